"""RFT, rejection-sampling fine-tuning: a model learns its own replies that were right.

    python recipes/rft.py --model data/base/gp-l --out runs/rft --split id fold=train
    python evaluate.py --run-folder runs/rft
    python evaluate.py --compare runs/sft runs/rl runs/rft

A round has two stages. The newest model plays episodes (data/own_successes.py); then it is trained
on the replies that were right (sft.py --data). The paper has no such arm. It stands between its
two: like PPO it learns from its own verified replies, and like SFT it only imitates.

    --first-tries      learn only what was right at once, so no reply after a verdict
    --sampler start    play with the start in all rounds: then the replies are verified, but no
                       longer the model's own

The run folder is one for evaluate.py: step_000003 is the model after round 3. In metrics.jsonl the
compute of sampling is counted as that of PPO's rollout. Ctrl-C or SIGTERM stops the run; the same
command goes on.
"""
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs
from support import command_line, demonstrator, digests, logs, settings
from support.command_line import flag

LOCK = ".training.lock"
MAY_DIFFER = ("out", "rounds", "save_every", "micro_batch_tokens")    # when a run goes on


@dataclass
class Config:
    """What is sampled and trained in each round."""
    model: str = flag("", "the start, a model folder")
    out: str = flag("", "run folder, new or stopped")
    task: str = flag("gp-l", "which environment", choices=tuple(envs.TASKS))
    split: tuple = flag(("id",), "the split to play, with settings")
    env: tuple = flag((), "settings of the environment")
    rounds: int = flag(8, "sample and train so often", low=1)
    save_every: int = flag(2, "keep the model of every second round, and of the last", low=1)
    episodes: int = flag(512, "played in each round", low=1)
    temperature: float = flag(0.7, "of the replies", low=0)
    max_new_tokens: int = flag(48, "of a reply", low=1)
    first_tries: bool = flag(False, "learn right first tries alone")
    sampler: str = flag("newest", "the model that plays", choices=("newest", "start"))
    steps: int = flag(15, "SFT steps of each round", low=1)
    batch_size: int = flag(128, "replies of a step", low=1)
    lr: float = flag(1e-4, "peak learning rate", low=1e-12)
    micro_batch_tokens: int = flag(16384, "as in sft.py", low=1)
    dtype: str = flag("auto", "as in sft.py", choices=("auto", "float32", "bfloat16"))
    seed: int = flag(0, "of deals, replies and order", low=0)


# ---- The run folder ------------------------------------------------------------------------------

def step_folder(out, number):
    return Path(out) / f"step_{number:06d}"


def newest_round(out):
    """The last round that is done; 0 if none is."""
    folders = Path(out).glob("step_" + 6 * "[0-9]")
    return max((int(folder.name.removeprefix("step_")) for folder in folders), default=0)


def write(path, text):
    """Write a file as a whole: a kill leaves the old one or the new one."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def write_config(config):
    write(Path(config.out) / "config.json", json.dumps(asdict(config), indent=1) + "\n")


def hold(out):
    """Lock the run folder until this process ends."""
    file = open(out / LOCK, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another process is training here") from None
    return file


def check(config):
    """An environment of the run; ValueError if the start or a setting is not allowed. Nothing is
    written before this."""
    command_line.check_folders(config)
    if config.sampler == "start" or not newest_round(config.out):
        command_line.check_model(config.model)
    settings.check_temperature(config.temperature)
    split, *more = settings.read_splits(config.split)
    if more:
        raise ValueError(f"--split {' '.join(config.split)}: one split only, not {more[0].name} "
                         "as well")
    given = settings.read_settings(config.env)
    demonstrator.check_own_replies({**given, **split.settings})
    return envs.make_env(config.task, split.name, given, **split.settings)


def check_inputs(config, env, done):
    """Write inputs.json, or ValueError if what the run began with is not what it was.

    After the first round the start counts only if it still plays. A run of an earlier version has
    no such file.
    """
    path = Path(config.out) / "inputs.json"
    files = digests.files_of([env])
    if not done and not path.exists():
        write(path, json.dumps({"files": files, **digests.of_start(config.model)}) + "\n")
    began = logs.read_object(path)
    plays = not done or config.sampler == "start"
    if plays and (changed := digests.changed_of_start(began, config.model)):
        raise ValueError(f"start {config.model}: has other {changed} than when {config.out} began: "
                         "put them back, or choose another --out")
    digests.check_files(config.out, began, files)


def open_folder(config):
    """Make the run folder, or cut its log back to the rounds that are done.

    Returns the config, with the type that "auto" stood for so far, and the folder's lock.
    """
    out = Path(config.out)
    config = replace(config, model=os.path.normpath(config.model))
    path, log = out / "config.json", out / "metrics.jsonl"
    if path.exists():
        theirs = json.loads(json.dumps(asdict(Config()))) | logs.read_object(path)
        if config.dtype == "auto":
            config = replace(config, dtype=theirs["dtype"])
        ours = json.loads(json.dumps(asdict(config)))
        told = newest_round(out) and logs.read_object(out / "inputs.json").get("files")
        differing = logs.differing(theirs, ours, MAY_DIFFER, digests.NAME_FILES if told else ())
        if "model" in differing and digests.is_start(out, config.model):
            differing.remove("model")      # it was moved
        if differing:
            raise ValueError(f"out folder {out} belongs to another config "
                             f"({', '.join(differing)} differ): choose another --out")
    elif out.exists() and any(each.name != LOCK for each in out.iterdir()):
        raise ValueError(f"out folder {out} holds something else: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    lock = hold(out)               # before anything is written
    done = newest_round(out)
    if config.rounds < done:
        raise ValueError(f"--rounds {config.rounds}: {out} has {done} rounds already")
    rows = logs.read_jsonl(log, "step")[:done]
    if [row["step"] for row in rows] != list(range(1, done + 1)):
        raise ValueError(f"{log} lacks a round of 1 to {done}: put it back from a copy")
    for path in out / "eval.jsonl", out / "dialogues.jsonl":
        tested = logs.read_jsonl(path, "step")
        if not done and any(row["step"] for row in tested):
            raise ValueError(f"{path} has tests, but their checkpoints are gone: choose another "
                             "--out")
        # Of rounds that are made again the tests are of no account.
        of_rounds = [row for row in tested if row["step"] <= done]
        if of_rounds != tested:
            write(path, "".join(json.dumps(row) + "\n" for row in of_rounds))
    write_config(config)
    if log.exists():
        write(log, "".join(json.dumps(row) + "\n" for row in rows))
    # A kill at the end of a round leaves the folder that its model was moved from.
    shutil.rmtree(out / f"round_{done}_sft", ignore_errors=True)
    return config, lock


# ---- The scripts of a round ----------------------------------------------------------------------

class Stop:
    """Ctrl-C, SIGTERM and a closed terminal. The script that runs is told, and no other begins."""

    def __init__(self):
        self.status = 0              # later what a shell expects of a process that was stopped so
        self.number = None           # a signal that the script has not been told of
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:   # as for nohup, or in the background
                signal.signal(number, self.handle)

    def handle(self, number, _):
        self.number = number
        self.status = self.status or 128 + number

    def pass_on(self, child):
        if self.number is None:
            return
        number, self.number = self.number, None
        # A closed terminal would end the script at once; told to stop, it saves.
        child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def leave_if_asked(self):
        if self.status:
            print("stopped; the same command goes on", flush=True)
            sys.exit(self.status)


def run(command, stop):
    """Run a script to its end. After a stop, or if the script fails, this script ends, too."""
    stop.leave_if_asked()
    script, *options = map(str, command)
    # In a session of its own the terminal's Ctrl-C reaches it through us alone, once.
    child = subprocess.Popen([sys.executable, ROOT / script, *options], start_new_session=True)
    while child.poll() is None:
        stop.pass_on(child)
        time.sleep(0.1)
    # A script that was told too late to stop has done its work, and exits with 0.
    stop.leave_if_asked()
    if child.returncode:
        sys.exit(child.returncode if child.returncode > 0 else 128 - child.returncode)


def last_row(path):
    """The last row of a log."""
    rows = logs.read_jsonl(path)
    if not rows:
        raise ValueError(f"{path}: holds no whole row: delete {path.parent} or put the log back")
    return rows[-1]


def options_of_both(config, number):
    """What both scripts of a round are told."""
    return ["--task", config.task, "--dtype", config.dtype, "--seed", 1000 * config.seed + number,
            *(["--env", *config.env] if config.env else [])]


def sample(config, number, model, stop):
    """Play the episodes of a round, if that is not done; returns (the samples' file, what was
    sampled)."""
    samples, log = [Path(config.out) / f"round_{number}{end}" for end in (".json", ".log")]
    # The log is written last, so without it the samples are not whole.
    if not logs.read_jsonl(log):
        log.unlink(missing_ok=True)
        samples.unlink(missing_ok=True)
        shutil.rmtree(samples.with_suffix(""), ignore_errors=True)
        run(["data/own_successes.py", "--model",
             config.model if config.sampler == "start" else model, "--out", samples, "--log", log,
             "--split", *config.split, *options_of_both(config, number),
             "--episodes", config.episodes, "--temperature", config.temperature,
             "--max-new-tokens", config.max_new_tokens,
             *(["--first-tries"] if config.first_tries else [])], stop)
    return samples, last_row(log)


def train(config, number, model, samples, stop):
    """Train on the samples of a round, if that is not done; returns (the folder, its last row)."""
    trained = Path(config.out) / f"round_{number}_sft"
    if not step_folder(trained, config.steps).is_dir():
        run(["sft.py", "--model", model, "--out", trained, "--data", samples,
             *options_of_both(config, number), "--steps", config.steps,
             "--save-every", config.steps, "--batch-size", config.batch_size, "--lr", config.lr,
             "--micro-batch-tokens", config.micro_batch_tokens], stop)
    return trained, last_row(trained / "metrics.jsonl")


def play_round(config, number, stop):
    """Sample, train, and move the new model into the run folder; returns the config, with the type
    that "auto" stood for."""
    out, log = Path(config.out), Path(config.out) / "metrics.jsonl"
    model = step_folder(out, number - 1) if number > 1 else config.model
    samples, own = sample(config, number, model, stop)
    # A run keeps its type, as one of sft.py does. A log of an earlier version does not name it.
    dtype = own.pop("dtype", config.dtype)
    if config.dtype == "auto" and dtype != "auto":
        config = replace(config, dtype=dtype)
        write_config(config)
    trained, sft = train(config, number, model, samples, stop)

    row = {"step": number, **own, "tokens_trained": sft["tokens_trained"], "loss": sft["loss"],
           "gflops": own["gflops"] + sft["gflops"], "seconds": own["seconds"] + sft["seconds"]}
    # Tokens, compute and seconds are counted from the start of the run.
    if number > 1:
        before = last_row(log)
        for name in ("tokens_rollout", "tokens_trained", "gflops", "seconds"):
            row[name] += before[name]
    row["gflops_paper"] = row["gflops"]
    with open(log, "a") as file:
        file.write(json.dumps(row) + "\n")
    shutil.rmtree(step_folder(trained, config.steps) / "resume", ignore_errors=True)
    step_folder(trained, config.steps).rename(step_folder(out, number))
    shutil.rmtree(trained)
    if (number - 1) % config.save_every:
        shutil.rmtree(step_folder(out, number - 1), ignore_errors=True)
    print(f"round {number}: {own['kept']} of {own['turns']} replies were right and are kept; "
          f"trained on {config.steps * config.batch_size} samples of them", flush=True)
    return config


def main(config):
    stop = Stop()
    try:
        env = check(config)
        config, lock = open_folder(config)  # noqa: F841    it is lost with this name
        check_inputs(config, env, newest_round(config.out))
        for number in range(newest_round(config.out) + 1, config.rounds + 1):
            print(f"round {number} of {config.rounds}", flush=True)
            config = play_round(config, number, stop)
            stop.leave_if_asked()
    except (ValueError, OSError) as error:
        command_line.fail(error)
    print(f"{config.out}: {config.rounds} rounds are done")


if __name__ == "__main__":
    main(command_line.parse_config(Config))
