"""What a rollout spends on replies that have ended: one rollout, then counting.

    python tests/idle.py --task gp-l
    python tests/idle.py --task virl-l --env root=CITY

`Policy.sample` appends one token to all rows of a group, also to rows whose reply has ended. It
drops these in bulk: once more than a tenth has ended, or more than half with CUDA graphs. A
row-step is one token appended to one row. The lengths of the replies decide how many there are, so
both rules are counted from one rollout. The settings are those of recipes/tiny.sh, in float32.

    idle       the share of row-steps that go to ended rows
    waiting    the share of places that stand empty or idle until the longest reply of a group ends.
               Continuous batching would fill them: a new row begins where a reply has ended
"""
import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rl
from model import Policy
from support.running import OneLineParser, one_line_errors

# Ended rows are dropped when less than this share goes on: without CUDA graphs, and with them.
DROPPED_BELOW = {"a tenth ended": 0.9, "half ended, CUDA graphs": 0.5}
SETTINGS = {"gp-l": dict(split=("id", "fold=train"), turns_per_env=5, max_new_tokens=40,
                         temperature=0.2),
            "virl-l": dict(split=("id",), turns_per_env=4, max_new_tokens=48, temperature=1.0)}


def useful_steps(lengths):
    """Row-steps that a reply needs: its first token comes from the prompt, the last is not read."""
    return sum(length - 1 for length in lengths)


def row_steps(lengths, dropped_below):
    """Row-steps that `Policy.sample` makes for a group with replies of these lengths."""
    rows, steps = list(lengths), 0
    for drawn in range(1, max(lengths)):       # tokens drawn before this step
        going = [length for length in rows if length > drawn]
        if len(going) < dropped_below * len(rows):
            rows = going
        steps += len(rows)
    return steps


def idle_share(groups, dropped_below):
    steps = sum(row_steps(lengths, dropped_below) for lengths in groups)
    return 1 - sum(map(useful_steps, groups)) / steps


def waiting_share(groups):
    places = sum(len(lengths) * (max(lengths) - 1) for lengths in groups)
    return 1 - sum(map(useful_steps, groups)) / places


def play(args):
    """The lengths of the replies of each group of one rollout."""
    groups, sample = [], Policy.sample

    def noting(*arguments):
        replies = sample(*arguments)
        groups.append([len(response_ids) for response_ids, _ in replies])
        return replies

    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS[args.task]
        config = rl.Config(task=args.task, model=args.model or f"data/base/{args.task}", out=folder,
                           env=tuple(args.env), num_envs=args.envs, seed=args.seed,
                           device="cpu", dtype="float32",
                           minibatch_turns=args.envs * settings["turns_per_env"], **settings)
        run, conversations = rl.set_up(config)
        with mock.patch.object(Policy, "sample", noting):
            rl.collect_turns(run.policy, run.processor, conversations, 0, run.config,
                             SimpleNamespace(requested=False))
    return groups


def main(argv=None):
    parser = OneLineParser(description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="gp-l", choices=SETTINGS, help="[gp-l]")
    parser.add_argument("--model", help="a model folder [the start in data/base/]")
    parser.add_argument("--env", nargs="*", default=[], help="settings, such as root=CITY")
    parser.add_argument("--envs", type=int, default=128, help="environments [128]")
    parser.add_argument("--seed", type=int, default=0, help="of hands and replies [0]")
    args = parser.parse_args(argv)
    if args.envs < 1:
        parser.error(f"--envs {args.envs}: must be at least 1")
    with one_line_errors():
        groups = play(args)
    lengths = [length for group in groups for length in group]
    print(f"{args.task}: {len(groups)} groups of {len(lengths) / len(groups):.0f} rows; replies of "
          f"{sum(lengths) / len(lengths):.1f} tokens, {min(lengths)} to {max(lengths)}")
    for rule, below in DROPPED_BELOW.items():
        print(f"idle, rows dropped once {rule}: {idle_share(groups, below):.1%} of row-steps")
    print(f"waiting for the longest reply: {waiting_share(groups):.1%} of places")


if __name__ == "__main__":
    main()
