"""Run folders as arms: which runs belong together, and whether they may be compared at all.

An arm is all runs of one method with one setting, such as "RL" or "SFT lr 0.001". Besides the
paper's two methods there may be RFT (recipes/rft.py).
"""
import json
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path

from support import command_line, digests, logs, running, settings
from support.errors import mean

# Settings that say how a run is executed. Runs that differ only in these are one arm.
NOT_OF_THE_METHOD = {
    "out", "model", "seed", "updates", "rounds", "save_every", "keep_resume", "micro_batch_tokens",
    "generate_tokens", "kept_gib", "gradient_checkpointing", "dtype", "param_dtype", "device",
}
# The script that makes runs of a method. Its defaults stand in for options that an old run lacks.
SCRIPTS = {"SFT": "sft.py", "RL": "rl.py", "RFT": "recipes/rft.py"}


def method_of(arm):
    """"start", "SFT", "RL" or "RFT" (recipes/rft.py)."""
    return arm.split()[0]


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


def with_types(names, configs, start_of):
    """The names of runs' arms, with the numeric types where two runs of one start and --seed differ
    in these alone. Under one name they would pass for two runs with two seeds."""
    for option in "dtype", "param_dtype":
        found = {}     # (arm, start, seed) -> types
        for run, config in configs.items():
            key = names[run], start_of[run], config.get("seed")
            found.setdefault(key, set()).add(config.get(option))
        several = {arm for (arm, _, _), types in found.items() if len(types) > 1}
        named = {}
        for run, name in names.items():
            named[run] = f"{name} {option} {configs[run].get(option)}" if name in several else name
        names = named
    return names


def differing_settings(one, two):
    """In words, how the settings of two evaluations differ; "" if they do not."""
    # The same files may lie elsewhere.
    same_files = one.get("files") and one.get("files") == two.get("files")
    moved = digests.NAME_FILES if same_files else ()
    one, two = settings.by_name(one), settings.by_name(two)
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

    `metrics` is {task: names of its metrics}. Each row also names its "start" and its "run". A
    start's rows belong to no run: each seed that it was evaluated on counts as one. ValueError
    unless all were tested on one task, and on each split with one set of settings. ValueError if a
    run is there twice, as are two of an arm with the same start and --seed.
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
    names = with_types(names, configs, start_of)
    arms = {"start": []}
    first_rows = {}    # split -> a checkpoint that was tested on it, and its settings
    first_task = None  # the first run, and the task that it was tested on
    began_with = {}    # for `check_inputs`
    starts_seen = {}   # (start, split, seed) -> the first run with this row, and its results
    seeds_seen = {}    # (arm, start, seed of the training) -> the run
    for run in runs:
        # Find the run's start, and see that no other run is the same.
        rows = read_rows(run, metrics)
        start = start_of[run]
        check_inputs(run, configs[run], rows, began_with)
        if "seed" in configs[run]:
            twin = seeds_seen.setdefault((names[run], start, configs[run]["seed"]), run)
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
            tested = f"step {row['step']} of {run}"
            other, first = first_rows.setdefault(split, (tested, row["settings"]))
            if differing := differing_settings(first, row["settings"]):
                raise ValueError("runs are compared with one set of settings for a split; on "
                                 f"{split} {other} and {tested} differ: {differing}")
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
