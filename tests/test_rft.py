"""data/own_successes.py and recipes/rft.py: a model learns its own replies that were right."""
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

import sft
from conftest import ROOT
from support import digests, evaluation, logs
from support.command_line import parse_config
from verify import judge_general_points

sys.path[:0] = [str(ROOT / "data"), str(ROOT / "recipes")]
import own_successes  # noqa: E402
import rft  # noqa: E402

GP_L = str(ROOT / "data/base/gp-l")


def read_dialogues(path):
    """The dialogues of a file, each a list of turns."""
    return [record["conversations"] for record in json.loads(path.read_text())]


@pytest.fixture
def config(tmp_path):
    return own_successes.Config(model=GP_L, out=str(tmp_path / "own.json"), episodes=16,
                                side_by_side=9, max_new_tokens=40, dtype="float32", device="cpu",
                                log=str(tmp_path / "log"))


def test_only_right_replies_are_kept_and_only_the_last_is_learnt(config, tmp_path):
    config = replace(config, episodes=24)
    own_successes.main(config)
    dialogues = read_dialogues(tmp_path / "own.json")
    counts = json.loads((tmp_path / "log").read_text())
    assert counts["kept"] == len(dialogues) == round(24 * counts["success"]) > 1
    assert len(dialogues) < counts["turns"] <= 5 * 24
    for prompt, *turns in dialogues:
        *earlier, last = turns
        assert "loss" not in last
        assert all(turn["loss"] is False for turn in earlier if turn["from"] == "gpt")
        cards = json.loads(re.search(r"Cards: (\[.*\])", prompt["value"])[1])
        values = [{"A": 1, "J": 10, "Q": 10, "K": 10}.get(card) or int(card) for card in cards]
        for turn in turns[::2]:
            verdict = judge_general_points(turn["value"], cards, values, 24)
            assert (verdict.status == "correct") == (turn is last)
    # The same command writes the same; dialogues with a failed try can be left out.
    own_successes.main(replace(config, out=str(tmp_path / "again.json"), side_by_side=24))
    assert (tmp_path / "again.json").read_text() == (tmp_path / "own.json").read_text()
    own_successes.main(replace(config, out=str(tmp_path / "first.json"), first_tries=True))
    assert (read_dialogues(tmp_path / "first.json")
            == [dialogue for dialogue in dialogues if len(dialogue) == 2])


def test_what_is_read_and_sampled_is_counted_once(config, tmp_path, monkeypatch):
    seen = []
    count = own_successes.training.count_read_and_sampled
    monkeypatch.setattr(own_successes.training, "count_read_and_sampled",
                        lambda policy, turns, dialogues: seen.extend(turns) or
                        count(policy, turns, dialogues))
    own_successes.main(config)
    # All tries at a hand are one dialogue: its last turn holds the earlier ones.
    whole = {turn.dialogue_key: len(turn.prompt_ids) + len(turn.response_ids) for turn in seen}
    counts = json.loads((tmp_path / "log").read_text())
    assert len(whole) == 16 and len(seen) == counts["turns"]
    # A retry's prompt holds the sampled ids of the earlier replies, so nothing is read twice.
    assert counts["tokens_rollout"] == sum(whole.values())


def test_each_position_of_a_route_is_a_dialogue_of_its_own(config, tmp_path, city):
    own_successes.main(replace(config, task="virl-l", model=str(ROOT / "data/base/virl-l"),
                               env=(f"root={city}",), episodes=4, max_new_tokens=48))
    dialogues = read_dialogues(tmp_path / "own.json")
    counts = json.loads((tmp_path / "log").read_text())
    assert counts["kept"] == len(dialogues) > 4
    assert {len(dialogue) for dialogue in dialogues} <= {2, 4}     # two tries at a position


def test_a_model_without_a_right_reply_and_two_splits_are_refused(config, capsys):
    from conftest import tiny_folder
    with pytest.raises(SystemExit):
        own_successes.main(replace(config, model=tiny_folder()))
    assert "none of 80 replies is right" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        own_successes.main(replace(config, split=("id", "rule_ood")))
    assert "one split only, not rule_ood" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        own_successes.main(replace(config, split=("id", "reward=random")))
    assert "reward 'random': has no effect here" in capsys.readouterr().err


# ---- Rounds --------------------------------------------------------------------------------------

class Stopped(Exception):
    pass


def rounds(monkeypatch, out, *more, stop_before=None):
    """recipes/rft.py in this process; stops before its script of this number."""
    scripts = []

    def run(command, stop):
        if len(scripts) == stop_before:
            raise Stopped
        script, *options = map(str, command)
        scripts.append(script)
        module = own_successes if script == "data/own_successes.py" else sft
        module.main(parse_config(module.Config, options))

    monkeypatch.setattr(rft, "run", run)
    monkeypatch.setattr(rft, "hold", lambda out: None)     # a traceback keeps the lock
    monkeypatch.setattr(rft.signal, "signal", lambda *_: None)
    rft.main(parse_config(rft.Config, [
        "--model", GP_L, "--out", str(out), "--rounds", "2", "--episodes", "16",
        "--steps", "1", "--batch-size", "4", "--save-every", "1", "--max-new-tokens", "40",
        "--dtype", "float32", *more]))
    return scripts


def test_rounds_go_on_after_a_stop_as_if_there_had_been_none(tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert rounds(monkeypatch, whole) == ["data/own_successes.py", "sft.py"] * 2
    for stop_before in (1, 1, 1):
        with pytest.raises(Stopped):
            rounds(monkeypatch, stopped, stop_before=stop_before)
    (stopped / "round_2.json").unlink()                   # as after a kill
    (stopped / "round_2.log").unlink()
    (stopped / "round_1_sft").mkdir()                     # its model was moved out of it
    rounds(monkeypatch, stopped)
    assert not list(stopped.glob("round_*_sft"))
    for number in (1, 2):
        name = f"step_{number:06d}/model.safetensors"
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    rows = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            for out in (whole, stopped)]
    assert [row["step"] for row in rows[0]] == [1, 2]
    for one, other in zip(*rows):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    first, second = rows[0]
    assert second["gflops"] > 1.5 * first["gflops"] and second["kept"] > first["kept"] / 3

    # evaluate.py takes it as a run.
    found = evaluation.list_checkpoints(whole, logs.read_trained(whole), with_start=True)
    assert [(each.step, each.gflops) for each in found] == [(0, 0.0), (1, first["gflops"]),
                                                            (2, second["gflops"])]


def test_a_folder_is_held_and_a_log_without_a_round_is_refused(tmp_path):
    lock = rft.hold(tmp_path)
    with pytest.raises(ValueError, match="another process is training here"):
        rft.hold(tmp_path)
    lock.close()
    for number in (1, 2):
        (tmp_path / "run" / f"step_{number:06d}").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    config = rft.Config(model=GP_L + "/", out=str(tmp_path / "run"))
    (tmp_path / "run/config.json").write_text(json.dumps({"model": GP_L, "out": "run"}))
    with pytest.raises(ValueError, match="metrics.jsonl lacks a round of 1 to 2"):
        rft.open_folder(config)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n{"step": 2,\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: "):
        rft.open_folder(config)
    # A second process cuts no log of the first: it is refused before it writes anything.
    log = '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    (tmp_path / "run/metrics.jsonl").write_text(log)
    lock = rft.hold(tmp_path / "run")
    with pytest.raises(ValueError, match="another process is training here"):
        rft.open_folder(config)
    assert (tmp_path / "run/metrics.jsonl").read_text() == log
    lock.close()
    with pytest.raises(ValueError, match="--rounds 1: .* has 2 rounds already"):
        rft.open_folder(replace(config, rounds=1))


def test_a_start_or_prompt_file_that_was_replaced_meanwhile_is_refused(tmp_path):
    """Round 1 may have sampled already, and the start plays on where --sampler names it."""
    shutil.copytree(GP_L, tmp_path / "start")
    (tmp_path / "p.json").write_text('{"gp_output": "one"}')
    config = rft.Config(model=str(tmp_path / "start"), out=str(tmp_path / "run"),
                        env=(f"prompt_file={tmp_path}/p.json",))
    (tmp_path / "run").mkdir()
    env = rft.check(config)
    rft.check_inputs(config, env, done=0)
    rft.check_inputs(config, env, done=0)
    before = digests.weights_of(tmp_path / "start")
    (tmp_path / "start/model.safetensors").write_bytes(b"other")
    for changed, done in (config, 0), (replace(config, sampler="start"), 3):
        with pytest.raises(ValueError, match="start .*: has other weights than when"):
            rft.check_inputs(changed, env, done)
    rft.check_inputs(config, env, done=3)
    assert json.loads((tmp_path / "run/inputs.json").read_text())["start"] == before
    (tmp_path / "p.json").write_text('{"gp_output": "two"}')
    with pytest.raises(ValueError, match="a prompt file, city or card_dir .* is not what it was"):
        rft.check_inputs(config, env, done=3)


def test_the_start_may_play_in_all_rounds(tmp_path, monkeypatch):
    played = []
    monkeypatch.setattr(own_successes, "load_policy",
                        lambda path, *args, load=own_successes.load_policy, **kwargs:
                        played.append(path) or load(path, *args, **kwargs))
    rounds(monkeypatch, tmp_path / "run", "--sampler", "start", "--save-every", "2")
    assert played == [GP_L, GP_L]
    # Of the checkpoints that are not asked for only the last one stays.
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == ["step_000002"]


def test_a_run_goes_on_under_another_spelling_of_its_model_and_after_that_was_moved(tmp_path):
    shutil.copytree(GP_L, tmp_path / "start")
    config = rft.Config(model=str(tmp_path / "start"), out=str(tmp_path / "run"))
    rft.open_folder(config)[1].close()
    rft.check_inputs(config, rft.check(config), done=0)
    (tmp_path / "link").symlink_to("start")
    rft.open_folder(replace(config, model=f"{tmp_path}/run/../link"))[1].close()
    (tmp_path / "start").rename(tmp_path / "moved")
    rft.open_folder(replace(config, model=str(tmp_path / "moved")))[1].close()
    with pytest.raises(ValueError, match="belongs to another config .model differ"):
        rft.open_folder(replace(config, model=str(tmp_path)))


def test_tests_of_rounds_that_are_gone_are_neither_kept_nor_lost_with_their_log(tmp_path):
    config = rft.Config(model=GP_L, out=str(tmp_path / "run"))
    rft.open_folder(config)[1].close()
    log = tmp_path / "run/eval.jsonl"
    log.write_text("".join(f'{{"step": {step}}}\n' for step in (0, 1, 2)))
    with pytest.raises(ValueError, match="eval.jsonl has tests, but their checkpoints are gone"):
        rft.open_folder(config)
    assert len(logs.read_jsonl(log)) == 3
    (tmp_path / "run/step_000001").mkdir()                     # round 2 was moved away
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    rft.open_folder(config)[1].close()
    assert [row["step"] for row in logs.read_jsonl(log)] == [0, 1]


def test_a_folder_of_another_run_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"lr": 1}')
    with pytest.raises(SystemExit):
        rounds(monkeypatch, tmp_path)
    assert "belongs to another config" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SystemExit):
        rounds(monkeypatch, tmp_path)
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("words, told", [
    (["--save-every", "0"], "--save-every 0: must be at least 1"),
    (["--rounds", "0"], "--rounds 0: must be at least 1"),
    (["--episodes", "0"], "--episodes 0: must be at least 1"),
    (["--steps", "-1"], "--steps -1: must be at least 1"),
    (["--lr", "nan"], "--lr nan: must be a finite number"),
    (["--seed", "-1"], "--seed -1: must be at least 0"),
    (["--model", "nowhere"], "model 'nowhere': no such model folder"),
    (["--split", "id", "rule_ood"], "one split only, not rule_ood"),
    (["--env", "fold=most"], "fold 'most'"),
    (["--env", "reward=random"], "reward 'random': has no effect here"),
    (["--env", "faults=leave_out:1"], "faults 'leave_out:1': has no effect here"),
    (["--env", "solution=random"], "solution 'random': has no effect here"),
    (["--split", "id", "faulty_tries=2"], "faulty_tries '2': has no effect here")])
def test_a_value_that_is_not_allowed_is_named_before_anything_is_written(
        tmp_path, monkeypatch, capsys, words, told):
    with pytest.raises(SystemExit):
        rounds(monkeypatch, tmp_path / "run", *words)
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_type_that_auto_chose_is_kept_and_the_samples_are_counted(
        tmp_path, monkeypatch, capsys):
    rounds(monkeypatch, tmp_path / "run", "--dtype", "auto", "--rounds", "1")
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert (f"round 1: {row['kept']} of {row['turns']} replies were right and are kept; "
            "trained on 4 samples of them\n") in capsys.readouterr().out
    chosen = logs.read_trained(tmp_path / "run")["dtype"]
    assert chosen in ("float32", "bfloat16")
    # On another processor auto would be another type.
    config = rft.Config(**{**logs.read_trained(tmp_path / "run"), "dtype": "auto"})
    config = replace(config, split=tuple(config.split), env=tuple(config.env))
    assert rft.open_folder(config)[0].dtype == chosen
    with pytest.raises(ValueError, match="belongs to another config .dtype differ"):
        rft.open_folder(replace(config, dtype="bfloat16" if chosen == "float32" else "float32"))


# ---- A stop --------------------------------------------------------------------------------------

LATE = "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"


def two_scripts(tmp_path, first, *ignored):
    """A process of ours that runs the script `first`, then one that prints "second"."""
    (tmp_path / "first.py").write_text(f"{first}\nprint('ready', flush=True)\ntime.sleep(0.5)")
    (tmp_path / "second.py").write_text("print('second')")

    def begin():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    code = ("import pathlib, sys; sys.path.insert(0, 'recipes'); import rft; stop = rft.Stop();"
            f"rft.ROOT = pathlib.Path({str(tmp_path)!r});"
            "rft.run(['first.py'], stop); rft.run(['second.py'], stop)")
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                            text=True, preexec_fn=begin)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_script_begins_after_a_stop_that_the_running_one_was_told_too_late(tmp_path, number):
    process = two_scripts(tmp_path, LATE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert said == "stopped; the same command goes on\n" and process.returncode == 128 + number


def test_a_stop_between_two_scripts_is_heard(tmp_path, monkeypatch):
    handlers = {}
    monkeypatch.setattr(rft.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(rft.signal, "getsignal", lambda number: signal.SIG_DFL)
    stop = rft.Stop()
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    with pytest.raises(SystemExit) as ended:
        rft.run([tmp_path / "never_begun.py"], stop)
    assert ended.value.code == 143


def test_a_signal_that_is_ignored_as_under_nohup_stops_nothing(tmp_path):
    process = two_scripts(tmp_path, "import time", signal.SIGHUP, signal.SIGINT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert said == "second\n" and process.returncode == 0
