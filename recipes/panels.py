"""The arms of a study in a table, panel by panel, and in one picture: how far each moved from its start, under the rule it was
trained on and under others.

    python recipes/panels.py runs/study --figure panels.png
    python recipes/panels.py runs/tiny-virl-l --every              # every evaluation of every run, in a table

A panel is a folder of evaluated runs, such as runs/study/virl; its runs are averaged by arm and split, newest checkpoints
alone. Changes are in points of the task's first measure (`envs.TASKS`), each of a run since its own start, with the
standard error over runs. Used by recipes/study.sh; results/paper_in_miniature.md says which panel is which figure of the paper.
"""
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
from evaluate import TITLES, name_arms
from support import running

MARKS = {"id": "o", "unseen": "s", "rule_ood": "D"}        # others: a cross


def read_panel(folder):
    """{(arm, split): [(value at the start, change since), ...]}, in percent, one pair for every run."""
    runs = {path.parent: running.read_jsonl(path, "step", "split", "seed") for path in sorted(folder.glob("*/eval.jsonl"))}
    configs = {run: running.read_run_config(run) for run in runs}
    arms, found = name_arms(configs), defaultdict(list)
    starts = {(configs[run]["model"], row["split"], row["seed"]): row for run, rows in runs.items() for row in rows if not row["step"]}
    for run, rows in sorted(runs.items(), key=lambda pair: arms[pair[0]]):
        metric = envs.TASKS[configs[run]["task"]].metrics[0]
        last = max((row["step"] for row in rows), default=0)
        for row in {row["split"]: row for row in rows if row["step"] == last > 0}.values():
            start = starts.get((configs[run]["model"], row["split"], row["seed"]))
            if start is None:
                raise ValueError(f"run {str(run)!r}: no run of {folder} has evaluated its start {configs[run]['model']} on {row['split']}")
            found[arms[run], row["split"]].append((100 * start[metric], 100 * (row[metric] - start[metric])))
    return found


def with_error(values):
    """Mean and standard error; no error of a single one."""
    return mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def print_every(runs):
    """The rows of the eval.jsonl of each run, all of one task."""
    metrics = (*envs.TASKS[running.read_run_config(runs[0])["task"]].metrics, "first_try", "retries")
    print(f"| run | step | GFLOPs | split | {' | '.join(metrics).replace('_', ' ')} | repeats | replies |\n{'|---' * (len(metrics) + 6)}|")
    for run in runs:
        for row in sorted(running.read_jsonl(run / "eval.jsonl", "step", "split", "seed"), key=lambda row: (row["step"], row["split"])):
            cells = [f"{100 * row[name]:.1f} ± {100 * row[f'{name}_stderr']:.1f}" for name in metrics]
            replies = ", ".join(f"{status} {count}" for status, count in row["statuses"].items())
            print(f"| {run.name} | {row['step']} | {row['gflops']:,.0f} | {row['split']} | {' | '.join(cells)} | {100 * row['repeats']:.0f} | {replies} |")


def draw(panels, figure):
    """A row for each arm, one mark for each split it was tested on; SFT in orange, RL in blue."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nno figure: matplotlib is not installed (pip install matplotlib)")
        return
    counts = [len({arm for arm, _ in panel}) for panel in panels.values()]
    fig, axes = plt.subplots(len(panels), 1, figsize=(9, 0.9 * len(panels) + 0.27 * sum(counts)), squeeze=False, sharex=True,
                             height_ratios=[count + 1 for count in counts], layout="constrained")
    for axis, (name, panel) in zip(axes.flat, panels.items()):
        arms = list(dict.fromkeys(arm for arm, _ in panel))
        for (arm, split), pairs in panel.items():
            change, error = with_error([change for _, change in pairs])
            colour = "grey" if split in ("id", "unseen") else "tab:orange" if arm.startswith("SFT") else "tab:blue"
            axis.errorbar([change], [arms.index(arm)], xerr=[error], fmt=MARKS.get(split, "x"), color=colour, markersize=5, capsize=2,
                          markerfacecolor="white" if split == "unseen" else colour, label=TITLES.get(split, split))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(arms)), arms, fontsize=8)
        axis.set_ylim(len(arms) - 0.4, -0.6)
        axis.set_title(name, fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("change since the start, points")
    labels = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    fig.legend(labels.values(), labels, loc="outside lower center", ncol=2, fontsize=8)
    fig.savefig(figure, dpi=130)
    print(f"\nfigure: {figure}")


def main():
    parser = running.OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="a folder of panels, each a folder of run folders")
    parser.add_argument("--figure", help="write the picture here (needs matplotlib)")
    parser.add_argument("--every", action="store_true", help="print every evaluation of every run instead")
    args = parser.parse_args()
    with running.one_line_errors():
        folders = sorted({path.parent.parent for path in Path(args.study).rglob("eval.jsonl")})
        panels = {str(folder.relative_to(args.study)): panel for folder in folders if (panel := read_panel(folder))}
        if not panels:
            raise ValueError(f"{args.study}: no evaluated run in a folder of a folder there")
        if args.every:
            for folder in folders:
                print_every(sorted(path.parent for path in folder.glob("*/eval.jsonl")))
            return
        print("| panel | arm | runs | tested on | start | change |\n|---|---|---|---|---|---|")
        for name, panel in panels.items():
            for (arm, split), pairs in panel.items():
                cells = [f"{value:.1f} ± {error:.1f}" if len(pairs) > 1 else f"{value:.1f}" for value, error in map(with_error, zip(*pairs))]
                print(f"| {name} | {arm} | {len(pairs)} | {split} | {' | '.join(cells)} |")
        if args.figure:
            draw(panels, args.figure)


if __name__ == "__main__":
    main()
