"""Run folders: which run they hold, their logs, and checkpoints to go on from.

    config.json        the settings; a run goes on only with the same ones
    metrics.jsonl      one line for each optimizer step (sft.py) or update (rl.py)
    turns.jsonl        whole conversations (rl.py)
    inputs.json        digests of what the run began with: its start, and files that settings name
    step_000400/       a Hugging Face folder, value_head.safetensors, and resume/ to go on from
    step_000500.tmp/   a checkpoint that was never finished: it is skipped
    .training.lock     locked by the process that trains here; evaluate.py has its own lock

Whatever else lies there is left alone: step_000400-best, notes, links.
"""
import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from support import digests, loading, logs, portable, running

# Fields that say how a run is executed, not what it computes: they may differ when it goes on.
MAY_DIFFER = {"out", "device", "micro_batch_tokens", "generate_tokens", "kept_gib", "save_every",
              "keep_resume", "gradient_checkpointing"}
LOGS = ("metrics.jsonl", "turns.jsonl")
MOMENTS = ("exp_avg", "exp_avg_sq")    # what Adam keeps of a weight, beside its number of steps
HELD = set()   # the locks of this process


def checkpoint_step(folder):
    return int(Path(folder).name.removeprefix("step_"))


def checkpoints(out):
    """The complete checkpoints of a run folder, oldest first."""
    name = "step_([0-9]{6}|[1-9][0-9]{6,})"
    found = [path for path in Path(out).glob("step_*")
             if re.fullmatch(name, path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=checkpoint_step)


def hold(folder, use):
    """Lock a folder for this use until the process ends; ValueError names the process that has it.

    The kernel takes the lock back, whatever ends the process. Nothing happens where there is no
    such folder yet, or where the file system has no locks.
    """
    path, host = Path(folder).resolve() / f".{use}.lock", f" on {socket.gethostname()}"
    holder = None
    if running.RANK == 0 and path not in HELD:
        with contextlib.suppress(OSError):
            # The file stays open, because the lock is lost with it.
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                HELD.add(path)
                os.truncate(file, 0)
                os.write(file, f"{os.getpid()}{host}".encode())
            except BlockingIOError:
                holder = os.read(file, 1000).decode(errors="replace").removesuffix(host) or "?"
    holder = running.gather(holder)[0]
    if holder:
        raise ValueError(f"{folder}: process {holder} is {use} here; wait for its end, or stop it")


def check_owner(config):
    """ValueError unless --out is new or holds a run with this config.

    It names the fields that differ, or the file that a run would write over.
    """
    out = Path(config.out)
    if (out / "config.json").is_file():
        theirs, ours = running.read_run_config(out), json.loads(json.dumps(asdict(config)))
        if "out" not in theirs:
            raise ValueError(f"out folder {config.out} has a config.json that is none of a run, "
                             "such as a model's: choose another --out")
        # A run from before an option was there has its default.
        theirs = json.loads(json.dumps(asdict(type(config)()))) | theirs
        # An option that is gone, such as --dft of sft.py, does not count where it was off.
        theirs = {name: value for name, value in theirs.items() if value or name in ours}
        if ("updates" in theirs) != ("updates" in ours):
            script = "rl.py" if "updates" in theirs else "sft.py"
            raise ValueError(f"out folder {config.out} holds a run of {script}: choose another "
                             "--out (OUT= of a recipe)")
        told = running.read_object(out / "inputs.json").get("files")
        moved = digests.NAME_FILES if told and checkpoints(out) else ()
        names = logs.differing(theirs, ours, MAY_DIFFER, moved)
        if "model" in names and digests.is_start(out, config.model):
            names.remove("model")      # it was moved
        # PPO's learning rate follows --lr-horizon, not --updates: a run may be made longer.
        if names == ["updates"] and ours["updates"] > theirs["updates"]:
            names = []
        if names:
            listed = ", ".join(f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} here"
                               for name in names)
            raise ValueError(f"out folder {config.out} belongs to another config ({listed}): "
                             "choose another --out (OUT= of a recipe)")
    elif out.is_dir():
        written = r"metrics\.jsonl|turns\.jsonl|eval\.jsonl|step_[0-9]+|.*\.safetensors"
        found = sorted(path.name for path in out.iterdir() if re.fullmatch(written, path.name))
        if found:
            raise ValueError(f"out folder {config.out} has {found[0]} but no config.json of a run: "
                             "choose another --out")
    elif out.exists():
        raise ValueError(f"out folder {config.out} is a file: choose another --out")


def read_steps(path):
    """The rows of a log of a run, each with the number of its step."""
    return running.read_jsonl(path, "step")


def read_metrics(run, steps):
    """{step: row} of metrics.jsonl; ValueError unless each of these steps has one."""
    path = Path(run) / "metrics.jsonl"
    rows = {row["step"]: row for row in read_steps(path)}
    if lost := sorted(set(steps) - rows.keys()):
        raise ValueError(f"{path} has no row of step {lost[0]}: put the log back from a copy; "
                         "without it the checkpoints behind that step serve only as --model of "
                         "evaluate.py or of a run with another --out")
    return rows


@contextlib.contextmanager
def damage_advice(newest):
    """Around the reading of the checkpoint that a run goes on from, or None: an error ends with how
    to go on without it."""
    try:
        yield
    except ValueError as error:
        if newest is None:
            raise
        advice = (f"{newest} is the only checkpoint to go on from: start anew with another --out, "
                  "with it as --model if its weights are whole")
        older = [path for path in checkpoints(newest.parent)[:-1] if (path / "resume").is_dir()]
        if older:
            advice = f"move {newest} away to go on from {older[-1].name}"
        raise ValueError(f"{error}; {advice}") from None


def newest_checkpoint(config):
    """The newest complete checkpoint of the run folder, from which it goes on, or None. Writes
    nothing but the lock.

    ValueError if the folder is of another run, if another process trains in it, or if the log or
    the checkpoint is not whole.
    """
    check_owner(config)
    out = Path(config.out)
    hold(out, "training")
    for torn in sorted(out.glob("step_*.tmp")):
        running.print0(f"{torn} was never finished: skipped")
    newest = (checkpoints(out) or [None])[-1]
    if newest:
        read_metrics(out, range(1, checkpoint_step(newest) + 1))
        with damage_advice(newest):
            if not (newest / "resume" / "state.json").is_file():
                raise ValueError(f"{newest}/resume/state.json is missing")
    elif any(row["step"] for row in read_steps(out / "eval.jsonl")):
        # To begin anew would take the logs of its training and these tests away.
        raise ValueError(f"out folder {out} has tests in eval.jsonl, but their checkpoints are "
                         "gone: choose another --out (OUT= of a recipe)")
    return newest


def check_start(run, start):
    """ValueError unless weights, tokenizer and configs of a start are those that a run began with.

    A run of an earlier version, which does not tell, and a folder that is gone pass.
    """
    began = running.read_object(Path(run) / "inputs.json")
    if Path(start).is_dir() and (changed := digests.changed_of_start(began, start)):
        raise ValueError(f"start {start}: has other {changed} than those that {run} began with: "
                         "put them back; evaluate.py can leave the start out (--no-start)")


def drop_tests(out, last_step, inputs):
    """Leave out the rows of tests whose checkpoint is gone, and will be made anew. In a new run
    these may be tests of another start."""
    began = {of_row: inputs.get(name) for name, of_row in digests.OF_START.items()}

    def stays(row):
        if row["step"] == 0 and not last_step:
            return all(row.get(name) in (None, own) for name, own in began.items() if own)
        return row["step"] <= last_step or (out / f"step_{row['step']:06d}").is_dir()

    if all(map(stays, read_steps(out / "eval.jsonl"))):
        return
    for path in (out / "eval.jsonl", out / "dialogues.jsonl"):
        if path.is_file():
            running.write_jsonl(path, [row for row in read_steps(path) if stays(row)])


def open_run(config, newest, inputs=None):
    """Make the run folder with its config.json and, in a new run, inputs.json. If the run goes on
    from a checkpoint, cut its logs back to that."""
    running.gather(None)                     # all have looked at the folder
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    hold(out, "training")                    # for a folder that was not there before
    running.write_atomically(out / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    if not newest:
        running.write_atomically(out / "inputs.json", json.dumps(inputs or {}) + "\n")
    last_step = checkpoint_step(newest) if newest else 0
    for path in (out / name for name in LOGS):
        if path.is_file():
            running.write_jsonl(path, [row for row in read_steps(path) if row["step"] <= last_step])
    drop_tests(out, last_step, inputs or {})
    if newest:
        running.print0(f"{out}: goes on after step {last_step}")
    running.gather(None)


def gather_weights(policy):
    """{"backbone": {name: tensor}, "value_head": ...} in the memory of the first process.

    Sharded weights are put together one after the other.
    """
    weights, known = {"backbone": {}, "value_head": {}}, {}
    for name, tensor in policy.state_dict(keep_vars=True).items():
        part, _, rest = name.partition(".")
        if id(tensor) not in known:          # tied weights are one tensor with two names
            values = tensor.detach()
            if isinstance(values, DTensor):
                values = values.full_tensor()
                values = values.cpu() if running.RANK == 0 else None
            known[id(tensor)] = values
        weights[part][rest] = known[id(tensor)]
    return weights


def sync(path):
    """Wait until a file or a folder's list of files is on the disk."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def publish(temporary, final):
    """Give a complete folder its final name, once all of it is on the disk, and the logs that lead
    to it as well."""
    for path in [final.parent / name for name in LOGS]:
        if path.is_file():
            sync(path)
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    os.replace(temporary, final)
    sync(final.parent)


@contextlib.contextmanager
def whole(out):
    """The path of a folder to make, which is named `out` at the end of the block. Of a block that
    does not end nothing is left. So a folder of this name is always whole."""
    out = Path(out)
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)        # of a process that was killed
    try:
        yield unfinished
        publish(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)    # unless it has its name


def write_checkpoint(folder, policy, processor, optimizer, state, with_value_head):
    """All files of a checkpoint. Every process has written its files when this returns."""
    weights = gather_weights(policy)
    if running.RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "resume").mkdir(parents=True)
        policy.backbone.save_pretrained(folder, state_dict=weights["backbone"])
        try:
            processor.save_pretrained(folder)
        except Exception as error:           # its writer, in Rust, raises nothing more precise
            raise OSError(str(error)) from None
        differs = portable.make_portable(folder, loading.tokenizer_of(processor))
        if differs and not checkpoints(folder.parent):         # said once
            running.print0(f"{folder.parent}: {differs}")
        if with_value_head:
            save_file(weights["value_head"], folder / "value_head.safetensors")
        (folder / "resume" / "state.json").write_text(json.dumps(state))
    running.gather(None)                     # the folder is there
    names = {p: name for name, p in policy.named_parameters()}
    parts = {}
    for p, entry in optimizer.state.items():
        for key, value in entry.items():
            if isinstance(value, DTensor):
                value = value.to_local().contiguous()
            parts[f"{names[p]}.{key}"] = value
    save_file(parts, folder / "resume" / f"optimizer_{running.RANK:05d}.safetensors")
    running.gather(None)


def check_finite(policy, final):
    """End the run if a weight is no finite number: such a checkpoint would take the place of whole
    ones."""
    broken = []
    for name, weight in policy.named_parameters():
        values = weight.to_local() if isinstance(weight, DTensor) else weight
        if not loading.is_finite(values):
            broken.append(name)
    broken = sum(running.gather(broken), [])
    if broken:
        running.fail(f"{final}: weights {broken[0]} hold values that are no finite numbers, so it "
                     "is not saved; what was saved before is whole")


def ensure_checkpoint(out, step, policy, processor, optimizer, state, keep_resume=2,
                      with_value_head=True):
    """Write step_000400/, unless it is there: a Hugging Face folder, value_head.safetensors, and
    resume/ with the optimizer and `state`.

    It is written as step_000400.tmp/ and renamed when it is complete. Every process writes its part
    of the optimizer; the first writes all the rest. Weights stay; resume/ is kept for the newest
    `keep_resume` checkpoints.
    """
    final = Path(out) / f"step_{step:06d}"
    temporary = final.with_suffix(".tmp")
    if any(running.gather(final in checkpoints(out))):
        return final
    check_finite(policy, final)
    try:
        write_checkpoint(temporary, policy, processor, optimizer, state, with_value_head)
        if running.RANK == 0:
            publish(temporary, final)
            for old in checkpoints(out)[:-keep_resume]:
                shutil.rmtree(old / "resume", ignore_errors=True)
    except (OSError, SafetensorError) as error:          # such as a full disk
        running.fail(f"{temporary}: {error}; the checkpoints before it are whole, and the same "
                     "command goes on", alone=True)
    running.gather(None)
    return final


def open_parts(resume):
    """The optimizer's files of a checkpoint, one for each process that wrote it.

    ValueError unless each has all that Adam keeps of each weight that one of them has.
    """
    files = {}
    for path in sorted(resume.glob("optimizer_*.safetensors")):
        try:
            files[path] = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: {error}") from None
    if not files:
        raise ValueError(f"{resume}/optimizer_00000.safetensors is missing")
    trained = {name.rpartition(".")[0] for file in files.values() for name in file.keys()}
    expected = {f"{name}.{key}" for name in trained for key in ("step", *MOMENTS)}
    for path, file in files.items():
        if lacking := sorted(expected - set(file.keys())):
            raise ValueError(f"{path}: has no {lacking[0]}")
    return list(files.values())


def is_count(value):
    return type(value) is int and value >= 0


def is_conversation(entry, num_ids):
    """Whether this is [episode, replies so far], each reply a list of ids below `num_ids`."""
    if not isinstance(entry, list) or len(entry) != 2 or not is_count(entry[0]):
        return False
    if not isinstance(entry[1], list):
        return False
    for reply in entry[1]:
        if not isinstance(reply, list) or not all(is_count(i) and i < num_ids for i in reply):
            return False
    return True


def check_state(path, state, first_state, num_ids):
    """ValueError unless a state has the keys of a run's first one, with values of their kinds."""
    for key, first in first_state.items():
        if key not in state:
            raise ValueError(f"{path}: has no {key!r}")
        value = state[key]
        if isinstance(first, (int, float)):
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise ValueError(f"{path}: {key!r} is {shortened(value)}, no number from 0 on")
        elif not isinstance(value, list) or len(value) != len(first):
            raise ValueError(f"{path}: {key!r} is {shortened(value)}, no list of {len(first)}")
    for i, entry in enumerate(state.get("conversations", ())):
        if not is_conversation(entry, num_ids):
            raise ValueError(f"{path}: number {i} of 'conversations' is {shortened(entry)}, not "
                             f"[episode, replies] with replies of ids from 0 to {num_ids - 1}")


def shortened(value):
    text = repr(value)
    return text if len(text) < 60 else text[:60] + "..."


def load_resume(folder, policy, optimizer, first_state=None):
    """Put the optimizer state of a checkpoint back and return its `state`; the weights come with
    load_policy.

    Each tensor is put together from the parts of the processes that wrote it, and cut anew for
    those that read it. ValueError if a file is missing or damaged, or the state is not like the
    first one of a run.
    """
    with damage_advice(folder):
        resume = folder / "resume"
        state = running.read_object(resume / "state.json")
        # With another step the run would train some steps twice, or leave some out.
        if state.get("step") != checkpoint_step(folder):
            raise ValueError(f"{resume}/state.json: says step {state.get('step')!r}, but the "
                             f"checkpoint is of step {checkpoint_step(folder)}")
        check_state(resume / "state.json", state, first_state or {}, len(policy.banned))
        files = open_parts(resume)
        names = set(files[0].keys())
        trained_head = any(name.startswith("value_head.") for name in names)
        if trained_head and not (folder / "value_head.safetensors").is_file():
            # load_policy has made a new one.
            raise ValueError(f"{folder}/value_head.safetensors is missing")
        for name, p in policy.named_parameters():
            if f"{name}.step" not in names:
                continue
            optimizer.state[p] = {"step": files[0].get_tensor(f"{name}.step")}
            for key in MOMENTS:
                parts = [file.get_tensor(f"{name}.{key}") for file in files]
                whole = torch.cat(parts) if len(parts) > 1 else parts[0]
                if whole.shape != p.shape:
                    raise ValueError(f"{resume}: its {len(files)} optimizer_*.safetensors hold "
                                     f"{tuple(whole.shape)} of {name}, which is {tuple(p.shape)}: "
                                     "one is missing or of another run")
                optimizer.state[p][key] = running.shard_like(p, whole)
    return state
