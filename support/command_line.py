"""A script's command line: its flags, errors of one line, an answer before torch is imported."""
import argparse
import ast
import contextlib
import dataclasses
import difflib
import math
import os
import re
import sys
from pathlib import Path

from support import logs

RANK = int(os.environ.get("RANK", 0))        # of this process under torchrun
KINDS = {kind.__name__: kind for kind in (str, int, float, bool, tuple)}

# ---- Flags ---------------------------------------------------------------------------------------


def flag(default, help, low=None, high=None, choices=None):
    """A field of a script's Config: its default, its help text, and the values that are allowed."""
    limits = {"low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        if found := re.search(r"unrecognized arguments: ([^\s=]+)", message):
            names = [name.removeprefix("--") for name in self._option_string_actions]
            near = difflib.get_close_matches(found[1].removeprefix("--"), names, 1)
            hint = f"did you mean --{near[0]}? " if near else ""
            message = f"unknown option {found[1]}; {hint}--help lists them all"
        fail(message)


class Console:
    """Whether stderr, where it is a log, stands within a line, such as that of a progress bar."""
    within_line = False


def end_line():
    """What is printed next begins a line."""
    if Console.within_line:
        Console.within_line = False
        with contextlib.suppress(OSError):       # nobody reads the log any more
            print(file=sys.stderr, flush=True)


def fail(message, alone=False):
    """Print one line and exit with 2, which is the ending for the user's mistakes.

    Only the first process prints, unless this one comes here `alone`.
    """
    flush_console()
    if RANK == 0 or alone:
        message = " ".join(str(message).splitlines())    # a path may hold a line break
        end_line()
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def flush_console():
    """Print what waits to be printed. If nobody reads it, it is dropped, and so is what follows."""
    for stream in filter(None, (sys.stdout, sys.stderr)):    # None: closed from the start
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def options_of(cls):
    """The fields of a Config as --help lists them: first its own, then those of its base class."""
    return sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__)


def flag_of(field):
    """The field num_envs is the flag --num-envs."""
    return "--" + field.name.replace("_", "-")


def parse_config(cls, argv=None):
    """A Config from the command line. A flag, type or value that is not allowed ends the program
    with one line.

    A field of type tuple takes words up to the next flag: `--env root=city0 verify_iter=3`.
    """
    parser = OneLineParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in options_of(cls):
        kind, shown = {"type": f.type}, f.default
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif f.type is tuple:
            kind, shown = {"nargs": "+", "type": str}, " ".join(f.default)
        parser.add_argument(flag_of(f), default=f.default,
                            help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    config = cls(**{name: tuple(value) if isinstance(value, list) else value
                    for name, value in given.items()})
    for f in dataclasses.fields(cls):
        if fault := fault_of(getattr(config, f.name), **f.metadata):
            parser.error(f"{flag_of(f)} {fault}")
    return config


def fault_of(value, help, low, high, choices):
    """The value and what is wrong with it, or None; the rest is what `flag` keeps of a field."""
    if choices and value not in choices:
        return f"{value!r}: allowed are {', '.join(map(str, choices))}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}: must be a finite number"
    if low is not None and value < low or high is not None and value > high:
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        return f"{value}: must be {allowed}"


# ---- Before torch is imported --------------------------------------------------------------------

def check(path):
    """Answer what is wrong with the command line of the script at this path, and --help.

    `running.run` reads it again, by the real Config.
    """
    try:
        sketch = sketch_config(Path(path), "Config")
    except (OSError, ValueError, LookupError):   # a Config that cannot be read without running it
        return
    try:
        check_needed(parse_config(sketch))
    except ValueError as error:
        fail(error)
    finally:
        flush_console()                  # --help into `| head`


def check_needed(config):
    """ValueError if a folder that the script needs is not named or not there."""
    if getattr(config, "run_folder", ""):
        logs.read_trained(config.run_folder)
    for run in logs.list_runs(getattr(config, "compare", ())):
        logs.check_evaluated(run)
    if hasattr(config, "keep_resume") and not getattr(config, "dump", ""):       # sft.py and rl.py
        check_folders(config)
    # A run that goes on reads its own checkpoint.
    goes_on = config.out and Path(config.out).exists()
    if getattr(config, "model", "") and not goes_on:
        check_model(config.model)


def check_folders(config):
    """ValueError unless the folders of a run are named."""
    if not config.out or not config.model:
        raise ValueError("--out and --model are required; --model is a folder, such as a "
                         "checkpoint of sft.py or a tiny model of support/tiny.py")


def check_model(path):
    """ValueError unless this is a model folder, by its config; says how to get one."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"model {path!r}: an adapter (PEFT) without its model: merge it into the "
                         "model first")
    if not (folder / "config.json").is_file():
        advice = "support/tiny.py writes a tiny one"
        if inside := sorted(str(path.parent) for path in folder.glob("*/config.json")):
            advice = f"model folders in it: {', '.join(inside)}"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.exists():
            advice = f"to get it from the hub: hf download {path} --local-dir FOLDER"
        raise ValueError(f"model {path!r}: no such model folder (it would have a config.json); "
                         f"{advice}")


def sketch_config(path, name):
    """The class `name` of a script's source, a Config, with all that can be read without running.

    Fields have their type, default, help and limits. Choices that the script computes are left out.
    A base class is looked up in support/. ValueError or LookupError if the class is written in
    another way.
    """
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body
               if isinstance(node, ast.ClassDef) and node.name == name]
    rows = []
    for node in classes[0].body:
        if isinstance(node, ast.AnnAssign):
            values = [ast.literal_eval(value) for value in node.value.args]
            limits = {}
            for keyword in node.value.keywords:
                try:
                    limits[keyword.arg] = ast.literal_eval(keyword.value)
                except ValueError:           # such as tuple(envs.TASKS)
                    continue
            rows.append((node.target.id, KINDS[node.annotation.id], flag(*values, **limits)))
    bases = tuple(sketch_config(Path(__file__).with_name(f"{base.value.id}.py"), base.attr)
                  for base in classes[0].bases)
    return dataclasses.make_dataclass(name, rows, bases=bases,
                                      namespace={"__module__": "__main__"})
