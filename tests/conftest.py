"""Fixtures shared by the tests: a tiny random-init policy with its tokenizer. DEVICE=cuda runs them on a GPU."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def device():
    return os.environ.get("DEVICE", "cpu")


@pytest.fixture(scope="session")
def tiny(device):
    """(policy, processor) of 30 k parameters, float32, with a tokenizer trained on GeneralPoints."""
    import torch

    import envs
    import model
    torch.manual_seed(0)
    return model.load_policy("tiny:32x2", device=device, texts=envs.sample_texts("gp-l", 30),
                             atoms=envs.make_env("gp-l", "id").atoms())


@pytest.fixture(scope="session")
def tiny_vl(device):
    """(policy, processor) of 0.2 M parameters that reads pictures: one tile of 224 pixels in 64 patches."""
    import torch

    import envs
    import model
    torch.manual_seed(0)
    return model.load_policy("tiny-vl:32x4", device=device, texts=envs.sample_texts("gp-vl", 30, resolution=48),
                             atoms=envs.make_env("gp-vl", "id").atoms(), vision=True)


@pytest.fixture
def run_script(tmp_path, device):
    """run_script("sft.py", "--flag", value, ...) in a process of its own; the finished process, output as text."""
    def run(*arguments, timeout=300):
        command = [sys.executable, *map(str, arguments)]
        command[1] = str(ROOT / command[1])
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    return run


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    """A synthetic city of 60 routes in words, with its other sets."""
    out = tmp_path_factory.mktemp("data") / "city"
    subprocess.run([sys.executable, str(ROOT / "data" / "synthetic_city.py"), "--out", str(out), "--routes", "60",
                    "--no-pictures"], check=True, capture_output=True, timeout=120)
    return out
