"""Files of JSON as our programs leave them, read with a fault named by file, line and key.

This file needs no torch, so envs.py can read a run, too.
"""
import json
import os
from pathlib import Path

NUMBER = (int, float)
# What a value is wherever a row of a log has it.
KINDS = {"step": int, "seed": int, "env": int, "episode": int, "turn": int, "split": str, "of": str,
         "settings": dict, "replies": (dict, int), "endings": dict, "verdicts": list,
         "messages": list, "gflops": NUMBER, "gflops_paper": NUMBER, "checkpoint": str,
         "expert": str, "position": int, "dialogues": list}
NAMES = {int: "a whole number", str: "a text", dict: "an object", list: "a list",
         NUMBER: "a number", (dict, int): "an object or a whole number"}


def without_twins(pairs):
    """For json.loads as `object_pairs_hook`: the object, or ValueError if a key stands in it twice.

    Python would take the last value, without a word.
    """
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice in one object")
        found[key] = value
    return found


def check_row(row, keys):
    """ValueError unless a row is an object that has these keys, and no value of another kind."""
    if not isinstance(row, dict) or not row.keys() >= set(keys):
        wanted = f" with {', '.join(keys)}" if keys else ""
        raise ValueError(f"expected a JSON object{wanted}")
    for key, kind in KINDS.items():
        value = row.get(key)
        if key in row and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"key {key!r} is {str(value)[:40]!r}, must be {NAMES[kind]}")


def whole_lines(content):
    """The lines of a log (bytes), without a last one that was never finished.

    A whole row whose line break is lost, as in an editor, counts.
    """
    *lines, last = content.split(b"\n")
    try:
        is_row = isinstance(json.loads(last.decode()), dict)
    except (ValueError, RecursionError):
        is_row = False
    return [*lines, last] if is_row else lines


def read_jsonl(path, *keys):
    """The rows of a log. Blank lines and a last line that was never finished are left out; a file
    that is not there is empty.

    ValueError names file and line of what is not a JSON object with these keys, or has another kind
    of value than our programs write.
    """
    rows, lines = [], []
    if Path(path).is_file():
        lines = whole_lines(Path(path).read_bytes())
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            check_row(row, keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    return rows


def read_object(path):
    """A JSON object from a file, {} if there is no file. ValueError names a file that holds
    anything else."""
    if not Path(path).is_file():
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


# ---- Run folders: what can be said of one without torch ------------------------------------------

def resolved(setting):
    """A setting in a form in which two spellings of a path are equal, also behind `root=`."""
    if isinstance(setting, (list, tuple)):
        return [resolved(word) for word in setting]
    if not isinstance(setting, str) or not setting:
        return setting
    name, _, path = setting.rpartition("=")
    return name, os.path.realpath(path)


def differing(theirs, ours, may_differ, moved=()):
    """The fields in which two configs differ, but for those that may.

    `moved`: settings such as root, whose files may have another path. `digests.check_files` sees
    whether they are what they were.
    """
    files = tuple(f"{name}=" for name in moved)

    def comparable(value):
        if isinstance(value, list) and moved:
            value = [word.partition("=")[0] if str(word).startswith(files) else word
                     for word in value]
        return resolved(value)

    found = []
    for name in {**theirs, **ours}:
        one, two = (comparable(config.get(name)) for config in (theirs, ours))
        if name not in may_differ and one != two:
            found.append(name)
    return found


def read_run_config(run):
    """config.json of a run folder, {} if there is none; ValueError if it is no JSON object."""
    return read_object(Path(run) / "config.json")


def runs_inside(folder):
    """In words, the run folders in a folder that is none itself; "" if there are none."""
    paths = [*sorted(Path(folder).glob("*/config.json")),
             *sorted(Path(folder).glob("*/*/config.json"))]
    found = [str(path.parent) for path in paths if "out" in read_run_config(path.parent)]
    return f"; run folders in it: {', '.join(found)}" if found else ""


def read_trained(run):
    """config.json of a run; ValueError if the folder is that of no run."""
    trained = read_run_config(run)
    if "model_type" in trained:
        raise ValueError(f"run {str(run)!r}: is a model, not a run; to evaluate it: evaluate.py "
                         f"--model {run}")
    if not {"task", "model"} <= trained.keys():
        raise ValueError(f"run {str(run)!r}: no run folder (it would have a config.json that names "
                         f"task and model){runs_inside(run)}")
    return trained


def list_runs(words):
    """The run folders of --compare, each a word, or several in one word with commas."""
    runs = []
    for word in words:
        runs += [word] if Path(word).is_dir() else word.split(",")
    return runs


def check_evaluated(run):
    """ValueError unless this is the folder of a run that was evaluated."""
    if not Path(run).is_dir():
        raise ValueError(f"run {str(run)!r}: there is no such folder; --compare takes run folders: "
                         "SFT_RUN RL_RUN")
    log = Path(run) / "eval.jsonl"
    if log.is_file() and log.stat().st_size:
        return
    config = read_run_config(run)
    advice = f"run evaluate.py --run-folder {run} first"
    if "model_type" in config:
        advice = "it is a model; --out of sft.py and rl.py names a run"
    elif not config:
        advice = f"it is no run folder{runs_inside(run)}"
    raise ValueError(f"run {str(run)!r}: no eval.jsonl; {advice}")
