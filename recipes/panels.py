"""The arms of a study in a table and in pictures: how far each moved from its start.

    python recipes/panels.py runs/study                          # a table, a line per arm and split
    python recipes/panels.py runs/study --csv panels.csv         # the same rows into a file, too
    python recipes/panels.py results/data/panels.csv --figure panels.png      # without the runs
    python recipes/panels.py runs/study/virl --paths paths.png   # one rule against the other
    python recipes/panels.py runs/study --gate gate.png          # change against mix-ups
    python recipes/panels.py runs/tiny-virl-l --every            # every evaluation of every run

A panel is a folder of evaluated runs, such as runs/study/virl. Its runs are averaged by arm and
split. A change is in points of the task's first metric (`envs.TASKS`), for each run since the start
that it went on from. Its standard error is over starts, or over runs if there is one start.

recipes/study.sh calls this script. results/paper.md says which panel is which
figure of the paper.
"""
import csv
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
from support import collect, compare, errors, running

COLOURS = {"SFT": "tab:orange", "RFT": "tab:green", "RL": "tab:blue"}
MARKS = {"id": "o", "unseen": "s", "rule_ood": "D"}   # of a split in a picture; others: a cross
# The share of mix-ups in the start's training -> the panel of arms that go on from there.
GATE = {0: "two_by_two/fault_alone", 0.05: "gate/share_0.05", 0.15: "two_by_two/both",
        0.3: "gate/share_0.3"}


class Row(NamedTuple):
    """A line of the table: the newest checkpoint of an arm on a split; in percent and points."""
    panel: str
    arm: str
    runs: int              # starts, or runs if there is one start
    split: str
    start: float
    start_error: float     # 0 if there is one run
    change: float
    change_error: float


# ---- Reading runs ------------------------------------------------------------------------------

def evaluated_runs(folder):
    return sorted(path.parent for path in folder.glob("*/eval.jsonl"))


def of_all_runs(arm, rows):
    """The rows of steps and splits that all runs of an arm were tested at: one run may have gone on
    longer, or its test may have been stopped."""
    tested = {}        # (step, split) -> the runs that were tested there
    for row in rows:
        tested.setdefault((row["step"], row["split"]), set()).add(row["run"])
    runs = {row["run"] for row in rows}
    for step, split in sorted(tested):
        if lacking := runs - tested[step, split]:
            print(f"{arm}: step {step} on {split} is left out, since {min(lacking)} was not tested "
                  "there", file=sys.stderr)
    return [row for row in rows if tested[row["step"], row["split"]] == runs]


def read_panel(folder):
    """{arm: {step: {split: [(value at the start, change since), ...]}}} of a folder of runs.

    Values are in percent. There is one pair for every start; with a single start there is one for
    every run, over all seeds of its tests. ValueError if the start of a run was not evaluated, and
    if `collect.collect_rows` finds that runs do not fit each other.
    """
    metrics = {name: task.metrics for name, task in envs.TASKS.items()}
    arms = collect.collect_rows(evaluated_runs(folder), metrics)
    starts = {(row["start"], row["split"], row["seed"]): row for row in arms.pop("start")}

    found = {}    # arm -> step -> split -> start -> run -> pairs, one for each seed of the tests
    for arm in sorted(arms):
        for row in of_all_runs(arm, arms[arm]):
            start, split = row["start"], row["split"]
            before = starts.get((start, split, row["seed"]))
            if before is None:
                raise ValueError(f"run {row['run']!r}: no run of {folder} has evaluated its start "
                                 f"{start} on {split} with seed {row['seed']}")
            metric = metrics[row["settings"]["task"]][0]
            pair = (100 * before[metric], 100 * (row[metric] - before[metric]))
            splits = found.setdefault(arm, {}).setdefault(row["step"], {})
            runs = splits.setdefault(split, {}).setdefault(start, {})
            runs.setdefault(row["run"], []).append(pair)

    panel = {}
    for arm, steps in found.items():
        panel[arm] = {}
        for step, splits in steps.items():
            panel[arm][step] = {}
            for split, by_start in splits.items():
                panel[arm][step][split] = over_starts(by_start)
    return panel


def mean_pair(pairs):
    return mean(start for start, _ in pairs), mean(change for _, change in pairs)


def over_starts(by_start):
    """{start: {run: [pair, ...]}} -> a mean pair for each start; of a single start, for each run.
    """
    of_runs = [[mean_pair(pairs) for pairs in runs.values()] for runs in by_start.values()]
    return of_runs[0] if len(of_runs) == 1 else [mean_pair(pairs) for pairs in of_runs]


def with_error(values):
    """Mean and standard error; no error of a single value."""
    if len(values) == 1:
        return values[0], 0.0
    return errors.mean_and_standard_error(values)


def rows_of(panels):
    """The rows of all panels, at the newest checkpoint of each arm."""
    rows = []
    for name, panel in panels.items():
        for arm, steps in panel.items():
            for split, pairs in steps[max(steps)].items():
                start, start_error = with_error([start for start, _ in pairs])
                change, change_error = with_error([change for _, change in pairs])
                rows.append(Row(name, arm, len(pairs), split, start, start_error, change,
                                change_error))
    return rows


# ---- The table, printed and in a file ----------------------------------------------------------

def write_csv(path, columns, rows):
    """Write rows, each a dict; a column that a row lacks stays empty."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nrows: {path}")


def table_rows(rows):
    """Rows as they are printed: numbers with one digit, "" for the error of a single run."""
    table = []
    for row in rows:
        cells = row._asdict()
        for name in ("start", "start_error", "change", "change_error"):
            several = row.runs > 1 or not name.endswith("error")
            cells[name] = f"{cells[name]:.1f}" if several else ""
        table.append(cells)
    return table


def read_row(line):
    """A Row of a line of the file; ValueError if the line lacks a field or has one too many."""
    if None in line or None in line.values():
        raise ValueError(f"expected {len(Row._fields)} fields")
    return Row(line["panel"], line["arm"], int(line["runs"]), line["split"],
               float(line["start"]), float(line["start_error"] or 0),
               float(line["change"]), float(line["change_error"] or 0))


def read_table(path):
    """The rows of a file that --csv wrote; ValueError says what it may not hold."""
    rows = []
    with open(path, newline="") as file:
        lines = csv.DictReader(file)
        try:
            if lines.fieldnames == list(Row._fields):
                rows = [read_row(line) for line in lines]
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {lines.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no table; its first line must be {','.join(Row._fields)}, and "
                         "rows must follow")
    return rows


def print_table(rows):
    print("| panel | arm | starts or runs | tested on | start | change |")
    print("|---|---|---|---|---|---|")
    for row in table_rows(rows):
        cells = []
        for name in ("start", "change"):
            error = row[f"{name}_error"]
            cells.append(f"{row[name]} ± {error}" if error else row[name])
        print(f"| {row['panel']} | {row['arm']} | {row['runs']} | {row['split']} | "
              f"{' | '.join(cells)} |")


# ---- Every evaluation --------------------------------------------------------------------------

def every_metric(run):
    """What --every shows of a run, by the names in eval.jsonl."""
    task = running.read_run_config(run)["task"]
    return (*envs.TASKS[task].metrics, "first_try", "retries")


def by_step_and_split(run):
    """The rows of a run's eval.jsonl, the last of equals."""
    rows = {}
    for row in running.read_jsonl(run / "eval.jsonl", "step", "split", "seed"):
        rows[row["step"], row["split"], row["seed"]] = row
    return sorted(rows.values(), key=lambda row: (row["step"], row["split"]))


def print_every(runs):
    """Print the rows of the eval.jsonl of each run, all of one task."""
    metrics = every_metric(runs[0])
    names = " | ".join(metrics).replace("_", " ")
    print(f"| run | step | GFLOPs | split | {names} | repeats | replies |")
    print(f"{'|---' * (len(metrics) + 6)}|")
    for run in runs:
        for row in by_step_and_split(run):
            cells = []
            for name in metrics:
                cells.append(f"{100 * row[name]:.1f} ± {100 * row[f'{name}_stderr']:.1f}")
            replies = ", ".join(f"{status} {count}" for status, count in row["statuses"].items())
            print(f"| {run.name} | {row['step']} | {row['gflops']:,.0f} | {row['split']} | "
                  f"{' | '.join(cells)} | {100 * row['repeats']:.0f} | {replies} |")


def write_every(path, folders, study):
    """Write what print_every prints of all panels into one file, with a column per verdict."""
    metrics, statuses, rows = {}, set(), []
    for folder in folders:
        for run in evaluated_runs(folder):
            for row in by_step_and_split(run):
                cells = {"panel": str(folder.relative_to(study)), "run": run.name,
                         "step": row["step"], "gflops": f"{row['gflops']:.0f}",
                         "split": row["split"], "repeats": f"{100 * row['repeats']:.0f}"}
                for name in every_metric(run):
                    cells[name] = f"{100 * row[name]:.1f}"
                    cells[f"{name}_error"] = f"{100 * row[f'{name}_stderr']:.1f}"
                    metrics |= {name: None, f"{name}_error": None}   # in order, each once
                for status, count in row["statuses"].items():
                    cells[f"replies_{status}"] = count
                    statuses.add(f"replies_{status}")
                rows.append(cells)
    columns = ["panel", "run", "step", "gflops", "split", *metrics, "repeats", *sorted(statuses)]
    write_csv(path, columns, rows)


# ---- Pictures ----------------------------------------------------------------------------------

def draw_rows(plt, rows):
    """A line for each arm, a mark for each split; the training rule grey, another rule in the
    colour of the method."""
    panels = {}   # panel -> its arms
    for row in rows:
        arms = panels.setdefault(row.panel, [])
        if row.arm not in arms:
            arms.append(row.arm)
    counts = [len(arms) for arms in panels.values()]
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.9 * len(panels) + 0.27 * sum(counts)), squeeze=False,
        sharex=True, height_ratios=[count + 1 for count in counts], layout="constrained")
    for axis, (name, arms) in zip(axes.flat, panels.items()):
        for row in rows:
            if row.panel == name:
                draw_change(axis, row, arms.index(row.arm))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(arms)), arms, fontsize=8)
        axis.set_ylim(len(arms) - 0.4, -0.6)
        axis.set_title(name, fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("change since the start, points")
    return fig, axes


def draw_change(axis, row, height):
    """The mark of one row."""
    colour = "grey" if row.split in ("id", "unseen") else COLOURS[collect.method_of(row.arm)]
    axis.errorbar([row.change], [height], xerr=[row.change_error], fmt=MARKS.get(row.split, "x"),
                  color=colour, markersize=5, capsize=2,
                  markerfacecolor="white" if row.split == "unseen" else colour,
                  label=compare.title_of(row.split))


def draw_paths(plt, panels):
    """A path for each arm, from its start over its checkpoints.

    To the right it gains on the training rule; downwards it loses on the other rule.
    """
    fig, axes = plt.subplots(len(panels), 1, figsize=(8, 6.5 * len(panels)), squeeze=False,
                             layout="constrained")
    for axis, (name, panel) in zip(axes.flat, panels.items()):
        for kind, shades in (("SFT", plt.cm.Oranges), ("RFT", plt.cm.Greens),
                             ("RL", plt.cm.Blues)):
            arms = [arm for arm in panel if collect.method_of(arm) == kind]
            for i, arm in enumerate(arms):
                draw_path(axis, arm, panel[arm], color=shades(0.9 - 0.6 * i / len(arms)),
                          marker="os^vDPX*<>"[i % 10])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=name if len(panels) > 1 else "",
                 xlabel="training rule: change since the start, points",
                 ylabel="the other rule: change since the start, points")
        axis.grid(alpha=0.3)
    return fig, axes


def draw_path(axis, arm, steps, **style):
    """The path of one arm over the checkpoints at which both rules were tested."""
    changes = {"id": [0.0], "rule_ood": [0.0]}
    bars = {"id": [0.0], "rule_ood": [0.0]}
    for _, splits in sorted(steps.items()):
        if {"id", "rule_ood"} <= splits.keys():
            for split in ("id", "rule_ood"):
                change, error = with_error([change for _, change in splits[split]])
                changes[split].append(change)
                bars[split].append(error)
    axis.errorbar(changes["id"], changes["rule_ood"], bars["rule_ood"], bars["id"], label=arm,
                  markersize=5, elinewidth=0.5, **style)


def draw_gate(plt, rows):
    """The change of both arms against the share of mix-ups in their start, a picture per rule.

    A mix-up is a first try of the start's teacher at a direction change that is named in the other
    rule's word.
    """
    found = {}   # (panel, method, split) -> row
    for row in rows:
        found[row.panel, collect.method_of(row.arm), row.split] = row
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), squeeze=False, layout="constrained")
    for axis, split in zip(axes.flat, ("id", "rule_ood")):
        for kind, colour in COLOURS.items():
            shares, changes, bars = [], [], []
            for share, panel in GATE.items():
                if row := found.get((panel, kind, split)):
                    shares.append(share)
                    changes.append(row.change)
                    bars.append(row.change_error)
            if shares:
                axis.errorbar(shares, changes, bars, label=kind, color=colour, marker="o",
                              markersize=4, capsize=2)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=compare.TITLES[split], xlabel="share of mix-ups in the start's last steps",
                 ylabel="change since the start, points")
        axis.grid(alpha=0.3)
    return fig, axes


def save(figure, fig, axes):
    """Write a figure with one legend below."""
    compare.legend_below(fig, axes, ncol=2)
    fig.savefig(figure, dpi=130)
    print(f"\nfigure: {figure}")


# ---- The command line --------------------------------------------------------------------------

def parse_arguments():
    parser = running.OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="a folder of panels, each a folder of run folders; or one of "
                        "these panels; or a file that --csv wrote")
    parser.add_argument("--csv", help="write the rows that are printed into this file, too")
    parser.add_argument("--figure", help="draw the changes at the newest checkpoints into this "
                        "file (needs matplotlib)")
    parser.add_argument("--paths", help="draw all checkpoints into this file, the other rule "
                        "against the training rule")
    parser.add_argument("--gate", help="draw the changes of both arms against the share of mix-ups "
                        "in the start into this file")
    parser.add_argument("--every", action="store_true",
                        help="print every evaluation of every run instead")
    args = parser.parse_args()
    if Path(args.study).is_file() and (args.paths or args.every):
        parser.error(f"{args.study}: --paths and --every need the runs, this is a file")
    for path in filter(None, (args.csv, args.figure, args.paths, args.gate)):
        if not Path(path).parent.is_dir():
            parser.error(f"{path}: there is no folder {Path(path).parent}")
    return args


def find_panels(study):
    """The folders in and under `study` that hold evaluated runs; links are followed."""
    folders = set()
    for depth in ("*", "*/*", "*/*/*"):
        for path in study.glob(f"{depth}/eval.jsonl"):
            folders.add(path.parent.parent)
    return sorted(folders)


def main():
    args = parse_arguments()
    study = Path(args.study)
    with running.one_line_errors():
        if args.csv and (Path(args.csv).is_dir() or not Path(args.csv).parent.is_dir()):
            raise ValueError(f"--csv {args.csv}: must be a file in a folder that is there")
        folders = find_panels(study)
        if args.every and folders:
            for folder in folders:
                print_every(evaluated_runs(folder))
            if args.csv:
                write_every(args.csv, folders, study)
            return
        panels = {}
        for folder in folders:
            if panel := read_panel(folder):
                panels[str(folder.relative_to(study))] = panel
        rows = read_table(study) if study.is_file() else rows_of(panels)
        if not rows:
            raise ValueError(f"{study}: no evaluated run in a folder of a folder there")
        if args.gate and not {row.panel for row in rows} & set(GATE.values()):
            raise ValueError(f"{study}: --gate needs one of its panels {', '.join(GATE.values())}")
        print_table(rows)
        if args.csv:
            write_csv(args.csv, Row._fields, table_rows(rows))

    plt = compare.import_pyplot() if args.figure or args.paths or args.gate else None
    if plt is None:
        return
    if args.figure:
        save(args.figure, *draw_rows(plt, rows))
    if args.paths:
        save(args.paths, *draw_paths(plt, panels))
    if args.gate:
        save(args.gate, *draw_gate(plt, rows))


if __name__ == "__main__":
    main()
