"""Means of scores, their standard errors, and p values, for --compare and recipes/panels.py.

A row is a line of eval.jsonl: a checkpoint, played on one split with one seed. Its "start" and its
"run" come from support/collect.py.

The error is over starts, or over runs if there is one start, but never below the error over hands.
A single run, or a single start, has the error over hands alone. Where each run plays hands of its
own (--seeds), chance in the hands is part of the error over runs. A change is taken run by run,
against the start that the run went on from, on the same hands.
"""
import math


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
