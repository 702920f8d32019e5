"""What rounding does to PPO's ratios on a real model, and what keeping rows side by side costs.

    python tests/ratios.py runs/base/step_000020 --dtype bfloat16     # a model in words

A reply's log-prob is rounded differently beside other rows. PPO compares two log-probs of a reply.
So a ratio may differ from 1 before anything was trained. For each temperature one rollout of GP-L
is played. Then one update is made twice, from the same weights:

    before    scores are made with all rows of the rollout, and each epoch draws new minibatches
    now       scores and all epochs see the same rows side by side (`rl.draw_minibatches`)

The table has the spread of the log-ratio before the first optimizer step, and seconds. It also has
the share of turns whose ratio is beyond the clip, at the first and at the last step. "Sampled" is
the spread of log-probs as scored minus as seen while sampling. Results: results/robustness.md.
"""
import copy
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import rl
from model import load_policy
from support import running


class Update(NamedTuple):
    """What was seen in one update."""
    ratios: list         # for each optimizer step the ratios of its turns
    seconds_scoring: float
    seconds_update: float


def all_groups(minibatches):
    return [group for minibatch in minibatches for group in minibatch.groups]


def redrawn_steps(policy, turns, config):
    """The steps of an update whose epochs each draw their own minibatches."""
    steps = []
    for epoch in range(config.epochs):
        for minibatch in rl.draw_minibatches(policy, turns, 1000 + epoch, config):
            steps.append((f"epoch {epoch}", minibatch))
    return steps


def update(policy, turns, config, side_by_side):
    """One PPO update of a copy of the policy; advantages are the rewards."""
    policy = copy.deepcopy(policy)
    minibatches = rl.draw_minibatches(policy, turns, 0, config)
    groups = all_groups(minibatches)
    steps = rl.epoch_steps(minibatches, 0, config)
    if not side_by_side:
        groups = rl.turn_batches(policy, turns, rl.group_dialogues(turns), config)
        steps = redrawn_steps(policy, turns, config)

    began = time.perf_counter()
    logprobs, values = rl.score_turns(policy, turns, groups, config)
    scored = time.perf_counter()

    # Watch the ratios of every step.
    ratios, loss, clip = [[]], rl.ppo_loss, running.clip_gradients

    def watched_loss(*arguments):
        result = loss(*arguments)
        ratios[-1] += result[2]["ratio"].tolist()
        return result

    def watched_clip(*arguments):
        ratios.append([])
        return clip(*arguments)

    rewards = torch.tensor([turn.reward for turn in turns])
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr, eps=1e-7)
    with (mock.patch.object(rl, "ppo_loss", watched_loss),
          mock.patch.object(rl, "epoch_steps", lambda *_: steps),
          mock.patch.object(running, "clip_gradients", watched_clip)):
        rl.ppo_update(policy, optimizer, turns, minibatches, logprobs, values, rewards, rewards, 0,
                      config)
    return Update(ratios[:-1], scored - began, time.perf_counter() - scored)


def beyond(ratios, clip):
    """The share of ratios beyond the clip, in percent."""
    return 100 * sum(abs(ratio - 1) > clip for ratio in ratios) / len(ratios)


def row(name, temperature, seen, sampled_std, clip):
    first, last = seen.ratios[0], seen.ratios[-1]
    spread = float(torch.tensor(first).log().std())
    return (f"| {temperature} | {name} | {spread:.4f} | {min(first):.3f} to {max(first):.3f} "
            f"| {beyond(first, clip):.1f} | {beyond(last, clip):.1f} | {sampled_std:.4f} "
            f"| {seen.seconds_scoring:.1f} | {seen.seconds_update:.1f} |")


def main():
    parser = running.OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the folder of a model in words")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.2, 0.5, 1.0])
    parser.add_argument("--environments", type=int, default=32)
    parser.add_argument("--turns", type=int, default=2, help="of each environment [2]")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    policy, processor = load_policy(args.model, args.dtype, running.pick_device(args.device))
    print("| temperature | | std of log-ratio | ratios | beyond the clip at first, % | at last, % "
          "| sampled | seconds scoring | update |\n|---|---|---|---|---|---|---|---|---|")
    for temperature in args.temperatures:
        with tempfile.TemporaryDirectory() as folder:
            config = rl.Config(out=folder, num_envs=args.environments, turns_per_env=args.turns,
                               minibatch_turns=args.environments * args.turns // 2, epochs=2,
                               temperature=temperature, lr=args.lr, dtype=args.dtype,
                               max_new_tokens=64, micro_batch_tokens=args.micro_batch_tokens)
            conversations = [rl.Conversation(i, envs.make_env("gp-l"), processor, config)
                             for i in range(args.environments)]
            turns = rl.collect_turns(policy, processor, conversations, 0, config,
                                     SimpleNamespace(requested=False))
        groups = all_groups(rl.draw_minibatches(policy, turns, 0, config))
        scored, _ = rl.score_turns(policy, turns, groups, config)
        sampled = torch.tensor([turn.sampled_logprob for turn in turns])
        gap = float((scored - sampled).std())
        for name, side_by_side in (("before", False), ("now", True)):
            print(row(name, temperature, update(policy, turns, config, side_by_side), gap,
                      config.clip), flush=True)


if __name__ == "__main__":
    main()
