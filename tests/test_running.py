"""The machinery of a run: configs, memory, the type to compute in, files and the console."""
import contextlib
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import model
from conftest import ROOT
from support import collect, command_line, evaluation, running, startup
from support.tiny import train_tokenizer


# ---- Configs and the command line

@dataclass
class Example:
    """A config with a flag of every kind."""
    name: str = running.flag("a", "a word", choices=("a", "b"))
    lr: float = running.flag(0.1, "100 % of it", low=0, high=1)
    steps: int = running.flag(3, "some", low=1)
    fast: bool = running.flag(False, "or slow")
    words: tuple = running.flag(("id",), "words up to the next flag")


def test_a_mistake_before_a_run_is_told_by_the_process_that_outlives_the_first_one(monkeypatch,
                                                                                  capsys):
    waited = []
    monkeypatch.setattr(running, "RANK", 1)
    monkeypatch.setattr(running.time, "sleep",
                        lambda _: waited.append(signal.getsignal(signal.SIGTERM)))
    with pytest.raises(SystemExit), running.one_line_errors():
        raise ValueError("a landmark has a control token")
    # torchrun's signal ends it without a word.
    assert waited == [signal.SIG_DFL]
    assert capsys.readouterr().err.endswith("error: a landmark has a control token\n")


def test_a_config_comes_from_the_command_line():
    assert running.parse_config(Example, []) == Example()
    found = running.parse_config(Example, ["--lr", "0.5", "--fast", "--name", "b"])
    assert found == Example("b", 0.5, 3, True)
    found = running.parse_config(Example, ["--words", "id", "rule=1,2,3", "--steps", "4"])
    assert found == Example(steps=4, words=("id", "rule=1,2,3"))


@pytest.mark.parametrize("argv, told", [
    (["--stepz", "3"], "unknown option --stepz; did you mean --steps? --help lists them all"),
    (["--stpes=3"], "unknown option --stpes; did you mean --steps? --help lists them all"),
    (["--colour", "3"], "unknown option --colour; --help lists them all"),
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--lr", "1.5"], "--lr 1.5: must be from 0 to 1"),
    (["--lr", "nan"], "--lr nan: must be a finite number"),
    (["--name", "c"], "--name 'c': allowed are a, b"),
    (["--words", "--fast"], "--words: expected at least one argument"),
])
def test_a_bad_option_ends_with_one_line_that_says_what_is_allowed(argv, told, capsys):
    with pytest.raises(SystemExit) as exit:
        running.parse_config(Example, argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and told in err and err.count("\n") == 1


def test_an_error_behind_a_bar_stands_on_a_line_of_its_own(capsys):
    running.LogStream().write("\rsft:  45%|####5     | 90/200")
    with pytest.raises(SystemExit):
        running.fail("loss nan")
    running.LogStream().write("done\n")
    with pytest.raises(SystemExit):
        running.fail("again")
    err = capsys.readouterr().err
    assert "90/200\n" in err and "error: loss nan\ndone\n" in err and err.count("\n") == 4


# ---- Before torch is imported

SCRIPTS = ("sft.py", "rl.py", "evaluate.py", "support/tiny.py", "data/own_failures.py")


@pytest.mark.parametrize("path", SCRIPTS)
def test_what_is_read_of_a_config_without_running_it_is_what_it_is(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)        # a dataclass looks its module up
        spec.loader.exec_module(module)
    real = module.Config
    sketch = command_line.sketch_config(ROOT / path, "Config")
    for ours, theirs in zip(command_line.options_of(sketch), command_line.options_of(real),
                            strict=True):
        assert (ours.name, ours.type, ours.default) == (theirs.name, theirs.type, theirs.default)
        choices = ours.metadata["choices"] or theirs.metadata["choices"]
        assert {**ours.metadata, "choices": choices} == theirs.metadata


def without_torch(tmp_path, then):
    """The environment of a script that runs the code `then` as it imports torch."""
    (tmp_path / "torch.py").write_text(then)
    return {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"}


DATA_BASE = str(ROOT / "data/base/gp-l")
NEEDED = ("{name}: error: --out and --model are required; --model is a folder, such as a "
          "checkpoint of sft.py or a tiny model of support/tiny.py\n")
HUB = ("{name}: error: model 'of/hub': no such model folder (it would have a config.json); to get "
       "it from the hub: hf download of/hub --local-dir FOLDER\n")


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_command_line_is_answered_before_torch_is_imported(tmp_path, path):
    env = without_torch(tmp_path, "raise SystemExit('torch was imported')")
    name = Path(path).name
    for words, status, told in ((["--outt", "x"], 2, f"{name}: error: unknown option --outt; did "
                                 "you mean --out? --help lists them all\n"),
                                (["--device"], 2, f"{name}: error: argument --device: expected one "
                                 "argument\n"), (["--help"], 0, ""),
                                (["--model", "of/hub", "--out", "x"], 2, HUB.format(name=name)),
                                (["--model", DATA_BASE, "--out", "x"], 1, "torch was imported\n"),
                                (["--out", "x"], 2, NEEDED.format(name=name)),
                                (["--model", "of/hub"], 2, "")):
        if path != "evaluate.py" and words == ["--model", "of/hub"]:
            continue                                         # the others need --out, too
        told = told or status == 2 and HUB.format(name=name) or ""
        if path not in ("sft.py", "rl.py") and words == ["--out", "x"]:
            continue                                         # the others need no model
        if path == "support/tiny.py" and "--out" in words:
            continue                                         # it needs no model
        if path == "support/tiny.py" and "--device" in words:
            continue                                         # it has none
        done = subprocess.run([sys.executable, str(ROOT / path), *words], env=env,
                              capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (status, told)
        assert ("--seed" in done.stdout) == (status == 0)


@pytest.mark.parametrize("words, told", [
    (["--compare", DATA_BASE, "x"], "no eval.jsonl; it is a model; --out of sft.py and rl.py"),
    (["--compare", "x"], "run 'x': there is no such folder; --compare takes run folders"),
    (["--run-folder", DATA_BASE], "is a model, not a run; to evaluate it: evaluate.py --model"),
    (["--run-folder", "."], "a config.json that names task and model); run folders in it: rl")
])
def test_a_folder_that_is_no_run_is_named_before_torch_is_imported(tmp_path, words, told):
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl/config.json").write_text('{"out": "rl"}')
    env = without_torch(tmp_path, "raise SystemExit('torch was imported')")
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *words], env=env,
                          cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("number, ignored, status, told", [
    (signal.SIGINT, False, 130, "\nstopped before it began\n"),
    (signal.SIGTERM, False, 143, "\nstopped before it began\n"),
    (signal.SIGINT, True, 0, "")])
def test_a_signal_while_torch_is_imported_ends_a_script_with_one_line(tmp_path, number, ignored,
                                                                       status, told):
    env = without_torch(tmp_path, f"import os; os.kill(os.getpid(), {int(number)}); os._exit(0)")

    def set_handler():     # a shell ignores SIGINT for `script &`, and so for tests in `pytest &`
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py")], env=env,
                          capture_output=True, text=True, timeout=60, preexec_fn=set_handler)
    assert (done.returncode, done.stderr) == (status, told)


def test_a_config_that_cannot_be_read_without_running_it_is_read_later(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("class Config:\n    steps: int = flag(len('ab'), 'some')\n")
    with pytest.raises(ValueError):
        command_line.sketch_config(path, "Config")
    command_line.check(path)


# ---- Numbers

def test_the_learning_rate_warms_up_and_falls_to_its_end():
    rates = [running.learning_rate(step, 100, 1.0, warmup_ratio=0.1, final=0.01)
             for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert 0.01 < rates[-1] < 0.02


def press_ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.parametrize("happens, status, told", [
    (press_ctrl_c, 130, "\nstopped; the same command goes on with what is saved\n"),
    (lambda: os.kill(os.getpid(), signal.SIGINT), 130,
     "\nstopped; the same command goes on with what is saved\n"),
    (lambda: os.kill(os.getpid(), signal.SIGTERM), 143,
     "\nstopped; the same command goes on with what is saved\n"),
    (lambda: None, 0, "")])
def test_a_signal_outside_of_training_ends_a_script_with_its_status_and_one_line(
        monkeypatch, capsys, happens, status, told):
    def main(config):
        happens()
    monkeypatch.setattr(running.os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # so that a script without a handler goes on
    signal.signal(signal.SIGINT, startup.stop_early)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as exit:
        running.run(main, Example)
    assert exit.value.code == status and capsys.readouterr().err == told


LATE = """
import atexit, dataclasses, os, signal, time
from support import running

def last():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    print("too late")

def main(config):
    atexit.register(last)
    print("done")

running.run(main, dataclasses.make_dataclass("Config", []))
"""


def test_a_signal_while_python_ends_changes_nothing():
    """Python takes tenths of a second to end, in which it calls what was registered with atexit."""
    ended = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True,
                           cwd=ROOT, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


# ---- The type that is computed in

@pytest.mark.parametrize("units, allowed, chosen, said", [
    ({"avx512_bf16": True}, True, "bfloat16", "has"),
    ({"amx_bf16": True, "avx512_bf16": False}, True, "bfloat16", "has"),
    ({"avx512_bf16": True}, False, "float32", "lacks"),
    ({"avx512_bf16": False, "avx2": True}, True, "float32", "lacks"),
    ({}, True, "float32", "lacks")])
def test_auto_is_decided_by_what_the_cpu_has_and_is_said(monkeypatch, capsys, units, allowed,
                                                         chosen, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: allowed)
    assert running.pick_dtype("auto", torch.device("cpu")) == chosen
    line = f"dtype auto: {chosen}, since this CPU {said} units for bfloat16\n"
    assert capsys.readouterr().out == line


def test_a_type_that_is_named_or_recorded_or_of_a_gpu_is_not_asked_of_the_cpu(
        monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(running, "has_bfloat16_units", lambda: 1 / 0)
    assert [running.pick_dtype(name, torch.device("cpu"), tmp_path)
            for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    assert running.pick_dtype("auto", torch.device("cpu"), tmp_path) == "float32"
    assert running.pick_dtype("bfloat16", torch.device("cpu"), tmp_path) == "bfloat16"
    assert not capsys.readouterr().out
    assert running.pick_dtype("auto", torch.device("cuda")) == "bfloat16"
    line = "dtype auto: bfloat16, since this GPU has units for bfloat16\n"
    assert capsys.readouterr().out == line


# ---- Memory

@pytest.mark.parametrize("param_dtype, dtype, samples, world, stays, copy",
                         [("float32", "float32", False, 1, 16, 0),
                          ("float32", "bfloat16", False, 1, 16, 2),
                          ("float32", "bfloat16", False, 2, 8, 0),
                          ("float32", "bfloat16", True, 2, 8, 2),
                          ("bfloat16", "bfloat16", False, 1, 8, 0),
                          ("bfloat16", "bfloat16", True, 1, 8, 0)])
def test_the_memory_estimate_counts_bytes_per_parameter(monkeypatch, param_dtype, dtype, samples,
                                                        world, stays, copy):
    monkeypatch.setattr(running, "WORLD", world)
    tokenizer = train_tokenizer(["abc"] * 3, ["1"])
    with torch.device("meta"):
        backbone = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=4096,
                                                num_hidden_layers=8, intermediate_size=11008))
    billions = sum(p.numel() for p in backbone.parameters()) / 1e9
    policy = model.Policy(backbone.to(getattr(torch, param_dtype)), tokenizer, dtype)
    config = SimpleNamespace(micro_batch_tokens=1000, gradient_checkpointing=False,
                             **{"generate_tokens": 1} if samples else {})
    fused = 2e-9 * 8 * (3 * 4096 ** 2 + 2 * 4096 * 11008) if samples else 0
    told = re.findall(r"([\d.]+) GB", running.memory_estimate(policy, config))
    assert told[:2] == [f"{stays * billions:.1f}", f"{copy * billions + fused:.1f}"]
    config.gradient_checkpointing = True
    less = re.findall(r"([\d.]+) GB", running.memory_estimate(policy, config))
    assert float(less[2]) < float(told[2]) / 2


@pytest.mark.parametrize("script, world, memory, told", [
    # Of 1.88 B weights 16 bytes each, shared out: weights, gradients and Adam.
    ("sft", 1, 31, None),
    ("sft", 1, 30, "needs at least 30.1 GB on each of 1 GPUs, which have 30.0: 22.6 for weights "
                   "and Adam, 7.5 for gradients; take more GPUs, --param-dtype bfloat16 or a "
                   "smaller model"),
    ("rl", 1, 31, None),
    ("sft", 16, 2, None),
    # In sampling 12 bytes shared out, and 2 on every GPU.
    ("rl", 16, 5.3, None),
    ("rl", 16, 5.1, "needs at least 5.2 GB on each of 16 GPUs, which have 5.1: 1.4 for weights and "
                    "Adam, 3.8 for the whole weights in sampling, on every GPU; take "
                    "--param-dtype bfloat16 or a smaller model"),
    ("rl", 10 ** 6, 3, "for the whole weights in sampling")])
def test_a_gpu_that_is_too_small_is_refused_before_anything_is_written(
        monkeypatch, pretend_cuda, script, world, memory, told):
    monkeypatch.setattr(running, "WORLD", world)
    # Another process has a larger GPU.
    monkeypatch.setattr(running, "gather", lambda value: [value, 2 * value])
    with torch.device("meta"):
        backbone = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=4096,
                                                num_hidden_layers=8, intermediate_size=11008))
    policy = model.Policy(backbone, train_tokenizer(["abc"] * 3, ["1"]), "bfloat16")
    config = SimpleNamespace(model="PATH", micro_batch_tokens=1000, gradient_checkpointing=True,
                             **{"generate_tokens": 1} if script == "rl" else {})
    running.check_memory(policy, config)       # a CPU is not asked
    with pretend_cuda(memory * 1e9):
        policy.banned = policy.banned.to("cuda")
        if told is None:
            return running.check_memory(policy, config)
        with pytest.raises(ValueError, match="^model 'PATH': training needs") as error:
            running.check_memory(policy, config)
    assert told in str(error.value)


# ---- Files and the console

@pytest.mark.parametrize("line, told", [("garbage", "Expecting value"),
                                        ("[1]", "expected a JSON object with step, split"),
                                        ('{"step": 1}', "expected a JSON object with step, split"),
                                        ('{"step": "3", "split": "id"}',
                                         "key 'step' is '3', must be a whole number"),
                                        ('{"step": true, "split": "id"}', "key 'step' is 'True'"),
                                        ('{"step": 1, "split": [0]}',
                                         "key 'split' is '.0.', must be a text"),
                                        ('{"step": 1, "split": "id", "gflops": null}',
                                         "key 'gflops' is 'None', must be a number"),
                                        ('{"step": 1, "split": "id", "settings": []}',
                                         "key 'settings' is '..', must be an object"),
                                        ("\0" * 9, "Expecting value"),
                                        ("\udcff", "can't decode byte 0xff"),
                                        ("[" * 100_000, "recursion")])
def test_garbage_in_a_log_is_named_with_file_and_line_and_blank_lines_are_none(
        tmp_path, line, told):
    path, rows = tmp_path / "eval.jsonl", [{"step": 1, "split": "id"}, {"step": 2, "split": "id"}]
    one, two = map(json.dumps, rows)
    path.write_text(f"\n{one}\r\n  \n{two}\n\n" + '{"step": 3, "sp')
    assert running.read_jsonl(path, "step", "split") == running.read_jsonl(path) == rows
    path.write_bytes(f"{one}\n\n{line}\n{two}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"eval.jsonl, line 3: .*{told}"):
        running.read_jsonl(path, "step", "split")
    assert running.read_jsonl(tmp_path / "none.jsonl") == []


def test_a_checkpoint_that_a_stop_has_saved_is_tested_only_as_the_last(tmp_path):
    for step in (3, 4, 7):
        (tmp_path / f"step_{step:06d}").mkdir()
    rows = [{"step": step, "gflops": step, "gflops_paper": step} for step in range(1, 8)]
    running.write_jsonl(tmp_path / "metrics.jsonl", rows)
    found = evaluation.list_checkpoints(tmp_path, {"model": "", "save_every": 2}, False)
    assert [each.step for each in found] == [4, 7]


def test_a_row_of_a_log_without_the_compute_is_named(tmp_path):
    (tmp_path / "step_000001").mkdir()
    running.write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "gflops": 2.0}])
    with pytest.raises(ValueError, match="metrics.jsonl: the row of step 1 has no gflops_paper"):
        evaluation.list_checkpoints(tmp_path, {"model": ""}, with_start=False)
    row = {"step": 1, "split": "id", "seed": 0, "settings": {"task": "gp-l"}}
    running.write_jsonl(tmp_path / "eval.jsonl", [row])
    with pytest.raises(ValueError, match="eval.jsonl, line 1: expected a JSON .*, gflops"):
        collect.read_rows(tmp_path, {"gp-l": ()})
    running.write_jsonl(tmp_path / "eval.jsonl", [row | {"gflops": 1}])
    assert len(collect.read_rows(tmp_path, {"gp-l": ()})) == 1


@contextlib.contextmanager
def full_disk(size):
    """No file grows beyond this size; what fits of a text is written, as on a real one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_on_a_full_disk_a_log_gets_a_whole_line_or_none_and_the_file_is_named(tmp_path):
    log, config = tmp_path / "metrics.jsonl", tmp_path / "config.json"
    running.log_jsonl(log, step=1)
    running.write_atomically(config, "{}")
    for path, write in ((log, lambda: running.log_jsonl(log, step=2, text="x" * 100)),
                        (tmp_path / "new.jsonl",
                         lambda: running.append_line(tmp_path / "new.jsonl", {"text": "x" * 100})),
                        (config, lambda: running.write_atomically(config, "{" + " " * 100 + "}"))):
        with full_disk(40), pytest.raises(OSError) as error:
            write()
        assert f"'{path}'" in str(error.value)
    assert (tmp_path / "new.jsonl").read_text() == "" and config.read_text() == "{}"
    running.log_jsonl(log, step=2)
    assert running.read_jsonl(log) == [{"step": 1}, {"step": 2}]


def test_what_cannot_be_written_ends_a_script_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    (tmp_path / "file").write_text("")
    for write in (lambda: running.log_jsonl(tmp_path / "file" / "metrics.jsonl", step=1),
                  lambda: running.write_atomically(tmp_path / "none" / "config.json", "")):
        with pytest.raises(SystemExit) as exit:
            running.run(lambda config: write(), Example)
        err = capsys.readouterr().err
        assert exit.value.code == 2
        told = r"script.py: error: \[Errno \d+\] .*'/.*; what was saved before is whole"
        assert re.match(told, err)
        assert err.count("\n") == 1


SCRIPT = """
import os, signal
from dataclasses import dataclass
from support import running

@dataclass
class Config:
    how: str = running.flag("", "a word")

def main(config):
    stop = running.StopSignal()
    for _ in running.progress(range(3)):
        if config.how == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
            config.how = ""
        running.print0("a line")
    open("saved", "w").close()
    if stop.requested:
        stop.leave("it")
    if config.how == "fail":
        running.fail("a mistake")

running.run(main, Config)
"""


def test_a_reader_who_has_gone_ends_a_script_quietly_and_not_before_its_work_is_saved(tmp_path):
    """`| head`, and `2>&1 | tee log` that Ctrl-C has ended before us."""
    reader, writer = os.pipe()
    os.close(reader)
    processes = {}
    for name, words, err, status in (("plain", (), subprocess.PIPE, 141),
                                     ("stop", ("--how", "stop"), writer, 143),
                                     ("fail", ("--how", "fail"), subprocess.PIPE, 2),
                                     ("help", ("--help",), subprocess.PIPE, 0)):
        (tmp_path / name).mkdir()
        processes[name] = status, subprocess.Popen([sys.executable, "-c", SCRIPT, *words],
                                                   cwd=tmp_path / name, stdout=writer,
                                                   stderr=err, text=True,
                                                   env={**os.environ, "PYTHONPATH": str(ROOT),
                                                        "PYTHONUNBUFFERED": ""})
    os.close(writer)
    told = {name: (process.communicate(timeout=60)[1] or "").replace("\r", "\n")
            for name, (_, process) in processes.items()}
    for name, (status, process) in processes.items():
        assert process.returncode == status, name
        assert not re.search("Traceback|Exception|BrokenPipe", told[name])
        assert (tmp_path / name / "saved").exists() == (name != "help")
    assert told["fail"].endswith("error: a mistake\n") and told["help"] == ""
    assert "3/3" in told["plain"]
