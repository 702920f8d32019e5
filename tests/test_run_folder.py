"""Run folders: whose they are, logs, checkpoints, what is damaged in them."""
import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import model
from conftest import ROOT, tiny_folder
from support import digests, run_folder, running
from test_model import some_prompts


def test_a_checkpoint_opens_in_plain_transformers_and_comes_back_whole(tiny, tmp_path):
    policy, processor = tiny
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    samples = [(p, model.encode_reply(processor, "1+2")) for p in some_prompts(processor)]
    logprobs, values = policy(model.collate([[s] for s in samples], policy.device))
    (logprobs.sum() * 0 + values.sum() * 0).backward()
    optimizer.step()
    folder = run_folder.ensure_checkpoint(tmp_path, 7, policy, processor, optimizer, {"step": 7})
    assert folder.name == "step_000007" and not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.rglob("*.p*kl"))
    plain = AutoModelForCausalLM.from_pretrained(folder).to(policy.device)
    ids = torch.tensor([samples[0][0]], device=policy.device)
    assert torch.equal(plain(ids).logits, policy.backbone(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read, expected = (each("J+10", add_special_tokens=False).input_ids
                      for each in (tokenizer, processor))
    assert read == expected
    again, its_processor = model.load_policy(str(folder), device=policy.device)
    for (name, p), (_, q) in zip(policy.named_parameters(), again.named_parameters()):
        assert torch.equal(p, q), name
    fresh = torch.optim.Adam(again.parameters(), lr=1e-3)
    assert run_folder.load_resume(folder, again, fresh) == {"step": 7}
    for p, q in zip(policy.parameters(), again.parameters()):
        assert all(torch.equal(optimizer.state[p][key], fresh.state[q][key])
                   for key in optimizer.state[p])


def test_weights_stay_and_resume_state_is_kept_for_the_newest_only(tiny, tmp_path):
    policy, processor = tiny
    optimizer = torch.optim.Adam(policy.parameters())
    for step in range(1, 5):
        run_folder.ensure_checkpoint(tmp_path, step, policy, processor, optimizer, {"step": step},
                                     keep_resume=2)
    checkpoints = run_folder.checkpoints(tmp_path)
    assert [p.name for p in checkpoints] == [f"step_{s:06d}" for s in range(1, 5)]
    assert [(p / "resume").exists() for p in checkpoints] == [False, False, True, True]


@pytest.mark.parametrize("moment", ["weights", "optimizer", "state"])
def test_a_full_disk_leaves_the_checkpoints_before_it_whole(tiny, tmp_path, monkeypatch, capsys,
                                                            moment):
    policy, processor = tiny
    optimizer = torch.optim.Adam(policy.parameters())
    run_folder.ensure_checkpoint(tmp_path, 1, policy, processor, optimizer, {"step": 1})
    full = OSError(28, "No space left on device")

    def fill(*_, **__):
        raise full
    with monkeypatch.context() as disk:
        if moment == "weights":
            disk.setattr(type(policy.backbone), "save_pretrained", fill)
        elif moment == "optimizer":
            disk.setattr(run_folder, "save_file",
                         lambda tensors, path: fill() if "optimizer" in str(path) else None)
        else:
            disk.setattr(run_folder.Path, "write_text", fill)
        with pytest.raises(SystemExit):
            run_folder.ensure_checkpoint(tmp_path, 2, policy, processor, optimizer, {"step": 2})
    told = ("step_000002.tmp: [Errno 28] No space left on device; the checkpoints before it are "
            "whole")
    assert told in capsys.readouterr().err
    assert [p.name for p in run_folder.checkpoints(tmp_path)] == ["step_000001"]
    assert run_folder.load_resume(tmp_path / "step_000001", policy, optimizer) == {"step": 1}
    assert run_folder.ensure_checkpoint(tmp_path, 2, policy, processor, optimizer,
                                        {"step": 2}).name == "step_000002"


def test_weights_that_are_no_numbers_take_no_whole_checkpoints_place(tiny, tmp_path, capsys):
    policy, processor = tiny
    optimizer = torch.optim.Adam(policy.parameters())
    run_folder.ensure_checkpoint(tmp_path, 1, policy, processor, optimizer, {"step": 1}, 1)
    bias = policy.value_head[0].bias
    with torch.no_grad():
        before = bias.clone()
        bias.fill_(float("nan"))
    with pytest.raises(SystemExit):
        run_folder.ensure_checkpoint(tmp_path, 2, policy, processor, optimizer, {"step": 2}, 1)
    with torch.no_grad():
        bias.copy_(before)
    assert "weights value_head.0.bias hold values that are no finite" in capsys.readouterr().err
    assert run_folder.load_resume(tmp_path / "step_000001", policy, optimizer) == {"step": 1}


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_over_its_tests(tmp_path):
    @dataclass
    class Config:
        out: str = str(tmp_path / "run")
    run_folder.open_run(Config(), None, {"start": "a"})
    log = tmp_path / "run/eval.jsonl"
    running.write_jsonl(log, [{"step": 0}])
    assert run_folder.newest_checkpoint(Config()) is None
    running.write_jsonl(log, [{"step": 0}, {"step": 1}])
    with pytest.raises(ValueError, match="tests in eval.jsonl, but their checkpoints are gone"):
        run_folder.newest_checkpoint(Config())


def test_a_run_that_is_made_again_keeps_no_test_of_checkpoints_that_are_gone(tmp_path):
    @dataclass
    class Config:
        out: str = str(tmp_path / "run")
    run_folder.open_run(Config(), None, {"start": "a"})
    log = tmp_path / "run/eval.jsonl"

    def rows():
        return [(row["step"], row["weights"]) for row in running.read_jsonl(log)]
    running.write_jsonl(log, [{"step": step, "weights": "a"} for step in (0, 1, 2, 3)])
    # It goes on from step 1, and step 3 is still there.
    for step in 1, 3:
        (tmp_path / f"run/step_{step:06d}").mkdir()
    run_folder.open_run(Config(), tmp_path / "run/step_000001")
    assert rows() == [(0, "a"), (1, "a"), (3, "a")]
    for step in 1, 3:
        (tmp_path / f"run/step_{step:06d}").rmdir()
    run_folder.open_run(Config(), None, {"start": "a"})
    assert rows() == [(0, "a")]
    running.write_jsonl(log, [{"step": 0, "weights": "a", "texts": "t"}])
    run_folder.open_run(Config(), None, {"start": "a", "start_texts": "t"})
    assert rows() == [(0, "a")]
    for inputs in {"start": "a", "start_texts": "other"}, {"start": "b", "start_texts": "t"}:
        running.write_jsonl(log, [{"step": 0, "weights": "a", "texts": "t"}])
        run_folder.open_run(Config(), None, inputs)
        assert rows() == []


def make_run(tmp_path, **changes):
    @dataclass
    class Config:
        out: str = str(tmp_path / "run")
        lr: float = 1.0
    return Config(**changes)


def test_a_run_goes_on_from_the_newest_complete_checkpoint_and_drops_later_log_lines(
        tiny, tmp_path, capsys):
    policy, processor = tiny
    config = make_run(tmp_path)
    assert run_folder.newest_checkpoint(config) is None and not list(tmp_path.iterdir())
    run_folder.open_run(config, None)
    run, optimizer = tmp_path / "run", torch.optim.Adam(policy.parameters())
    for step in (1, 2):
        run_folder.ensure_checkpoint(run, step, policy, processor, optimizer, {"step": step})
    (run / "step_000003.tmp" / "resume").mkdir(parents=True)          # a save that was killed
    (run / "step_000003.tmp" / "resume" / "state.json").write_text("{}")
    for step in (1, 2, 3):
        running.log_jsonl(run / "metrics.jsonl", step=step)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')                                  # a line that was killed
    newest = run_folder.newest_checkpoint(config)
    assert newest.name == "step_000002"
    run_folder.open_run(config, newest)
    assert "step_000003.tmp" in capsys.readouterr().out
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_an_out_folder_of_another_config_is_refused_untouched(tmp_path):
    run_folder.open_run(make_run(tmp_path), None)
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match="lr 1.0 there, 2.0 here"):
        run_folder.newest_checkpoint(make_run(tmp_path, lr=2.0))
    assert (tmp_path / "run" / "config.json").read_text() == before


def write_checkpoint(run, step, policy, processor, steps=1, **state):
    """A checkpoint as a training step would leave it, with moments in the optimizer."""
    optimizer = torch.optim.Adam(policy.parameters())
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return run_folder.ensure_checkpoint(run, step, policy, processor, optimizer,
                                        {"step": step, **state})


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run folder of two checkpoints, and its config."""
    config = make_run(tmp_path_factory.mktemp("whole"))
    run_folder.open_run(config, None)
    for step in (1, 2):
        running.log_jsonl(f"{config.out}/metrics.jsonl", step=step)
        write_checkpoint(config.out, step, *tiny)
    return config


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it that may be damaged."""
    return shutil.copytree(whole.out, tmp_path / "run")


def resume(run, **config):
    """What sft.py and rl.py do when they go on."""
    config = make_run(run.parent, **config)
    newest = run_folder.newest_checkpoint(config)
    with run_folder.damage_advice(newest):
        policy, _ = running.load_spread(partial(model.load_policy, str(newest), "float32"),
                                        torch.device("cpu"))
    optimizer = torch.optim.Adam(policy.parameters())
    return newest.name, run_folder.load_resume(newest, policy, optimizer)


def test_paths_of_a_config_are_compared_however_they_are_spelt(tmp_path, monkeypatch):
    @dataclass
    class Config:
        out: str = "run"
        model: str = "start/step_000004"
        data: str = ""
        env: tuple = ("root=city", "target=24")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("start")
    run_folder.open_run(Config(), None)
    for spelling in ("start/step_000004/", "./start/step_000004", "link/step_000004",
                     f"{tmp_path}/start//step_000004"):
        assert run_folder.newest_checkpoint(Config(model=spelling)) is None
    assert run_folder.newest_checkpoint(Config(env=("root=./city/", "target=24"))) is None
    for other in (dict(model="start/step_000005"), dict(data="."),
                  dict(env=("root=city", "target=36")), dict(env=("root=city",))):
        with pytest.raises(ValueError, match=f"belongs to another config .{next(iter(other))} "):
            run_folder.newest_checkpoint(Config(**other))


def test_a_run_of_ppo_may_be_made_longer_but_not_shorter(tmp_path):
    @dataclass
    class Config:
        out: str = str(tmp_path / "run")
        updates: int = 8
        lr: float = 1e-4
    run_folder.open_run(Config(), None)
    assert run_folder.newest_checkpoint(Config(updates=9)) is None
    for other in (dict(updates=7), dict(updates=9, lr=1e-3)):
        with pytest.raises(ValueError, match="belongs to another config .updates 8 there"):
            run_folder.newest_checkpoint(Config(**other))


def test_a_run_goes_on_from_a_start_that_was_moved(tmp_path):
    @dataclass
    class Config:
        out: str = str(tmp_path / "run")
        model: str = str(tmp_path / "start")
        env: tuple = ("root=old", "target=24")
    shutil.copytree(tiny_folder(), tmp_path / "start")
    run_folder.open_run(Config(), None, digests.of_start(tmp_path / "start"))
    (tmp_path / "start").rename(tmp_path / "moved")
    moved = Config(model=str(tmp_path / "moved"))
    assert run_folder.newest_checkpoint(moved) is None
    # So may files that settings name. Whether they are what they were is seen later.
    elsewhere = Config(model=moved.model, env=("root=new", "target=24"))
    with pytest.raises(ValueError, match="belongs to another config .env"):
        run_folder.newest_checkpoint(elsewhere)
    inputs = tmp_path / "run/inputs.json"
    inputs.write_text(json.dumps({**json.loads(inputs.read_text()), "files": "a"}))
    with pytest.raises(ValueError, match="belongs to another config .env"):
        run_folder.newest_checkpoint(elsewhere)       # it has no checkpoint to go on from
    (tmp_path / "run/step_000001/resume").mkdir(parents=True)
    (tmp_path / "run/step_000001/resume/state.json").write_text("{}")
    running.write_jsonl(tmp_path / "run/metrics.jsonl", [{"step": 1}])
    run_folder.check_owner(elsewhere)
    with pytest.raises(ValueError, match="belongs to another config .env"):
        run_folder.newest_checkpoint(Config(model=moved.model, env=("root=new", "target=36")))
    (tmp_path / "moved/chat_template.jinja").write_text("another")
    with pytest.raises(ValueError, match="belongs to another config .model"):
        run_folder.newest_checkpoint(moved)


def test_a_run_from_before_an_option_was_there_goes_on_where_that_is_off(tmp_path, monkeypatch):
    @dataclass
    class Before:
        out: str = "run"

    @dataclass
    class Config(Before):
        dft: bool = False
    monkeypatch.chdir(tmp_path)
    run_folder.open_run(Before(), None)
    assert run_folder.newest_checkpoint(Config()) is None
    with pytest.raises(ValueError, match="another config .dft False there, True here"):
        run_folder.newest_checkpoint(Config(dft=True))


def test_a_run_goes_on_without_an_option_that_is_gone_only_if_it_was_off(tmp_path, monkeypatch):
    @dataclass
    class Config:
        out: str = "run"

    @dataclass
    class Before(Config):
        dft: bool = False
    monkeypatch.chdir(tmp_path)
    run_folder.open_run(Before(), None)
    assert run_folder.newest_checkpoint(Config()) is None
    run_folder.open_run(Before(dft=True), None)
    with pytest.raises(ValueError, match="another config .dft True there, None here"):
        run_folder.newest_checkpoint(Config())


# ---- What else lies in a folder

def test_only_whole_folders_with_the_name_of_a_checkpoint_are_checkpoints(run, capsys):
    for name in ("step_000002-best", "step_000002 copy", "step_final", "step_3", "step_0000004",
                 "step_000009.tmp"):
        shutil.copytree(run / "step_000002", run / name)
    (run / "step_000007").symlink_to("step_000001")
    (run / "step_000008").write_text("notes")
    assert [path.name for path in run_folder.checkpoints(run)] == ["step_000001", "step_000002"]
    assert resume(run) == ("step_000002", {"step": 2})
    (run / "step_1000000").mkdir()
    assert run_folder.checkpoints(run)[-1].name == "step_1000000"


def test_a_new_run_may_begin_beside_files_that_are_none_of_its_own(tmp_path):
    config = make_run(tmp_path)
    (tmp_path / "run" / "step_final").mkdir(parents=True)
    for name in (".DS_Store", "train.log", "thesis.txt", "metrics.jsonl.tmp"):
        (tmp_path / "run" / name).write_text("!")
    assert run_folder.newest_checkpoint(config) is None
    run_folder.open_run(config, None)
    assert run_folder.newest_checkpoint(config) is None
    assert (tmp_path / "run" / "thesis.txt").read_text() == "!"


@pytest.mark.parametrize("name, told", [
    ("metrics.jsonl", "has metrics.jsonl but no config.json of a run"),
    ("turns.jsonl", "has turns.jsonl but"),
    ("eval.jsonl", "has eval.jsonl but"), ("step_000100", "has step_000100 but"),
    ("model.safetensors", "has model.safetensors but"),
    ("config.json",
     "has a config.json that is none of a run, such as a model's: choose another --out")])
def test_a_folder_in_which_a_run_would_write_over_something_is_refused_untouched(
        tmp_path, name, told):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text('{"model_type": "llama"}\n')
    with pytest.raises(ValueError, match=told):
        run_folder.newest_checkpoint(make_run(tmp_path))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
    with pytest.raises(ValueError, match=f"{name} is a file: choose another --out"):
        run_folder.newest_checkpoint(make_run(tmp_path, out=str(tmp_path / "run" / name)))


# ---- The log

def test_the_log_is_on_the_disk_before_a_checkpoint_has_its_name(tiny, tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(file):
        done.append((os.fstat(file).st_ino, os.fstat(file).st_size))
        return fsync(file)

    def watched_replace(source, target):
        done.append(Path(target).name)
        return replace(source, target)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    logs = [tmp_path / name for name in ("metrics.jsonl", "turns.jsonl")]
    for log in logs:
        running.log_jsonl(log, step=1)
    write_checkpoint(tmp_path, 1, *tiny)
    for log in logs:
        assert done.index((log.stat().st_ino, log.stat().st_size)) < done.index("step_000001")
    done.clear()
    # so are a config and a log that was cut
    running.write_atomically(tmp_path / "config.json", "{}")
    assert done == [((tmp_path / "config.json").stat().st_ino, 2), "config.json"]


@pytest.mark.parametrize("log, lost",
                         [("", 1), ('{"step": 2}\n', 1), ('{"step": 1}\n{"step": 2', 2), (None, 1)])
def test_a_run_does_not_go_on_with_a_log_that_lacks_a_step(run, log, lost):
    path = run / "metrics.jsonl"
    path.unlink() if log is None else path.write_text(log)
    with pytest.raises(ValueError, match=f"run/metrics.jsonl has no row of step {lost}: put the "
                                         "log back from a copy; without it"):
        run_folder.newest_checkpoint(make_run(run.parent))
    assert log is None or path.read_text() == log
    shutil.rmtree(run / "step_000002")
    if lost == 2:
        assert run_folder.newest_checkpoint(make_run(run.parent)).name == "step_000001"


def test_a_step_in_the_log_that_is_no_number_is_named(run):
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": [2]}\n')
    told = r"metrics.jsonl, line 2: key 'step' is '\[2\]', must be a whole number"
    with pytest.raises(ValueError, match=told):
        run_folder.newest_checkpoint(make_run(run.parent))


# ---- Two processes on one folder

HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], 'w')
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f'{os.getpid()} on {sys.argv[2]}')
file.flush()
print(flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def held(path, host=None):
    """Another process that holds a lock; it is killed in the end."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path), host or socket.gethostname()],
                          stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_a_second_process_in_a_run_folder_is_refused_until_the_first_has_ended_however(run):
    config = make_run(run.parent)
    for host in (None, "elsewhere"):
        with held(run / ".training.lock", host) as pid:
            holder = f"{pid} on elsewhere" if host else pid
            with pytest.raises(ValueError, match=f"run: process {holder} is training here; wait "
                                                 "for its end"):
                run_folder.newest_checkpoint(config)
            run_folder.hold(run, "evaluating")                     # is another matter
    assert run_folder.newest_checkpoint(config).name == "step_000002"    # SIGKILL leaves no lock
    code = "import sys; from support import run_folder; run_folder.hold(sys.argv[1], 'training')"
    done = subprocess.run([sys.executable, "-c", code, str(run)],
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True)
    assert f"process {os.getpid()} is training here" in done.stderr       # and ours is there
    assert run_folder.newest_checkpoint(config).name == "step_000002"    # we may, twice


def test_two_processes_that_begin_one_new_folder_do_not_both_write_to_it(tmp_path):
    config = make_run(tmp_path)
    assert run_folder.newest_checkpoint(config) is None and not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run" / ".training.lock"):
        with pytest.raises(ValueError, match="is training here"):
            run_folder.open_run(config, None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".training.lock"]
    run_folder.open_run(config, None)


def test_a_file_system_without_locks_is_no_obstacle(run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run_folder.newest_checkpoint(make_run(run.parent)).name == "step_000002"


def test_the_other_processes_of_a_run_learn_who_holds_it_and_lock_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "RANK", 1)
    monkeypatch.setattr(running, "gather", lambda holder: [f"4 on node{holder or ''}", holder])
    with pytest.raises(ValueError, match="process 4 on node is training here"):
        run_folder.hold(tmp_path, "training")
    assert not list(tmp_path.iterdir())


# ---- Damage

WHOLE = ("resume/state.json", "resume/optimizer_00000.safetensors", "model.safetensors")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("damage", ["half", "empty", "missing", "{}"])
def test_a_damaged_newest_checkpoint_is_named_with_the_way_on(run, name, damage):
    path = run / "step_000002" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"half": content[:len(content) // 2], "empty": b"", "{}": b"{}"}[damage])
    with pytest.raises(ValueError) as told:
        resume(run)
    words = str(told.value)
    assert "\n" not in words
    assert words.endswith(f"; move {run}/step_000002 away to go on from step_000001")
    assert str(path if name.startswith("resume") else path.parent) in words
    shutil.move(run / "step_000002", run / "step_000002-damaged")
    assert resume(run) == ("step_000001", {"step": 1})


def test_without_an_older_checkpoint_the_way_on_is_a_new_run(run):
    shutil.rmtree(run / "step_000001" / "resume")
    (run / "step_000002" / "resume" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="state.json: expected a JSON object, got list; "
                                         ".*step_000002 is the only checkpoint to go on from: "
                                         "start anew with another --out, with it as --model if"):
        resume(run)
    shutil.rmtree(run / "step_000002" / "resume")
    with pytest.raises(ValueError, match="step_000002/resume/state.json is missing; .* start anew "
                                         "with another --out"):
        resume(run)


def test_a_state_without_its_keys_and_a_value_head_that_is_gone_are_noticed(run, tiny):
    newest, policy = run / "step_000002", tiny[0]
    with pytest.raises(ValueError, match="state.json: has no 'seconds'; move"):
        run_folder.load_resume(newest, policy, torch.optim.Adam(policy.parameters()),
                               {"step": 0, "seconds": 0.0})
    (newest / "value_head.safetensors").unlink()
    with pytest.raises(ValueError, match="step_000002/value_head.safetensors is missing; move"):
        resume(run)


@pytest.mark.parametrize("step", [1, 3, "2", 2.5, None])
def test_a_state_of_another_step_is_noticed_since_steps_would_be_trained_twice(run, step):
    (run / "step_000002" / "resume" / "state.json").write_text(json.dumps({"step": step}))
    with pytest.raises(ValueError, match=f"state.json: says step {step!r}, but the checkpoint is "
                                         "of step 2; move .*step_000002 away"):
        resume(run)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_part_of_the_optimizer_that_is_gone_is_noticed(run, tiny, gone):
    """Two processes have written two."""
    folder = run / "step_000002" / "resume"
    parts = load_file(folder / "optimizer_00000.safetensors")
    for rank in (0, 1):
        part = {}
        for name, tensor in parts.items():
            if not name.endswith(".step"):
                rows = tensor.chunk(2)[rank] if len(tensor) > 1 else tensor[rank:]
                tensor = rows.clone()
            part[name] = tensor
        save_file(part, folder / f"optimizer_{rank:05d}.safetensors")
    assert resume(run)[0] == "step_000002"
    (folder / f"optimizer_{gone:05d}.safetensors").unlink()
    with pytest.raises(ValueError, match=r"resume: its 1 optimizer_\*.safetensors hold .* one is "
                                         "missing or of another run; move"):
        resume(run)


@pytest.mark.parametrize("lost", ["step", "exp_avg", "exp_avg_sq"])
def test_an_optimizer_file_that_lacks_a_tensor_is_named(run, lost):
    path = run / "step_000002" / "resume" / "optimizer_00000.safetensors"
    parts = load_file(path)
    del parts[f"value_head.0.bias.{lost}"]
    save_file(parts, path)
    with pytest.raises(ValueError, match=f"optimizer_00000.safetensors: has no value_head.0.bias."
                                         f"{lost}; move"):
        resume(run)


@pytest.mark.parametrize("change, told", [
    ({"conversations": [[0]]}, r"number 0 of 'conversations' is \[0\], not \[episode, replies\]"),
    ({"conversations": [[0, [[10 ** 6]]]]}, r"is \[0, \[\[1000000\]\]\], not .* ids from 0 to"),
    ({"conversations": [[0, [[-1]]]]}, "number 0 of 'conversations'"),
    ({"conversations": [[0, [["5"]]]]}, "number 0 of 'conversations'"),
    ({"conversations": [[-1, []]]}, "number 0 of 'conversations'"),
    ({"conversations": [[0, 5]]}, "number 0 of 'conversations'"),
    ({"conversations": []}, r"'conversations' is \[\], no list of 1"),
    ({"conversations": {}}, "'conversations' is {}, no list of 1"),
    ({"seconds": "3"}, "'seconds' is '3', no number from 0 on"),
    ({"seconds": None}, "'seconds' is None, no number from 0 on"),
])
def test_a_state_with_odd_values_is_named_by_file_and_key(run, tiny, change, told):
    newest, policy = run / "step_000002", tiny[0]
    path = newest / "resume" / "state.json"
    state = {"step": 2, "seconds": 1.5, "conversations": [[3, [[1, 2], []]]]}
    first = {"step": 0, "seconds": 0.0, "conversations": [[0, []]]}
    path.write_text(json.dumps(state))
    optimizer = torch.optim.Adam(policy.parameters())
    assert run_folder.load_resume(newest, policy, optimizer, first) == state
    path.write_text(json.dumps(state | change))
    with pytest.raises(ValueError, match=f"state.json: .*{told}.*; move .*step_000002 away"):
        run_folder.load_resume(newest, policy, optimizer, first)
