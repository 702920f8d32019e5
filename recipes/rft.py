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
import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ".training.lock"
MAY_DIFFER = ("out", "rounds", "save_every", "micro_batch_tokens")    # when a run goes on


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the start, a model folder")
    parser.add_argument("--out", type=Path, required=True, help="run folder, new or stopped")
    parser.add_argument("--task", default="gp-l", help="which environment [gp-l]")
    parser.add_argument("--split", nargs="+", default=["id"],
                        help="the split to play, with settings [id]")
    parser.add_argument("--env", nargs="+", default=[], help="settings of the environment")
    parser.add_argument("--rounds", type=int, default=8, help="sample and train so often [8]")
    parser.add_argument("--save-every", type=int, default=2,
                        help="keep the model of every second round, and of the last [2]")
    parser.add_argument("--episodes", type=int, default=512, help="played in each round [512]")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the replies [0.7]")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="of a reply [48]")
    parser.add_argument("--first-tries", action="store_true", help="learn right first tries alone")
    parser.add_argument("--sampler", choices=["newest", "start"], default="newest",
                        help="the model that plays [newest]")
    parser.add_argument("--steps", type=int, default=15, help="SFT steps of each round [15]")
    parser.add_argument("--batch-size", type=int, default=128, help="replies of a step [128]")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate [1e-4]")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384, help="as in sft.py")
    parser.add_argument("--dtype", default="auto", help="as in sft.py [auto]")
    parser.add_argument("--seed", type=int, default=0, help="of deals, replies and order [0]")
    return parser.parse_args()


def step_folder(out, number):
    return out / f"step_{number:06d}"


def newest_round(out):
    """The last round that is done; 0 if none is."""
    return max((int(path.name.removeprefix("step_")) for path in out.glob("step_??????")),
               default=0)


def write(path, text):
    """Write a file as a whole: a kill leaves the old one or the new one."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def hold(out):
    """Lock the run folder until this process ends."""
    file = open(out / LOCK, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"rft.py: error: {out}: another process is training here")
    return file


def open_folder(args):
    """Make the run folder, or cut its log back to the rounds that are done; returns its lock."""
    config = {**vars(args), "out": str(args.out), "model": os.path.normpath(args.model)}
    path, log = args.out / "config.json", args.out / "metrics.jsonl"
    if path.exists():
        theirs = json.loads(path.read_text())
        differing = [name for name in {**theirs, **config} if name not in MAY_DIFFER
                     and theirs.get(name) != config.get(name)]
        if differing:
            sys.exit(f"rft.py: error: out folder {args.out} belongs to another config "
                     f"({', '.join(differing)} differ): choose another --out")
    elif args.out.exists() and any(each.name != LOCK for each in args.out.iterdir()):
        sys.exit(f"rft.py: error: out folder {args.out} holds something else: choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    lock = hold(args.out)          # before anything is written
    done = newest_round(args.out)
    if args.rounds < done:
        sys.exit(f"rft.py: error: --rounds {args.rounds}: {args.out} has {done} rounds already")
    write(path, json.dumps(config, indent=1) + "\n")
    if done or log.exists():
        rows = log.read_text().splitlines()[:done] if log.exists() else []
        if [json.loads(row)["step"] for row in rows] != list(range(1, done + 1)):
            sys.exit(f"rft.py: error: {log} lacks a round of 1 to {done}: put it back from a copy")
        write(log, "".join(f"{row}\n" for row in rows))
    return lock


def run(command):
    """Run a script and pass a stop on to it; this script then ends with its exit status."""
    # In a session of its own the terminal's Ctrl-C reaches it through us alone, once.
    script, *options = map(str, command)
    child = subprocess.Popen([sys.executable, ROOT / script, *options], start_new_session=True)
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A closed terminal would end the script at once; told to stop, it saves.
        signal.signal(stop, lambda number, _: child.send_signal(
            signal.SIGTERM if number == signal.SIGHUP else number))
    status = child.wait()
    if status:
        sys.exit(status if status > 0 else 128 - status)


def last_row(path):
    return json.loads(path.read_text().splitlines()[-1])


def play_round(args, number, model):
    """Sample, train, and move the new model into the run folder. Returns the round's row."""
    samples, sampled = args.out / f"round_{number}.json", args.out / f"round_{number}.log"
    trained = args.out / f"round_{number}_sft"
    seed = 1000 * args.seed + number
    common = ["--task", args.task, "--dtype", args.dtype, "--seed", seed,
              *(["--env", *args.env] if args.env else [])]

    # The log is written last, so without it the samples are not whole.
    if not sampled.exists():
        samples.unlink(missing_ok=True)
        shutil.rmtree(samples.with_suffix(""), ignore_errors=True)
        run(["data/own_successes.py", "--model", args.model if args.sampler == "start" else model,
             "--out", samples, "--log", sampled, "--split", *args.split, *common,
             "--episodes", args.episodes, "--temperature", args.temperature,
             "--max-new-tokens", args.max_new_tokens,
             *(["--first-tries"] if args.first_tries else [])])

    if not step_folder(trained, args.steps).is_dir():
        run(["sft.py", "--model", model, "--out", trained, "--data", samples, *common,
             "--steps", args.steps, "--save-every", args.steps, "--batch-size", args.batch_size,
             "--lr", args.lr, "--micro-batch-tokens", args.micro_batch_tokens])

    own, sft = last_row(sampled), last_row(trained / "metrics.jsonl")
    row = {"step": number, **own, "tokens_trained": sft["tokens_trained"], "loss": sft["loss"],
           "gflops": own["gflops"] + sft["gflops"], "seconds": own["seconds"] + sft["seconds"]}
    return row, trained


def main():
    args = parse()
    lock = open_folder(args)  # noqa: F841    it is lost with this name
    log = args.out / "metrics.jsonl"
    for number in range(newest_round(args.out) + 1, args.rounds + 1):
        print(f"round {number} of {args.rounds}", flush=True)
        model = step_folder(args.out, number - 1) if number > 1 else args.model
        row, trained = play_round(args, number, model)
        # Tokens, compute and seconds are counted from the start of the run.
        if number > 1:
            before = last_row(log)
            for name in ("tokens_rollout", "tokens_trained", "gflops", "seconds"):
                row[name] += before[name]
        row["gflops_paper"] = row["gflops"]
        with open(log, "a") as file:
            file.write(json.dumps(row) + "\n")
        shutil.rmtree(step_folder(trained, args.steps) / "resume", ignore_errors=True)
        step_folder(trained, args.steps).rename(step_folder(args.out, number))
        shutil.rmtree(trained)
        if (number - 1) % args.save_every:
            shutil.rmtree(step_folder(args.out, number - 1), ignore_errors=True)
        print(f"round {number}: {row['kept']} of {row['turns']} replies were learnt", flush=True)
    print(f"{args.out}: {args.rounds} rounds are done")


if __name__ == "__main__":
    main()
