"""Runs of a recipe, some side by side: shows where each one stands, and stops them together.

    python recipes/runs.py --logs runs/tiny-gp-l --side-by-side 2 --title gp-l <LIST

Each line of the list is one run: its name, then its commands, with tabs between them. The commands
of a run follow each other. What they print goes to log_NAME in the folder of the logs. On a
terminal a line for each run shows its stage, its step and the time left. Elsewhere a line is
printed each minute.

Ctrl-C and SIGTERM are passed on to the commands, which save; so is the end of the terminal. This
script waits for them and exits with 130, 143 or 129. When a run fails, its error is printed, and
the others save and stop.
"""
import argparse
import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# A progress bar in a log, such as "sft:  45%|####     | 90/200 [01:10<01:20,  1.2it/s]".
BAR = re.compile(r"([a-z]+)[^:\r\n]*: +\d+%\|[^|]*\| (\d+)/(\d+) \[[^<\]]*<([0-9:]+|\?)")
ERROR = re.compile(r"\w+\.py: error: .*")
STAGES = {"own": "sampling, part", "sft": "training, step", "rl": "training, update",
          "checkpoints": "testing, checkpoints done:"}
SAME_SIGNAL = 1.0              # a Ctrl-C reaches us from the terminal and from the recipe
EVERY = 60                     # seconds between lines where nobody watches


class Run:
    """One line of the list: a name and commands that follow each other."""

    def __init__(self, line, folder):
        self.name, *self.commands = line.rstrip("\n").split("\t")
        self.log = folder / f"log_{self.name}"
        self.process = self.status = None

    def begin_next(self):
        """Start the next command. What an earlier attempt wrote stays in the log, unread."""
        command = self.commands.pop(0)
        with open(self.log, "a") as log:
            self.unread = log.tell()
            # In a session of its own the terminal's Ctrl-C reaches it through us alone, once.
            self.process = subprocess.Popen(["bash", "-c", f"exec {command}"], stdout=log,
                                            stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT,
                                            start_new_session=True)

    def go_on(self, stopping):
        """Begin the next command if one has ended; sets `status` at the end of the run."""
        status = self.process.poll()
        if status is None:
            return
        if status or stopping or not self.commands:
            self.status = status
        else:
            self.begin_next()

    def printed(self):
        """What the command has printed so far, in lines; of a bar each state is a line."""
        with open(self.log, "rb") as log:
            log.seek(max(self.unread, log.seek(0, 2) - 20_000))
            return re.split("[\r\n]+", log.read().decode(errors="replace").strip())

    def where(self):
        """Its stage, step and time left in words; of a recipe in a recipe its last line."""
        for line in reversed(self.printed()):
            if bar := BAR.search(line):
                stage, done, total, left = bar.groups()
                left = "" if left == "?" else f", {left} left"
                return f"{STAGES.get(stage, stage)} {done} of {total}{left}"
            if line.startswith("== "):
                return line.removeprefix("== ")
        return "loading"

    def fault(self):
        """The line in which a command says why it ended; without one, the last five lines."""
        lines = self.printed()
        errors = [found[0] for line in lines if (found := ERROR.search(line))]
        return errors[-1:] or [line for line in lines if line and not BAR.search(line)][-5:]


class Screen:
    """Where the runs stand: lines that are written again and again, or a line each minute."""

    def __init__(self, title):
        self.title, self.began = title, time.monotonic()
        self.live = sys.stdout.isatty()
        self.drawn, self.due = 0, EVERY

    def minutes(self):
        return int(time.monotonic() - self.began) // 60

    def clear(self):
        """Take the live lines away."""
        if self.drawn:
            self.write(f"\033[{self.drawn}A\033[J")
            self.drawn = 0

    def say(self, text, stopping=False):
        """Print a line. What a stop brings goes to a terminal behind stderr, too: in `| tee log` it
        has ended the tee."""
        self.clear()
        self.write("\r" * self.live + f"== {self.title}: {text}\n")     # ^C may stand there
        if stopping and not self.live and sys.stderr.isatty():
            sys.stderr.write(f"\r== {self.title}: {text}\n")

    def write(self, text):
        with contextlib.suppress(OSError):     # the terminal may be closed; the runs still save
            sys.stdout.write(text)
            sys.stdout.flush()

    def show(self, running, num_done, num_runs):
        if not self.live:
            if time.monotonic() - self.began >= self.due:
                self.due += EVERY
                stands = "; ".join(f"{run.name}: {run.where()}" for run in running)
                self.say(f"{self.minutes()} min; {stands}")
            return
        self.clear()
        lines = [f"   {self.title}: {num_done} of {num_runs} runs done, "
                 f"{self.minutes()} min so far"]
        width = max(len(run.name) for run in running)
        lines += [f"   {run.name:{width}}  {run.where()}" for run in running]
        columns = shutil.get_terminal_size().columns - 1
        self.write("".join(f"{line[:columns]}\n" for line in lines))
        self.drawn = len(lines)


class Stop:
    """Ctrl-C, SIGTERM and a closed terminal, of which the runs are told. A second one makes them
    leave at once."""

    def __init__(self):
        self.status = 0              # later what a shell expects of a process that was stopped so
        self.came, self.number = -SAME_SIGNAL, None
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:       # as for nohup
            signal.signal(signal.SIGHUP, self.handle)

    def handle(self, number, _):
        if time.monotonic() - self.came >= SAME_SIGNAL:
            self.came, self.number = time.monotonic(), number

    def pass_on(self, running, screen):
        """Send a signal that has come to all runs."""
        if self.number is None:
            return
        number, self.number = self.number, None
        send_all(running, number)
        if not self.status:
            self.status = 128 + number
            screen.say(f"stopping, {names_of(running)} saving first", stopping=True)


def send_all(running, number):
    # A closed terminal would end the commands at once; told to stop, they save.
    number = signal.SIGTERM if number == signal.SIGHUP else number
    for run in running:
        run.process.send_signal(number)


def names_of(running):
    return " and ".join(run.name for run in running) or "nothing"


def run_all(waiting, side_by_side, screen):
    """Run them all; returns the exit status."""
    num_runs, num_done, running = len(waiting), 0, []
    stop, ending = Stop(), 0             # `ending`: the exit status, once no other run begins
    while running or waiting and not ending:
        while waiting and len(running) < side_by_side and not ending:
            run = waiting.pop(0)
            run.begin_next()
            running.append(run)
            if not screen.live:
                screen.say(f"{run.name} begins")
        stop.pass_on(running, screen)
        ending = ending or stop.status
        for run in list(running):
            run.go_on(stopping=bool(ending))
            if run.status is None:
                continue
            running.remove(run)
            if run.status == 0 and not run.commands:
                num_done += 1
                screen.say(f"{run.name} is done ({num_done} of {num_runs})")
            elif run.status and not ending:
                ending = run.status
                screen.say("\n   ".join([f"{run.name} ended early:", *run.fault()]))
                if running:
                    screen.say(f"stopping, {names_of(running)} saving first")
                    send_all(running, signal.SIGTERM)
        if running:
            screen.show(running, num_done, num_runs)
            time.sleep(0.2)
    screen.clear()
    if stop.status:
        screen.say("stopped; the same command goes on", stopping=True)
    # Python drops its handlers before it ends. A late signal would then change the exit status.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return ending


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", type=Path, required=True, help="the folder of the logs")
    parser.add_argument("--side-by-side", type=int, default=2, help="runs at a time [2]")
    parser.add_argument("--title", required=True, help="begins each line that is printed")
    args = parser.parse_args()
    waiting = [Run(line, args.logs) for line in sys.stdin.read().split("\n") if line]
    screen = Screen(args.title)
    screen.say(f"{len(waiting)} runs, {args.side_by_side} at a time, each trained and then tested; "
               f"what they print is in {args.logs}/log_NAME")
    return run_all(waiting, args.side_by_side, screen)


if __name__ == "__main__":
    sys.exit(main())
