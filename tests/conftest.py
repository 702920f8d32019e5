"""What the tests share: tiny random-init models, a city, scripts in a process, a pretended GPU.

DEVICE=cuda runs the tests on a GPU.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")      # read by torch; tiny models need no more
import torch  # noqa: E402
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def device():
    return os.environ.get("DEVICE", "cpu")


# ---- Tiny models, one folder of each for all tests -----------------------------------------------

FOLDERS = tempfile.TemporaryDirectory(prefix="tiny_")      # removed when the interpreter ends
WANTED, started = {}, False                                # path -> (family, size)


def tiny_folder(vision=False, size="32x2", family=None):
    """The folder of a tiny model with a tokenizer trained on GeneralPoints.

    A test module may name it in its settings. It is written before the first test, so collecting
    tests takes no time.
    """
    family = family or ("mllama" if vision else "llama")
    path = str(Path(FOLDERS.name) / f"{family}_{size}")
    if path not in WANTED:
        WANTED[path] = family, size
        if started:
            write_tiny(path)
    return path


def write_tiny(path):
    import envs
    from support import tiny
    family, size = WANTED[path]
    task, settings = ("gp-vl", {"resolution": 48}) if family != "llama" else ("gp-l", {})
    torch.manual_seed(0)
    backbone, processor = tiny.make_tiny(size, family, tiny.sample_texts(task, 30, **settings),
                                         tiny.atoms_of(task, envs.make_env(task)))
    backbone.save_pretrained(path)
    processor.save_pretrained(path)


@pytest.fixture(scope="session", autouse=True)
def tiny_folders():
    """Writes the folders that test modules have named."""
    global started
    started = True
    for path in WANTED:
        write_tiny(path)


@pytest.fixture(scope="session")
def tiny(device):
    """(policy, processor) of 30 k parameters in float32, its tokenizer trained on GeneralPoints."""
    import model
    torch.manual_seed(0)
    return model.load_policy(tiny_folder(), device=device)


@pytest.fixture(scope="session")
def tiny_vl(device):
    """(policy, processor) of 0.2 M parameters that reads pictures: one tile in 64 patches."""
    import model
    torch.manual_seed(0)
    return model.load_policy(tiny_folder(vision=True, size="32x4"), device=device, vision=True)


@pytest.fixture(autouse=True)
def signals():
    """Gives the signals back that a script took in this process: Ctrl-C shall stop the tests."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.fixture
def run_script(tmp_path, device):
    """run_script("sft.py", "--flag", value, ...) in a new process.

    Returns the finished process, with its output as text.
    """
    def run(*arguments, timeout=300):
        command = [sys.executable, *map(str, arguments)]
        command[1] = str(ROOT / command[1])
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                              timeout=timeout,
                              env={**os.environ, "OMP_NUM_THREADS": "1",
                                   "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    return run


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    """A synthetic city of 60 routes in words, with its other sets."""
    out = tmp_path_factory.mktemp("data") / "city"
    subprocess.run([sys.executable, str(ROOT / "data" / "synthetic_city.py"), "--out", str(out),
                    "--routes", "60", "--no-pictures"], check=True, capture_output=True,
                   timeout=120)
    return out


def write_conversations(folder, *rows, task="gp-l", **config):
    """A run folder as `envs.py --read` needs it, with these rows of turns.jsonl."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"task": task, "split": ["id"], "env": [], "seed": 0, "num_envs": 1,
                    **config}))
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ---- A pretended GPU: tensors stay in the CPU's memory, but each counts as being on a device 

def on_cuda(tensor):
    return getattr(tensor.untyped_storage(), "on_cuda", False)


class PretendOperations(TorchDispatchMode):
    """An operation on tensors of two devices is an error, as with a real GPU.

    The result of an operation is on the device of its tensors. Left out: what autocast does on CUDA
    only, limits of CUDA's kernels, graphs, several processes, `.cuda()` and `.to(tensor)`.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        leaves, name = tree_leaves((args, kwargs)), operation.__name__.partition(".")[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        cuda = any(map(on_cuda, tensors))
        if name == "copy_":
            cuda = on_cuda(args[0])
        elif cuda and name != "_to_copy":
            strangers = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
            # In these operations single numbers may be anywhere, and so may the indices of x[...].
            numbers = torch.Tag.pointwise in operation.tags or "foreach" in name or name == "fill_"
            strangers += [tensor for tensor in tensors
                          if not on_cuda(tensor) and (tensor.dim() or not numbers)]
            if "index" in name and isinstance(args[1], (list, tuple)) and on_cuda(args[0]):
                strangers = [stranger for stranger in strangers
                             if all(stranger is not index for index in args[1])]
            if strangers:
                raise RuntimeError(f"{name}: tensors of two devices, on the CPU "
                                   f"{[(type(s), getattr(s, 'shape', '')) for s in strangers]}")
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (isinstance(tensor, torch.Tensor)
                    and not hasattr(tensor.untyped_storage(), "on_cuda")):
                tensor.untyped_storage().on_cuda = cuda
        return result


class PretendCalls(TorchFunctionMode):
    """Takes "cuda" out of calls, before torch looks for a driver, and marks what they return."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__ and on_cuda(args[0]):
            return torch.device("cuda", 0)
        if name in ("numpy", "__array__") and on_cuda(args[0]):
            raise TypeError("can't convert a tensor on cuda to numpy")
        target = kwargs.get("device")
        if name == "to":
            target = next((word for word in [*args[1:], target]
                           if isinstance(word, (str, torch.device))), None)
            args = [torch.device("cpu") if word is target and target is not None else word
                    for word in args]
        if name == "cpu" or name == "new_tensor" and target is None:
            target = "cuda" if name == "new_tensor" and on_cuda(args[0]) else "cpu"
        target = target and torch.device(target).type
        if target == "cuda" and "device" in kwargs:
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if (target in ("cuda", "cpu") and isinstance(result, torch.Tensor)
                and on_cuda(result) != (target == "cuda")):
            # A copy, since `to` may have returned what it was given.
            result = result.clone()
            result.untyped_storage().on_cuda = target == "cuda"
        return result


@pytest.fixture
def pretend_cuda(monkeypatch):
    """pretend_cuda() is a context in which device="cuda" works, until something asks the driver.

    The GPU has `memory` bytes.
    """
    class CpuAutocast(torch.autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__("cpu", *args, **kwargs)

    @contextlib.contextmanager
    def pretend(memory=80e9):
        from support.decoder import LlamaDecoder
        monkeypatch.setattr(torch, "autocast", CpuAutocast)
        monkeypatch.setattr(LlamaDecoder, "graphs", False)
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda device: SimpleNamespace(total_memory=memory))
        with PretendOperations(), PretendCalls():
            yield
    return pretend
