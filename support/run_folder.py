"""Run folders: which run they hold, their logs, checkpoints to go on from.

    config.json        the settings; a run goes on only with the same ones
    metrics.jsonl      one line per optimizer step (sft.py) or update (rl.py); turns.jsonl: whole conversations
    step_000400/       a Hugging Face folder, value_head.safetensors, and resume/ with the optimizer's state
    step_000500.tmp/   a checkpoint that was never finished: it is skipped
"""
import json
import os
import shutil
from dataclasses import MISSING, asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from support import running

# Fields that say how a run is executed, not what it computes: they may differ when it is continued.
MAY_DIFFER = {"out", "device", "micro_batch_tokens", "generate_tokens", "save_every", "keep_resume",
              "gradient_checkpointing"}


def checkpoint_step(folder):
    return int(Path(folder).name.removeprefix("step_"))


def checkpoints(out):
    """The complete checkpoints of a run folder, oldest first."""
    return sorted((p for p in Path(out).glob("step_*") if not p.suffix), key=checkpoint_step)


def newest_checkpoint(config):
    """The newest complete checkpoint of the run folder, from which it goes on, or None; writes nothing.

    ValueError names the fields in which the folder's config differs from this one, or says that it holds no run.
    """
    out = Path(config.out)
    if (out / "config.json").is_file():
        theirs, ours = running.read_run_config(out), json.loads(json.dumps(asdict(config)))
        differing = [k for k in {**theirs, **ours}
                     if k not in MAY_DIFFER and theirs.get(k, MISSING) != ours.get(k, MISSING)]
        if differing:
            listed = ", ".join(f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in differing)
            raise ValueError(f"out folder {config.out} belongs to another config ({listed}): choose another --out (OUT= "
                             "of a recipe)")
    elif out.exists() and (not out.is_dir() or any(p.suffix != ".tmp" for p in out.iterdir())):
        raise ValueError(f"out folder {config.out} is not empty and holds no run: choose another --out")
    for torn in sorted(out.glob("step_*.tmp")):
        running.say(f"{torn} was never finished: skipped")
    resumable = [p for p in checkpoints(out) if (p / "resume" / "state.json").is_file()]
    if checkpoints(out) and not resumable:
        raise ValueError(f"out folder {config.out} has checkpoints but none with its resume/ folder: "
                         f"go on with --model {checkpoints(out)[-1]} and another --out")
    return resumable[-1] if resumable else None


def open_run(config, newest):
    """Make the run folder with its config.json, or cut its log back to the checkpoint it goes on from."""
    running.gather(None)                                         # all have looked at the folder
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    running.write_atomically(out / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    last_step = checkpoint_step(newest) if newest else 0
    for name in ("metrics.jsonl", "turns.jsonl"):
        if (out / name).is_file():
            rows = [row for row in running.read_jsonl(out / name) if row["step"] <= last_step]
            running.write_atomically(out / name, "".join(json.dumps(row) + "\n" for row in rows))
    if newest:
        running.say(f"{out}: goes on after step {last_step}")
    running.gather(None)


def gather_weights(policy):
    """{"backbone": {name: tensor}, "value_head": ...} in the memory of the first process, put together one by one."""
    weights, known = {"backbone": {}, "value_head": {}}, {}
    for name, tensor in policy.state_dict(keep_vars=True).items():
        part, _, rest = name.partition(".")
        if id(tensor) not in known:                      # tied weights are one tensor with two names
            values = tensor.detach()
            if isinstance(values, DTensor):
                values = values.full_tensor()
                values = values.cpu() if running.RANK == 0 else None
            known[id(tensor)] = values
        weights[part][rest] = known[id(tensor)]
    return weights


def publish(temporary, final):
    """Give a complete folder its final name, once all of it is on the disk."""
    for path in [*temporary.rglob("*"), temporary]:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_checkpoint(folder, policy, processor, optimizer, state, with_value_head):
    """All files of a checkpoint; every process has written its own when this returns."""
    weights = gather_weights(policy)
    if running.RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "resume").mkdir(parents=True)
        policy.backbone.save_pretrained(folder, state_dict=weights["backbone"])
        processor.save_pretrained(folder)
        if with_value_head:
            save_file(weights["value_head"], folder / "value_head.safetensors")
        (folder / "resume" / "state.json").write_text(json.dumps(state))
    running.gather(None)                                         # the folder is there
    names = {p: name for name, p in policy.named_parameters()}
    parts = {f"{names[p]}.{key}": value.to_local().contiguous() if isinstance(value, DTensor) else value
             for p, entry in optimizer.state.items() for key, value in entry.items()}
    save_file(parts, folder / "resume" / f"optimizer_{running.RANK:05d}.safetensors")
    running.gather(None)


def ensure_checkpoint(out, step, policy, processor, optimizer, state, keep_resume=2, with_value_head=True):
    """Write step_000400/, unless it is there: a Hugging Face folder, value_head.safetensors, and resume/ (optimizer and
    `state`).

    It is written as step_000400.tmp/ and renamed when it is complete. Weights stay; resume/ is kept for the newest
    `keep_resume` checkpoints. Every process writes its part of the optimizer state; the first writes all the rest.
    """
    final = Path(out) / f"step_{step:06d}"
    temporary = final.with_suffix(".tmp")
    if any(running.gather(final.exists())):
        return final
    try:
        write_checkpoint(temporary, policy, processor, optimizer, state, with_value_head)
        if running.RANK == 0:
            publish(temporary, final)
            for old in checkpoints(out)[:-keep_resume]:
                shutil.rmtree(old / "resume", ignore_errors=True)
    except (OSError, SafetensorError) as error:          # such as a full disk
        running.fail(f"{temporary}: {error}; the checkpoints before it are whole, and the same command goes on", alone=True)
    running.gather(None)
    return final


def load_resume(folder, policy, optimizer):
    """Put the optimizer state of a checkpoint back and return its `state`; the weights come with load_policy.

    Each tensor is put together from the parts of the processes that wrote it and cut anew for those that read it.
    """
    files = [safe_open(path, "pt") for path in sorted((folder / "resume").glob("optimizer_*.safetensors"))]
    names = set(files[0].keys())
    for name, p in policy.named_parameters():
        if f"{name}.step" in names:
            optimizer.state[p] = {"step": files[0].get_tensor(f"{name}.step")}
            for key in ("exp_avg", "exp_avg_sq"):
                parts = [file.get_tensor(f"{name}.{key}") for file in files]
                optimizer.state[p][key] = running.shard_like(p, torch.cat(parts) if len(parts) > 1 else parts[0])
    return json.loads((folder / "resume" / "state.json").read_text())
