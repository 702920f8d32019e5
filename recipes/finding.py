"""Draw the README's figure from the rows in results/data/: both rules, SFT and RL, four tasks.

    python recipes/finding.py results/finding.png          # needs matplotlib; no runs, no model

A curve is the mean over the starts of a task, with its standard error. Each arm has one setting:
SFT at 1e-3, and RL at temperature 0.2. On V-IRL-L, RL's is the one of four settings that gains.
"""
import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support import compare, errors, running

DATA = ROOT / "results" / "data"


class Task(NamedTuple):
    """What the figure shows of a task."""
    rows: str            # results/data/ROWS_every_evaluation.csv
    measure: str         # its column
    label: str
    rl_setting: tuple    # learning rate and temperature, as they stand there


TASKS = {
    "GP-L": Task("gp_l", "success", "hands solved, %", ("5e-5", "0.2")),
    "V-IRL-L": Task("virl_l", "paper_step_accuracy", "per-step accuracy, %", ("3e-5", "0.2")),
    "GP-VL": Task("gp_vl", "solved_and_read", "hands solved and read, %", ("3e-5", "0.2")),
    "V-IRL-VL": Task("virl_vl", "paper_step_accuracy", "per-step accuracy, %", ("3e-5", "0.2")),
}
RULES = {"id": "training rule", "rule_ood": "the other rule"}
COLOURS = {"SFT": "tab:orange", "RL": "tab:blue"}


def read_rows(task):
    """(rows of the starts, rows of the checkpoints) of SFT at 1e-3 and of RL with its setting."""
    with open(DATA / f"{task.rows}_every_evaluation.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    settings = {"SFT": ("1e-3", ""), "RL": task.rl_setting}
    starts = {}           # once each: which arm's folder holds its evaluation does not matter
    checkpoints = []
    for row in rows:
        if row["step"] == "0":
            starts[row["start"], row["split"]] = row
        elif (row["learning_rate"], row["temperature"]) == settings[row["arm"]]:
            checkpoints.append(row)
    return list(starts.values()), checkpoints


def curve(rows, measure):
    """[(1,000 GFLOPs, mean, standard error), ...], one for each step, over the starts."""
    scores, compute = defaultdict(list), defaultdict(list)
    for row in rows:
        scores[int(row["step"])].append(float(row[measure]))
        compute[int(row["step"])].append(float(row["gflops"]) / 1000)
    points = []
    for step, own in sorted(scores.items()):
        points.append((mean(compute[step]), *errors.mean_and_standard_error(own)))
    return points


def main(arguments):
    with running.one_line_errors():
        named = len(arguments) == 1 and not arguments[0].startswith("-")
        if not named or not Path(arguments[0]).resolve().parent.is_dir():
            raise ValueError("expected one file to draw into, in a folder that is there")
    plt = compare.import_pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(len(RULES), len(TASKS), figsize=(13.5, 5.2), layout="constrained")
    for column, (title, task) in zip(axes.T, TASKS.items()):
        starts, checkpoints = read_rows(task)
        num_starts = len({row["start"] for row in checkpoints})
        for axis, split in zip(column, RULES):
            before = curve([row for row in starts if row["split"] == split], task.measure)
            for arm, colour in COLOURS.items():
                rows = [row for row in checkpoints if (row["arm"], row["split"]) == (arm, split)]
                x, y, error = zip(*before, *curve(rows, task.measure))
                axis.errorbar(x, y, error, label=arm, color=colour, marker="o", markersize=3,
                              capsize=2)
            axis.plot(*before[0][:2], "k*", markersize=11, label="start")
            axis.set(title=f"{title}, {RULES[split]} ({num_starts} starts)", ylabel=task.label)
            axis.set_ylim(bottom=min(-0.5, axis.get_ylim()[0]))
        column[-1].set_xlabel("1,000 GFLOPs of post-training")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3)
    figure.savefig(arguments[0], dpi=110)
    print(f"figure: {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
