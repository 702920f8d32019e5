"""What evaluate.py needs and the paper does not mention.

It checks options against each other, and takes task and settings from a run. It knows which rows
are there already, and keeps the replies of a stopped evaluation. It prints what a row says.
"""
import json
import os
import re
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support import api, digests, logs, run_folder, running, settings, transcripts
from support.chat import read_text
from support.command_line import flag_of
from support.demonstrator import Wrapper, refuse_without_effect


def check_options(config):
    """ValueError if the options of evaluate.py do not go together."""
    if not all(seed.strip().isdecimal() for seed in config.seeds.split(",")):
        raise ValueError(f"--seeds {config.seeds!r}: expected whole numbers such as 0,1,2")
    ways = [config.model, config.run_folder, config.compare, config.api_url]
    if len([way for way in ways if way]) != 1:
        raise ValueError("exactly one of --model, --run-folder, --compare and --api-url is "
                         "required")
    for flag, file in ("--figure", config.figure), ("--html", config.html):
        if file and not config.compare:
            raise ValueError(f"{flag} {file}: needs --compare")
    if config.figure and not Path(config.figure).parent.is_dir():
        raise ValueError(f"--figure {config.figure}: there is no folder "
                         f"{Path(config.figure).parent}")
    if config.html:
        transcripts.check_page(config.html)
    if config.api_url and not (config.api_model and config.out):
        raise ValueError("--api-url needs --api-model and --out")
    if config.api_url and running.WORLD > 1:
        raise ValueError("--api-url runs in one process, with --api-workers requests at the same "
                         "time")
    if config.out and (config.run_folder or config.compare):
        raise ValueError(f"--out {config.out}: is for --model and --api-url; a run's rows go to "
                         "its folder")
    check_used(config)
    for split in settings.read_splits(config.splits):
        given = {**settings.read_settings(config.env), **split.settings}
        refuse_without_effect(given, ["faults", "faulty_tries"], "no expert plays in a test")
    settings.check_temperature(config.temperature)
    if config.top_p != 1 and config.temperature == 0:
        raise ValueError(f"--top-p {config.top_p}: has no effect at --temperature 0, which always "
                         "takes the likeliest token")


def check_used(config):
    """ValueError if an option was given that has no effect beside the others."""
    if config.compare:
        way, unused = "--compare", {each.name for each in fields(config)}
        unused -= {"compare", "figure", "html"}
    elif config.api_url:
        way, unused = "--api-url", {"start", "generate_tokens", "kept_gib", "dtype"}
    else:
        way = "--run-folder" if config.run_folder else "--model"
        unused = {"api_model", "api_extra", "api_header", "api_timeout", "api_workers"}
        unused |= set() if config.run_folder else {"start"}
    if config.paper and "paper" not in unused:
        way, unused = f"{way} and --paper", unused | {"episodes"}
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name in unused and value != each.default:
            words = " ".join(value) if isinstance(value, tuple) else value
            given = f"{flag_of(each)} {words}"
            if isinstance(value, bool):
                given = flag_of(each) if value else f"--no-{each.name}"
            raise ValueError(f"{given}: has no effect with {way}")


# ---- A run and its checkpoints -----------------------------------------------------------------

def content_of(checkpoint):
    """What a row holds of a checkpoint's folder, which tells it from others of the same path."""
    return {"weights": digests.weights_of(checkpoint), "texts": digests.texts_of(checkpoint)}


class Checkpoint(NamedTuple):
    """A checkpoint of a run, or its start as step 0, and the compute since the start."""
    step: int
    path: Path
    gflops: float
    gflops_paper: float

    def numbers(self):
        """What the rows of a checkpoint begin with."""
        return {"step": self.step, "gflops": self.gflops, "gflops_paper": self.gflops_paper,
                **content_of(self.path)}

    def rows(self, known):
        """Those of the rows of a run that are of this step.

        A row of other content, as of a checkpoint that was trained anew or has got another
        template, comes without its settings: it is no finished evaluation of this checkpoint, but
        it may hide an earlier row in tables. ValueError if the start was made anew: the run began
        with the old one.
        """
        found, content = [row for row in known if row["step"] == self.step], content_of(self.path)
        for name in content if self.step == 0 else ():
            if any(row.get(name, content[name]) != content[name] for row in found):
                raise ValueError(f"start {self.path}: has other {digests.WORDS_OF[name]} than when "
                                 "it was tested with this run, which did not begin with them: use "
                                 "--no-start")
        return [row if transcripts.is_of(row, content) else {**row, "settings": {}}
                for row in found]


def list_checkpoints(run, trained, with_start):
    """The checkpoints of a run, oldest first, and its start; `trained` is the run's config.json.

    One that a stop has saved is left out, unless it is the last: its step is no multiple of
    --save-every.
    """
    found, start, save_every = [], trained["model"], trained.get("save_every") or 1
    if with_start:
        if not Path(start).is_dir():
            raise ValueError(f"run {str(run)!r} started from {start!r}, which is no folder: put "
                             "it, or a link to it, there, or use --no-start")
        run_folder.check_start(run, start)
        found.append(Checkpoint(0, Path(start), 0.0, 0.0))
    paths = {run_folder.checkpoint_step(path): path for path in run_folder.checkpoints(run)}
    paths.pop(0, None)
    passed_over = [step for step in paths if step % save_every and step != max(paths)]
    if passed_over:
        running.print0(f"{run}: not tested, since a stop saved them (or another --save-every): "
                       f"step {', '.join(map(str, passed_over))}")
    for step in passed_over:
        del paths[step]
    spent = run_folder.read_metrics(run, list(paths))
    for step, path in paths.items():
        row = spent[step]
        if lacking := {"gflops", "gflops_paper"} - row.keys():
            raise ValueError(f"{run}/metrics.jsonl: the row of step {step} has no {min(lacking)}")
        found.append(Checkpoint(step, path, row["gflops"], row["gflops_paper"]))
    return found


def may_know_held_out(trained):
    """Whether a run may have trained on hands of the held-out fold; `trained` is its config.json.

    Nobody knows that of a file of data.
    """
    common = settings.read_settings(trained.get("env", ()))
    words = trained.get("split") or trained.get("mix") or ("id",)
    folds = [{**common, **split.settings}.get("fold") for split in
             settings.read_splits(words, weighted=True)]
    return bool(trained.get("data")) or any(fold != "train" for fold in folds)


def check_files(run, trained, make_env, task="", named=()):
    """ValueError if a file that a run's settings name is not what it was in training.

    `trained` is the run's config.json. A run of an earlier version does not tell, and passes. So
    does a test on another `task`, or with files that its settings (`named`) name: they are what the
    user wants. A city without the routes of the training passes, too.
    """
    began = logs.read_object(Path(run) / "inputs.json").get("files")
    if any(word.partition("=")[0] in digests.NAME_FILES for word in named):
        return
    if not began or task not in ("", trained["task"]):
        return
    common = settings.read_settings(trained.get("env", ()))
    words = trained.get("split") or trained.get("mix") or ("id",)
    try:
        environments = [make_env(trained["task"], split.name, common, **split.settings)
                        for split in settings.read_splits(words, weighted=True)]
    except ValueError:
        return
    if digests.files_of(environments) != began:
        raise ValueError(f"{run}: a prompt file, city or card_dir of its settings is not what it "
                         "was in training: put it back, or name the file to test with by --env")


def take_settings(config, run, trained, make_env, tasks):
    """The config with task, environment and type of a run where no flag says otherwise.

    `trained` is the run's config.json, `tasks` is envs.TASKS. What is taken is printed, and so is
    what differs from the training. ValueError if a file of the settings has changed.
    """
    check_files(run, trained, make_env, config.task, (*config.env, *config.splits))
    task = config.task or trained["task"]
    same_task = task == trained["task"]
    theirs = settings.read_settings(trained.get("env", ())) if same_task else {}
    given = settings.read_settings(config.env)

    # A split may fix a setting itself: "unseen" has fold=test, so the run's fold=train is left out.
    fixed_by = {}
    for split in settings.read_splits(config.splits):
        fixed = tasks[task].splits.get(split.name, ())
        for name in theirs:
            if name in fixed:
                fixed_by[name] = split.name
    taken = {name: value for name, value in theirs.items() if name not in fixed_by}
    # What one split fixes holds for the other splits as it was in training. It makes another split
    # of them only if it is a rule: else they are called what they are called without that split.
    splits = []
    for split in settings.read_splits(config.splits):
        added = {}
        for name in fixed_by:
            own = name in split.settings or name in tasks[task].splits.get(split.name, ())
            if not own and name not in given:
                added[name] = theirs[name]
        splits.append(split._replace(settings={**split.settings, **added},
                                     of_training=tuple(sorted(added.keys() - settings.RULES))))
    config = replace(config, splits=tuple(splits))
    env = tuple(f"{name}={value}" for name, value in {**taken, **given}.items())

    changed = []
    for name, value in taken.items():
        if name in given and given[name] != value:
            changed.append(f"{name}={given[name]} instead of {value}")
    for name, value in given.items():
        if name not in taken:
            changed.append(f"{name}={value} given here")
    if not same_task:
        changed.append(f"task {task} instead of {trained['task']}")
    for name, split_name in fixed_by.items():
        changed.append(f"{name}, which split {split_name} has of its own")
    held_out = [split.label for split in settings.read_splits(config.splits)
                if {**tasks[task].splits.get(split.name, {}), **given,
                    **split.settings}.get("fold") == "test"]
    if same_task and held_out and may_know_held_out(trained):
        running.print0(f"{run}: was not trained with fold=train alone, so it may know the hands of "
                       f"{', '.join(held_out)}")
    but_for = f" but for {', '.join(changed)}" if changed else ""
    running.print0(f"{run}: task {' '.join([task, *env])}, as in its training{but_for}")

    dtype = trained.get("dtype", "auto") if config.dtype == "auto" else config.dtype
    return replace(config, task=task, env=env, dtype=dtype)


def as_in_its_run(config, make_env, tasks):
    """`take_settings` for --model: from the run folder that a checkpoint lies in, if it does."""
    model = Path(config.model)
    if not re.fullmatch(r"step_\d+", model.name):
        model = model.resolve()        # maybe a link to a checkpoint
    trained = logs.read_object(model.parent / "config.json")
    if not re.fullmatch(r"step_\d+", model.name) or not {"task", "model"} <= trained.keys():
        return config
    return take_settings(config, model.parent, trained, make_env, tasks)


# ---- Parts of a row ----------------------------------------------------------------------------

def by_city(routes, solved):
    """[success, ...] of the cities of `visual_ood`, whose file has two routes of each.

    `routes` and `solved` have a number for each episode: that of its route, and 1 or 0.
    """
    cities = {}
    for route, success in zip(routes, solved):
        cities.setdefault(route // 2, []).append(success)
    return [sum(city) / len(city) for _, city in sorted(cities.items())]


# ---- Rows and replies that are there already ---------------------------------------------------

def chosen_settings(config, env):
    """The settings that a row holds. Evaluations with the same ones are the same evaluation."""
    names = ("api_url", "task", "episodes", "paper", "temperature", "top_p", "max_new_tokens",
             "dtype")
    chosen = {name: getattr(config, name) for name in names}
    chosen["env"] = dict(env.settings)
    for name in ("solution", "faults", "faulty_tries"):   # of the expert, who does not play
        chosen["env"].pop(name, None)
    if not chosen["env"].get("guided"):   # rows of earlier versions do not name it
        chosen["env"].pop("guided", None)
    if config.api_url and (extra := api.read_extra(config.api_extra)):
        chosen["api_extra"] = extra
    if files := digests.files_of([env]):
        chosen["files"] = files
    return chosen


def without_paths(chosen):
    env = {name: value for name, value in chosen["env"].items() if name not in digests.NAME_FILES}
    return {**chosen, "env": env}


def are_settings(of_row, chosen):
    """Whether a row has these settings. The same files may lie elsewhere."""
    if "files" not in of_row:          # a test without files, or of an earlier version
        return of_row == {name: value for name, value in chosen.items() if name != "files"}
    if of_row["files"] == chosen.get("files"):
        of_row, chosen = without_paths(of_row), without_paths(chosen)
    return of_row == chosen


def finished_rows(known, split, chosen, metrics):
    """{seed: its row} of those rows that are of a split, with these settings and all metrics."""
    found = {}
    for row in known:
        same = row["split"] == split.label and are_settings(row["settings"], chosen)
        if same and row.keys() >= set(metrics):   # else it is from an earlier version
            found[row["seed"]] = row
    return found


def is_hidden(row, known):
    """Whether a later row of the same split and seed, with other settings, is the one that counts
    in tables."""
    alike = [each for each in known if (each["split"], each["seed"]) == (row["split"], row["seed"])]
    return alike[-1] is not row


class KeptReplies:
    """The replies of an unfinished evaluation, in files, so that a stopped one goes on.

    `stem` is how the paths of the files begin, such as runs/rl/eval_unfinished; None keeps nothing.
    Every process writes to a file that no other has, eval_unfinished_<its number>.jsonl, a line per
    turn of all episodes. All files of the stem are read, whoever wrote them.
    """

    def __init__(self, stem):
        self.stem = stem
        self.path = None
        self.known = {}   # (evaluation, turn, episode) -> ids of the reply
        self.told = set()   # evaluations that go on
        if stem is None:
            return
        self.path = Path(f"{stem}_{os.getpid()}.jsonl")
        if self.path.exists():      # of a killed process with this number: without its torn end
            running.write_whole_lines(self.path)
        for file in self.files():
            for row in running.read_jsonl(file, "of", "turn", "replies"):
                for episode, ids in row["replies"].items():
                    self.known[row["of"], row["turn"], int(episode)] = ids

    def files(self):
        return sorted(self.stem.parent.glob(f"{self.stem.name}_*.jsonl"))

    def find(self, of, turn, episode):
        """The ids of a reply, or None. `of` is a text that names the evaluation."""
        ids = self.known.get((of, turn, episode))
        if ids is not None and of not in self.told:
            self.told.add(of)
            num = sum(of == key[0] for key in self.known)
            running.print0(f"goes on with {num} replies of an earlier evaluation")
        return ids

    def add(self, of, turn, replies):
        """Keep the replies {episode: ids} of one turn."""
        if self.path:
            running.append_line(self.path, {"of": of, "turn": turn, "replies": replies})

    def forget(self, of):
        """Drop the replies of an evaluation whose row is written, from all files."""
        self.known = {key: ids for key, ids in self.known.items() if key[0] != of}
        running.gather(None)   # all have written theirs
        if self.path and running.RANK == 0:
            for file in self.files():
                keep_lines(file, lambda row: row["of"] != of)
        running.gather(None)


class Recorder:
    """Keeps what is said in the first environments that it is given to watch, `num` of them."""

    def __init__(self, num):
        self.num, self.kept = num, []

    def watch(self, env):
        """The environment; among the first, one that keeps its dialogues."""
        if self.num == 0:
            return env
        self.num -= 1
        return Recorded(env, rows=self.kept, now={})

    def rows(self):
        """The dialogues of all processes, by episode and position."""
        rows = [row for part in running.gather(self.kept) for row in part]
        return sorted(rows, key=lambda row: (row["episode"], row["position"]))


class Recorded(Wrapper):
    """An environment that keeps each of its dialogues in `rows`; `now` is the present one."""

    def reset(self, seed, episode):
        found = self.env.reset(seed=seed, episode=episode)
        self.begin(episode)
        return found

    def begin(self, episode):
        self.now.clear()
        self.now.update(episode=episode, position=self.env.at, expert=self.env.expert_reply(),
                        verdicts=[])

    def step(self, reply):
        before = self.env.messages
        messages, reward, terminated, truncated, info = self.env.step(reply)
        self.now["verdicts"].append([info["status"], reward])
        if terminated or truncated or info["new_dialogue"]:
            # After a right reply `messages` may be the next dialogue already.
            said = messages
            if info["new_dialogue"]:
                said = [*before, {"role": "assistant", "content": reply}]
            texts = [message | {"content": read_text(message)} for message in said]
            self.rows.append({**self.now, "done": terminated or truncated,
                              "success": info["status"] == "correct", "messages": texts})
        if info["new_dialogue"]:
            self.begin(self.now["episode"])
        return messages, reward, terminated, truncated, info


def check_out(out):
    """ValueError unless --out is a new folder or one of an earlier evaluation."""
    out = Path(out)
    if out.exists() and not out.is_dir() or (out / "config.json").exists():
        raise ValueError(f"--out {out}: must be a new folder or one of an earlier evaluation, not "
                         f"{'a run folder' if out.is_dir() else 'a file'}")


def open_out(out, checkpoint):
    """Make the folder --out if it is not there.

    Returns the rows that it holds of this checkpoint with these weights, and a function that writes
    a row with its dialogues. Without --out a row is printed.
    """
    if not out:
        return [], print_one
    check_out(out)
    running.gather(None)   # all have looked
    Path(out).mkdir(parents=True, exist_ok=True)
    content = content_of(checkpoint)
    known = known_rows(out, str(Path(checkpoint)))   # as rows name it, without a last slash
    known = [row for row in known if transcripts.is_of(row, content)]
    return known, partial(log_evaluation, out, **content)


def known_rows(folder, checkpoint):
    """The rows of eval.jsonl in a folder that are of this checkpoint. Before its files are written
    anew the folder is locked."""
    run_folder.hold(folder, "evaluating")
    return [row for row in open_logs(folder) if row["checkpoint"] == checkpoint]


def open_logs(folder, *more_keys):
    """The rows of eval.jsonl in a folder; ValueError if it or dialogues.jsonl is damaged.

    Both files are written anew: without a torn last line, and without dialogues of an evaluation
    whose row was never written. It will be played again.
    """
    dialogues, log = Path(folder) / "dialogues.jsonl", Path(folder) / "eval.jsonl"
    transcripts.read_dialogues(dialogues)
    rows = running.read_jsonl(log, *more_keys, "split", "seed", "settings", "checkpoint")
    finished = {transcripts.evaluation_of(row) for row in rows}
    if log.exists():
        running.write_jsonl(log, rows)
    if dialogues.exists():
        running.write_jsonl(dialogues, [row for row in running.read_jsonl(dialogues)
                                        if transcripts.evaluation_of(row) in finished])
    return rows


def log_evaluation(folder, row, said, **point):
    """Append a row to eval.jsonl in a folder, and what was said to dialogues.jsonl.

    `point`: what the row begins with, such as its step. The row is last: if a kill comes between,
    the evaluation is played again, and the later dialogues count.
    """
    if said:
        about = {name: row[name] for name in ("checkpoint", "split", "seed", "settings")}
        about |= {name: point[name] for name in transcripts.CONTENT if name in point}
        running.log_jsonl(Path(folder) / "dialogues.jsonl", step=point.get("step", 0), **about,
                          dialogues=said)
    running.log_jsonl(Path(folder) / "eval.jsonl", **{**point, **row})


def print_one(row, said):
    """Print a row, and one of its dialogues: a failed one if there is any."""
    running.print0(json.dumps(row))
    failed = [each for each in said if not each["success"]]
    for each in (failed or said)[:1]:
        about = {name: row[name] for name in ("split", "seed", "settings")}
        running.print0(transcripts.as_text(about | each))
        running.print0("One of its dialogues; --out FOLDER keeps some of each split, for "
                       "python envs.py --read FOLDER")


def keep_lines(path, wanted):
    """Leave only the wanted rows in a file of JSON lines; without any the file is deleted.

    Lines are read one by one, since ids take many times the memory of their text.
    """
    kept = []
    with open(path) as lines:
        for line in lines:
            whole = line.endswith("\n")   # the last may be torn
            if whole and line.strip() and wanted(json.loads(line)):
                kept.append(line)
    if kept:
        running.write_atomically(path, "".join(kept))
    else:
        path.unlink()


# ---- What is printed of a row ------------------------------------------------------------------

def print_path(run, config, make_env, metric):
    """Print a metric over the checkpoints of a run, a line for each split and seed.

    Only rows with the settings of this evaluation are shown.
    """
    chosen = {}        # split -> its settings
    common = settings.read_settings(config.env)
    for split in settings.read_splits(config.splits):
        env = make_env(config.task, split.name, common, **split.settings)
        chosen[split.label] = chosen_settings(config, env)
    lines = {}
    for row in run_folder.read_steps(run / "eval.jsonl"):
        if are_settings(row["settings"], chosen.get(row["split"], {})) and metric in row:
            lines.setdefault((row["split"], row["seed"]), {})[row["step"]] = 100 * row[metric]
    for (split, seed), values in lines.items():
        path = ", ".join(f"{value:.1f} ({step})" for step, value in sorted(values.items()))
        running.print0(f"{split}, seed {seed}: {metric.replace('_', ' ')} in % (step): {path}")


def odd_replies(row):
    """In words, how many replies were cut, refused, filtered, empty or not had; "" if none."""
    limit = f"--max-new-tokens {row['settings']['max_new_tokens']}"
    if row["settings"].get("api_url"):
        limit += " or the server's own limit"   # its context may have ended before
    if "api_extra" in row["settings"]:
        limit = "their limit"   # the request may have named another
    odd = []
    for ending, count in row["endings"].items():
        if ending.startswith(api.FAILED):
            odd.append(f"{count} not the model's ({ending})")
        elif ending == "length":
            odd.append(f"{count} cut at {limit}")
        elif ending != "stop":
            odd.append(f"{count} ended with {ending}")
    if row["replies_empty"]:
        odd.append(f"{row['replies_empty']} empty")
    return f"of {row['replies']} replies, {', '.join(odd)}" if odd else ""


def print_results(label, row, metrics, beside):
    """Print the metrics of a row, then `beside` (the paper's numbers, or ""), then odd replies."""
    found = []
    for name in ("first_try", *metrics):
        value, error = 100 * row[name], 100 * row[f"{name}_stderr"]
        found.append(f"{name.replace('_', ' ')} {value:.1f} +- {error:.1f} %")
    for words in (", ".join(found), beside, odd_replies(row)):
        if words:
            running.print0(f"{label}: {words}")
