"""How far runs have moved from their starts, under the training rule and under the other: a table.

    python recipes/distance.py runs/tiny-virl-l/sft_0_0 runs/tiny-virl-l/rl_3_0

The distance of a checkpoint is KL(checkpoint || start), in nats a reply, of replies at first tries:

    KL  ~  mean over replies of  log p_checkpoint(reply) - log p_start(reply)

The checkpoint samples the replies at temperature 1; in V-IRL they are asked for anywhere on a
route. The newest checkpoint of each run counts, with --every all of them. Not in the paper;
recipes/study.sh uses it.
"""
import random
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
from model import EVALUATION, collate, encode, load_policy, sampling_uniforms
from support import evaluation, run_folder, running, settings

SPLITS = ("id", "rule_ood")
LONGEST = 64                    # tokens of a reply
TOGETHER = 64                   # replies in a batch


@torch.no_grad()
def distances(policy, start, processor, task, split, common, seed, num):
    """log p_policy(reply) - log p_start(reply) of each of `num` replies that `policy` samples."""
    env = envs.make_env(task, split, common)
    prompts = []
    for i in range(num):
        env.reset(f"{seed}/distance/{i}", episode=i, begin=False)
        messages = env.skip_ahead(random.Random(f"{seed}/at/{i}"), balance=False)
        prompts.append(encode(processor, messages))
    uniforms = sampling_uniforms([(EVALUATION, seed, i) for i in range(num)], LONGEST)
    replies = [ids for ids, _ in policy.generate(prompts, uniforms, LONGEST, 1.0)]
    found = []
    for first in range(0, num, TOGETHER):
        some = slice(first, first + TOGETHER)
        batch = collate([[pair] for pair in zip(prompts[some], replies[some])], policy.device)
        here = policy(batch, 1.0)[0].sum(1)                        # (B,)
        there = start(batch, 1.0)[0].sum(1)                        # (B,)
        found += (here - there).tolist()
    return found


def main():
    parser = running.OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders of sft.py or rl.py, tasks in words")
    parser.add_argument("--num", type=int, default=256, help="replies for each rule [256]")
    parser.add_argument("--every", action="store_true", help="every checkpoint of a run")
    args = parser.parse_args()
    if args.num < 2:
        parser.error(f"--num {args.num}: must be at least 2, for an error")
    print("| run | KL to the start, training rule | the other rule |\n|---|---|---|")
    for run in args.runs:
        with running.one_line_errors():
            config = running.read_run_config(Path(run))
            if "model" not in config:
                raise ValueError(f"run {run!r}: not a run folder of sft.py or rl.py")
            checkpoints = run_folder.checkpoints(Path(run))
            if not checkpoints:
                raise ValueError(f"run {run!r}: it has no checkpoint yet")
            common = settings.read_settings(config.get("env", ()))
            if envs.make_env(config["task"], SPLITS[0], common).vision:
                raise ValueError(f"run {run!r}: {config['task']} has pictures; a distance is "
                                 "measured in words alone")
            run_folder.check_start(run, config["model"])
            evaluation.check_files(Path(run), config, envs.make_env)
            start, _ = load_policy(config["model"])
            for checkpoint in checkpoints if args.every else checkpoints[-1:]:
                policy, processor = load_policy(str(checkpoint))
                cells = []
                for split in SPLITS:
                    found = distances(policy, start, processor, config["task"], split, common,
                                      config["seed"], args.num)
                    cells.append(f"{mean(found):.2f} ± {stdev(found) / len(found) ** 0.5:.2f}")
                name = f"{run}, {checkpoint.name}" if args.every else run
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
