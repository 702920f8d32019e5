"""Starts the scripts as a user does, and hurts them: kills, full disks, folders that refuse.

    python tests/torture.py kills disk folders --kills 50 --jobs 2 --out torture.md

    kills      sft.py, rl.py, evaluate.py --run-folder, sft.py --dump and data/synthetic_city.py are
               killed (SIGKILL) at seeded random moments, most of them after their first write. Each
               is killed several times in a row, and started again
    disk       a file may not grow (RLIMIT_FSIZE), or the disk is full (a small tmpfs, which needs
               root). Later there is room
    folders    read-only folders; a stdout that nobody reads or that is closed; a path with a blank,
               an umlaut, quotes and a newline in every argument that takes a path

Models are tiny, and every trial has a folder for itself. What must hold:

    in the end a command makes what an undisturbed one makes, byte for byte but for the seconds;
    nothing that was saved is lost;
    a script that cannot go on says so in one line and ends with status 2.

The table tells a failure by what was broken, how often, and the first line that shows it. Ours is
in results/robustness.md.
"""
import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "PYTHONDONTWRITEBYTECODE": "1"}
PATIENCE = 120                                 # seconds after which a script counts as hanging
ODD = "a blank ü 'single' \"double\"\nand a second line"
BAR = re.compile(r"[^\r\n]*?\d+%\|[^\r\n]*?\]")                    # of tqdm
SECONDS = re.compile(rb'"seconds\w*": [-\d.e+]+')
# How a script ended. `lines` are those of stderr without progress bars; `place` says where a
# traceback comes from.
Done = namedtuple("Done", "status out lines place")


@dataclass
class Case:
    """A script in a tiny run: its words, and what an undisturbed run of them made."""
    name: str
    words: list
    files: tuple             # (what may not grow, has the run begun before) pairs
    final: str = ""          # of a script that does not go on: the name of what it makes
    start: Path = None       # a folder whose content stands there before
    folder: Path = None      # where the undisturbed run was
    whole: dict = None       # file -> digest, of all that it made
    begin: float = 0.0       # seconds until its first write
    work: float = 0.0        # seconds from there to its end


def start(words, folder, before=None, **env):
    """Start a script in a new session; `before` runs in the new process."""
    return subprocess.Popen([sys.executable, str(ROOT / words[0]), *map(str, words[1:])],
                            cwd=folder, env={**ENVIRONMENT, **env}, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            errors="replace", start_new_session=True, preexec_fn=before)


def finish(process):
    """Wait for a script; its status is "hangs" if it takes too long."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        (out, err), status = process.communicate(), "hangs"
    lines = [line.strip() for line in re.split(r"[\r\n]+", BAR.sub("", err)) if line.strip()]
    places = re.findall(rf'File "{ROOT}/(\S+)", line (\d+), in (\w+)',
                        err) or [("?", "?", "one of its processes")]
    trace = "Traceback" in err or "Exception ignored" in err
    return Done(status, out or "", lines or ["nothing on stderr"],
                trace and "{}:{} {}".format(*places[-1]))


def run(words, folder, before=None):
    return finish(start(words, folder, before))


def broken(done, status):
    """What is wrong with how a script ended, as (kind, text) pairs."""
    if done.place:
        return [(f"traceback from {done.place}, status {done.status}", done.lines[-1])]
    return [(f"status {done.status} instead of {status}", done.lines[-1])] * (done.status != status)


def tree(folder):
    """{file: digest} of all below a folder, without lock files and the seconds in logs."""
    return {str(path.relative_to(folder)):
            hashlib.sha256(SECONDS.sub(b"", path.read_bytes())).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"}


def newest_step(folder):
    return max((int(p.name[5:]) for p in folder.glob("run/step_*") if p.name[5:].isdecimal()),
               default=0)


def read_rows(path):
    """The finished lines of a log."""
    return ([line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]
            if path.is_file() else [])


def progress(folder):
    return newest_step(folder) + len(read_rows(folder / "run/eval.jsonl"))


def saved(folder):
    """What may never be lost again: the weights of complete checkpoints, and evaluated rows."""
    rows = enumerate(read_rows(folder / "run/eval.jsonl"))
    return ({(name, digest) for name, digest in tree(folder).items()
             if re.fullmatch(r"run/step_\d+/[^/]+", name)}
            | {(f"eval.jsonl, row {i}", str(row)) for i, row in rows})


def lost(seen, folder):
    return [("lost", name) for name, _ in sorted(seen - saved(folder))[:1]]


def differences(case, folder, out=""):
    """How a folder differs from that of the undisturbed run, as (kind, text) pairs.

    A half-written checkpoint may stay if the output `out` says so.
    """
    found = tree(folder)
    other = [name for name in case.whole if found.get(name) != case.whole[name]]
    more = [name for name in found.keys() - case.whole.keys()
            if not any(part.endswith(".tmp") and f"{part} was never finished" in out
                       for part in Path(name).parts)]
    return ([("differs from an undisturbed run", ", ".join(other[:3]))] * bool(other)
            + [("left over", name) for name in sorted(more)[:1]])


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_named(case, folder, done):
    """Remove what a script asks to have removed, and return the names.

    Only a script that does not go on where it was stopped may ask for that.
    """
    named = [path for path in folder.iterdir()
             if case.final and done.status == 2 and path.name in done.lines[-1]]
    for path in named:
        remove(path)
    return ", ".join(sorted(path.name for path in named))


def prepare(case, folder, begun=False):
    """Put into a folder what stands there before a script.

    That is what a first start finds or, with `begun`, what a run left that was stopped late.
    """
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        remove(path)
    begun = begun and not case.final
    if source := case.folder if begun else case.start:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    if begun and not case.start:
        remove(folder / f"run/step_{newest_step(folder):06d}")
    for path in folder.glob("run/*.jsonl") if begun else ():
        rows = read_rows(path)
        rows = (rows[:len(rows) // 2] if path.name == "eval.jsonl"
                else [row for row in rows if json.loads(row)["step"] <= newest_step(folder)])
        path.write_bytes(b"".join(rows))


def make_cases(kit):
    """The cases, each run undisturbed, as (case, what went wrong) pairs.

    Makes the tiny models and a run to evaluate first.
    """
    sft = ["sft.py", "--model", kit / "model", "--out", "run", "--batch-size", 8, "--lr", 1e-3,
           "--dtype", "float32"]
    (kit / "trained").mkdir()
    for words in (["support/tiny.py", "--task", "gp-l", "--size", "32x2", "--out", kit / "model/"],
                  [*sft, "--steps", 30, "--save-every", 10]):
        if (done := run(words, kit / "trained")).status:
            sys.exit(f"torture.py: error: {words[0]}: {done.lines[-1]}")
    weights, optimizer, log = ("run/step_*/model.safetensors", "run/step_*/resume/optimizer*",
                               "run/metrics.jsonl")
    for case in (
            Case("sft.py", [*sft, "--steps", 120, "--save-every", 5],
                 ((weights, True), (optimizer, True), (weights, False), (log, True),
                  ("run/config.json", False))),
            Case("rl.py",
                 ["rl.py", "--model", kit / "model", "--out", "run", "--num-envs", 4,
                  "--turns-per-env", 3, "--minibatch-turns", 6, "--epochs", 2, "--updates", 16,
                  "--max-new-tokens", 10, "--lr", 1e-4, "--temperature", 1, "--env",
                  "verify_iter=4", "--dtype", "float32", "--save-every", 2],
                 (("run/step_*/value_head.safetensors", True), ("run/turns.jsonl", True))),
            Case("evaluate.py --run-folder",
                 ["evaluate.py", "--run-folder", "run", "--episodes", 24,
                  "--max-new-tokens", 16, "--temperature", 1],
                 (("run/eval.jsonl", True), ("run/eval_unfinished", False)), start=kit / "trained"),
            Case("sft.py --dump",
                 ["sft.py", "--task", "gp-vl", "--env", "resolution=96", "--dump", "data.json",
                  "--num", 600],
                 (("data/*.png", False), ("data.json", False)), final="data.json"),
            Case("data/synthetic_city.py",
                 ["data/synthetic_city.py", "--out", "city", "--routes", 2, "--unseen", 1,
                  "--most-legs", 2, "--size", 256, "--workers", 2],
                 (("city/*/street_views/*.jpg", False), ("city/*/route_infos.json", False)),
                 final="city")):
        folders = [Path(tempfile.mkdtemp(dir=kit)) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:                        # side by side, as trials run
            ends = list(pool.map(partial(measure, case), folders))
        case.folder, case.whole = folders[0], tree(folders[0])
        case.begin, case.work = (sum(times) / 2 for times in list(zip(*ends))[:2])
        faults = ([fault for *_, done in ends for fault in broken(done, 0)]
                  + differences(case, folders[1]))
        yield case, faults + [("made nothing", case.name)] * (not case.whole)


def stamp(folder):
    """Changes when a script first writes."""
    return [path.stat().st_mtime_ns for path in (folder, folder / "run") if path.exists()]


def start_watched(case, folder, written=True):
    """(a process at its first write, the stamp from before it); at its end, if it ends before."""
    before, process = stamp(folder), start(case.words, folder)
    while written and process.poll() is None and stamp(folder) == before:
        time.sleep(0.002)
    return process, before


def measure(case, folder):
    """Seconds until its first write, seconds from there to its end, how it ended."""
    prepare(case, folder)
    began = time.time()
    process, _ = start_watched(case, folder)
    wrote, done = time.time(), finish(process)
    return wrote - began, time.time() - wrote, done


def kill_at(case, folder, written, share):
    """Start a script and kill it at a share of the time that it needs.

    With `written` that is the time of the work left after its first write, else the time before it.
    Returns (the process, where the kill landed, whether processes of the script lived on).
    """
    first = progress(case.start) if case.start else 0
    left = 1 - (progress(folder) - first) / max(1, progress(case.folder) - first)
    process, before = start_watched(case, folder, written)
    try:
        process.wait(share * (case.work * left if written else case.begin))
        return process, "after its end", False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    landed = "while it wrote" if stamp(folder) != before else "before its first write"
    # The error is what we expect: no process of its session is left.
    with contextlib.suppress(ProcessLookupError):
        for _ in range(60):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        return process, landed, True
    return process, landed, False


def kill_trial(folder, case, kills, rng):
    """Kill a script again and again in one folder, then let it end."""
    faults, notes, seen, number = [], Counter(), set(), 0
    prepare(case, folder)
    while number <= kills:
        process, where, live_on = (kill_at(case, folder, rng.random() > 0.15, rng.random())
                                   if number < kills
                                   else (start(case.words, folder), "", False))
        done = finish(process)
        if where and done.status == 0:                             # it was faster than the signal
            where = "after its end"
        if not (folder / case.final).is_file() and (names := remove_named(case, folder, done)):
            notes[f"asked to remove {names}"] += 1
            continue
        number += 1
        notes.update([where] * bool(where))
        ended = where in ("", "after its end")
        faults += [("processes live on", "3 s after the kill")] * live_on
        faults += broken(done, 0 if ended else -9) + lost(seen, folder)
        seen |= saved(folder)
        if ended:
            faults += differences(case, folder, done.out)
        elif case.final and (folder / case.final).exists():
            faults += [("half under its final name", text)
                       for kind, text in differences(case, folder)
                       if kind != "left over"]
            ended = True
        if ended and number <= kills:              # the kills that are left begin anew
            prepare(case, folder)
            seen = set()
    return faults, notes


def kills(cases, options):
    for case in cases:
        left, trials, plan = options.kills, [], random.Random(f"{options.seed}/{case.name}")
        while left:
            trials.append((case, min(left, plan.randint(2, 5)), random.Random(plan.random())))
            left -= trials[-1][1]
        must = "nothing under its final name or all of it" if case.final else "what was saved stays"
        yield (case.name, f"{options.kills} SIGKILLs, then the same command",
               f"{must}; the end equal to an undisturbed run; nothing left over, no traceback",
               kill_trial, trials)


def limit_trial(folder, case, pattern, begun):
    """A file may not grow: beyond its size as the run goes on, or else to its whole size."""
    prepare(case, folder, begun)
    path = max(case.folder.glob(pattern), key=lambda p: (p.stat().st_size, p), default=None)
    here = path and folder / path.relative_to(case.folder)
    limit = (here.stat().st_size + 100 if path and here.exists()
             else path.stat().st_size - 1 if path else 100)
    named = next((name for name in ("city", "step_", "data", "run/eval") if name in pattern),
                 path.name if path else Path(pattern).name)
    if named == "run/eval":            # the file of dialogues is larger, and meets the limit first
        named = "run/(eval|dialogues)"

    def before():
        # With the signal ignored the write is an error, and not the end of the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return refuse(case, folder, named, before=before)


def mount_trial(folder, case, begun, free):
    """The disk has `free` bytes left; with None it is read-only."""
    def mount(*options):
        return subprocess.run(["mount", *options, "torture", str(folder)],
                              capture_output=True).returncode == 0

    if not mount("-t", "tmpfs"):
        return [], Counter(["skipped: this user may not mount"])
    try:
        prepare(case, folder, begun)
        disk = os.statvfs(folder)
        # At least a block: 0 would be no limit.
        size = max(4096, (disk.f_blocks - disk.f_bfree) * disk.f_frsize + (free or 0))
        assert mount("-o", "remount,ro" if free is None else f"remount,size={size}")
        named = Path(case.final).stem if case.final else r"\brun\b"
        return refuse(case, folder, named, free is not None,
                      partial(mount, "-o", "remount,rw,size=1g"))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def refuse(case, folder, named, may_fit=False, mend=lambda: None, before=None):
    """Start a script that cannot write, then again when it can; its one line must name `named`."""
    seen, notes, done = saved(folder), Counter(), run(case.words, folder, before=before)
    if may_fit and done.status == 0:
        faults, notes["had room enough"] = broken(done, 0), 1
    elif not (faults := broken(done, 2)):
        faults += ([(f"{len(done.lines)} lines instead of one", " / ".join(done.lines[:3]))]
                   if len(done.lines) > 1 else [])
        faults += ([] if re.search(named, " ".join(done.lines))
                   else [(f"does not name {named}", done.lines[-1])])
    faults += lost(seen, folder)
    mend()
    if tree(folder) != case.whole:
        done = run(case.words, folder)
        if names := remove_named(case, folder, done):
            notes[f"asked to remove {names}"], done = 1, run(case.words, folder)
        faults += [(f"afterwards {kind}", text)
                   for kind, text in broken(done, 0) + differences(case, folder, done.out)]
    return faults, notes


REFUSED = ("status 2 and one line that names the file; what was saved stays; later the same "
           "command ends as undisturbed")


def disk(cases, options):
    for case in cases:
        for pattern, begun in case.files:
            yield (case.name, f"{pattern} cannot grow{', the run half-way' * begun}", REFUSED,
                   limit_trial, [(case, pattern, begun)])
        last = case.folder / f"run/step_{newest_step(case.folder):06d}"
        written = ([case.folder / "run/eval.jsonl"] if case.start
                   else (case.folder if case.final else last).rglob("*"))
        total = sum(-(-path.stat().st_size // 4096) * 4096 for path in written)
        yield (case.name, "a full tmpfs, each time with more room", REFUSED, mount_trial,
               [(case, True, int(total * share))
                for share in (0, 0.02, 0.1, 0.2, 0.33, 0.5, 0.8, 0.97)])
        yield (case.name, "a full tmpfs from the start", REFUSED, mount_trial,
               [(case, False, 0), (case, False, 8192)])


def stdout_trial(folder, case, how):
    """A script whose stdout goes away; it may end early if the same command goes on."""
    prepare(case, folder)
    if how == "closed, unknown device":
        return (broken(run([*case.words, "--device", "none"], folder,
                           before=partial(os.close, 1)), 2), Counter())
    if how == "closed":
        done = run(case.words, folder, before=partial(os.close, 1))
    else:
        process = start(case.words, folder, PYTHONUNBUFFERED="1")
        for _ in range(how == "| head -1"):
            process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        done = finish(process)
    faults, found = broken(done, 0 if how == "closed" else done.status), differences(case, folder)
    if found and done.status:
        again = run(case.words, folder)
        found = broken(again, 0) + differences(case, folder, again.out)
    return (faults + [(f"afterwards {kind}", text) for kind, text in found],
            Counter([f"status {done.status}"]))


def chains(name):
    """The commands of two experiments below a folder: in words, and with pictures from a file."""
    small, more = ["--size", "32x2"], ["--lr", 1e-3, "--dtype", "float32", "--save-every", 2]
    words, eyes = (["--task", "virl-l", "--env", f"root={name}/city"],
                   ["--task", "gp-vl", "--env", "resolution=48"])
    test = ["--episodes", 4, "--max-new-tokens", 8]
    return {"city, model, sft, rl, evaluate, compare and figure": [
        ["data/synthetic_city.py", "--out", f"{name}/city", "--routes", 8, "--unseen", 2,
         "--no-pictures"],
        ["support/tiny.py", "--out", f"{name}/model", *words, *small],
        ["sft.py", "--model", f"{name}/model", "--out", f"{name}/sft", *words, "--steps", 4,
         "--batch-size", 8, *more],
        ["rl.py", "--model", f"{name}/model", "--out", f"{name}/rl", *words, "--num-envs", 4,
         "--turns-per-env", 3, "--minibatch-turns", 6, "--updates", 2, "--max-new-tokens", 8,
         *more],
        ["evaluate.py", "--run-folder", f"{name}/sft", *test],
        ["evaluate.py", "--run-folder", f"{name}/rl", *test],
        ["evaluate.py", "--compare", f"{name}/sft,{name}/rl", "--figure", f"{name}/figure.png"]],
        "dump, model and sft from its data": [
        ["sft.py", "--dump", f"{name}/data.json", "--num", 8, *eyes],
        ["support/tiny.py", "--out", f"{name}/vision", *eyes, *small],
        ["sft.py", "--data", f"{name}/data.json", "--model", f"{name}/vision", "--out",
         f"{name}/seen", *eyes, "--steps", 2, "--batch-size", 4, *more]]}


def chain_trial(folder, which):
    """A chain of commands below an odd path and below a plain one.

    All must end well, and both must make and print the same.
    """
    made = {}
    for name in ("plain", ODD):
        (folder / name).mkdir()
        printed = ""
        for words in chains(name)[which]:
            done = run(words, folder)
            printed += done.out
            if faults := broken(done, 0):
                return ([(f"{words[0]} {words[1]} below {name}, {kind}", text)
                         for kind, text in faults], Counter())
        for path in (folder / name).rglob("*.json*"):              # paths that files hold
            path.write_text(path.read_text().replace(json.dumps(name)[1:-1], "plain"))
        made[name] = tree(folder / name) | {
            "stdout": re.sub(r"[\d.]+ seconds", "", printed).replace(name, "plain")}
    return [("differs from the plain path", name)
            for name in sorted(made["plain"].keys() | made[ODD].keys())
            if made["plain"].get(name) != made[ODD].get(name)], Counter()


def folders(cases, options):
    for case in cases:
        yield (case.name, "a read-only disk, new and half-way", REFUSED, mount_trial,
               [(case, begun, None) for begun in (False, True)])
    for how in ("| head -1", "| true", "closed"):
        for case in cases:
            again = "" if how == "closed" else ", at once or by the same command again"
            yield (case.name, f"stdout {how}", f"no traceback; the end as undisturbed{again}",
                   stdout_trial, [(case, how)])
    for case in cases[:3]:
        how = "closed, unknown device"
        yield case.name, f"stdout {how}", "status 2 and one line", stdout_trial, [(case, how)]
    for which in chains(ODD):
        yield ("all", f"{which} below {ODD}", "files and output equal to those below a plain path",
               chain_trial, [(which,)])


SECTIONS = {"kills": kills, "disk": disk, "folders": folders}


def table_row(script, how, must, faults, notes, times):
    """A row: of each kind of fault how often and the first line, then what else happened."""
    kinds, first = Counter(kind for kind, _ in faults), dict(reversed(faults))
    found = [f"{count}x {kind}: `{first[kind][:300]}`" for kind, count in kinds.items()] or ["none"]
    found += ([f"({', '.join(f'{count}x {note}' for note, count in sorted(notes.items()))})"]
              * bool(notes))
    cells = [script, how, str(times), must, "<br>".join(found)]
    cells = [text.replace("|", "\\|").replace("\n", "\\n") for text in cells]
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--kills", type=int, default=50, help="of each script [50]")
    parser.add_argument("--seed", type=int, default=0,
                        help="fixes when kills come, up to the machine's own timing [0]")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side [2]")
    parser.add_argument("--out", help="write the table to this file as well")
    options, began, failed, lines = parser.parse_args(), time.time(), 0, []

    def say(line):
        print(line, flush=True)
        lines.append(line)

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    say(f"# The scripts, hurt\n\n`python tests/torture.py {' '.join(sys.argv[1:])}`, "
        f"{time.strftime('%Y-%m-%d')}, on {cpu[1] if cpu else 'an unknown CPU'}, {os.cpu_count()} "
        f"cores, torch {importlib.metadata.version('torch')}.\n")
    with (tempfile.TemporaryDirectory(prefix="torture_") as place,
          ThreadPoolExecutor(options.jobs) as pool):
        def attempt(trial, arguments):
            folder = Path(tempfile.mkdtemp(dir=place))
            try:
                return trial(folder, *arguments)
            finally:
                shutil.rmtree(folder)

        (Path(place) / "kit").mkdir()
        measured = list(make_cases(Path(place) / "kit"))
        cases = [case for case, _ in measured]
        times = [f"{case.name} {case.begin:.1f} s to its first write and {case.work:.1f} s from "
                 f"there" for case in cases]
        say(f"Undisturbed: {'; '.join(times)}.\n")
        say("| script | how it was hurt | times | what must hold | failures |\n"
            "|---|---|---|---|---|")
        for case, faults in measured:
            say(table_row(case.name, "not at all", "status 0; two runs equal", faults, {}, 2))
            failed += bool(faults)
        rows = [(words, [pool.submit(attempt, trial, own) for own in arguments])
                for section in options.sections
                for *words, trial, arguments in SECTIONS[section](cases, options)]
        try:
            for words, trials in rows:
                faults = [fault for trial in trials for fault in trial.result()[0]]
                say(table_row(*words, faults,
                              sum((trial.result()[1] for trial in trials), Counter()), len(trials)))
                failed += bool(faults)
        finally:
            # After Ctrl-C only what runs comes to its end.
            pool.shutdown(cancel_futures=True)
    say(f"\n{failed} rows with failures; {time.time() - began:.0f} seconds in all.")
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
