"""The arms of a study in a table, panel by panel, and in pictures: how far each moved from its start, under the rule it was
trained on and under others.

    python recipes/panels.py runs/study --figure panels.png        # a row for each arm
    python recipes/panels.py runs/study/virl --paths paths.png     # the other rule against the training rule, at all checkpoints
    python recipes/panels.py runs/study --gate gate.png            # both arms against the share of mix-ups in the start
    python recipes/panels.py runs/tiny-virl-l --every              # every evaluation of every run, in a table
    python recipes/panels.py results/paper_in_miniature.md --figure panels.png         # from the table on a page, without the runs

A panel is a folder of evaluated runs, such as runs/study/virl; its runs are averaged by arm and split. Changes are in points of
the task's first measure (`envs.TASKS`), each of a run since its own start, with the standard error over the starts, or over the
runs if there is one start. A page instead of a folder: the table that was printed here once, read again. Used by recipes/study.sh;
results/paper_in_miniature.md says which panel is which figure of the paper.
"""
import os
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
from evaluate import TITLES, name_arms, spread
from support import running

MARKS = {"id": "o", "unseen": "s", "rule_ood": "D"}        # others: a cross
HEAD = "| panel | arm | starts or runs | tested on | start | change |\n|---|---|---|---|---|---|\n"
GATE = {0: "two_by_two/fault_alone", 0.05: "gate/share_0.05", 0.15: "two_by_two/both", 0.3: "gate/share_0.3"}   # share of mix-ups: panel


def read_panel(folder):
    """{arm: {step: {split: [(value at the start, change since), ...]}}}, in percent, one pair for every start; if there is only one,
    for every run and seed of its tests."""
    runs = {path.parent: running.read_jsonl(path, "step", "split", "seed") for path in sorted(folder.glob("*/eval.jsonl"))}
    configs = {run: running.read_run_config(run) for run in runs}
    models = {run: os.path.realpath(config["model"]) for run, config in configs.items()}          # one start, however it is spelt
    arms, found = name_arms(configs), defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    starts = {(models[run], row["split"], row["seed"]): row for run, rows in runs.items() for row in rows if not row["step"]}
    for run, rows in sorted(runs.items(), key=lambda pair: arms[pair[0]]):
        metric = envs.TASKS[configs[run]["task"]].metrics[0]
        for row in {(row["step"], row["split"], row["seed"]): row for row in rows if row["step"]}.values():      # the last of equals
            start = starts.get((models[run], row["split"], row["seed"]))
            if start is None:
                raise ValueError(f"run {str(run)!r}: no run of {folder} has evaluated its start {configs[run]['model']} on {row['split']}")
            pair = 100 * start[metric], 100 * (row[metric] - start[metric])
            found[arms[run]][row["step"]][row["split"]][models[run]].append(pair)
    return {arm: {step: {split: over_starts(list(pairs.values())) for split, pairs in splits.items()} for step, splits in steps.items()}
            for arm, steps in found.items()}


def over_starts(pairs):
    """The pairs of each start -> one pair for each; of a single start all of its."""
    return pairs[0] if len(pairs) == 1 else [tuple(map(mean, zip(*own))) for own in pairs]


def table_of(panels):
    """{panel: [(arm, starts or runs, split, start, change), ...]} of the newest checkpoint of each arm, start and change each as a
    mean and its error."""
    return {name: [(arm, len(pairs), split, *map(with_error, zip(*pairs))) for arm, steps in panel.items()
                   for split, pairs in steps[max(steps)].items()] for name, panel in panels.items()}


def read_table(page):
    """What table_of gave, from a page that has it as it was printed."""
    found = defaultdict(list)
    for line in page.read_text().partition(HEAD)[2].partition("\n\n")[0].splitlines():
        name, arm, num, split, *values = line.strip("| ").split(" | ")
        start, change = ((float(value), float(error or 0)) for value, _, error in (text.partition(" ± ") for text in values))
        found[name].append((arm, int(num), split, start, change))
    if not found:
        raise ValueError(f"{page}: no table that begins with {HEAD.splitlines()[0]!r}")
    return found


def print_table(table):
    """The rows of all panels."""
    print(HEAD, end="")
    for name, rows in table.items():
        for arm, num, split, *values in rows:
            cells = [f"{value:.1f} ± {error:.1f}" if num > 1 else f"{value:.1f}" for value, error in values]
            print(f"| {name} | {arm} | {num} | {split} | {' | '.join(cells)} |")


def with_error(values):
    """Mean and standard error; no error of a single one."""
    return spread(values) if len(values) > 1 else (values[0], 0.0)


def print_every(runs):
    """The rows of the eval.jsonl of each run, all of one task."""
    metrics = (*envs.TASKS[running.read_run_config(runs[0])["task"]].metrics, "first_try", "retries")
    print(f"| run | step | GFLOPs | split | {' | '.join(metrics).replace('_', ' ')} | repeats | replies |\n{'|---' * (len(metrics) + 6)}|")
    for run in runs:
        for row in sorted(running.read_jsonl(run / "eval.jsonl", "step", "split", "seed"), key=lambda row: (row["step"], row["split"])):
            cells = [f"{100 * row[name]:.1f} ± {100 * row[f'{name}_stderr']:.1f}" for name in metrics]
            replies = ", ".join(f"{status} {count}" for status, count in row["statuses"].items())
            print(f"| {run.name} | {row['step']} | {row['gflops']:,.0f} | {row['split']} | {' | '.join(cells)} | {100 * row['repeats']:.0f} | {replies} |")


def draw_rows(plt, table):
    """A row for each arm, one mark for each split it was tested on; SFT in orange, RL in blue."""
    panels = {name: list(dict.fromkeys(arm for arm, *_ in rows)) for name, rows in table.items()}
    counts = [len(arms) for arms in panels.values()]
    fig, axes = plt.subplots(len(panels), 1, figsize=(9, 0.9 * len(panels) + 0.27 * sum(counts)), squeeze=False, sharex=True,
                             height_ratios=[count + 1 for count in counts], layout="constrained")
    for axis, (name, arms) in zip(axes.flat, panels.items()):
        for arm, _, split, _, (change, error) in table[name]:
            colour = "grey" if split in ("id", "unseen") else "tab:orange" if arm.startswith("SFT") else "tab:blue"
            axis.errorbar([change], [arms.index(arm)], xerr=[error], fmt=MARKS.get(split, "x"), color=colour, markersize=5, capsize=2,
                          markerfacecolor="white" if split == "unseen" else colour, label=TITLES.get(split, split))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(arms)), arms, fontsize=8)
        axis.set_ylim(len(arms) - 0.4, -0.6)
        axis.set_title(name, fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("change since the start, points")
    return fig, axes


def draw_paths(plt, panels):
    """A path for each arm, from its start over its checkpoints: to the right it gains on the training rule, downwards it loses
    the other."""
    fig, axes = plt.subplots(len(panels), 1, figsize=(8, 6.5 * len(panels)), squeeze=False, layout="constrained")
    for axis, (name, panel) in zip(axes.flat, panels.items()):
        kinds = {kind: [arm for arm in panel if arm.startswith(kind)] for kind in ("SFT", "RL")}
        for kind, shades in (("SFT", plt.cm.Oranges), ("RL", plt.cm.Blues)):
            for i, arm in enumerate(kinds[kind]):
                points = [splits for _, splits in sorted(panel[arm].items()) if {"id", "rule_ood"} <= splits.keys()]
                x, y = ([(0.0, 0.0)] + [with_error([change for _, change in splits[split]]) for splits in points]
                        for split in ("id", "rule_ood"))
                axis.errorbar(*zip(*((a, b) for (a, _), (b, _) in zip(x, y))), [e for _, e in y], [e for _, e in x], label=arm,
                              color=shades(0.9 - 0.6 * i / len(kinds[kind])), marker="os^vDPX*<>"[i % 10], markersize=5, elinewidth=0.5)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=name if len(panels) > 1 else "", xlabel="training rule: change since the start, points",
                 ylabel="the other rule: change since the start, points")
        axis.grid(alpha=0.3)
    return fig, axes


def draw_gate(plt, table):
    """The change of both arms, a picture for each rule, against the share of its teacher's first tries at a turn that were
    named in the other rule's word."""
    changes = {(share, arm.split()[0], split): change for share, name in GATE.items() for arm, _, split, _, change in table.get(name, ())}
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), squeeze=False, layout="constrained")
    for axis, split in zip(axes.flat, ("id", "rule_ood")):
        for kind, colour in (("SFT", "tab:orange"), ("RL", "tab:blue")):
            points = [(share, *changes[share, kind, split]) for share in GATE if (share, kind, split) in changes]
            if points:
                axis.errorbar(*zip(*points), label=kind, color=colour, marker="o", markersize=4, capsize=2)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=TITLES[split], xlabel="share of mix-ups in the start's last steps", ylabel="change since the start, points")
        axis.grid(alpha=0.3)
    return fig, axes


def save(drawn, figure):
    """Write a figure with one legend below."""
    fig, axes = drawn
    labels = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    fig.legend(labels.values(), labels, loc="outside lower center", ncol=2, fontsize=8)
    fig.savefig(figure, dpi=130)
    print(f"\nfigure: {figure}")


def main():
    parser = running.OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="a folder of panels, each a folder of run folders; or one of these; or a page with their table")
    parser.add_argument("--figure", help="write a picture of the newest checkpoints here (needs matplotlib)")
    parser.add_argument("--paths", help="write a picture of all checkpoints here, the other rule against the training rule")
    parser.add_argument("--gate", help="write a picture of both arms against the share of mix-ups in the start here")
    parser.add_argument("--every", action="store_true", help="print every evaluation of every run instead")
    args = parser.parse_args()
    study = Path(args.study)
    if study.is_file() and (args.paths or args.every):
        parser.error(f"{study}: --paths and --every need the runs, this is a file")
    for figure in filter(None, (args.figure, args.paths, args.gate)):
        if not Path(figure).parent.is_dir():
            parser.error(f"{figure}: there is no folder {Path(figure).parent}")
    with running.one_line_errors():
        folders = sorted({path.parent.parent for depth in ("*", "*/*", "*/*/*") for path in study.glob(f"{depth}/eval.jsonl")})   # through links, too
        panels = {str(folder.relative_to(study)): panel for folder in folders if (panel := read_panel(folder))}
        table = read_table(study) if study.is_file() else table_of(panels)
        if not table:
            raise ValueError(f"{study}: no evaluated run in a folder of a folder there")
        if args.gate and not table.keys() & set(GATE.values()):
            raise ValueError(f"{study}: --gate needs one of its panels {', '.join(GATE.values())}")
        if args.every:
            for folder in folders:
                print_every(sorted(path.parent for path in folder.glob("*/eval.jsonl")))
            return
        print_table(table)
    figures = {figure: drawn for figure, drawn in ((args.figure, (draw_rows, table)), (args.paths, (draw_paths, panels)),
                                                   (args.gate, (draw_gate, table))) if figure}
    if figures:
        try:
            import matplotlib
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            print("\nno figure: matplotlib is not installed (pip install matplotlib)")
            return
        for figure, (draw, what) in figures.items():
            save(draw(plt, what), figure)


if __name__ == "__main__":
    main()
