"""What a run needs and the paper does not mention: errors, files, memory, processes.

The scripts are written as if there were one process. torchrun starts one per device. What the
processes have to agree on goes through `gather` and `total`. Every process calls these at the same
point, and in a single process they cost nothing.

The last section is the one to read: how FSDP2 spreads weights, gradients and optimizer state over
the processes, which the paper's scale needs.
"""
import contextlib
import datetime
import json
import math
import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# Scripts find these here as well: running.flag, running.read_jsonl.
from support import command_line, logs
from support.command_line import (RANK, OneLineParser, fail, flag,  # noqa: F401
                                  flush_console, parse_config)
from support.logs import read_jsonl, read_object, read_run_config  # noqa: F401
from support.startup import stop_early

WORLD = int(os.environ.get("WORLD_SIZE", 1))

# ---- How a script begins and ends ---------------------------------------------------------------

@contextlib.contextmanager
def one_line_errors(where=None, out=None):
    """The user's mistakes (ValueError) and numbers that are not finite end with one line and no
    traceback.

    `where` names what has begun: a step or an update, of a run with the folder `out`, or a test.
    Before that all processes mostly meet the same error, and the first one prints it.
    """
    begun = "" if where is None else f"{where}: "

    def has_checkpoint():
        names = [path.name for path in Path(out).glob("step_*")] if out else []
        return any(re.fullmatch("step_[0-9]+", name) for name in names)

    try:
        yield
    except FloatingPointError as error:      # in every process: they share the gradient's norm
        advice = "start again"
        if has_checkpoint():
            advice = "the last checkpoint is whole, go on from it"
        fail(f"{begun}{error}; {advice} with a smaller --lr and another --out")
    except ValueError as error:              # in a run such as a picture that cannot be read
        advice = "; the last checkpoint is whole" if has_checkpoint() else ""
        if RANK and not out:
            # If the first process has failed as well, torchrun ends this one meanwhile.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(8)
        fail(f"{begun}{error}{advice}", alone=True)


@contextlib.contextmanager
def memory_advice(knobs):
    """Where memory may run out (also as a decorator): end with one line that names the options to
    lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).splitlines()[0]} Lower {knobs}; what is saved is whole, and the same "
             "command goes on", alone=True)


def run(main, config_class):
    """A script: its command line, `main`, and an end that all processes reach together.

    Ctrl-C and SIGTERM end it with one line. (In a training loop StopSignal takes them, and saves
    first.) A full disk or a folder without permission to write ends it with one line, too. If its
    reader has gone (`| head`), it ends without a line, as other tools do.
    """
    def terminate(*_):
        raise KeyboardInterrupt("terminated")

    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) == stop_early:        # it is not ignored, as for a job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A daemon may have no output at all.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        main(parse_config(config_class))
        sys.stdout.flush()
        leave()
    except KeyboardInterrupt as stop:
        flush_console()
        print("\nstopped; the same command goes on with what is saved", file=sys.stderr)
        os._exit(143 if stop.args else 130)              # the other processes got the signal, too
    except BrokenPipeError:                              # a result is saved before it is printed
        os._exit(128 + signal.SIGPIPE)
    except OSError as error:
        fail(f"{error}; what was saved before is whole, and the same command goes on with it",
             alone=True)
    finally:
        flush_console()                                  # else Python ends with a complaint


# ---- Console and files ---------------------------------------------------------------------------

class LogStream:
    """stderr that leads to a file or a program. If that is gone, bars are not shown, and the work
    goes on."""

    def write(self, text):
        command_line.Console.within_line = not text.endswith("\n")     # as a bar leaves it
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def progress(iterable=None, nested=False, **kwargs):
    """A progress bar of the first process. In a log that nobody watches it is written rarely, and a
    nested one not at all."""
    watched = sys.stderr.isatty()
    return tqdm(iterable, disable=RANK > 0 or nested and not watched, leave=not nested,
                mininterval=0.1 if watched else 30, miniters=None if watched else 1,
                file=None if watched else LogStream(), **kwargs)


def print0(text):
    """Print a line, in the first process."""
    if RANK == 0:
        command_line.end_line()
        tqdm.write(text)


def print_finished(out):
    """The last line of a run, also of one that was finished before."""
    print0(f"{out}: finished; to test its checkpoints: python evaluate.py --run-folder {out}")


@contextlib.contextmanager
def naming(path):
    """Errors of writing, such as a full disk, name the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path, text):
    """Replace a file's content in one move, so that no reader or crash ever shows half of it."""
    if RANK > 0:
        return
    temporary = Path(f"{path}.tmp")
    with naming(path), open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_jsonl(path, rows):
    """Replace a log by these rows."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_whole_lines(path):
    """Cut a file back to its whole lines, so that a row can be appended."""
    content = Path(path).read_bytes()
    size = sum(len(line) + 1 for line in logs.whole_lines(content))
    if size > len(content):                 # the last line lacks its break
        with open(path, "ab") as file:
            file.write(b"\n")
    os.truncate(path, size)


def log_jsonl(path, **row):
    """Append a row to a log, in the first process."""
    if RANK > 0:
        return
    append_line(path, row)


def append_line(path, row):
    """Append a row to a file, in any process; on a full disk all of it or nothing."""
    size = Path(path).stat().st_size if Path(path).exists() else 0
    try:
        with naming(path), open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)          # half a line would spoil the next one
        raise


# ---- Device, type and memory ---------------------------------------------------------------------

def pick_device(name):
    """"auto" is CUDA where there is one; anything else is torch's name of a device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def has_bfloat16_units():
    """Whether this CPU multiplies matrices in bfloat16, and torch's kernels may use that.

    The second is what ONEDNN_MAX_CPU_ISA can forbid. Without such units a CPU is 25 to 80 times
    slower in bfloat16 than in float32.
    """
    units = torch.cpu.get_capabilities()
    found = any(units.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return found and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pick_dtype(name, device, run_folder=None):
    """The type that "auto" stands for, which is printed; any other name is itself.

    It is what the run folder has recorded. In a new run it is bfloat16 on a GPU, and on a CPU that
    has units for it. That depends on the processor alone, so all arms of a comparison get the same.
    """
    if name != "auto":
        return name
    recorded = read_run_config(run_folder).get("dtype") if run_folder else None
    if recorded not in (None, "auto"):
        return recorded
    has_units = device.type != "cpu" or has_bfloat16_units()
    dtype = gather("bfloat16" if has_units else "float32")[0]
    kind = "GPU" if device.type == "cuda" else device.type.upper()
    has = "has" if dtype == "bfloat16" else "lacks"
    print0(f"dtype auto: {dtype}, since this {kind} {has} units for bfloat16")
    return dtype


class Memory(NamedTuple):
    """Bytes that training needs on a device."""
    weights: float         # master weights, its share
    gradients: float       # its share
    moments: float         # Adam's two, its share
    computed_with: float   # whole weights in the type that the policy computes in
    fused: float           # what sampling adds for a Llama
    micro_batch: float     # what one micro-batch adds


def memory_parts(policy, config):
    """The `Memory` of a run.

    Weights, gradients and Adam's two moments are shared out over the processes. Beside them stand
    weights in the type that the policy computes in. A single process has these if its master
    weights are of another type. Several processes have them for sampling, all on every device. For
    a Llama, sampling adds fused projections.

    What a layer keeps of a token for the backward pass is fitted to Llama. It is 40 bytes per
    hidden unit and four numbers per unit of the MLP. With checkpointing each layer keeps its input,
    and one layer at a time all of that. A quarter of the tokens is taken for replies, which have
    logits.
    """
    text, tokens = policy.backbone.config.get_text_config(), config.micro_batch_tokens
    size, samples = policy.dtype.itemsize, hasattr(config, "generate_tokens")
    parts = dict(policy.backbone.named_parameters())
    weights = sum(p.numel() * p.element_size() for p in parts.values()) / WORLD
    gradients = sum(p.numel() * p.element_size() for p in parts.values() if p.requires_grad) / WORLD
    cast = WORLD == 1 and any(p.dtype != policy.dtype for p in parts.values())
    computed_with = fused = 0
    if cast or samples and WORLD > 1:
        computed_with = size * sum(p.numel() for p in parts.values())
    if samples and not cast and policy.backbone.config.model_type == "llama":
        fused = size * sum(p.numel() for name, p in parts.items()
                           if re.search(r"\.(q|k|v|gate|up)_proj\.", name))
    layers, kept = text.num_hidden_layers, 40 * text.hidden_size + 4 * size * text.intermediate_size
    of_layers = kept * layers
    if config.gradient_checkpointing:
        of_layers = kept + 4 * text.hidden_size * layers
    logits = tokens / 4 * policy.backbone.lm_head.weight.shape[0] * (4 + size)
    return Memory(weights, gradients, 2 * gradients, computed_with, fused,
                  tokens * of_layers + logits)


def memory_estimate(policy, config):
    """A line on the memory that training needs on each device: what stays, and what one micro-batch
    adds."""
    parts = memory_parts(policy, config)
    stays = parts.weights + parts.gradients + parts.moments
    return (f"memory on each device: about {stays / 1e9:.1f} GB for weights, gradients and Adam, "
            f"{(parts.computed_with + parts.fused) / 1e9:.1f} GB for weights as computed with, "
            f"{parts.micro_batch / 1e9:.1f} GB for a micro-batch of {config.micro_batch_tokens} "
            "tokens; a picture's tokens are counted as text, which takes more")


def print_memory(policy, config):
    """Print the estimate where memory is short: on GPUs."""
    if policy.device.type == "cuda":
        print0(memory_estimate(policy, config))


def check_memory(policy, config):
    """ValueError if a GPU cannot hold what training must have on it at one time.

    Only what is certain counts. Gradients and gathered weights are never there together. In a
    vision model some weights may get no gradient, and so no moments.
    """
    if policy.device.type != "cuda":
        return
    parts = memory_parts(policy, config)
    # The smallest of all GPUs, so that all processes stop together.
    holds = min(gather(torch.cuda.get_device_properties(policy.device).total_memory))
    trained = not policy.vision
    shares = parts.weights + trained * parts.moments
    beside = trained * parts.gradients, "gradients", "more GPUs, "
    if WORLD > 1 and parts.computed_with > beside[0]:
        beside = parts.computed_with, "the whole weights in sampling, on every GPU", ""
    if shares + beside[0] > holds:
        raise ValueError(
            f"model {config.model!r}: training needs at least {(shares + beside[0]) / 1e9:.1f} GB "
            f"on each of {WORLD} GPUs, which have {holds / 1e9:.1f}: "
            f"{shares / 1e9:.1f} for weights and Adam, {beside[0] / 1e9:.1f} for {beside[1]}; "
            f"take {beside[2]}--param-dtype bfloat16 or a smaller model")


def learning_rate(step, steps, peak, warmup_ratio=0.0, final=0.0):
    """Linear warm-up over a share of the `steps`, then a cosine from `peak` to `final`.

        in the warm-up: peak (step + 1) / warmup
        after it: final + (peak - final) (1 + cos(pi share)) / 2, where share goes from 0 to 1
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))


# ---- Signals -------------------------------------------------------------------------------------

class StopSignal:
    """Turns Ctrl-C, SIGTERM or SIGUSR1 into a flag that the loops look at together. A second signal
    exits at once."""

    def __init__(self):
        self.status = 0              # later what a shell expects of a process that was stopped so
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number, _):
        if self.status:
            os._exit(self.status)
        self.status = 130 if number == signal.SIGINT else 143
        if RANK == 0:
            with contextlib.suppress(OSError):   # Ctrl-C has ended a `| tee` as well
                os.write(2, b"\nstopping: ends this step or update and saves; a second signal "
                            b"leaves at once\n")

    @property
    def requested(self):
        """Whether any process received a signal."""
        return any(gather(self.status))

    def leave(self, checkpoint):
        """End a run that is saved; the exit status says by which signal."""
        print0(f"stopped; {checkpoint} is saved, and the same command goes on")
        leave(max(gather(self.status)))


# ---- Several processes ---------------------------------------------------------------------------

def start_processes(name):
    """The device of this process, once it has met the others.

    A process that waits for another gives up after half an hour. Meanwhile the first one may write
    43 GB to a slow disk.
    """
    device = pick_device(name)
    if WORLD > 1 and not dist.is_initialized():
        backend = "gloo"
        if device.type == "cuda":
            backend = "nccl"
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    return device


def leave(status=0):
    """End of a script: exit with this status, all processes together."""
    flush_console()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        os._exit(status)             # torch's threads sometimes crash a normal exit
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            # All is done, so a stop that comes now changes nothing.
            signal.signal(number, lambda *_: os._exit(status))
    sys.exit(status)


def gather(value):
    """The values of all processes in order of rank; a value is anything that JSON can hold."""
    if WORLD == 1:
        return [value]
    # The values are sent as bytes of JSON, padded to the longest.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(WORLD)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    rows = [torch.zeros(int(max(sizes)), dtype=torch.uint8, device=device) for _ in range(WORLD)]
    dist.all_gather(rows, F.pad(data, (0, int(max(sizes)) - len(data))))
    return [json.loads(bytes(row[:int(size)].tolist())) for row, size in zip(rows, sizes)]


def total(value):
    """The sum of a number over all processes."""
    return sum(gather(value))


def mean_and_variance(values):
    """Mean and variance of the values (n,) of all processes."""
    values = values.double()
    num = total(len(values))
    mean = total(float(values.sum())) / num
    return mean, total(float(((values - mean) ** 2).sum())) / num


def local_part(items):
    """The part of a sequence that falls to this process: with two of them, every second item."""
    return items[RANK::WORLD]


def pad_batches(batches, filler=None):
    """(batch, weight) pairs, equally many in every process, since each pass gathers weights from
    all. A process with fewer batches repeats its last, or has `filler` if it has none, with weight
    0."""
    missing = max(gather(len(batches))) - len(batches)
    extra = batches[-1] if batches else filler
    return [(batch, 1.0) for batch in batches] + [(extra, 0.0)] * missing


# ---- FSDP2: weights, gradients and optimizer state spread over the processes ---------------------
#
# A unit is one layer of the model, or what is left beside the layers. Of every weight in a unit,
# each process holds a share: some rows. Gradients and Adam's moments have the same shares.
#
#   loading     the first process reads the folder and sends each unit to the others, which keep
#               their shares of it
#   training    before a unit computes, forward or backward, its weights are gathered from all
#               processes, and dropped after; its gradients are averaged, and each keeps its share
#   sampling    all weights are gathered once for a call of `generate`, and dropped after
#   saving      the first process gathers one weight after the other (support/run_folder.py); the
#               optimizer's shares are written by each process and cut anew when they are read

def layers_of(policy):
    """The layers of the language model and of the vision tower: the units of sharding and of
    checkpointing."""
    names = policy.backbone._no_split_modules or ()
    return [module for module in policy.backbone.modules() if type(module).__name__ in names]


def enable_checkpointing(policy):
    """Compute a layer's activations again in the backward pass instead of keeping them."""
    if not layers_of(policy):
        raise ValueError(f"gradient_checkpointing: {policy.backbone.config.model_type} does not "
                         "name its layers")
    # transformers has a switch for this, but it leaves the vision tower out.
    for layer in layers_of(policy):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                preserve_rng_state=False)


def broadcast_module(unit, device):
    """Move a module's parameters and buffers to `device`, on every process with the values of the
    first. What is sharded already stays."""
    # Tied weights are one tensor in two places, so each tensor is moved once, known by its id. The
    # original is kept beside the moved one, so that no other tensor gets its id meanwhile.
    moved = {}
    for module in unit.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in moved:
                    if RANK == 0:
                        values = tensor.detach().to(device)
                    else:
                        values = torch.empty_like(tensor, device=device)
                    dist.broadcast(values, 0)
                    if isinstance(tensor, nn.Parameter):
                        values = nn.Parameter(values, tensor.requires_grad)
                    moved[id(tensor)] = values, tensor
                tensors[name] = moved[id(tensor)][0]


def load_spread(load, device):
    """(policy, processor) for training, by load(device, on_meta). With several processes each holds
    a share of the weights.

    Only the first process reads the folder; for the others `on_meta` leaves the weights out. While
    loading, no device holds more than one whole unit beside its shares. ValueError in the first
    process is raised in all.
    """
    if WORLD == 1:
        return load(device, on_meta=False)
    error = None
    try:
        policy, processor = load("cpu", on_meta=RANK > 0)
    except ValueError as problem:
        error = str(problem)
    if errors := [problem for problem in gather(error) if problem]:
        raise ValueError(errors[0])
    # The config may tie lm_head to the embeddings although the file holds an lm_head of its own.
    # Then only the first process, which read the file, has untied them. The others do it here.
    names = gather([name for name, _ in policy.named_parameters()])[0]
    lm_head, embeddings = policy.backbone.lm_head, policy.backbone.get_input_embeddings()
    if "backbone.lm_head.weight" in names and lm_head.weight is embeddings.weight:
        lm_head.weight = nn.Parameter(torch.empty_like(lm_head.weight))
    # Shares keep the type of the master weights. A unit is gathered in the type that the policy
    # computes in. Gradients are averaged in float32. After a forward pass a unit is dropped again.
    settings = {"mesh": init_device_mesh(device.type, (WORLD,)), "reshard_after_forward": True,
                "mp_policy": MixedPrecisionPolicy(param_dtype=policy.dtype,
                                                  reduce_dtype=torch.float32)}
    # Layers first: the last unit, the policy, then holds what no layer has taken.
    for unit in [*layers_of(policy), policy]:
        broadcast_module(unit, device)
        fully_shard(unit, **settings)
    # `generate` is entered like `forward`, so FSDP must know it as one.
    register_fsdp_forward_method(policy, "generate")
    return policy, processor


@contextlib.contextmanager
def unsharded(policy):
    """Inside, every process has all weights, so that sampling waits for nobody.

    Replies differ in length: a decode that gathered weights layer by layer would leave processes
    waiting for each other.
    """
    units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def clip_gradients(parameters, max_norm):
    """Scale gradients to a norm of at most `max_norm`; returns their norm before, as a float.

    The norm is over the shares of all processes, and is the same in each.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def shard_like(p, tensor):
    """A whole tensor on the device of parameter p and, if p is sharded, this process's share."""
    if not isinstance(p, DTensor):
        return tensor.to(p.device)
    shared, rows = torch.zeros_like(p.detach()), tensor.chunk(WORLD)
    # A tensor with fewer rows than processes leaves some without a share.
    if RANK < len(rows):
        shared.to_local().copy_(rows[RANK])
    return shared
