"""Files of JSON as our programs leave them, read with a fault named by file, line and key.

This file needs no torch, so envs.py can read a run, too.
"""
import json
from pathlib import Path

NUMBER = (int, float)
# What a value is wherever a row of a log has it.
KINDS = {"step": int, "seed": int, "env": int, "episode": int, "turn": int, "split": str, "of": str,
         "settings": dict, "replies": (dict, int), "endings": dict, "verdicts": list,
         "messages": list, "gflops": NUMBER, "gflops_paper": NUMBER, "checkpoint": str,
         "expert": str, "position": int, "dialogues": list}
NAMES = {int: "a whole number", str: "a text", dict: "an object", list: "a list",
         NUMBER: "a number", (dict, int): "an object or a whole number"}


def check_row(row, keys):
    """ValueError unless a row is an object that has these keys, and no value of another kind."""
    if not isinstance(row, dict) or not row.keys() >= set(keys):
        wanted = f" with {', '.join(keys)}" if keys else ""
        raise ValueError(f"expected a JSON object{wanted}")
    for key, kind in KINDS.items():
        value = row.get(key)
        if key in row and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"key {key!r} is {str(value)[:40]!r}, must be {NAMES[kind]}")


def read_jsonl(path, *keys):
    """The rows of a log. Blank lines and a last line that was never finished are left out; a file
    that is not there is empty.

    ValueError names file and line of what is not a JSON object with these keys, or has another kind
    of value than our programs write.
    """
    rows, lines = [], []
    if Path(path).is_file():
        lines = Path(path).read_bytes().split(b"\n")[:-1]
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


def read_run_config(run):
    """config.json of a run folder, {} if there is none; ValueError if it is no JSON object."""
    return read_object(Path(run) / "config.json")
