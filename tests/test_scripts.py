"""The scripts as a user runs them: the chain, stopping and going on, bad input."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import bench
import envs
import evaluate
import model
import rl
import sft
from conftest import ROOT, tiny_folder
from support import run_folder, running, tiny
from test_run_folder import held
from verify import Verdict

SFT = dict(model=tiny_folder(), steps=4, batch_size=8, lr=1e-3, save_every=2, dtype="float32")
RL = dict(num_envs=4, turns_per_env=3, minibatch_turns=6, epochs=2, updates=4, lr=1e-4,
          max_new_tokens=10, temperature=1.0,
          env=("verify_iter=4",), dtype="float32")


def flags(**knobs):
    """The words of a command line: none behind a flag that is True, several behind one whose value
    is a tuple."""
    return [word for name, value in knobs.items()
            for word in ("--" + name.replace("_", "-"),
                         *map(str, () if value is True else value if isinstance(value, tuple)
                              else (value,)))]


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
    assert [p.name for p in run_folder.checkpoints(start)] == ["step_000002", "step_000004"]
    done = run_script("rl.py", *flags(model=start / "step_000004", out="rl", device=device,
                                      **{**RL, "updates": 2}))
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path / "rl")] == [1, 2]
    test = dict(run_folder=str(tmp_path / "rl"), episodes=6, env=("verify_iter=2",),
                max_new_tokens=12, device=device)
    done = run_script("evaluate.py", *flags(**test))
    assert done.returncode == 0 and "rule_ood" in done.stdout, done.stderr
    rows = running.read_jsonl(tmp_path / "rl" / "eval.jsonl")
    expected = [(step, split) for step in (0, 1, 2) for split in ("id", "rule_ood")]
    assert [(row["step"], row["split"]) for row in rows] == expected
    assert rows[0]["gflops"] == 0 < rows[2]["gflops"] < rows[4]["gflops"]
    evaluate.main(evaluate.Config(**test))
    # what is there is not played again
    assert running.read_jsonl(tmp_path / "rl" / "eval.jsonl") == rows


def test_the_same_chain_in_a_city(city, tmp_path, device, capsys):
    more = dict(task="virl-l", env=(f"root={city}",), device=device)
    out = {name: str(tmp_path / name) for name in ("sft", "rl")}
    test = dict(episodes=4, max_new_tokens=16, splits=("id", "rule_ood", "unseen"), device=device)
    sft.main(sft.Config(out=out["sft"], balance=True, **SFT, **more))
    rl.main(rl.Config(model=out["sft"] + "/step_000004", out=out["rl"],
                      **{**RL, "max_new_tokens": 16, "updates": 2, **more,
                         "env": (f"root={city}", "verify_iter=2")}))
    assert "step_accuracy_turn" in metrics(tmp_path / "rl")[0]
    evaluate.main(evaluate.Config(run_folder=out["rl"], **test))
    assert "step accuracy turn" in capsys.readouterr().out
    evaluate.main(evaluate.Config(run_folder=out["sft"], start=False, **test))
    rows = {name: running.read_jsonl(tmp_path / name / "eval.jsonl") for name in out}
    assert [row["step"] for row in rows["sft"]] == [2] * 3 + [4] * 3 and len(rows["rl"]) == 9
    with pytest.raises(SystemExit) as ending:
        evaluate.main(evaluate.Config(compare=(f"{out['sft']},{out['rl']}",)))
    assert ending.value.code == 2 and "these started from" in capsys.readouterr().err


@pytest.mark.parametrize("task, dtype", [("gp-l", "bfloat16"), ("gp-vl", "bfloat16")])
def test_nothing_in_the_chain_mixes_tensors_of_a_gpu_with_those_of_the_cpu(tmp_path, pretend_cuda,
                                                                           task, dtype):
    vision = task == "gp-vl"
    more = dict(task=task, device="cuda", dtype=dtype, env=("resolution=60",) if vision else ())
    with pretend_cuda():
        with pytest.raises(RuntimeError, match="two devices"):
            torch.ones(2, device="cuda") + torch.ones(2)
        sft.main(sft.Config(out=str(tmp_path / "sft"),
                            **{**SFT, "model": tiny_folder(vision), "steps": 1, "save_every": 1,
                               **more}))
        config = rl.Config(model=str(tmp_path / "sft/step_000001"), out=str(tmp_path / "rl"),
                           save_every=1,
                           gradient_checkpointing=True,
                           **{**RL, "updates": 2, **more, "env": (*more["env"], "verify_iter=4")})
        rl.main(config)
        straight = metrics(tmp_path / "rl")
        shutil.rmtree(tmp_path / "rl/step_000002")
        rl.main(config)
        evaluate.main(evaluate.Config(run_folder=str(tmp_path / "rl"), episodes=2, splits=("id",),
                                      env=("verify_iter=2",),
                                      max_new_tokens=8, start=False, device="cuda"))
    assert metrics(tmp_path / "rl") == straight and len(straight) == 2
    assert len(running.read_jsonl(tmp_path / "rl/eval.jsonl")) == 2


@pytest.mark.parametrize("script, settings", [(sft, SFT), (rl, RL)])
def test_a_run_that_no_gpu_can_hold_ends_before_its_folder_is_made(tmp_path, pretend_cuda, capsys,
                                                                   script, settings):
    with pretend_cuda(memory=1e5), pytest.raises(SystemExit) as ending:
        script.main(script.Config(out=str(tmp_path / "run"),
                                  **{**settings, "model": tiny_folder(), "device": "cuda"}))
    err = capsys.readouterr().err
    assert ending.value.code == 2 and "training needs at least" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_log_has_what_a_reader_of_a_run_needs(start, tmp_path, device):
    rl.main(rl.Config(model=str(start / "step_000004"), out=str(tmp_path / "rl"), device=device,
                      lr_warmup=1,
                      **{**RL, "updates": 3}))
    rates = [row["lr"] for row in metrics(tmp_path / "rl")]
    assert rates == pytest.approx([0.5e-4, 1e-4, 1e-4], rel=0.01)
    row = metrics(tmp_path / "rl")[-1]
    assert row["turns"] == 12 and row["optimizer_steps"] == 4 and row["gflops_paper"] > 0
    trained, rollout = row["tokens_trained"], row["tokens_rollout"]
    assert row["gflops"] / row["gflops_paper"] == pytest.approx(
        (3 * trained + rollout) / (3 * trained + 6 * trained))
    assert sum(value for name, value in row.items() if name.startswith("status_")) == 12
    assert {"success", "reward", "replies_cut", "grad_norm", "clip_fraction", "approx_kl",
            "explained_variance", "value_error", "lr",
            "policy_loss", "value_loss", "tokens_trained", "tokens_rollout", "gflops"} <= row.keys()
    talk = running.read_jsonl(tmp_path / "rl" / "turns.jsonl")[0]["messages"]
    assert [m["role"] for m in talk[:3]] == ["user", "assistant", "user"]
    assert talk[0]["content"].startswith("Make 24")


def interrupted(script, knobs, run, how, lines=2):
    """Start a script, stop it once its log has `lines` lines, and return its exit status."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *flags(out=run, **knobs)],
                               stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})
    deadline = time.time() + 120
    log = run / "metrics.jsonl"
    while not log.is_file() or log.read_text().count("\n") < lines:
        assert process.poll() is None and time.time() < deadline, "it ended before it was stopped"
        time.sleep(0.005)
    process.send_signal(how)
    return process.wait(timeout=60)


def stops(fast):
    """The ways to stop a run, as parameters; all but one are slow tests."""
    statuses = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
    return [pytest.param(how, status, marks=[] if how == fast else pytest.mark.slow)
            for how, status in statuses.items()]


def assert_saved(run):
    """What a signal stops is saved as far as it came."""
    assert run_folder.checkpoint_step(run_folder.checkpoints(run)[-1]) == metrics(run)[-1]["step"]


@pytest.mark.parametrize("how, status", stops(fast=signal.SIGINT))
def test_a_stopped_rl_run_goes_on_to_the_same_numbers(start, tmp_path, device, how, status):
    knobs = dict(model=start / "step_000004", device=device, save_every=2, **{**RL, "updates": 12})
    rl.main(rl.Config(out=str(tmp_path / "straight"), **{**knobs, "model": str(knobs["model"])}))
    shorter = {**knobs, "updates": 11}                  # a run may be made longer later
    assert interrupted("rl.py", shorter, tmp_path / "stopped", how, lines=3) == status
    assert len(metrics(tmp_path / "stopped")) < 11
    if how != signal.SIGKILL:
        assert_saved(tmp_path / "stopped")
    # Memory may have run out: less of it for keys and values changes no number.
    less = {**knobs, "model": str(knobs["model"]), "kept_gib": 0.001}
    rl.main(rl.Config(out=str(tmp_path / "stopped"), **less))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    ours, theirs = ((tmp_path / run / "step_000012" / "model.safetensors").read_bytes()
                    for run in ("stopped", "straight"))
    assert ours == theirs


@pytest.mark.parametrize("how, status", stops(fast=signal.SIGKILL))
def test_a_stopped_sft_run_goes_on_to_the_same_numbers(tmp_path, device, how, status):
    knobs = dict(SFT, device=device, steps=40, save_every=5)
    sft.main(sft.Config(out=str(tmp_path / "straight"), **knobs))
    assert interrupted("sft.py", knobs, tmp_path / "stopped", how, lines=8) == status
    assert len(metrics(tmp_path / "stopped")) < 40
    if how != signal.SIGKILL:
        assert_saved(tmp_path / "stopped")
    sft.main(sft.Config(out=str(tmp_path / "stopped"), **knobs))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")


def test_the_type_that_auto_chose_is_kept_when_a_run_goes_on_and_in_its_evaluation(
        tmp_path, device, monkeypatch):
    knobs = {**SFT, "out": str(tmp_path / "sft"), "device": device, "steps": 2, "save_every": 1,
             "dtype": "auto"}
    monkeypatch.setattr(running, "has_bfloat16_units", lambda: False)
    sft.main(sft.Config(**knobs))
    expected = metrics(tmp_path / "sft")
    shutil.rmtree(tmp_path / "sft" / "step_000002")
    monkeypatch.setattr(running, "has_bfloat16_units", lambda: True)
    sft.main(sft.Config(**knobs))
    assert metrics(tmp_path / "sft") == expected
    assert running.read_run_config(tmp_path / "sft")["dtype"] == "float32"
    evaluate.main(evaluate.Config(run_folder=str(tmp_path / "sft"), splits=("id",), episodes=2,
                                  max_new_tokens=4, device=device,
                                  start=False))
    rows = running.read_jsonl(tmp_path / "sft" / "eval.jsonl")
    assert [row["settings"]["dtype"] for row in rows] == ["float32"] * 2


def test_an_interrupted_evaluation_goes_on_within_a_split(start, tmp_path, device, monkeypatch):
    """Ctrl-C in the third turn of the first checkpoint, and then in the middle of a line."""
    run = shutil.copytree(start, tmp_path / "run")
    config = evaluate.Config(run_folder=str(run), start=False, splits=("id",), episodes=6,
                             temperature=1.0, max_new_tokens=12,
                             device=device)
    evaluate.main(config)
    expected = (run / "eval.jsonl").read_text()
    assert expected.count("\n") == 2
    (run / "eval.jsonl").unlink()
    asked, generate = [], model.Policy.generate

    def watched(self, prompts, *rest):
        asked.append(len(prompts))
        if stop_at == len(asked):
            raise KeyboardInterrupt
        return generate(self, prompts, *rest)
    monkeypatch.setattr(model.Policy, "generate", watched)
    stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(config)
    kept, = run.glob("eval_unfinished_*.jsonl")
    assert len(running.read_jsonl(kept)) == 2 and not (run / "eval.jsonl").exists()
    kept = kept.rename(run / "eval_unfinished_1.jsonl")            # as if from another process
    kept.write_text(kept.read_text() + '{"of": "x", "tu')
    asked[:], stop_at = [], 0
    evaluate.main(config)
    assert asked == [6] * 3 + [6] * 5             # turns 3 to 5 of one checkpoint, all of the other
    assert (run / "eval.jsonl").read_text() == expected and not list(run.glob("eval_unfinished_*"))


def test_an_evaluation_needs_a_whole_log_and_a_folder_for_itself(start, tmp_path, device, capsys):
    run = shutil.copytree(start, tmp_path / "run")
    config = evaluate.Config(run_folder=str(run), start=False, splits=("id",), episodes=2,
                             max_new_tokens=4, device=device)
    with held(run / ".evaluating.lock") as pid:
        with pytest.raises(SystemExit):
            evaluate.main(config)
    told = f"error: {run}: process {pid} is evaluating here; wait for its end"
    assert told in capsys.readouterr().err
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:3]))
    with pytest.raises(SystemExit):
        evaluate.main(config)
    told = f"error: {run}/metrics.jsonl has no row of step 4: put the log back from a copy"
    assert told in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("".join(rows))
    (run / "eval.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        evaluate.main(config)
    told = "eval.jsonl, line 1: expected a JSON object with step, split, seed, settings"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("script", [sft, rl])
def test_a_run_goes_on_under_another_spelling_of_its_model_but_neither_damaged_nor_without_its_log(
        start, tmp_path, device, capsys, script):
    run = tmp_path / "run"
    knobs = {sft: dict(SFT, steps=2, save_every=1),
             rl: dict(RL, updates=2, model=str(start / "step_000004"))}[script]
    config = script.Config(out=str(run), device=device, **knobs)
    script.main(config)
    expected = metrics(run)
    shutil.rmtree(run / "step_000002")
    script.main(replace(config, model=f"{os.path.relpath(config.model)}/"))
    assert metrics(run) == expected and "goes on after step 1" in capsys.readouterr().out
    for name, damage, told in (("model.safetensors", b"{}", "run/step_000002"),
                               ("resume/state.json", b'{"step": 2}', "state.json: has no '")):
        content = (run / "step_000002" / name).read_bytes()
        (run / "step_000002" / name).write_bytes(damage)
        with pytest.raises(SystemExit):
            script.main(config)
        err = capsys.readouterr().err
        assert told in err
        assert err.endswith(f"; move {run}/step_000002 away to go on from step_000001\n")
        assert err.count("\n") == 1
        (run / "step_000002" / name).write_bytes(content)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit):
        script.main(config)
    assert f"error: {run}/metrics.jsonl has no row of step 1" in capsys.readouterr().err


class Echo(envs.Environment):
    """Say the number that you are told: the least that an environment has."""
    kinds, retry_prompt = ("word",), "gp_retry"

    def __init__(self, most=9, verify_iter=3, **common):
        super().__init__(verify_iter=verify_iter, **common)
        self.most = most

    def lay_out(self, episode):
        self.number = self.rng.randint(self.most // 2, self.most)

    def prompt(self):
        return f"Say {self.number}."

    def picture(self):
        raise ValueError("there is none")

    def judge(self, reply):
        right = reply == self.expert_reply()
        if right:
            return Verdict("correct", 5.0, "Yes.")
        return Verdict("wrong", -1.0, "No.")

    def format_reply(self, answer):
        return json.dumps({"said": answer})

    def expert_reply(self):
        return self.format_reply(self.number)

    def flawed_reply(self):
        return self.format_reply(-1)


def test_a_class_and_a_row_make_a_task_for_all_scripts(tmp_path, device, monkeypatch, capsys):
    splits = {"id": {}, "far": {"most": 99}}
    task = envs.Task(Echo, {"vision": False}, splits, ("success",), 1.0, {"": 10})
    monkeypatch.setitem(envs.TASKS, "echo", task)
    tiny.main(tiny.Config(out=str(tmp_path / "blank"), task="echo", size="32x2"))
    out = {name: str(tmp_path / name) for name in ("sft", "rl")}
    more = dict(task="echo", device=device)
    sft.main(sft.Config(out=out["sft"], **{**SFT, "model": str(tmp_path / "blank"),
                                           "mix": ("id", "most=5", "far"), **more}))
    rl.main(rl.Config(model=f"{out['sft']}/step_000004", out=out["rl"],
                      **{**RL, "updates": 2, "split": ("far",), **more}))
    talk = running.read_jsonl(tmp_path / "rl" / "turns.jsonl")[0]["messages"]
    assert re.fullmatch(r"Say [4-9]\d\.", talk[0]["content"]) and "No." in talk[2]["content"]
    evaluate.main(evaluate.Config(run_folder=out["rl"], splits=("id", "far"), episodes=3,
                                  start=False, max_new_tokens=8, device=device))
    rows = running.read_jsonl(tmp_path / "rl" / "eval.jsonl")
    found = [(row["split"], row["replies"], row["settings"]["env"]["most"]) for row in rows]
    assert found == [("id", 12, 9), ("far", 12, 99)] * 2
    assert "far, seed 0: first try" in capsys.readouterr().out
    dump = tmp_path / "data.json"
    sft.main(sft.Config(dump=str(dump), num=5, task="echo"))
    assert all(re.fullmatch(r'Say (\d)\.\{"said": \1\}',
                            "".join(turn["value"] for turn in record["conversations"]))
               for record in json.loads(dump.read_text()))


BAD = [
    ("sft.py", dict(model=tiny_folder(), out="new", stepz=3),
     "unknown option --stepz; did you mean --steps? --help lists them all"),
    ("sft.py", dict(model=tiny_folder(), out="new", steps="many"),
     "--steps: invalid int value: 'many'"),
    ("sft.py", dict(model=tiny_folder(), out="new", data="none.json"), "data file none.json"),
    ("sft.py", dict(model=tiny_folder(), out="new", pictures="folder"),
     "--pictures folder: is the folder of the pictures that --data names, so it needs --data"),
    ("sft.py", dict(model=tiny_folder(), out="new", lr=0), "--lr 0.0: must be at least 1e-12"),
    ("sft.py", dict(model=tiny_folder(), out=tiny_folder()),
     "has a config.json that is none of a run, such as a model's"),
    ("sft.py", dict(model="nowhere", out="new"), "model 'nowhere': no such model folder"),
    ("rl.py", dict(model="nowhere", out="new"), "model 'nowhere': no such model folder"),
    ("rl.py", dict(model="nowhere", out="new", clip=-1), "--clip -1.0: must be at least 0"),
    ("rl.py", dict(model="nowhere", out="new", split=("blue",)),
     "split 'blue': gp-l has id, rule_ood"),
    ("rl.py", dict(model="nowhere", out="new", split=("id", "rule_ood")),
     "--split id rule_ood: one split only, not rule_ood as well"),
    ("rl.py", dict(model="nowhere", out="new", env=("target",)),
     "setting 'target': expected KEY=VALUE"),
    ("rl.py", dict(model="nowhere", out="new", env=("fold=test",), split=("unseen",)),
     "fold 'test': split unseen has a fold of its own"),
    ("rl.py", dict(model="nowhere", out="new", split=("id", "split=x")),
     "split 'x': gp-l has no such setting"),
    ("sft.py", dict(model=tiny_folder(), out="new", mix=("rule=1,2,3", "id")),
     "setting 'rule=1,2,3': the name of a split must stand"),
    ("sft.py", dict(model=tiny_folder(), out="new", mix=("id:0",)),
     "split 'id:0': its weight '0' must be a number above 0"),
    ("sft.py", dict(model="tiny:32x2", out="new"), "model 'tiny:32x2': no such model folder"),
    ("evaluate.py", dict(model="nowhere", splits=("id", "target=x")),
     "target 'x': must be a whole number"),
    ("evaluate.py", dict(model="nowhere", env=("rule=random",)),
     "rule 'random': split id has a rule of its own"),
    ("evaluate.py", dict(run_folder=tiny_folder()),
     "is a model, not a run; to evaluate it: evaluate.py --model"),
    ("sft.py", dict(model=tiny_folder(), out="new", mix=("id", "verify_iter=2"), failed_tries=2),
     "--mix id verify_iter=2: verify_iter 2 must be above --failed-tries 2"),
    ("evaluate.py", dict(model="nowhere"), "model 'nowhere': no such model folder"),
    ("evaluate.py", dict(run_folder="nowhere"), "run 'nowhere': no run folder"),
    ("sft.py", dict(model=tiny_folder(), out="new", task="virl-l"),
     "root '': V-IRL needs a folder"),
    ("sft.py", dict(model=tiny_folder(), out="new", task="gp-vl"),
     "llama reads no pictures; the task needs a vision model"),
    ("sft.py", dict(model=tiny_folder(), out="new", freeze="vision"),
     "freeze 'vision': allowed are vision, projector, and only"),
    ("sft.py", dict(model=tiny_folder(vision=True), out="new", task="gp-vl", freeze="eyes"),
     "freeze 'eyes': allowed are vision"),
    ("sft.py", dict(model=tiny_folder(vision=True), out="new", task="gp-vl", env=("resolution=8",)),
     "resolution 8: must be"),
    ("sft.py", dict(model=tiny_folder(vision=True), out="new", task="gp-vl",
                    env=("card_dir=none",)), "none/SA.png: not a picture that can be read"),
    ("sft.py", dict(model=tiny_folder(), out="new", env=("resolution=224",)),
     "resolution '224': gp-l has no pictures"),
    ("sft.py", dict(model=tiny_folder(), out="new", dtype="float32", param_dtype="bfloat16"),
     "param_dtype bfloat16 needs dtype bfloat16, not float32"),
    ("sft.py", dict(dump="data.json", failed_tries=2),
     "--dump with --failed-tries 2: in the released shape every reply"),
    ("sft.py", dict(model=tiny_folder(), out="new", env=("root=city",)),
     "root 'city': gp-l has no such setting"),
    ("rl.py", dict(model="nowhere", out="new", task="virl-l", env=("root=nowhere",)),
     "root 'nowhere': V-IRL needs a folder"),
    ("rl.py", dict(model="nowhere", out="new", task="virl-vl"), "root '': V-IRL needs a folder"),
    ("rl.py", dict(model="nowhere", out="new", task="gp"),
     "--task 'gp': allowed are gp-l, gp-vl, virl-l, virl-vl"),
    ("evaluate.py", dict(episodes=3),
     "exactly one of --model, --run-folder, --compare and --api-url"),
]


def test_bad_input_ends_with_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scripts = {"sft.py": sft, "rl.py": rl, "evaluate.py": evaluate}
    for script, knobs, told in BAD:
        monkeypatch.setattr(sys, "argv", [script])
        with pytest.raises(SystemExit) as exit:
            scripts[script].main(running.parse_config(scripts[script].Config, flags(**knobs)))
        err = capsys.readouterr().err
        assert exit.value.code == 2 and f"{script}: error: " in err and told in err, err
        assert err.strip().count("\n") == 0
        assert not list(tmp_path.iterdir()), f"{script} {knobs} left something behind"


@pytest.mark.parametrize("script, broken, advice", [
    (sft, "forward", "Lower --micro-batch-tokens or set --gradient-checkpointing"),
    (rl, "forward", "Lower --micro-batch-tokens or set --gradient-checkpointing"),
    (rl, "generate", "Lower --generate-tokens or --kept-gib"),
    (evaluate, "generate", "Lower --generate-tokens or --kept-gib")])
def test_out_of_memory_is_one_line_that_names_the_knob(start, tmp_path, device, capsys, monkeypatch,
                                                       script, broken, advice):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr(model.Policy, broken, refuse)
    folder, out = str(start / "step_000004"), str(tmp_path / "run")
    knobs = {sft: dict(SFT, out=out), rl: dict(RL, out=out, model=folder),
             evaluate: dict(model=folder, episodes=2, dtype="float32")}
    with pytest.raises(SystemExit) as ending:
        script.main(script.Config(device=device, **knobs[script]))
    said = capsys.readouterr().err
    assert ending.value.code == 2
    assert f"error: CUDA out of memory. Tried to allocate 2.00 GiB. {advice};" in said
    assert "and more" not in said


def test_a_loss_that_is_not_finite_ends_sft_with_one_line_that_names_the_samples(
        tmp_path, device, capsys, monkeypatch):
    forward = model.Policy.forward

    def broken(self, *arguments):
        logprobs, values = forward(self, *arguments)
        return logprobs * float("nan"), values
    sft.main(sft.Config(out=str(tmp_path / "run"), device=device, **SFT))
    shutil.rmtree(tmp_path / "run" / "step_000004")
    monkeypatch.setattr(model.Policy, "forward", broken)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        sft.main(sft.Config(out=str(tmp_path / "run"), device=device, **SFT))
    assert ending.value.code == 2 and len(metrics(tmp_path / "run")) == 2
    told = "error: step 3, samples 16 to 23: loss nan, grad_norm nan; the last checkpoint is whole"
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_the_distance_of_a_run_from_its_start_is_0_at_first_and_grows(start, tmp_path, monkeypatch,
                                                                      capsys):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    import distance

    def rows(*arguments):
        monkeypatch.setattr(sys, "argv", ["distance.py", *map(str, arguments)])
        distance.main()
        return [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]

    # The same run, but with its first checkpoint for its start.
    run = shutil.copytree(start, tmp_path / "run")
    first, last = run_folder.checkpoints(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"task": "gp-vl"}))
    with pytest.raises(SystemExit):
        rows(run, "--num", 2)
    assert "gp-vl has pictures; a distance is" in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps(config | {"model": str(first)}))
    with pytest.raises(SystemExit):
        rows(run, "--num", 2)
    assert f"start {first}: has other weights than those" in capsys.readouterr().err
    (run / "inputs.json").unlink()
    every = rows(run, "--num", 64, "--every")
    assert [row[0] for row in every] == [f"| {run}, {path.name}" for path in (first, last)]
    assert every[0][1:] == ["0.00 ± 0.00", "0.00 ± 0.00 |"]
    assert all(float(cell.split()[0]) > 0 for cell in every[1][1:])
    assert rows(run, "--num", 64) == [[f"| {run}", *every[1][1:]]]
    for arguments, told in (((run, "--num", 1), "--num 1: must be at least 2, for an error\n"),
                            (("nothing",), "run 'nothing': not a run folder of sft.py or rl.py\n")):
        with pytest.raises(SystemExit):
            rows(*arguments)
        assert capsys.readouterr().err.endswith(told)


def test_an_out_folder_of_another_config_is_not_touched(start, device, capsys):
    before = {p: p.stat().st_mtime_ns for p in start.rglob("*")}
    with pytest.raises(SystemExit):
        sft.main(sft.Config(out=str(start), device=device, **{**SFT, "lr": 5e-4}))
    assert "belongs to another config (lr 0.001 there, 0.0005 here)" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in start.rglob("*")}


def test_importing_any_file_starts_nothing(tmp_path):
    code = "import verify, envs, model, sft, rl, evaluate, support.tiny"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True)
    assert done.returncode == 0 and not done.stdout and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("section", [name for name in bench.SECTIONS if name != "ranks"])
def test_every_section_of_the_bench_runs(section):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "bench.py"), "--only", section,
                           "--rounds", "1", "--force"],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"| {section} |") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bench_takes_a_model_folder(dtype):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "bench.py"), "--model",
                           tiny_folder(), "--dtype", dtype, "--only",
                           "rollout,turns,sft,limits,decode", "--rounds", "1", "--force",
                           "--profile"],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| decode |") == 1
    for section in ("rollout", "turns", "sft", "limits"):
        assert done.stdout.count(f"| {section} |") >= 2
