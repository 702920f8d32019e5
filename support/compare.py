"""Runs beside each other: arms, errors, p values, and the table and figure of --compare.

Words used here:

    row      one line of eval.jsonl: a checkpoint, played on one split with one seed
    start    the model that a run goes on from; its rows have step 0
    arm      all runs of one method with one setting, such as "RL" or "SFT lr 0.001"; besides the
             paper's two methods there may be RFT (recipes/rft.py)
    hands    what is played with one seed; for V-IRL these are routes. A hand is known by its seed
             and its number, so it is the same for all runs

Runs of one arm are averaged. The error is over starts, or over runs if there is one start, but
never below the error over hands. A single run, or a single start, has the error over hands alone.
Where each run plays hands of its own (--seeds), chance in the hands is part of the error over runs.
A change is taken run by run, against the start that the run went on from, on the same hands.

What the paper found is handed in (`Reference`), so this file imports none of the six files.
recipes/panels.py names arms and computes errors with the functions of this file as well.
"""
import json
import math
import os
import re
import textwrap
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

from support import command_line, digests, logs, running, settings

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

# Settings that say how a run is executed. Runs that differ only in these are one arm.
NOT_OF_THE_METHOD = {
    "out", "model", "seed", "updates", "rounds", "save_every", "keep_resume", "micro_batch_tokens",
    "generate_tokens", "kept_gib", "gradient_checkpointing", "dtype", "param_dtype", "device",
}
# The script that makes runs of a method. Its defaults stand in for options that an old run lacks.
SCRIPTS = {"SFT": "sft.py", "RL": "rl.py", "RFT": "recipes/rft.py"}


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


def method_of(arm):
    """"start", "SFT", "RL" or "RFT" (recipes/rft.py)."""
    return arm.split()[0]


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


# ---- Means and errors --------------------------------------------------------------------------

def mean(values):
    return sum(values) / len(values)


def mean_and_standard_error(values):
    """The mean of two or more values, and its standard error.

        error = sqrt(sum of (value - mean)^2 / (n - 1) / n)
    """
    middle = mean(values)
    squares = sum((value - middle) ** 2 for value in values)
    return middle, math.sqrt(squares / (len(values) - 1) / len(values))


def clusters(rows):
    """Rows in the groups that an error is taken over: by start if there are several, else by run.

    Rows of one group are no independent samples, so they are averaged before the error is taken.
    """
    several_starts = len({row["start"] for row in rows}) > 1
    key = "start" if several_starts else "run"
    grouped = {}
    for row in rows:
        grouped.setdefault(row[key], []).append(row)
    return list(grouped.values())


def metric_and_error(rows, metric):
    """The mean of a metric and its standard error, both in %.

    The error is over starts or runs if there are several, else over the episodes of the one run.
    It is nan where rows of an earlier version hold no error over episodes.
    """
    means = []
    for cluster in clusters(rows):
        means.append(100 * mean([row[metric] for row in cluster]))
    if len(means) > 1:
        return mean_and_standard_error(means)
    # The rows of the one run are of different seeds, so their errors are independent.
    squares = sum(row.get(f"{metric}_stderr", math.nan) ** 2 for row in rows)
    return means[0], 100 * math.sqrt(squares) / len(rows)


def hands_of(row):
    """A name for the hands of a row: its seed. Routes in file order are the same for all seeds."""
    return "in order" if "routes" in row else row["seed"]


def error_over_episodes(rows, metric):
    """The standard error, in %, that the episodes of these rows give the mean of a metric.

    Rows of one seed have the same hands. They are no independent samples, so their errors are
    averaged. The result is nan where rows of an earlier version hold no error.
    """
    by_seed = {}
    for row in rows:
        by_seed.setdefault(hands_of(row), []).append(row.get(f"{metric}_stderr", math.nan))
    squares = sum((100 * mean(errors)) ** 2 for errors in by_seed.values())
    return math.sqrt(squares) / len(by_seed)


def score_and_error(rows, metric):
    """The mean of a metric and its standard error, both in %, of a start or an arm.

    The error is never below that over episodes: a few starts or runs may agree by chance. Rows of a
    single start differ in their hands alone, so theirs is the error over episodes.
    """
    score, error = metric_and_error(rows, metric)
    bound = error_over_episodes(rows, metric)
    if math.isnan(bound):                        # rows of an earlier version
        return score, error
    of_one_start = rows[0]["step"] == 0 and len({row["start"] for row in rows}) == 1
    return score, bound if of_one_start else max(error, bound)


def solved_by_hand(rows):
    """{seed: [for each hand the share of the rows that solved it]}.

    None if a row does not tell which hands it solved, or if rows of one seed have not equally many.
    """
    by_seed = {}       # seed -> texts of 1 and 0, a digit for each hand
    for row in rows:
        solved = row.get("solved", "")
        # Routes that are played in order come round again: then each round is a text.
        period = row.get("routes") or len(solved) or 1
        rounds = [solved[at:at + period] for at in range(0, len(solved), period)]
        by_seed.setdefault(hands_of(row), []).extend(rounds or [""])
    shares = {}
    for seed, texts in by_seed.items():
        lengths = {len(text) for text in texts}
        if len(lengths) > 1 or min(lengths) < 2:       # one hand alone gives no standard error
            return None
        shares[seed] = [digits.count("1") / len(texts) for digits in zip(*texts)]
    return shares


def error_over_hands(rows, other_rows, metric):
    """The standard error, in points, of the mean of `rows` less that of `other_rows`, over hands.

    The difference is taken hand by hand. A hand that several runs have played counts once, with the
    mean of its differences. None for metrics other than success, which alone is known hand by hand,
    and None unless both have the same hands.
    """
    one, other = solved_by_hand(rows), solved_by_hand(other_rows)
    if metric != "success" or not one or not other:
        return None
    num_hands = [{seed: len(shares) for seed, shares in each.items()} for each in (one, other)]
    if num_hands[0] != num_hands[1]:
        return None
    squares = 0.0
    for seed in one:
        differences = [100 * (ours - theirs) for ours, theirs in zip(one[seed], other[seed])]
        _, error = mean_and_standard_error(differences)
        squares += error ** 2
    return math.sqrt(squares) / len(one)


def on_the_same_hands(run_rows, start_rows):
    """(rows of one run, rows of its start) on the hands that both have played.

    ValueError if there are none.
    """
    start, split = run_rows[0]["start"], run_rows[0]["split"]
    rows = [row for row in start_rows if row["start"] == start]
    seeds = {row["seed"] for row in run_rows} & {row["seed"] for row in rows}
    if not seeds:
        first = sorted({row["seed"] for row in run_rows})[0]
        raise ValueError(f"{run_rows[0]['run']} was tested on {split} with seed {first}, but its "
                         f"start {start} never was, so both have no hands in common: run "
                         f"evaluate.py --run-folder {run_rows[0]['run']} --seeds {first}")
    run_rows = [row for row in run_rows if row["seed"] in seeds]
    return run_rows, [row for row in rows if row["seed"] in seeds]


def change_and_error(rows, start_rows, metric):
    """The mean change of a metric since the start and its standard error, both in points.

    Each run is compared with the start that it went on from, on the same hands. The error is over
    starts or runs, but never below a bound, the error over hands: a few runs may agree by chance.
    Where single hands are not known, the bound is the error over the episodes of the runs. With one
    start it then also holds the error over the start's episodes, as if both were independent.
    """
    # The change of each run is written as a row, in shares as all rows are. So `metric_and_error`
    # averages changes as it averages scores.
    changes, all_before = [], []
    for run in dict.fromkeys(row["run"] for row in rows):
        after = [row for row in rows if row["run"] == run]
        after, before = on_the_same_hands(after, start_rows)
        all_before += before
        change = mean([row[metric] for row in after]) - mean([row[metric] for row in before])
        error = error_over_hands(after, before, metric)
        if error is None:
            errors = [metric_and_error(each, metric)[1] for each in (after, before)]
            error = math.hypot(*errors)
        changes.append({"run": run, "start": after[0]["start"], metric: change,
                        f"{metric}_stderr": error / 100})
    change, error = metric_and_error(changes, metric)        # now in points

    bound = error_over_hands(rows, all_before, metric)
    if bound is None:
        bound = error_over_episodes(rows, metric)
        if len({row["start"] for row in rows}) == 1:
            bound = math.hypot(bound, error_over_episodes(all_before, metric))
    if math.isnan(error) or math.isnan(bound):   # rows of an earlier version: no bound
        return change, error
    return change, max(error, bound)


def p_value(change, error, num):
    """Student's t test: how likely a mean change as far from 0 as this is, if there is no change.

    `num` starts or runs give the mean `change` and its standard error `error`. Where
    `change_and_error` raised that to the error over episodes, the p value is too large. The test is
    two-sided, with f = num - 1 degrees of freedom:

        t     = change / error
        angle = atan(|t| / sqrt(f))
        p     = 1 - A

    A is the probability of a t nearer to 0. For a whole f it is a finite sum, with s = sin(angle)
    and c = cos(angle) (Abramowitz and Stegun 26.7.3 and 26.7.4):

        f odd     A = 2/pi (angle + s (c + 2/3 c^3 + 2*4/(3*5) c^5 + ...))   up to c^(f-2)
        f even    A = s (1 + 1/2 c^2 + 1*3/(2*4) c^4 + ...)                  up to c^(f-2)
    """
    freedom = num - 1
    odd = freedom % 2
    angle = math.atan2(abs(change), error * math.sqrt(freedom))   # an error of 0 is allowed
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = cosine if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term * sine
        term *= (power + 1) / (power + 2) * cosine ** 2
    nearer = (total + angle) * 2 / math.pi if odd else total
    return 1 - nearer


def judge_sign(expected, change, error):
    """Whether a change goes the paper's way by more than two standard errors."""
    if not abs(change) > 2 * error:      # an error that is not known (nan) decides nothing
        return "undecided"
    return "met" if (change > 0) == (expected == "up") else "not met"


# ---- Arms --------------------------------------------------------------------------------------

def own_words(value, values):
    """The words of a setting that not all `values` have, as one text.

    ["root=city", "reward=random"] beside ["root=city"] is "reward=random".
    """
    words = []
    for word in value or ():
        if not all(word in (other or ()) for other in values):
            words.append(word)
    return " ".join(words)


def name_setting(key, value, values):
    """A setting as part of an arm's name; `values` are those of all runs of the same method.

    It is "" where all runs agree, and where the setting is off (False, 0 or empty).
    """
    if all(other == value for other in values):
        return ""
    if isinstance(value, list):
        # A setting is named by its own words. But the order of words counts, too: in `id fold=train
        # rule_ood` the fold is of id alone. If own words name two settings alike, all words stand.
        named = own_words(value, values)
        alike = any(own_words(other, values) == named for other in values if other != value)
        value = " ".join(value) if alike else named
    if not value:
        return ""
    if value is True:
        return key
    return value if key == "env" else f"{key} {value}"


@cache
def defaults_of(method):
    """The defaults of the script that makes runs of a method, as a config.json has them."""
    path = Path(__file__).parent.parent / SCRIPTS[method]
    try:
        config = command_line.sketch_config(path, "Config")()
    except (OSError, ValueError, LookupError) as error:   # a script rewritten in another way
        running.print0(f"{path.name}: its defaults cannot be read ({error}), so runs from before "
                       "an option was there may stand apart from later ones")
        return {}
    return json.loads(json.dumps(asdict(config)))


def name_arms(configs):
    """The arm of each run, by the run's config: its method, and the settings in which runs differ.

    Where a run's config lacks an option, since it is older, the option's default counts.

    >>> name_arms({"a": {"steps": 400, "lr": 0.001, "seed": 0},
    ...            "b": {"steps": 400, "lr": 0.0001, "seed": 1},
    ...            "c": {"updates": 20, "lr": 1e-05, "seed": 0}})
    {'a': 'SFT lr 0.001', 'b': 'SFT lr 0.0001', 'c': 'RL'}
    """
    methods = {}
    for run, config in configs.items():
        methods[run] = "SFT"
        for name, method in ("updates", "RL"), ("rounds", "RFT"):   # sft.py has neither
            if name in config:
                methods[run] = method
    configs = {run: defaults_of(methods[run]) | config for run, config in configs.items()}
    names = {}
    for run, config in configs.items():
        of_method = [configs[other] for other in configs if methods[other] == methods[run]]
        words = [methods[run]]
        for key in sorted(config.keys() - NOT_OF_THE_METHOD):
            if key == "lr_final" and config[key] == config.get("lr"):
                continue   # a constant learning rate is named once
            word = name_setting(key, config[key], [other.get(key) for other in of_method])
            if word:
                words.append(word)
        names[run] = " ".join(words)
    return names


def differing_settings(one, two):
    """In words, how the settings of two evaluations differ; "" if they do not."""
    # The same files may lie elsewhere.
    same_files = one.get("files") and one.get("files") == two.get("files")
    moved = digests.NAME_FILES if same_files else ()
    one = {**one, **one.get("env", {})}        # settings of the environment beside the others
    two = {**two, **two.get("env", {})}
    one, two = {"files": two.get("files"), **one}, {"files": one.get("files"), **two}
    found = []
    for name in {**one, **two}:
        if name in moved:
            continue
        differ = logs.resolved(one.get(name)) != logs.resolved(two.get(name))
        if name != "env" and differ:
            found.append(f"{name} {one.get(name)!r} and {two.get(name)!r}")
    return ", ".join(found)


def read_rows(run, metrics):
    """The rows of a run's eval.jsonl, without those that a later row replaces.

    ValueError if one lacks a metric that its task has today. ValueError if a checkpoint was trained
    anew between two tests: then its rows are of two models.
    """
    rows = {}
    keys = ("step", "split", "seed", "settings", "gflops")
    for row in running.read_jsonl(run / "eval.jsonl", *keys):
        rows[row["step"], row["split"], row["seed"]] = row
    for row in rows.values():
        if lacking := set(metrics[row["settings"]["task"]]) - row.keys():
            raise ValueError(f"run {str(run)!r}: its eval.jsonl is from an earlier version, "
                             f"without {min(lacking)}; run evaluate.py --run-folder {run} again")
    content = {}       # (step, what a row tells of its model) -> that of the first such row
    for row in rows.values():
        for name in "weights", "texts":    # rows of an earlier version do not tell
            own = row.get(name)
            if not own or content.setdefault((row["step"], name), own) == own:
                continue
            raise ValueError(f"run {str(run)!r}: the model of step {row['step']} was made anew "
                             f"between two tests (its {name} are others); run evaluate.py "
                             f"--run-folder {run} again, with all --splits and --seeds")
    return list(rows.values())


def files_of(config):
    """The task and splits of a run, and the paths of the files that its settings name."""
    found = [config.get("task")]
    common = settings.read_settings(config.get("env") or ())
    words = config.get("split") or config.get("mix") or ("id",)
    for split in settings.read_splits(words, weighted=True):
        chosen = {**common, **split.settings}
        paths = [os.path.realpath(chosen.get(name, "")) for name in digests.NAME_FILES]
        found.append([split.name, *paths])
    return found


def with_first_paths(configs):
    """The configs, where the files of settings have the paths that the first run with the same
    files gives them: they may have been moved between two runs."""
    first = {}         # (name, digest) -> the word of the first run
    found = {}
    for run, config in configs.items():
        digest = logs.read_object(run / "inputs.json").get("files")
        words = []
        for word in config.get("env") or ():
            name = word.partition("=")[0]
            if digest and name in digests.NAME_FILES:
                word = first.setdefault((name, digest), word)
            words.append(word)
        found[run] = {**config, "env": words}
    return found


def name_starts(configs):
    """{run: its start, as the first run spells it}. ValueError if a config.json names none.

    A start is known by its path, and a copy of it by the digests that runs tell of it.
    """
    told = {}          # real path -> digests, from the first run that tells
    for run, config in configs.items():
        if "model" not in config:
            raise ValueError(f"run {str(run)!r}: its config.json is gone, or names no model that "
                             "it started from")
        inputs = logs.read_object(run / "inputs.json")
        if inputs.get("start"):
            content = tuple(inputs.get(name) for name in digests.OF_START)
            told.setdefault(os.path.realpath(config["model"]), content)
    spellings, names = {}, {}
    for run, config in configs.items():
        path = os.path.realpath(config["model"])
        names[run] = spellings.setdefault(told.get(path, path), os.path.normpath(config["model"]))
    return names


def check_inputs(run, config, rows, seen):
    """ValueError if a run began with other files of one name than the runs before it.

    A start is known by its path, and so are prompt files, cities, cards and data. Others may have
    come there between two runs. `seen` holds what is named -> (the first run that tells, a digest).
    """
    inputs, start = logs.read_object(run / "inputs.json"), os.path.normpath(config["model"])
    told = []
    for name, of_row in digests.OF_START.items():
        told += [(of_row, row.get(of_row)) for row in rows if row["step"] == 0]
        told.append((of_row, inputs.get(name)))
    for name, own in told:
        key = name, os.path.realpath(start)
        first_run, first = seen.setdefault(key, (run, own)) if own else (run, own)
        if own != first:
            raise ValueError(f"the start {start} has other {digests.WORDS_OF[name]} in {run} than "
                             f"in {first_run}: it was made anew in between, so these runs have no "
                             "start in common")
    named = {"files": json.dumps(files_of(config)),
             "data": os.path.realpath(config.get("data") or "")}
    for name, what in ("files", "prompt file, city or card_dir"), ("data", "file of --data"):
        own = inputs.get(name)
        first_run, first = seen.setdefault(named[name], (run, own)) if own else (run, own)
        if own != first:
            raise ValueError(f"{run} was trained with another {what} than {first_run}, under the "
                             "same name: train one of them anew")


def collect_rows(folders, metrics):
    """The evaluated rows of run folders by arm: {"start": [row, ...], "SFT": [...], "RL": [...]}.

    `metrics`: as in Reference. Each row also names its "start" and its "run". A start's rows belong
    to no run: each seed that it was evaluated on counts as one. ValueError unless all were tested
    on one task, and on each split with one set of settings. ValueError if a run is there twice, as
    are two of an arm with the same start and --seed.
    """
    # Each folder once, SFT first.
    runs = {os.path.realpath(folder): Path(folder) for folder in folders}
    runs = list(runs.values())
    for run in runs:
        logs.check_evaluated(run)
    configs = {run: running.read_run_config(run) for run in runs}
    names = name_arms(with_first_paths(configs))
    runs.sort(key=lambda run: (not names[run].startswith("SFT"), names[run]))

    start_of = name_starts({run: configs[run] for run in runs})
    arms = {"start": []}
    first_rows = {}    # split -> the first run that was evaluated on it, and its settings
    first_task = None  # the first run, and the task that it was tested on
    began_with = {}    # for `check_inputs`
    starts_seen = {}   # (start, split, seed) -> the first run with this row, and its results
    seeds_seen = {}    # (arm, start, seed of the training, numeric types) -> the run
    for run in runs:
        # Find the run's start, and see that no other run is the same.
        rows = read_rows(run, metrics)
        start = start_of[run]
        check_inputs(run, configs[run], rows, began_with)
        if "seed" in configs[run]:
            numbers = configs[run].get("dtype"), configs[run].get("param_dtype")
            twin = seeds_seen.setdefault((names[run], start, configs[run]["seed"], numbers), run)
            if twin != run:
                raise ValueError(f"{twin} and {run} have one start, method and --seed "
                                 f"{configs[run]['seed']}, so they are one run twice: leave one "
                                 "out")
        # Put its rows into its arm, those of step 0 under "start".
        for row in rows:
            split = row["split"]
            task = row["settings"]["task"]
            first_task = first_task or (run, task)
            if task != first_task[1]:
                raise ValueError("runs are compared on one task: "
                                 f"{first_task[0]} was tested on {first_task[1]}, {run} on {task}")
            first_run, first = first_rows.setdefault(split, (run, row["settings"]))
            if differing := differing_settings(first, row["settings"]):
                raise ValueError("runs are compared with one set of settings for a split; on "
                                 f"{split} {first_run} and {run} differ: {differing}")
            if row["step"]:
                of_arm = arms.setdefault(names[run], [])
                of_arm.append({**row, "start": start, "run": str(run)})
                continue
            # Several runs may hold the start's row. It is one model only if the rows agree.
            key = (start, split, row["seed"])
            results = [row.get(name) for name in ("success", "replies", "statuses", "reward")]
            earlier_run, earlier_results = starts_seen.setdefault(key, (run, results))
            if earlier_results != results:
                raise ValueError(f"on {split} the start {start} has another result in {run} than "
                                 f"in {earlier_run}: it was made anew or played on another machine "
                                 "in between. Evaluate both runs anew")
            if earlier_run == run:
                arms["start"].append({**row, "start": start, "run": (start, row["seed"])})
    check_no_run_is_there_twice(arms)
    return arms


def load_arms(folders, metrics):
    """The rows of --compare: arms as from `collect_rows`, and in words which rows were left out.

    ValueError unless every start has all arms, on the same splits and hands.
    """
    arms = collect_rows(folders, metrics)
    check_every_start_has_all_arms(arms)
    check_all_were_tested_on_every_split(arms)
    return on_common_hands(arms)


def check_every_start_has_all_arms(arms):
    """ValueError unless each start was evaluated and has a run of SFT, of RL and of every arm."""
    arms_of = {}       # start -> the arms that were found of it
    for arm, rows in arms.items():
        for row in rows:
            arms_of.setdefault(row["start"], set()).add(arm)
    given = {method_of(arm) for arm in arms}
    if lacking := sorted({"SFT", "RL"} - given):
        lacking = " and no ".join(lacking)
        raise ValueError(f"--compare needs runs of SFT and of RL; no {lacking} run was given")
    for start, found in arms_of.items():
        methods = {method_of(arm) for arm in found}
        if not methods >= {"start", "SFT", "RL"} or len(found) < len(arms):
            raise ValueError("--compare needs an SFT run, an RL run and an evaluation of the start "
                             f"they go on from, and of each start all arms ({', '.join(arms)}); of "
                             f"{start} it found {', '.join(sorted(found))}; these started from "
                             f"{', '.join(arms_of)}")


def check_all_were_tested_on_every_split(arms):
    """ValueError unless each start and run was tested on every split that a start was tested on."""
    splits = {row["split"] for row in arms["start"]}
    found = {}         # "the start ..." or "the run ..." -> its splits
    for arm, rows in arms.items():
        for row in rows:
            tested = f"the start {row['start']}" if arm == "start" else f"the run {row['run']}"
            found.setdefault(tested, set()).add(row["split"])
    for tested, its_splits in found.items():
        if lacking := sorted(splits - its_splits):
            raise ValueError(f"--compare: {tested} was not tested on {lacking[0]}, as others were: "
                             "evaluate all with the same --splits")


def check_no_run_is_there_twice(arms):
    """ValueError if two runs of an arm have a row in common, since one run would count as two.

    That happens with a copied folder, or a longer run with the same settings.
    """
    for arm in arms.keys() - {"start"}:
        seen = {}      # a row without paths -> earlier rows of this content
        for row in arms[arm]:
            content = {name: value for name, value in row.items()
                       if name not in ("run", "checkpoint", "weights", "texts")}
            twins = seen.setdefault(json.dumps(content, sort_keys=True), [])
            for twin in twins:
                # One of the two may be of a version that told nothing of the model.
                weights = {twin.get("weights"), row.get("weights")} - {None}
                if twin["run"] != row["run"] and len(weights) < 2:
                    raise ValueError(f"{twin['run']} and {row['run']} have the same row of step "
                                     f"{row['step']}, so they are one run twice: leave one out")
            twins.append(row)


def on_common_hands(arms):
    """Drop rows of seeds that not all arms of a start have: (arms, in words what was dropped).

    So values and differences are taken on the same hands. ValueError where there are none.
    """
    seeds = {}         # (start, split) -> arm -> seeds
    for arm, rows in arms.items():
        for row in rows:
            of_arms = seeds.setdefault((row["start"], row["split"]), {})
            of_arms.setdefault(arm, set()).add(row["seed"])
    kept, dropped = {}, {}
    for arm, rows in arms.items():
        kept[arm] = []
        for row in rows:
            of_arms = seeds[row["start"], row["split"]]
            common = set.intersection(*of_arms.values())
            if not common:
                told = []
                for each, its_seeds in of_arms.items():
                    told.append(f"{each}: {', '.join(map(str, sorted(its_seeds)))}")
                raise ValueError(f"--compare: on {row['split']} the arms were tested with other "
                                 f"seeds, so they have no hands in common ({'; '.join(told)}): "
                                 "evaluate them with the same --seeds")
            if row["seed"] in common:
                kept[arm].append(row)
            else:
                dropped[f"{arm} on {row['split']}, seed {row['seed']}"] = None    # each once
    return kept, "; ".join(dropped)


def common_checkpoints(rows, split):
    """[(mean GFLOPs, rows), ...] of the checkpoints at which every run was tested on this split.

    The oldest checkpoint comes first.
    """
    rows = [row for row in rows if row["split"] == split]
    num_runs = len({row["run"] for row in rows})
    by_step = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    points = []
    for _, step_rows in sorted(by_step.items()):
        if len({row["run"] for row in step_rows}) == num_runs:
            points.append((mean([row["gflops"] for row in step_rows]), step_rows))
    if not points:
        raise ValueError(f"--compare: no checkpoint of every run was evaluated on {split}")
    return points


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
    verdict: str     # of `judge_sign`


class Study(NamedTuple):
    """Evaluated runs beside each other."""
    task: str
    arms: dict       # as `load_arms` returns them
    dropped: str     # the rows that `load_arms` left out, in words
    tried: list      # the arms but "start"
    splits: list
    metrics: list
    budget: float    # the GFLOPs that all arms reached; compared are the checkpoints nearest to it
    cells: dict      # (metric, split, arm) -> Cell
    signs: list

    def nearest(self, arm, split):
        """The rows of the checkpoint of an arm that is nearest to the budget."""
        points = common_checkpoints(self.arms[arm], split)
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
    arms, dropped = load_arms(folders, paper.metrics)
    task = arms["start"][0]["settings"]["task"]
    tried = [arm for arm in arms if arm != "start"]
    splits = list(dict.fromkeys(row["split"] for row in arms["start"]))
    metrics = [*paper.metrics[task], "first_try", "retries", "repeats"]

    # The most compute that every arm has reached on every split.
    budget = math.inf
    for arm in tried:
        for split in splits:
            last_gflops, _ = common_checkpoints(arms[arm], split)[-1]
            budget = min(budget, last_gflops)

    study = Study(task, arms, dropped, tried, splits, metrics, budget, cells={}, signs=[])
    check_hands_of_the_table(study)
    for metric in metrics:
        for split in splits:
            start_rows = [row for row in arms["start"] if row["split"] == split]
            study.cells[metric, split, "start"] = Cell(*score_and_error(start_rows, metric))
            for arm in tried:
                rows = study.nearest(arm, split)
                cell = Cell(*score_and_error(rows, metric),
                            *change_and_error(rows, start_rows, metric))
                study.cells[metric, split, arm] = cell
                expected = paper.signs.get(split, {}).get(method_of(arm))
                if expected and metric == paper.metric(task, split):
                    verdict = judge_sign(expected, cell.change, cell.change_error)
                    study.signs.append(Sign(arm, split, cell, len(clusters(rows)), expected,
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
        means.append({start: mean(values) for start, values in by_start.items()})
    means_of_one, means_of_other = means
    by_start = {start: value - means_of_other[start] for start, value in means_of_one.items()}
    differences = list(by_start.values())
    value, error = differences[0], 0.0
    if len(differences) > 1:
        value, error = mean_and_standard_error(differences)
    elif any(len(clusters(rows)) > 1 for rows in rows_of):
        error = math.hypot(*[metric_and_error(rows, metric)[1] for rows in rows_of])
    bound = error_over_hands(*rows_of, metric)
    if bound is None:
        bound = math.hypot(*[error_over_episodes(rows, metric) for rows in rows_of])
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
    return f"{words} ({num} starts: {each}; p = {p_value(found.value, found.error, num):.2g})"


def contrasts(study, paper):
    """How much more one method has than another: a sentence for each pair of arms and split."""
    pairs = []
    for method, other_method in ("RL", "SFT"), ("RL", "RFT"), ("RFT", "SFT"):
        for one in study.tried:
            for other in study.tried:
                if method_of(one) == method and method_of(other) == other_method:
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
            p = f" (p = {p_value(cell.change, cell.change_error, sign.num):.2g})"
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
                by_seed[hands_of(row)] = row.get("routes", row["episodes"])
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
            gflops = mean([row["gflops"] for row in study.nearest(arm, split)])
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
                  left_out(study), trained_on(study), cut_replies(study)):
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
    for gflops, rows in common_checkpoints(study.arms[arm], split):
        if steps is None or rows[0]["step"] in steps:
            points.append((gflops, *score_and_error(rows, metric)))
    return points


def steps_of(study, arm, split):
    """The steps of the checkpoints that all runs of an arm have."""
    return {rows[0]["step"] for _, rows in common_checkpoints(study.arms[arm], split)}


def draw_method(axis, study, method, colours, metric, split):
    """The curves of all arms of a method, or their mean and range if they are more than two."""
    arms = [arm for arm in study.tried if method_of(arm) == method]
    steps = None
    if len(arms) > 2:
        steps = set.intersection(*[steps_of(study, arm, split) for arm in arms])
    curves = [curve_of(study, arm, metric, split, steps) for arm in arms]
    if len(arms) <= 2:
        for arm, points, colour in zip(arms, curves, colours):
            gflops, values, errors = zip(*points)
            axis.errorbar(gflops, values, errors, label=arm, color=colour, marker="o", markersize=3,
                          capsize=2)
        return
    # The checkpoints of one method are at nearly the same GFLOPs in all settings. A run that was
    # stopped has one more, which is left out.
    gflops, means, lows, highs = [], [], [], []
    for points in zip(*curves):        # of one checkpoint, a point for each arm
        arm_gflops, arm_values, _ = zip(*points)
        gflops.append(mean(arm_gflops))
        means.append(mean(arm_values))
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
