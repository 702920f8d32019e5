"""Two processes: the same numbers as one, whatever is killed and however many go on.

`pytest -m slow` kills ten times.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import model
import rl
import sft
from conftest import ROOT, tiny_folder
from support import running
from test_scripts import flags, metrics

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SFT = dict(model=tiny_folder(), batch_size=8, lr=1e-3, save_every=1, micro_batch_tokens=300,
           device="cpu", dtype="float32")
RL = dict(num_envs=4, turns_per_env=3, minibatch_turns=6, epochs=2, lr=1e-3, max_new_tokens=10,
          temperature=1.0,
          env=("verify_iter=4",), micro_batch_tokens=200, device="cpu", dtype="float32")


def launcher(processes):
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(processes)]


def command(script, processes, **knobs):
    return [*launcher(processes), str(ROOT / script), *flags(**knobs)]


SCRIPTS = {"sft": sft, "rl": rl, "evaluate": evaluate}


def run_all(processes, *jobs):
    """Run (script, knobs) one after the other: here, or all in one start of torchrun, since the
    start takes most of the time."""
    if processes == 1:
        for script, knobs in jobs:
            values = {name: str(value) if isinstance(value, Path) else value
                      for name, value in knobs.items()}
            SCRIPTS[script].main(SCRIPTS[script].Config(**values))
        return
    code = ("import json, sys, sft, rl, evaluate\n"
            "from support import running\n"
            "for script, arguments in json.loads(sys.argv[1]):\n"
            "    script = {'sft': sft, 'rl': rl, 'evaluate': evaluate}[script]\n"
            "    script.main(running.parse_config(script.Config, arguments))\n"
            "running.leave()")
    worker = Path(jobs[0][1].get("out") or jobs[0][1]["run_folder"]).parent / "worker.py"
    worker.write_text(code)
    done = subprocess.run([*launcher(processes), str(worker),
                           json.dumps([(script, flags(**knobs)) for script, knobs in jobs])],
                          env={**ENV, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def run_rl(processes, **knobs):
    run_all(processes, ("rl", knobs))
    return metrics(knobs["out"])


def assert_same(one, two, tolerance=1e-5):
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for ours, theirs in zip(one, two):
        for name in ours:
            assert theirs[name] == pytest.approx(ours[name], rel=10 * tolerance,
                                                 abs=tolerance), name


def assert_same_weights(one, two, tolerance=1e-5):
    ours, theirs = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=tolerance, rtol=0, msg=name)


def untied_in_the_file_only(folder):
    """A model whose config says that its embeddings are tied, and whose file has two of them:
    from_pretrained believes the file."""
    policy, processor = model.load_policy(tiny_folder())
    policy.backbone.lm_head.weight = torch.nn.Parameter(policy.backbone.lm_head.weight.detach() * 2)
    policy.backbone.config.tie_word_embeddings = False
    policy.backbone.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def test_two_processes_have_the_losses_gradients_weights_and_figures_of_one_in_words_and_pictures(
        tmp_path):
    tasks = {"words": dict(task="gp-l"), "pictures": dict(task="gp-vl", env=("resolution=60",)),
             "tokens": dict(task="gp-vl", env=("resolution=60",))}        # pictures that are tokens
    models = {"words": tiny_folder(), "pictures": tiny_folder(vision=True),
              "tokens": tiny_folder(family="qwen3_vl")}
    untied_in_the_file_only(tmp_path / "untied")
    # With two, the weights are sharded, and what a dialogue has read is kept from turn to turn;
    # with one, it is read anew. `more` is for sft.py alone.
    for processes, kept, more in (1, 0, {}), (2, 1, {"gradient_checkpointing": True}):
        (tmp_path / str(processes)).mkdir()
        jobs = []
        for name, task in tasks.items():
            out, start = tmp_path / str(processes), tmp_path / "1" / f"sft_{name}" / "step_000003"
            test = dict(run_folder=out / f"rl_{name}", episodes=5, env=("verify_iter=2",),
                        max_new_tokens=10, device="cpu",
                        kept_gib=kept)
            played = {**task, "env": (*task.get("env", ()), "verify_iter=4")}
            jobs += [("sft", dict(SFT, out=out / f"sft_{name}", steps=3, model=models[name], **task,
                                  **more)),
                     ("rl", {**RL, "out": out / f"rl_{name}", "updates": 3, "model": start,
                             "kept_gib": kept, **played})]
            # it takes time, and shows what rl.py shows
            jobs += [("evaluate", test)] * (name != "tokens")
        jobs.append(("sft", dict(SFT, out=out / "sft_untied", steps=3, model=tmp_path / "untied")))
        # The run of one process in words, after its second update, goes on here.
        if processes == 2:
            begun = shutil.copytree(tmp_path / "1" / "rl_words", out / "begun_by_one")
            shutil.rmtree(begun / "step_000003")
            of_words = next(knobs for script, knobs in jobs if script == "rl")
            jobs.append(("rl", {**of_words, "out": begun}))
        run_all(processes, *jobs)
    shutil.copytree(tmp_path / "1" / "rl_words", tmp_path / "1" / "begun_by_one")
    for processes in "12":
        for name in tasks:
            for row in metrics(tmp_path / processes / f"rl_{name}"):
                assert row["ratio_min_first"] == row["ratio_max_first"] == 1.0
    runs = [f"{script}_{name}" for script in ("sft", "rl") for name in tasks]
    for run in [*runs, "sft_untied", "begun_by_one"]:
        one, two = tmp_path / "1" / run, tmp_path / "2" / run
        assert_same(metrics(one), metrics(two))
        assert_same_weights(one / "step_000003", two / "step_000003")
        # Weights that differ by rounding have different digests.
        rows = [[{**row, "checkpoint": "", "weights": ""}
                 for row in running.read_jsonl(folder / "eval.jsonl")] for folder in (one, two)]
        if run == "begun_by_one":        # the tests of its step 3 left with that checkpoint
            rows[0] = [row for row in rows[0] if row["step"] < 3]
        assert rows[0] == rows[1]
        assert len(rows[0]) == {"rl_words": 8, "rl_pictures": 8, "begun_by_one": 6}.get(run, 0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [4, 8])
def test_more_processes_have_the_losses_gradients_weights_and_figures_of_one(tmp_path, processes):
    for number in (1, processes):
        (tmp_path / str(number)).mkdir()
        of_sft = dict(SFT, out=tmp_path / str(number) / "sft", steps=3, task="gp-l")
        of_rl = dict(RL, out=tmp_path / str(number) / "rl", updates=3, task="gp-l", num_envs=8,
                     model=tmp_path / "1" / "sft" / "step_000003")
        run_all(number, ("sft", of_sft), ("rl", of_rl))
    for run in ("sft", "rl"):
        one, more = tmp_path / "1" / run, tmp_path / str(processes) / run
        assert_same(metrics(one), metrics(more))
        assert_same_weights(one / "step_000003", more / "step_000003")


@pytest.mark.slow
def test_before_the_first_step_every_ratio_is_one_in_two_processes_in_bfloat16(tmp_path):
    """On a deep model, where a log-prob moves with the rows beside it."""
    rows = run_rl(2, **dict(RL, out=tmp_path / "rl", updates=2, dtype="bfloat16",
                            model=tiny_folder(size="32x16")))
    assert [row["ratio_min_first"] for row in rows] == [1.0, 1.0]
    assert [row["ratio_max_first"] for row in rows] == [1.0, 1.0]


def stopped(script, processes, out, when, how, everyone, **knobs):
    """Start a script and send a signal to all processes, or to one, as soon as when(out) holds.
    Returns its exit status."""
    process = subprocess.Popen(command(script, processes, out=out, **knobs), env=ENV,
                               stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 150
    while not when(out):
        assert process.poll() is None and time.time() < deadline, "it ended before it was stopped"
        time.sleep(0.002)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    workers = [int(pid) for pid in found.stdout.split()]
    if how == signal.SIGKILL and everyone:
        os.killpg(process.pid, how)
    else:
        os.kill(random.Random(0).choice(workers) if workers and not everyone else process.pid, how)
    return process.wait(timeout=100)


def lines(number):
    def when(out):
        log = out / "metrics.jsonl"
        return log.is_file() and log.read_text().count("\n") >= number
    return when


def saving(out):
    return any(out.glob("step_000003.tmp"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A start, and a run of six updates from it that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    run_all(1, ("sft", dict(SFT, out=folder / "sft", steps=2)))
    knobs = dict(RL, model=folder / "sft" / "step_000002", updates=6)
    return knobs, run_rl(2, out=folder / "rl", **knobs), folder / "rl" / "step_000006"


@pytest.mark.parametrize("when, everyone", [
    pytest.param(lines(2), False, id="training", marks=pytest.mark.slow),
    pytest.param(saving, True, id="saving", marks=pytest.mark.slow)])
def test_a_killed_run_of_two_goes_on_to_the_same_numbers(tmp_path, straight, when, everyone):
    knobs, expected, weights = straight
    assert stopped("rl.py", 2, tmp_path / "run", when, signal.SIGKILL, everyone, **knobs) != 0
    assert len(metrics(tmp_path / "run")) < 6
    assert run_rl(2, out=tmp_path / "run", **knobs) == expected
    ours, theirs = ((folder / "model.safetensors").read_bytes()
                    for folder in (tmp_path / "run" / "step_000006", weights))
    assert ours == theirs


def test_a_signal_to_one_process_stops_and_saves_all_and_a_run_of_two_goes_on_alone(
        tmp_path, straight):
    knobs, expected, weights = straight
    out = tmp_path / "run"
    assert stopped("rl.py", 2, out, lines(2), signal.SIGUSR1, False,
                   **{**knobs, "save_every": 6}) != 0
    assert 2 <= len(metrics(out)) < 6
    assert [p.name for p in out.glob("step_*")] == [f"step_{len(metrics(out)):06d}"]
    assert_same(run_rl(1, out=out, **knobs), expected)
    assert_same_weights(out / "step_000006", weights)


def test_a_loss_that_is_not_finite_in_one_process_stops_both_with_one_line(tmp_path, straight):
    knobs, _, _ = straight
    code = ("import rl; from support import running; real = rl.ppo_loss\n"
            "def broken(logprobs, *rest):\n"
            "    policy, value, watched = real(logprobs, *rest)\n"
            "    return (policy * float('nan') if running.RANK else policy), value, watched\n"
            "rl.ppo_loss = broken; rl.main(running.parse_config(rl.Config))")
    script = tmp_path / "broken.py"
    script.write_text(code)
    done = subprocess.run(command(script, 2, out=tmp_path / "run", **knobs), capture_output=True,
                          text=True, timeout=150,
                          env={**ENV, "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    assert done.stderr.count("error: update 1: epoch 0, minibatch from turn 0, turns [") == 1
    assert not metrics(tmp_path / "run") if (tmp_path / "run" / "metrics.jsonl").is_file() else True


def test_only_the_first_process_reads_the_weights_and_all_hear_what_is_wrong_with_them(
        tmp_path, straight, monkeypatch):
    folder = straight[0]["model"]
    on_meta, processor = model.load_policy(str(folder), "bfloat16", param_dtype="bfloat16",
                                          on_meta=True)
    kinds = {(p.device.type, p.dtype) for p in on_meta.backbone.parameters()}
    assert kinds == {("meta", torch.bfloat16)}
    assert {b.dtype for b in on_meta.backbone.buffers()} == {torch.float32} and len(processor) > 100
    # no dropout, as in the first
    assert not any(module.training for module in on_meta.backbone.modules())
    monkeypatch.setattr(running, "WORLD", 2)
    monkeypatch.setattr(running, "RANK", 1)
    monkeypatch.setattr(running, "gather", lambda error: ["the weights are torn", error])
    with pytest.raises(ValueError, match="the weights are torn"):
        running.load_spread(partial(model.load_policy, str(folder), "float32"), torch.device("cpu"))


def test_what_processes_cannot_share_evenly_is_refused(tmp_path, monkeypatch, capsys):
    for script, knobs, told in ((sft, dict(SFT, batch_size=1),
                                 "--batch-size 1: must be at least the number of processes, 2"),
                                (rl, dict(RL, model=tiny_folder(), num_envs=3, minibatch_turns=9),
                                 "--num-envs 3: must be a multiple"),
                                (evaluate, dict(api_url="http://127.0.0.1:9", api_model="x",
                                                out="y"), "--api-url runs in one process")):
        monkeypatch.setattr(running, "WORLD", 2)
        monkeypatch.setattr(running, "start_processes", torch.device)
        monkeypatch.setenv("API_KEY", "x")
        with pytest.raises(SystemExit):
            script.main(script.Config(**{"out": str(tmp_path / "run"), **knobs}))
        assert told in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_a_run_killed_at_any_moment_goes_on_to_the_same_numbers(tmp_path, straight, moment):
    knobs, expected, _ = straight
    rng = random.Random(moment)
    number, pause = rng.randint(1, 4), rng.uniform(0, 0.5)

    def when(out):
        if moment % 2:
            return any(out.glob(f"step_{number:06d}.tmp"))
        return lines(number)(out) and not time.sleep(pause)

    stopped("rl.py", 2, tmp_path / "run", when, signal.SIGKILL, bool(rng.randint(0, 1)), **knobs)
    assert run_rl(2, out=tmp_path / "run", **knobs) == expected
