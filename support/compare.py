"""Runs beside each other: the table, the sentences and the figure of --compare.

Words used here:

    row      one line of eval.jsonl: a checkpoint, played on one split with one seed
    start    the model that a run goes on from; its rows have step 0
    arm      all runs of one method with one setting, such as "RL" or "SFT lr 0.001"; besides the
             paper's two methods there may be RFT (recipes/rft.py)
    hands    what is played with one seed; for V-IRL these are routes. A hand is known by its seed
             and its number, so it is the same for all runs

Runs of one arm are averaged (support/errors.py says what the error is over).

What the paper found is handed in (`Reference`), so this file imports none of the six files.
"""
import math
import re
import textwrap
from collections import Counter
from typing import NamedTuple

from support import collect, errors, running, settings

# What a split is called in a figure.
TITLES = {
    "id": "the training rule",
    "rule_ood": "the other rule",
    "visual_ood": "the training rule, another look",
    "unseen": "the training rule, held out from training",
    "rule_family": "a family of rules",
}

# Measures of ours that are never above the paper's, for which they stand (docs/differences.md, 22).
LOWER_BOUNDS = ("solved_and_read",)


class Reference(NamedTuple):
    """What the runs are compared with."""
    numbers: dict   # (task, split, metric) -> the paper's % at the start, after SFT, after RL
    signs: dict     # split -> {"SFT": "up" or "down", "RL": "up" or "down"}
    metrics: dict   # task -> the names of its metrics, the paper's measure first

    def metric(self, task, split):
        """The metric by which the paper judges a split."""
        for metric in self.metrics[task]:
            if (task, split, metric) in self.numbers:
                return metric
        return self.metrics[task][0]


# ---- Names -------------------------------------------------------------------------------------

def title_of(split):
    """What a split is called."""
    return TITLES.get(split, split)


def in_words(metric):
    """A metric's name as it is printed, with a remark if it is a lower bound of the paper's."""
    words = metric.replace("_", " ")
    return f"{words} (lower bound)" if metric in LOWER_BOUNDS else words


# What is counted, by metric; the others are named by `in_words`.
COUNTED = {
    "success": "{episodes} solved within {tries} tries{each}",
    "first_try": "{places} solved at the first try",
    "retries": "later tries that are right",
    "repeats": "later tries that are word for word an earlier one",
    "step_accuracy": "replies that are right",
    "step_accuracy_turn": "replies that are right where a direction must be named",
    "paper_step_accuracy": "replies that are right, by the paper's count (per-step accuracy)",
    "recognition": "hands whose four cards the first reply names, in any order",
    "rank_accuracy": "cards that the first reply names in their place",
    "solved_and_read": "hands solved and read (lower bound of the paper's measure)",
}


def task_name(task):
    """A task as the pages spell it: virl-l is V-IRL-L."""
    return task.upper().replace("VIRL", "V-IRL")


# ---- A study: all that is shown ------------------------------------------------------------------

class Cell(NamedTuple):
    """A metric of an arm on a split, in %, and its change since the start, in points."""
    value: float
    error: float
    change: float = 0.0
    change_error: float = 0.0


class Sign(NamedTuple):
    """An arm's change on a split, beside the direction in which it goes in the paper."""
    arm: str
    split: str
    cell: Cell
    num: int         # starts or runs that the error is over
    expected: str    # "up" or "down"
    verdict: str     # of `errors.judge_sign`


class Study(NamedTuple):
    """Evaluated runs beside each other."""
    task: str
    arms: dict       # as `collect.load_arms` returns them
    dropped: str     # the rows that it left out, in words
    tried: list      # the arms but "start"
    splits: list
    metrics: list
    budget: float    # the GFLOPs that all arms reached; compared are the checkpoints nearest to it
    cells: dict      # (metric, split, arm) -> Cell
    signs: list

    def nearest(self, arm, split):
        """The rows of the checkpoint of an arm that is nearest to the budget."""
        points = collect.common_checkpoints(self.arms[arm], split)
        return min(points, key=lambda point: abs(point[0] - self.budget))[1]

    def counted(self, metric):
        """A metric in words: what it is a share of."""
        on_routes = self.task.startswith("virl")
        tries = dict.fromkeys(row["settings"]["env"]["verify_iter"] for row in self.arms["start"])
        return COUNTED.get(metric, in_words(metric)).format(
            tries=" or ".join(map(str, tries)),
            episodes="routes" if on_routes else "hands",
            each=" at each position" if on_routes else "",
            places="positions" if on_routes else "hands")


def study_runs(folders, paper):
    """The Study of run folders, of SFT and of RL; `paper` is a Reference."""
    arms, dropped = collect.load_arms(folders, paper.metrics)
    task = arms["start"][0]["settings"]["task"]
    tried = [arm for arm in arms if arm != "start"]
    splits = list(dict.fromkeys(row["split"] for row in arms["start"]))
    metrics = [*paper.metrics[task], "first_try", "retries", "repeats"]

    # The most compute that every arm has reached on every split.
    budget = math.inf
    for arm in tried:
        for split in splits:
            last_gflops, _ = collect.common_checkpoints(arms[arm], split)[-1]
            budget = min(budget, last_gflops)

    study = Study(task, arms, dropped, tried, splits, metrics, budget, cells={}, signs=[])
    check_hands_of_the_table(study)
    for metric in metrics:
        for split in splits:
            start_rows = [row for row in arms["start"] if row["split"] == split]
            study.cells[metric, split, "start"] = Cell(*errors.score_and_error(start_rows, metric))
            for arm in tried:
                rows = study.nearest(arm, split)
                cell = Cell(*errors.score_and_error(rows, metric),
                            *errors.change_and_error(rows, start_rows, metric))
                study.cells[metric, split, arm] = cell
                expected = paper.signs.get(split, {}).get(collect.method_of(arm))
                if expected and metric == paper.metric(task, split):
                    verdict = errors.judge_sign(expected, cell.change, cell.change_error)
                    study.signs.append(Sign(arm, split, cell, len(errors.clusters(rows)), expected,
                                            verdict))
    return study


def check_hands_of_the_table(study):
    """ValueError unless the checkpoints that the table shows were played on the start's hands.

    A checkpoint that was tested later may have fewer seeds.
    """
    for split in study.splits:
        hands = {"start": {(row["start"], row["seed"]) for row in study.arms["start"]
                           if row["split"] == split}}
        for arm in study.tried:
            rows = study.nearest(arm, split)
            hands[arm] = {(row["start"], row["seed"]) for row in rows}
            if lacking := sorted(hands["start"] - hands[arm]):
                start, seed = lacking[0]
                raise ValueError(f"--compare: on {split} {arm} at step {rows[0]['step']} was not "
                                 f"tested with seed {seed}, as the start {start} and other "
                                 "checkpoints were: evaluate all with the same --seeds")


class Difference(NamedTuple):
    """What one arm has more than another, in points."""
    value: float
    error: float
    by_start: dict     # start -> the difference of the runs from it


def difference(study, one, other, metric, split):
    """The paired Difference of two arms on a split.

    Both are compared at their checkpoints nearest to the budget. With several starts a difference
    is taken at each start, and the error is over starts. With one start the error is over runs if
    an arm has several, as if the arms had nothing in common. It is never below that over hands.
    """
    means = []         # for each arm: start -> mean
    rows_of = [study.nearest(arm, split) for arm in (one, other)]
    for rows in rows_of:
        by_start = {}
        for row in rows:
            by_start.setdefault(row["start"], []).append(100 * row[metric])
        means.append({start: errors.mean(values) for start, values in by_start.items()})
    means_of_one, means_of_other = means
    by_start = {start: value - means_of_other[start] for start, value in means_of_one.items()}
    differences = list(by_start.values())
    value, error = differences[0], 0.0
    if len(differences) > 1:
        value, error = errors.mean_and_standard_error(differences)
    elif any(len(errors.clusters(rows)) > 1 for rows in rows_of):
        error = math.hypot(*[errors.metric_and_error(rows, metric)[1] for rows in rows_of])
    bound = errors.error_over_hands(*rows_of, metric)
    if bound is None:
        bound = math.hypot(*[errors.error_over_episodes(rows, metric) for rows in rows_of])
    if not math.isnan(bound):          # it is nan for rows of an earlier version
        error = max(error, bound)
    return Difference(value, error, by_start)


# ---- In words ------------------------------------------------------------------------------------

def beside_paper(task, row, numbers):
    """In words, a row beside the paper's numbers (as in Reference); "" where the paper has none."""
    found = []
    for (of, split, metric), (start, sft, rl) in numbers.items():
        if (of, split) == (task, row["split"]):
            upper = ""
            if metric in LOWER_BOUNDS:
                upper = f" and success {100 * row['success']:.1f} % (upper bound)"
            found.append(f"{in_words(metric)} {100 * row[metric]:.1f} %{upper}, in the paper "
                         f"{start} at the start, {sft} after SFT, {rl} after RL")
    return "; ".join(found)


def change_in_words(cell):
    """A value and its change since the start, such as "57.6 (+36.4 ± 2.8)"."""
    return f"{cell.value:5.1f} ({cell.change:+.1f} ± {cell.change_error:.1f})"


def metric_rows(study, metric, paper):
    """The lines of one metric as pairs (name, a text for each split): start, arms, paper."""
    starts = [study.cells[metric, split, "start"] for split in study.splits]
    rows = [("start", [f"{cell.value:5.1f} ± {cell.error:.1f}" for cell in starts])]
    for arm in study.tried:
        cells = [study.cells[metric, split, arm] for split in study.splits]
        rows.append((arm, [change_in_words(cell) for cell in cells]))
    numbers = [paper.numbers.get((study.task, split, metric)) for split in study.splits]
    if any(numbers):
        for i, name in enumerate(("start", "SFT", "RL")):    # the order within a split's numbers
            values = [f"{of_split[i]:5.1f}" if of_split else "" for of_split in numbers]
            rows.append((f"paper: {name}", values))
    return rows


def table_of(study, metric, paper):
    """The lines of one metric: a line an arm, a column a split, and the paper's values below."""
    titles = [title_of(split) for split in study.splits]
    width = max(20, *map(len, titles))
    lines = []
    for name, cells in [("", titles), *metric_rows(study, metric, paper)]:
        # A long name has a line for itself.
        if len(name) > 16:
            lines.append(f"  {name}")
            name = ""
        lines.append(f"  {name:16}" + "".join(f" {cell:{width}}" for cell in cells).rstrip())
    return lines


def judged_by(study, paper):
    """The measures by which the findings below a table are told, in words."""
    splits = [split for split in study.splits if split in paper.signs] or study.splits
    names = [in_words(paper.metric(study.task, split)) for split in splits]
    return " and ".join(dict.fromkeys(names))


def difference_in_words(found):
    """Such as "+6.0 ± 2.0 points (2 starts: +4.0, +8.0; p = 0.2)"."""
    words = f"{found.value:+.1f} ± {found.error:.1f} points"
    num = len(found.by_start)
    if num == 1:
        return words
    each = ", ".join(f"{value:+.1f}" for value in found.by_start.values())
    p = errors.p_value(found.value, found.error, num)
    return f"{words} ({num} starts: {each}; p = {p:.2g})"


def contrasts(study, paper):
    """How much more one method has than another: a sentence for each pair of arms and split."""
    pairs = []
    for method, other_method in ("RL", "SFT"), ("RL", "RFT"), ("RFT", "SFT"):
        for one in study.tried:
            for other in study.tried:
                if collect.method_of(one) == method and collect.method_of(other) == other_method:
                    pairs.append((one, other))
    sentences = []
    for one, other in pairs:
        for split in study.splits:
            told = []
            # The paper's measure needs no name here: `judged_by` names it above the sentences.
            measures = {paper.metric(study.task, split): "", "first_try": "first tries "}
            for metric, words in measures.items():
                found = difference(study, one, other, metric, split)
                told.append(f"{words}{difference_in_words(found)}")
            sentences.append(f"{one} minus {other} on {title_of(split)}: "
                             f"{'; '.join(told)}.")
    return sentences


def findings(study, paper):
    """What was found: a sentence for each change, how many go as in the paper, the contrasts."""
    sentences = []
    for sign in study.signs:
        cell, p = sign.cell, ""
        if sign.num > 1:
            p = f" (p = {errors.p_value(cell.change, cell.change_error, sign.num):.2g})"
        in_paper = {"met": "as in the paper, where it goes",
                    "not met": "unlike the paper, where it goes",
                    "undecided": "undecided; in the paper it goes"}[sign.verdict]
        sentences.append(f"{sign.arm} on {title_of(sign.split)}: {cell.change:+.1f} ± "
                         f"{cell.change_error:.1f} points{p}, {in_paper} {sign.expected}.")
    counts = Counter(sign.verdict for sign in study.signs)
    if study.signs:
        sentences.append(f"Of these {len(study.signs)} changes {counts['met']} go as in the paper, "
                         f"{counts['not met']} go the other way, {counts['undecided']} are "
                         "undecided: within two standard errors.")
    return sentences + contrasts(study, paper)


def episodes_called(study):
    """What an episode of the task is called."""
    return "routes" if study.task.startswith("virl") else "hands"


def how_many(study):
    """Such as "Runs from 1 start: SFT 2, RL 1. Each is tested on 500 hands; errors are over
    hands"."""
    runs = {arm: {row["run"] for row in study.arms[arm]} for arm in study.tried}
    counts = ", ".join(f"{arm} {len(runs[arm])}" for arm in study.tried)
    num_starts = len({row["start"] for row in study.arms["start"]})

    # A start or run that was tested with two seeds has played twice as many.
    num_hands = {}     # (start or run, split) -> seed -> how many hands
    for arm in study.arms:
        for row in study.arms[arm]:
            who = row["start"] if arm == "start" else row["run"]
            if row["split"] in study.splits:
                by_seed = num_hands.setdefault((who, row["split"]), {})
                by_seed[errors.hands_of(row)] = row.get("routes", row["episodes"])
    tested = dict.fromkeys(f"{sum(by_seed.values()):,}" for by_seed in num_hands.values())

    # What the errors are over: starts, else runs of arms that have several, else hands or routes.
    played = episodes_called(study)
    over = played
    several = [arm for arm in study.tried if len(runs[arm]) > 1]
    if several:
        single = [arm for arm in study.tried if arm not in several] + ["the start"]
        over = f"runs for {' and '.join(several)}, over {played} for {' and '.join(single)}"
    if num_starts > 1:
        over = "starts"
    return (f"Runs from {num_starts} start{'s' * (num_starts > 1)}: {counts}. Each is "
            f"tested on {' or '.join(tested)} {played}; errors are over {over}.")


def compared_at(study):
    """Such as "SFT at 13,926 and RL at 14,101 GFLOPs": the checkpoints in the tables."""
    words = []
    for arm in study.tried:
        points = {}        # in words, each once
        for split in study.splits:
            gflops = errors.mean([row["gflops"] for row in study.nearest(arm, split)])
            points[f"{gflops:,.0f}"] = None
        words.append(f"{arm} at {' or '.join(points)}")
    return f"{' and '.join(words)} GFLOPs"


def left_out(study):
    """The splits and rows that were tested but are not shown, in words; "" if there are none."""
    tested = {row["split"] for arm in study.tried for row in study.arms[arm]}
    not_shown = sorted(tested - set(study.splits))
    told = []
    if not_shown:
        told.append(f"Not shown: {', '.join(not_shown)}, on which the start was not tested.")
    if study.dropped:
        told.append(f"Left out, since not all arms were tested on these hands: {study.dropped}.")
    return " ".join(told)


def trained_on(study):
    """Sentences on the arms that were trained on another rule than that of the split `id`."""
    sentences = []
    for arm in study.tried:
        config = running.read_run_config(study.arms[arm][0]["run"])
        words = [*config.get("mix", ()), *config.get("split", ()), *config.get("env", ())]
        if config.get("data"):
            sentences.append(f"{arm} was trained on the file {config['data']}.")
        elif any(re.match("rule|action_space|target", word) for word in words):
            sentences.append(f"{arm} was trained on {' '.join(words)}.")
    return " ".join(sentences)


# How a test is made, whatever its split, with the value that need not be told.
HOW_TESTED = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": None, "dtype": None,
              "verify_iter": None, "feedback": "informative", "guided": False, "target": 24,
              "turn_words": "wrapped", "resolution": None, "card_dir": "", "prompt_file": ""}


def tested_with(study):
    """Sentences on how the tests were made: what is not usual, and what differs between splits."""
    sentences = []
    for name, usual in HOW_TESTED.items():
        values = {}    # split -> value; what a split's own name tells is left out
        for row in study.arms["start"]:
            chosen = settings.by_name(row["settings"])
            if name in chosen and f"{name}=" not in row["split"]:
                values[row["split"]] = chosen[name]
        values = {split: values[split] for split in study.splits if split in values}
        different = {str(value) for value in values.values()}
        if len(different) > 1:
            each = ", ".join(f"{'none' if value == '' else value} on {title_of(split)}"
                             for split, value in values.items())
            sentences.append(f"Splits were not tested alike: {name} {each}.")
        elif usual is not None and different - {str(usual)}:
            sentences.append(f"Tested with {name} {different.pop()}.")
    return " ".join(sentences)


def cut_replies(study):
    """Which arms had more than a twentieth of their replies cut at the limit, in words, or ""."""
    told = []
    for arm in ("start", *study.tried):
        rows = []
        for split in study.splits:
            rows += study.nearest(arm, split)
        replies = sum(row.get("replies", 0) for row in rows)
        cut = sum(row.get("endings", {}).get("length", 0) for row in rows)
        if cut > replies / 20:
            told.append(f"{arm} {100 * cut / replies:.0f} %")
    return f"Replies cut at --max-new-tokens: {', '.join(told)}." if told else ""


BOUND = ("Lower bound: the official code plays on until one reply solves a hand and names its "
         "cards. So the paper's measure lies between solved and read and success. Its changes may "
         "be larger or smaller than those above.")


def print_study(study, paper):
    """Print tables of at most 80 columns for up to three splits, then what was found."""
    print(f"\n{task_name(study.task)}: values in %, changes since the start in points, ± standard "
          "errors")
    for words in (how_many(study), f"Compared: {compared_at(study)} of post-training.",
                  left_out(study), trained_on(study), tested_with(study), cut_replies(study)):
        if words:
            print(textwrap.fill(words, 80))
    for metric in study.metrics:
        print(f"\n{textwrap.fill(study.counted(metric), 80)}")
        print("\n".join(table_of(study, metric, paper)))
    if any(metric in LOWER_BOUNDS for metric in study.metrics):
        print(f"\n{textwrap.fill(BOUND, 80)}")
    print(f"\nFound, in points of {judged_by(study, paper)}:")
    for sentence in findings(study, paper):
        print(textwrap.fill(sentence, 80, subsequent_indent="  "))


def compare(folders, figure, paper, write_page=None):
    """Compare run folders, of SFT and of RL: print the tables, draw the curves and write a page.

    figure: a path, or "" for none. paper: a Reference. write_page(study, paper), if given, writes
    the page and returns what to print about it. All arms are compared at the checkpoints nearest to
    the compute that every arm has spent.
    """
    study = study_runs(folders, paper)
    # Files come first: behind `| head` the printing ends early.
    page = write_page(study, paper) if write_page else ""
    drawn = figure and draw(study, figure, paper)
    print_study(study, paper)
    if drawn:
        print(f"\nfigure: {figure}")
    if page:
        print(f"\n{page}")


# ---- The figure --------------------------------------------------------------------------------

def import_pyplot():
    """matplotlib.pyplot, or None after a line that says that it is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nno figure: matplotlib is not installed (pip install matplotlib)")
        return None
    return plt


def legend_below(fig, axes, **options):
    """One legend below all panels, each label once."""
    labels = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            labels[label] = handle
    fig.legend(labels.values(), labels, loc="outside lower center", fontsize=8, **options)


def draw(study, figure, paper):
    """Draw the paper's measure and first tries against GFLOPs: a panel per measure and split.
    Returns whether that was possible.

    A method with one or two settings has a curve for each. With more it has one curve, their mean,
    and their range is shaded. All panels of a measure have one axis, so they can be compared.
    """
    plt = import_pyplot()
    if plt is None:
        return False
    metrics = list(dict.fromkeys([study.metrics[0], "first_try"]))
    size = (4.5 * len(study.splits), 3.6 * len(metrics))
    fig, axes = plt.subplots(len(metrics), len(study.splits), figsize=size, squeeze=False,
                             sharex=True, sharey="row", layout="constrained")
    for panels, metric in zip(axes, metrics):
        for axis, split in zip(panels, study.splits):
            for method, colours in (("SFT", ("tab:orange", "goldenrod")),
                                    ("RFT", ("tab:green", "yellowgreen")),
                                    ("RL", ("tab:blue", "tab:cyan"))):
                draw_method(axis, study, method, colours, metric, split)
            start = study.cells[metric, split, "start"].value
            axis.plot([0], [start], "k*", markersize=11, label="start", zorder=3)
            draw_paper(axis, paper.numbers.get((study.task, split, metric), ()))
            axis.set(title=f"{task_name(study.task)}: {title_of(split)}",
                     xlabel="GFLOPs of post-training")
        panels[0].set_ylim(bottom=-0.03 * panels[0].get_ylim()[1])   # no curve on the frame
        panels[0].set_ylabel(textwrap.fill("% of " + study.counted(metric), 34))
    legend_below(fig, axes, ncol=4)
    fig.savefig(figure, dpi=150)
    return True


def curve_of(study, arm, metric, split, steps=None):
    """The points (GFLOPs, %, error) of an arm, the start's first; `steps` limits them if given."""
    start = study.cells[metric, split, "start"]
    points = [(0.0, start.value, start.error)]
    for gflops, rows in collect.common_checkpoints(study.arms[arm], split):
        if steps is None or rows[0]["step"] in steps:
            points.append((gflops, *errors.score_and_error(rows, metric)))
    return points


def steps_of(study, arm, split):
    """The steps of the checkpoints that all runs of an arm have."""
    return {rows[0]["step"] for _, rows in collect.common_checkpoints(study.arms[arm], split)}


def draw_method(axis, study, method, colours, metric, split):
    """The curves of all arms of a method, or their mean and range if they are more than two."""
    arms = [arm for arm in study.tried if collect.method_of(arm) == method]
    steps = None
    if len(arms) > 2:
        steps = set.intersection(*[steps_of(study, arm, split) for arm in arms])
    curves = [curve_of(study, arm, metric, split, steps) for arm in arms]
    if len(arms) <= 2:
        for arm, points, colour in zip(arms, curves, colours):
            gflops, values, bars = zip(*points)
            axis.errorbar(gflops, values, bars, label=arm, color=colour, marker="o", markersize=3,
                          capsize=2)
        return
    # The checkpoints of one method are at nearly the same GFLOPs in all settings. A run that was
    # stopped has one more, which is left out.
    gflops, means, lows, highs = [], [], [], []
    for points in zip(*curves):        # of one checkpoint, a point for each arm
        arm_gflops, arm_values, _ = zip(*points)
        gflops.append(errors.mean(arm_gflops))
        means.append(errors.mean(arm_values))
        lows.append(min(arm_values))
        highs.append(max(arm_values))
    axis.plot(gflops, means, color=colours[0], marker="o", markersize=3,
              label=f"{method}, {len(arms)} settings: mean and range")
    axis.fill_between(gflops, lows, highs, color=colours[0], alpha=0.2)


def draw_paper(axis, numbers):
    """The paper's values, where it has some: dotted lines with their names inside the frame."""
    for name, colour, value in zip(("start", "SFT", "RL"), ("black", "tab:orange", "tab:blue"),
                                   numbers):
        axis.axhline(value, color=colour, linestyle=":", linewidth=1, zorder=0)
        axis.text(0.99, value, f"paper: {name} {value:g}", color=colour, fontsize=7, ha="right",
                  va="bottom", transform=axis.get_yaxis_transform())
