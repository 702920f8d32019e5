"""Success inside and outside the training distribution (paper Section 4 and 5, appendix C.3), and the paper's figure.

An episode succeeds when it is solved within its verification turns. Every episode is played until it is solved or out
of tries, so one evaluation gives the success within every smaller number of tries as well.

    python evaluate.py --model runs/sft/step_000400                  # one checkpoint, printed only
    python evaluate.py --run runs/rl                                 # all checkpoints of a run and its start
    python evaluate.py --compare runs/sft,runs/rl --figure fig.png   # table beside the paper's numbers, and curves

Rows of a run go to its eval.jsonl, one per checkpoint, split and seed; rows that are there already are not played
again, so a stopped evaluation goes on. Several runs of one arm (other seeds) are averaged: mean and standard error
over runs, which should be evaluated on hands of their own (--seeds) so that the error holds the draw of hands as
well; a single run has the binomial standard error sqrt(p (1 - p) / n).

Left out: smoothing (the paper's curves are Savitzky-Golay filtered), API models.
"""
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import envs
from model import (checkpoint_step, checkpoints, decode_reply, encode, fail, knob, load_policy, log_jsonl,
                   parse_config, pick_device, read_jsonl, sampling_uniforms, write_whole)

EVALUATION = 2   # the first number of a random stream's key; rl.py has 0 and 1
# Paper Fig. 6 and Section 5.1: success on the other rule (%) at the start, after SFT and after RL, at equal compute.
PAPER = {"gp-l": {"rule_ood": (11.5, 3.4, 15.0)}}


@dataclass
class Config:
    """Defaults are ours: the paper does not say how it decodes in its tests."""
    model: str = knob("", "evaluate this one checkpoint")
    run: str = knob("", "evaluate all checkpoints of this run folder, and the model it started from")
    start: bool = knob(True, "with --run: evaluate the model it started from as well")
    compare: str = knob("", "print the table and draw the figure of these evaluated run folders, comma-separated")
    figure: str = knob("", "with --compare: write the figure here (needs matplotlib)")
    task: str = knob("gp-l", "which environment", choices=tuple(envs.TASKS))
    splits: str = knob("id,rule_ood", "what to evaluate on, comma-separated (envs.py lists them)")
    fold: str = knob("", "hands to test on: all, train or test; empty: as the split says", choices=("", *envs.FOLDS))
    verify_iter: int = knob(5, "judged replies per episode", low=1)
    feedback: str = knob("informative", "what the verifier tells the model", choices=("informative", "plain"))
    prompt_file: str = knob("", "JSON object of templates that replace ours")
    episodes: int = knob(1000, "per split and seed", low=1)
    paper: bool = knob(False, "the paper's sample size instead: 234 hands")
    seeds: str = knob("0", "evaluation seeds, comma-separated; never those of training, though a hand may come again")
    temperature: float = knob(0.0, "0 is greedy", low=0)
    max_new_tokens: int = knob(256, "a reply is cut here", low=1)
    generate_tokens: int = knob(65536, "padded tokens, replies included, that are sampled side by side", low=1)
    dtype: str = knob("float32", "compute in this type", choices=("float32", "bfloat16"))
    device: str = knob("auto", "cpu, cuda, or auto")


# ---- Playing -----------------------------------------------------------------------------------------------

def play_episodes(policy, processor, environments, seed, config):
    """Play one episode in each environment, all side by side; the list of infos, one per turn, of each episode."""
    dialogues, infos = [], [[] for _ in environments]   # a dialogue: its prompt ids
    for i, env in enumerate(environments):
        messages, _ = env.reset(seed=f"{seed}/evaluate/{i}")
        dialogues.append(encode(processor, messages))
    playing, turn = list(range(len(environments))), 0
    progress = tqdm(total=len(environments), desc="episodes", leave=False)
    while playing:
        uniforms = sampling_uniforms([(EVALUATION, seed, i, turn) for i in playing], config.max_new_tokens)
        prompts = [dialogues[i] for i in playing]
        replies = policy.generate(prompts, uniforms, config.max_new_tokens, config.temperature,
                                  config.generate_tokens)
        for i, (response_ids, _) in zip(playing, replies):
            messages, reward, _, _, info = environments[i].step(decode_reply(processor, response_ids))
            infos[i].append(info | {"reward": reward})
            if environments[i].done:
                progress.update()
            else:
                prior_ids = None if info["new_dialogue"] else dialogues[i] + response_ids
                dialogues[i] = encode(processor, messages, prior_ids)
        playing, turn = [i for i in playing if not environments[i].done], turn + 1
    progress.close()
    return infos


def summarise(infos, verify_iter):
    """What eval.jsonl says about a list of played episodes, each a list of infos."""
    n, turns = len(infos), [info for episode in infos for info in episode]
    solved_at = [len(episode) if episode[-1]["success"] else 0 for episode in infos]   # 0: never
    tries = range(1, verify_iter + 1)
    within = [sum(0 < at <= turn for at in solved_at) / n for turn in tries]
    played = [sum(len(episode) >= turn for episode in infos) for turn in tries]
    success = within[-1]
    return {"episodes": n, "success": success, "stderr": math.sqrt(success * (1 - success) / n),
            "success_within": within, "first_try": within[0],
            "turn_accuracy": [solved_at.count(turn) / max(1, num) for turn, num in zip(tries, played)],
            "numbers_right": sum(bool(info["numbers_right"]) for info in turns) / len(turns),
            "reward": sum(info["reward"] for info in turns) / n,
            "statuses": dict(sorted(Counter(info["status"] for info in turns).items()))}


def evaluate_checkpoint(path, known, config, write):
    """Evaluate one checkpoint on every split and seed that `known` rows do not cover; `write` gets each new row."""
    wanted = [(split, int(seed)) for split in config.splits.split(",") for seed in config.seeds.split(",")]
    names = ("task", "fold", "verify_iter", "feedback", "prompt_file", "temperature", "max_new_tokens", "dtype")
    settings = {name: getattr(config, name) for name in names}
    settings["episodes"] = 234 if config.paper else config.episodes
    done = [(row["split"], row["seed"]) for row in known
            if row["checkpoint"] == str(path) and row["settings"] == settings]
    missing = [pair for pair in wanted if pair not in done]
    if not missing:
        print(f"{path}: already evaluated")
        return
    policy, processor = load_policy(str(path), config.dtype, pick_device(config.device))
    for split, seed in missing:
        environments = [envs.make_env(config.task, split, fold=config.fold, verify_iter=config.verify_iter,
                                      feedback=config.feedback, prompt_file=config.prompt_file)
                        for _ in range(settings["episodes"])]
        infos = play_episodes(policy, processor, environments, seed, config)
        row = {"checkpoint": str(path), "split": split, "seed": seed, **summarise(infos, config.verify_iter),
               "settings": settings}
        success, error, first, numbers = (100 * row[k] for k in ("success", "stderr", "first_try", "numbers_right"))
        tqdm.write(f"{path.name:12s} {split:9s} seed {seed}: success {success:.1f} +- {error:.1f} %, "
                   f"first try {first:.1f} %, numbers right {numbers:.1f} %")
        write(row)


def evaluate_run(run, config):
    """Evaluate every checkpoint of a run; rows carry its step and the compute spent since the start."""
    if not (run / "config.json").is_file():
        raise ValueError(f"run {str(run)!r}: no run folder (it would have a config.json)")
    spent = {0: {"gflops": 0.0, "gflops_paper": 0.0}} | {row["step"]: row for row in read_jsonl(run / "metrics.jsonl")}
    start = json.loads((run / "config.json").read_text())["model"]
    if config.start and not Path(start).is_dir():
        raise ValueError(f"run {str(run)!r} started from {start!r}, which is no folder: use --no-start")
    points = [(0, Path(start))] if config.start else []
    points += [(checkpoint_step(path), path) for path in checkpoints(run) if checkpoint_step(path)]
    known = read_jsonl(run / "eval.jsonl")
    write_whole(run / "eval.jsonl", "".join(json.dumps(row) + "\n" for row in known))   # without a torn last line
    for step, path in tqdm(points, desc=f"checkpoints of {run}"):
        compute = {name: spent[step][name] for name in ("gflops", "gflops_paper")}
        evaluate_checkpoint(path, known, config,
                            lambda row: log_jsonl(run / "eval.jsonl", step=step, **compute, **row))


# ---- Comparing ---------------------------------------------------------------------------------------------

def mean_and_error(rows):
    """Mean success (%) and its standard error: over runs if there are several, binomial for one."""
    runs = defaultdict(list)
    for row in rows:
        runs[row["run"]].append(row)
    means = [100 * sum(row["success"] for row in own) / len(own) for own in runs.values()]
    mean = sum(means) / len(means)
    if len(means) == 1:
        return mean, 100 * math.sqrt(sum(row["stderr"] ** 2 for row in rows)) / len(rows)
    return mean, math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means))


def load_arms(folders):
    """Evaluated rows by arm ("start", "SFT", "RL"), each with the run it comes from.

    ValueError unless all runs go on from one start and were evaluated with one set of settings. The start is one
    model: its "runs" are the seeds it was evaluated on.
    """
    arms, starts, settings = defaultdict(list), {}, {}
    for run in map(Path, folders):
        rows = read_jsonl(run / "eval.jsonl")
        if not rows:
            raise ValueError(f"run {str(run)!r}: no eval.jsonl; run evaluate.py --run {run} first")
        config = json.loads((run / "config.json").read_text())
        arm = "RL" if "updates" in config else "SFT"               # rl.py counts updates, sft.py steps
        starts[config["model"]] = run
        for row in rows:
            settings[json.dumps(row["settings"], sort_keys=True)] = row["settings"]
            if row["step"]:
                arms[arm].append(row | {"run": str(run)})
            else:
                arms["start"].append(row | {"run": row["seed"]})
    if len(starts) > 1:
        raise ValueError(f"--compare needs runs of one start; these started from {', '.join(starts)}")
    if len(settings) > 1:
        raise ValueError(f"--compare needs one set of settings; eval.jsonl holds {' and '.join(settings)}")
    if len(arms) < 3:
        raise ValueError(f"--compare needs an evaluated start, an SFT run and an RL run; found {', '.join(arms)}")
    return arms


def curve(rows, split):
    """[(mean GFLOPs, mean success, error)] over the checkpoints that all runs have, oldest first."""
    steps = defaultdict(list)
    for row in rows:
        if row["split"] == split:
            steps[row["step"]].append(row)
    num_runs = len({row["run"] for row in rows})
    points = [(sum(row["gflops"] for row in own) / len(own), *mean_and_error(own)) for _, own in sorted(steps.items())
              if len({row["run"] for row in own}) == num_runs]
    if not points:
        raise ValueError(f"--compare: no checkpoint of every run was evaluated on {split}")
    return points


def compare(folders, figure):
    """Print success at the start, after SFT and after RL at equal compute, beside the paper's; draw the curves."""
    arms = load_arms(folders)
    task = arms["start"][0]["settings"]["task"]
    splits = list(dict.fromkeys(row["split"] for row in arms["start"]))
    budget = min(max(row["gflops"] for row in arms[arm]) for arm in ("SFT", "RL"))
    num_runs = {arm: len({row["run"] for row in arms[arm]}) for arm in ("SFT", "RL")}
    print(f"\n{task}: success %, at the checkpoints nearest to {budget:,.0f} GFLOPs of post-training "
          f"({num_runs['SFT']} SFT and {num_runs['RL']} RL runs)\n")
    print("| split | start | SFT | RL | paper: start | SFT | RL |\n|---|---|---|---|---|---|---|")
    for split in splits:
        start = mean_and_error([row for row in arms["start"] if row["split"] == split])
        cells = ["{:.1f} ± {:.1f}".format(*start)]
        for arm in ("SFT", "RL"):
            gflops, mean, error = min(curve(arms[arm], split), key=lambda point: abs(point[0] - budget))
            cells.append(f"{mean:.1f} ± {error:.1f} ({mean - start[0]:+.1f})")
        paper = PAPER.get(task, {}).get(split)
        cells += [f"{paper[0]}"] + [f"{p} ({p - paper[0]:+.1f})" for p in paper[1:]] if paper else ["not printed"] * 3
        print(f"| {split} | {' | '.join(cells)} |")
    if figure:
        draw(arms, task, splits, figure)


def draw(arms, task, splits, figure):
    """Success against GFLOPs: one panel per split, one curve per arm, error bars, the start marked."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nno figure: matplotlib is not installed (pip install matplotlib)")
        return
    fig, axes = plt.subplots(1, len(splits), figsize=(4.5 * len(splits), 3.6), squeeze=False)
    for axis, split in zip(axes[0], splits):
        mean, error = mean_and_error([row for row in arms["start"] if row["split"] == split])
        for arm, colour in (("SFT", "tab:orange"), ("RL", "tab:blue")):
            x, y, e = zip((0.0, mean, error), *curve(arms[arm], split))
            axis.errorbar(x, y, e, label=arm, color=colour, marker="o", markersize=3, capsize=2)
        axis.plot([0], [mean], "k*", markersize=11, label="start")
        axis.set(title=f"{task}, {split}", xlabel="GFLOPs of post-training", ylabel="success %", ylim=(0, None))
        axis.legend()
    fig.tight_layout()
    fig.savefig(figure, dpi=150)
    print(f"\nfigure: {figure}")


def main(config):
    try:
        for split in config.splits.split(","):
            envs.make_env(config.task, split, fold=config.fold, prompt_file=config.prompt_file)
        if not all(seed.strip().isdecimal() for seed in config.seeds.split(",")):
            raise ValueError(f"--seeds {config.seeds!r}: expected whole numbers such as 0,1,2")
        if sum(map(bool, (config.model, config.run, config.compare))) != 1:
            raise ValueError("exactly one of --model, --run and --compare is required")
        if config.compare:
            compare(config.compare.split(","), config.figure)
        elif config.run:
            evaluate_run(Path(config.run), config)
        else:
            evaluate_checkpoint(Path(config.model), [], config, lambda row: print(json.dumps(row)))
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main(parse_config(Config))
