"""The scripts as a user runs them: the chain, stopping and going on, bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import bench
import evaluate
import model
import rl
import sft
from conftest import ROOT

SFT = dict(model="tiny:32x2", steps=4, batch_size=8, lr=1e-3, save_every=2)
RL = dict(num_envs=4, turns_per_env=3, minibatch_turns=6, epochs=2, updates=4, lr=1e-4, max_new_tokens=10, temperature=1.0, verify_iter=4)


def flags(**knobs):
    return [word for name, value in knobs.items()
            for word in ("--" + name.replace("_", "-"), str(value))[:1 if value is True else 2]]


def metrics(run):
    """The lines of metrics.jsonl without the fields that hold times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


@pytest.fixture(scope="module")
def start(tmp_path_factory, device):
    """A checkpoint of a few SFT steps."""
    out = tmp_path_factory.mktemp("start") / "run"
    sft.main(sft.Config(out=str(out), device=device, **SFT))
    return out


def test_sft_then_rl_then_evaluate_on_the_command_line(start, tmp_path, device, run_script):
    assert [p.name for p in model.checkpoints(start)] == ["step_000002", "step_000004"]
    done = run_script("rl.py", *flags(model=start / "step_000004", out="rl", device=device, **{**RL, "updates": 2}))
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path / "rl")] == [1, 2]
    test = dict(run_folder=str(tmp_path / "rl"), episodes=6, verify_iter=2, max_new_tokens=12, device=device)
    done = run_script("evaluate.py", *flags(**test))
    assert done.returncode == 0 and "rule_ood" in done.stdout, done.stderr
    rows = model.read_jsonl(tmp_path / "rl" / "eval.jsonl")
    assert [(row["step"], row["split"]) for row in rows] == [(s, split) for s in (0, 1, 2) for split in ("id", "rule_ood")]
    assert rows[0]["gflops"] == 0 < rows[2]["gflops"] < rows[4]["gflops"]
    evaluate.main(evaluate.Config(**test))
    assert model.read_jsonl(tmp_path / "rl" / "eval.jsonl") == rows      # what is there is not played again


def test_the_same_chain_in_a_city(city, tmp_path, device, capsys):
    more, out = dict(task="virl-l", root=str(city), device=device), {name: str(tmp_path / name) for name in ("sft", "rl")}
    test = dict(episodes=4, max_new_tokens=16, splits="id,rule_ood,unseen", **more)
    sft.main(sft.Config(out=out["sft"], balance=True, **SFT, **more))
    rl.main(rl.Config(model=out["sft"] + "/step_000004", out=out["rl"],
                      **{**RL, "verify_iter": 2, "max_new_tokens": 16, "updates": 2}, **more))
    assert "step_accuracy_turn" in metrics(tmp_path / "rl")[0]
    evaluate.main(evaluate.Config(run_folder=out["rl"], **test))
    assert "step accuracy turn" in capsys.readouterr().out
    evaluate.main(evaluate.Config(run_folder=out["sft"], start=False, **test))
    rows = {name: model.read_jsonl(tmp_path / name / "eval.jsonl") for name in out}
    assert [row["step"] for row in rows["sft"]] == [2] * 3 + [4] * 3 and len(rows["rl"]) == 9
    with pytest.raises(SystemExit) as ending:
        evaluate.main(evaluate.Config(compare=f"{out['sft']},{out['rl']}"))
    assert ending.value.code == 2 and "these started from" in capsys.readouterr().err


@pytest.mark.parametrize("task, name, dtype", [("gp-l", "tiny", "bfloat16"), ("gp-vl", "tiny-vl", "bfloat16")])
def test_nothing_in_the_chain_mixes_tensors_of_a_gpu_with_those_of_the_cpu(tmp_path, pretend_cuda, task, name, dtype):
    more = dict(task=task, device="cuda", dtype=dtype, **({"resolution": 60} if task == "gp-vl" else {}))
    with pretend_cuda():
        with pytest.raises(RuntimeError, match="two devices"):
            torch.ones(2, device="cuda") + torch.ones(2)
        sft.main(sft.Config(out=str(tmp_path / "sft"), **{**SFT, "model": f"{name}:32x2", "steps": 1, "save_every": 1}, **more))
        config = rl.Config(model=str(tmp_path / "sft/step_000001"), out=str(tmp_path / "rl"), save_every=1,
                           gradient_checkpointing=True, **{**RL, "updates": 2}, **more)
        rl.main(config)
        straight = metrics(tmp_path / "rl")
        shutil.rmtree(tmp_path / "rl/step_000002")
        rl.main(config)
        evaluate.main(evaluate.Config(run_folder=str(tmp_path / "rl"), episodes=2, splits="id", verify_iter=2,
                                      max_new_tokens=8, start=False, **more))
    assert metrics(tmp_path / "rl") == straight and len(straight) == 2
    assert len(model.read_jsonl(tmp_path / "rl/eval.jsonl")) == 2


def test_the_log_has_what_a_reader_of_a_run_needs(start, tmp_path, device):
    rl.main(rl.Config(model=str(start / "step_000004"), out=str(tmp_path / "rl"), device=device, lr_warmup=1,
                      **{**RL, "updates": 3}))
    assert [row["lr"] for row in metrics(tmp_path / "rl")] == pytest.approx([0.5e-4, 1e-4, 1e-4], rel=0.01)
    row = metrics(tmp_path / "rl")[-1]
    assert row["turns"] == 12 and row["optimizer_steps"] == 4 and row["gflops_paper"] > 0
    assert sum(value for name, value in row.items() if name.startswith("status_")) == 12
    assert {"success", "reward", "replies_cut", "grad_norm", "clip_fraction", "approx_kl", "explained_variance", "lr",
            "policy_loss", "value_loss", "tokens_trained", "tokens_rollout", "gflops"} <= row.keys()
    talk = model.read_jsonl(tmp_path / "rl" / "turns.jsonl")[0]["messages"]
    assert [m["role"] for m in talk[:3]] == ["user", "assistant", "user"] and talk[0]["content"].startswith("Make 24")


def interrupted(script, knobs, run, how, lines=2):
    """Start a script, stop it once its log has `lines` lines, and return its exit status."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *flags(out=run, **knobs)], stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < lines:
        assert process.poll() is None and time.time() < deadline, "it ended before it was stopped"
        time.sleep(0.005)
    process.send_signal(how)
    return process.wait(timeout=60)


@pytest.mark.parametrize("how, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_stopped_rl_run_goes_on_to_the_same_numbers(start, tmp_path, device, how, status):
    knobs = dict(model=start / "step_000004", device=device, save_every=2, **{**RL, "updates": 12})
    rl.main(rl.Config(out=str(tmp_path / "straight"), **{**knobs, "model": str(knobs["model"])}))
    assert interrupted("rl.py", knobs, tmp_path / "stopped", how, lines=3) == status
    assert len(metrics(tmp_path / "stopped")) < 12
    rl.main(rl.Config(out=str(tmp_path / "stopped"), **{**knobs, "model": str(knobs["model"])}))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    ours, theirs = ((tmp_path / run / "step_000012" / "model.safetensors").read_bytes() for run in ("stopped", "straight"))
    assert ours == theirs


@pytest.mark.parametrize("how, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_stopped_sft_run_goes_on_to_the_same_numbers(tmp_path, device, how, status):
    knobs = dict(SFT, device=device, steps=40, save_every=5)
    sft.main(sft.Config(out=str(tmp_path / "straight"), **knobs))
    assert interrupted("sft.py", knobs, tmp_path / "stopped", how, lines=8) == status
    assert len(metrics(tmp_path / "stopped")) < 40
    sft.main(sft.Config(out=str(tmp_path / "stopped"), **knobs))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")


BAD = [
    ("sft.py", dict(model="tiny:32x2", out="new", stepz=3), "unknown option --stepz; did you mean --steps?"),
    ("sft.py", dict(model="tiny:32x2", out="new", steps="many"), "--steps: invalid int value: 'many'"),
    ("sft.py", dict(model="tiny:32x2", out="new", data="none.json"), "data file none.json"),
    ("sft.py", dict(model="nowhere", out="new"), "model 'nowhere': no such model folder"),
    ("rl.py", dict(model="nowhere", out="new"), "model 'nowhere': no such model folder"),
    ("rl.py", dict(model="nowhere", out="new", clip=-1), "--clip -1.0: must be at least 0"),
    ("rl.py", dict(model="nowhere", out="new", split="blue"), "split 'blue': gp-l has id, rule_ood"),
    ("evaluate.py", dict(model="nowhere"), "model 'nowhere': no such model folder"),
    ("evaluate.py", dict(run_folder="nowhere"), "run 'nowhere': no run folder"),
    ("sft.py", dict(model="tiny:32x2", out="new", task="virl-l"), "root '': V-IRL needs a folder"),
    ("sft.py", dict(model="tiny:32x2", out="new", task="gp-vl"), "model 'tiny:32x2' reads no pictures"),
    ("sft.py", dict(model="tiny:32x2", out="new", freeze="vision"), "freeze 'vision': allowed are vision, projector, and only"),
    ("sft.py", dict(model="tiny-vl:32x2", out="new", task="gp-vl", freeze="eyes"), "freeze 'eyes': allowed are vision"),
    ("sft.py", dict(model="tiny-vl:32x2", out="new", task="gp-vl", resolution=8), "resolution 8: must be"),
    ("sft.py", dict(model="tiny-vl:32x2", out="new", task="gp-vl", card_dir="none"), "none/SA.png: not a picture that can be read"),
    ("sft.py", dict(model="tiny:32x2", out="new", resolution=224), "resolution 224: gp-l has no pictures"),
    ("sft.py", dict(model="tiny:32x2", out="new", param_dtype="bfloat16"), "param_dtype bfloat16 needs dtype bfloat16, not float32"),
    ("sft.py", dict(dump="data.json", failed_tries=2), "--dump with --failed-tries 2: in the released shape every reply"),
    ("sft.py", dict(model="tiny:32x2", out="new", root="city"), "root 'city': gp-l has no such setting"),
    ("rl.py", dict(model="nowhere", out="new", task="virl-l", root="nowhere"), "root 'nowhere': V-IRL needs a folder"),
    ("rl.py", dict(model="nowhere", out="new", task="virl-vl"), "root '': V-IRL needs a folder"),
    ("rl.py", dict(model="nowhere", out="new", task="gp"), "--task 'gp': allowed are gp-l, gp-vl, virl-l, virl-vl"),
    ("evaluate.py", dict(episodes=3), "exactly one of --model, --run-folder, --compare and --api-url"),
]


def test_bad_input_ends_with_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scripts = {"sft.py": sft, "rl.py": rl, "evaluate.py": evaluate}
    for script, knobs, told in BAD:
        monkeypatch.setattr(sys, "argv", [script])
        with pytest.raises(SystemExit) as exit:
            scripts[script].main(model.parse_config(scripts[script].Config, flags(**knobs)))
        err = capsys.readouterr().err
        assert exit.value.code == 2 and f"{script}: error: " in err and told in err, err
        assert err.strip().count("\n") == 0
        assert not list(tmp_path.iterdir()), f"{script} {knobs} left something behind"


@pytest.mark.parametrize("script, broken, advice", [
    (sft, "forward", "Lower --micro-batch-tokens or set --gradient-checkpointing"),
    (rl, "forward", "Lower --micro-batch-tokens or set --gradient-checkpointing"),
    (rl, "generate", "Lower --generate-tokens"), (evaluate, "generate", "Lower --generate-tokens")])
def test_out_of_memory_is_one_line_that_names_the_knob(start, tmp_path, device, capsys, monkeypatch, script, broken, advice):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr(model.Policy, broken, refuse)
    folder, out = str(start / "step_000004"), str(tmp_path / "run")
    knobs = {sft: dict(SFT, out=out), rl: dict(RL, out=out, model=folder), evaluate: dict(model=folder, episodes=2)}
    with pytest.raises(SystemExit) as ending:
        script.main(script.Config(device=device, **knobs[script]))
    said = capsys.readouterr().err
    assert ending.value.code == 2 and f"error: CUDA out of memory. Tried to allocate 2.00 GiB. {advice};" in said and "and more" not in said


def test_an_out_folder_of_another_config_is_not_touched(start, device, capsys):
    before = {p: p.stat().st_mtime_ns for p in start.rglob("*")}
    with pytest.raises(SystemExit):
        sft.main(sft.Config(out=str(start), device=device, **{**SFT, "lr": 5e-4}))
    assert "belongs to another config (lr 0.001 there, 0.0005 here)" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in start.rglob("*")}


def test_importing_any_file_starts_nothing(tmp_path):
    code = "import verify, envs, model, sft, rl, evaluate"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("section", [name for name in bench.SECTIONS if name != "ranks"])
def test_every_section_of_the_bench_runs(section):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "bench.py"), "--only", section, "--rounds", "1", "--force"],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"| {section} |") >= 2
