"""recipes/runs.py and recipes/common.sh: runs side by side, where they stand, and a stop."""
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT

BAR = "\rsft:  45%|####5     | 90/200 [01:10<01:20,  1.28it/s, loss=0.2]"
SAVES = "trap 'echo saved; exit 130' INT; trap 'echo saved; exit 143' TERM; "


def hear_all():
    """In a child: no signal is ignored, as SIGHUP is in tests that run under nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(jobs, folder, **options):
    """recipes/runs.py with these jobs: {name: commands}."""
    lines = ["\t".join([name, *commands]) for name, commands in jobs.items()]
    process = subprocess.Popen([sys.executable, ROOT / "recipes/runs.py", "--logs", folder,
                                "--title", "gp-l"], stdin=subprocess.PIPE, text=True,
                               preexec_fn=hear_all, **{"stdout": subprocess.PIPE, **options})
    process.stdin.write("\n".join(lines))
    process.stdin.close()
    process.stdin = None
    return process


def sh(script):
    """A command of a run: this shell script."""
    return f'bash -c "{script}"'


def test_the_commands_of_a_run_follow_each_other_and_a_fault_of_this_attempt_is_shown(tmp_path):
    (tmp_path / "log_bad").write_text("rl.py: error: of an earlier attempt\n")
    (tmp_path / "bar").write_text(BAR)     # which ends without a line break
    jobs = {"good": [sh("echo one"), sh("echo two")],
            "bad": [sh(f"sleep 1.5; cat {tmp_path}/bar; echo 'sft.py: error: loss nan'; exit 2")]}
    process = started(jobs, tmp_path)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert (tmp_path / "log_good").read_text() == "one\ntwo\n"
    assert "bad ended early:\n   sft.py: error: loss nan\n" in said
    assert "earlier attempt" not in said and "good is done (1 of 2)" in said
    assert "goes on" not in said           # the error says what may help


def test_a_fault_stops_the_others_which_save(tmp_path):
    saving = SAVES + "while true; do sleep 0.1; done"
    process = started({"long": [sh(saving), sh("echo second")],
                       "bad": [sh("sleep 1; echo 'rl.py: error: no'; exit 2")],
                       "later": [sh("echo never")]}, tmp_path)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and (tmp_path / "log_long").read_text() == "saved\n"
    assert not (tmp_path / "log_later").exists()
    assert said.endswith("bad ended early:\n   rl.py: error: no\n"
                         "== gp-l: stopping, long saving first\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_reaches_the_commands_is_awaited_and_begins_no_other(tmp_path, number):
    saving = SAVES + "echo ready; while true; do sleep 0.1; done"
    jobs = {name: [f"bash -c \"{saving}\"", sh("echo second")] for name in "ab"}
    process = started({**jobs, "c": [sh("echo third")]}, tmp_path)
    logs = [tmp_path / "log_a", tmp_path / "log_b"]
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
        time.sleep(0.05)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)            # the recipe passes on what the terminal has sent
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said.endswith("stopping, a and b saving first\n"
                         "== gp-l: stopped; the same command goes on\n")
    assert [log.read_text() for log in logs] == ["ready\nsaved\n"] * 2
    assert not (tmp_path / "log_c").exists()


def test_a_terminal_shows_stage_step_and_time_left(tmp_path):
    master, slave = pty.openpty()
    (tmp_path / "bar").write_text(BAR)
    process = started({"sft_0_0": [sh(f"cat {tmp_path}/bar; sleep 0.8")]}, tmp_path, stdout=slave)
    process.wait(timeout=30)
    os.close(slave)
    shown = os.read(master, 100_000).decode()
    assert "sft_0_0  training, step 90 of 200, 01:20 left" in shown
    assert "0 of 1 runs done" in shown and "sft_0_0 is done (1 of 1)" in shown


def test_a_stop_is_told_on_the_terminal_when_it_has_ended_the_tee_behind_the_recipe(tmp_path):
    master, slave = pty.openpty()
    process = started({"a": [f"bash -c \"{SAVES}echo ready; while true; do sleep 0.1; done\""]},
                      tmp_path, stderr=slave)
    while not (tmp_path / "log_a").exists() or "ready" not in (tmp_path / "log_a").read_text():
        time.sleep(0.05)
    process.stdout.close()                 # as when Ctrl-C ends the tee
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    os.close(slave)
    told = os.read(master, 100_000).decode()
    assert "stopping, a saving first" in told and "stopped; the same command goes on" in told


@pytest.mark.parametrize("number, everyone", [(signal.SIGTERM, False), (signal.SIGINT, True),
                                              (signal.SIGHUP, True)])
def test_a_recipe_awaits_the_end_of_its_command(number, everyone):
    """SIGTERM comes to the recipe alone, Ctrl-C to all of its process group."""
    command = ("import signal, sys, time\n"
               "def save(*_): print('saved'); sys.exit(1)\n"
               "signal.signal(signal.SIGINT, save); signal.signal(signal.SIGTERM, save)\n"
               "print('ready', flush=True); time.sleep(60)")
    script = ('command=("$@"); set --; source recipes/common.sh; attended "${command[@]}"; '
              "echo goes on")
    process = subprocess.Popen(["bash", "-ec", script, "recipe", sys.executable, "-c", command],
                               cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=hear_all)
    assert process.stdout.readline() == "ready\n"
    (os.killpg if everyone else os.kill)(process.pid, number)
    said, _ = process.communicate(timeout=30)
    assert said == "saved\n" and process.returncode == 128 + number


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.sh")))
def test_a_recipe_reads_what_it_calls(name):
    """bash meets a name that is not there only when it comes to that line."""
    shared = re.findall(r"^(\w+)\(\) \{", (ROOT / "recipes/common.sh").read_text(), re.M)
    assert "attended" in shared
    text = (ROOT / "recipes" / name).read_text()
    calls = [each for each in shared if re.search(rf"^[^#\n]*\b{each}\b", text, re.M)]
    assert not calls or name == "common.sh" or "\nsource recipes/common.sh\n" in text


# ---- Recipes without Python: a stand-in notes the command lines and leaves what they would write -

STAND_IN = """#!/usr/bin/env bash
case $1 in recipes/runs.py) exec REAL "$@" ;; esac
[ "$1" != - ] || { mkdir "$3"; touch "$3/config.json"; exit; }
echo "$*" >>"$NOTES"
while [ $# != 0 ]; do
    case "$1 ${2:-}" in
    "--out "*.json) touch "$2" ;;
    "--out "*) mkdir -p "$2/step_000001" ;;
    esac
    shift
done
"""


@pytest.fixture
def recipe(tmp_path):
    """recipe(NAME, SETTING=...) runs a recipe: (exit status, its error, the command lines)."""
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN.replace("REAL", sys.executable))
    stand_in.chmod(0o755)

    def run(name, **settings):
        notes = tmp_path / "notes"
        notes.write_text("")
        done = subprocess.run(["bash", f"recipes/{name}.sh"], cwd=ROOT, capture_output=True,
                              text=True, timeout=60, stdin=subprocess.DEVNULL,
                              env={**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
                                   "NOTES": str(notes), **{k: str(v) for k, v in settings.items()}})
        return done.returncode, done.stderr, notes.read_text().splitlines()
    return run


def model_of(lines, run):
    """--model of the command line that trains in a folder of this name."""
    line, = [line for line in lines if re.search(rf"--out \S*/{run} ", line)]
    return re.search(r"--model \S*/(\S+)", line)[1]


def test_each_seed_of_the_gpu_run_begins_with_its_own_start(recipe, tmp_path):
    """That of seed 0 may be there first, under the name that tiny.sh looks for."""
    for seed in (0, 1):
        (tmp_path / f"start_{seed}").mkdir()
        (tmp_path / f"start_{seed}/config.json").touch()
    status, _, lines = recipe("gpu", OUT=tmp_path, SEEDS="0 1", STARTS="3")
    assert status == 0 and recipe("gpu", OUT=tmp_path, SEEDS="0 1", SIZE="64x2")[0] == 2
    for run in ("rl_0", "sft_0"):
        assert [model_of(lines, f"{run}_{seed}") for seed in (0, 1)] == ["start_0", "start_1"]


def test_a_model_that_no_run_would_begin_with_is_refused(recipe, tmp_path):
    (tmp_path / "config.json").touch()
    status, told, lines = recipe("tiny", OUT=tmp_path / "runs", MODEL=tmp_path, STARTS="1 10")
    assert (status, lines) == (2, [])
    assert told == f"MODEL={tmp_path}: is start 0, which STARTS=1 10 does not have\n"


def test_a_start_that_was_begun_with_other_settings_is_not_gone_on_with(recipe, tmp_path):
    """Its dialogues would be those of the other faults."""
    settings = {"OUT": tmp_path / "making", "BASE": tmp_path / "base", "FAULTS": "ten:0.5"}
    status, _, lines = recipe("base", **settings)
    assert status == 0 and "faults=ten:0.5" in "\n".join(lines)
    assert recipe("base", **settings)[0] == 0            # the same command goes on
    for other in ({"FAULTS": "ten:0.4"}, {"FAULTS": ""}, {"SIZE": "64x2"}, {"SEED": "1"}):
        status, told, lines = recipe("base", **settings | other)
        assert (status, lines) == (2, []) and told.endswith(": choose another OUT\n")
    assert recipe("read", OUT=tmp_path / "read")[0] == 0
    assert recipe("read", OUT=tmp_path / "read", FAMILY="qwen3_vl")[0] == 2


def test_a_start_that_is_there_stays_if_it_was_made_with_these_settings(recipe, tmp_path):
    status, _, lines = recipe("tiny", OUT=tmp_path, STARTS="1", SIZE="64x2", SFT_SETTINGS="none")
    assert status == 0 and [line for line in lines if "--size 64x2" in line]
    status, _, lines = recipe("tiny", OUT=tmp_path, STARTS="1", SIZE="64x2", SFT_SETTINGS="none")
    assert status == 0 and not [line for line in lines if "making_1" in line]
    for other in ({"SIZE": "32x2"}, {"FAULTS": "ten:0.4"}, {"LRS": "1e-3 1e-3 1e-3"}):
        status, told, lines = recipe("tiny", OUT=tmp_path, STARTS="1",
                                     **{"SIZE": "64x2", "SFT_SETTINGS": "none", **other})
        assert (status, lines) == (2, [])
        assert "making_1/settings says that this was begun with TASK=gp-l SEED=1" in told


@pytest.mark.parametrize("setting", [{"FAULTY_TRIES": 1}, {"FAULTS": ""}, {"SIZE": "64x2"}])
def test_a_start_of_another_making_is_not_the_committed_one(recipe, tmp_path, setting):
    """Else the start 0 of a table would have other faults than its starts 1 and 2."""
    status, _, lines = recipe("tiny", OUT=tmp_path, SFT_SETTINGS="none", **setting)
    assert status == 0 and model_of(lines, "rl_0_0") == "start_0"
    assert [line for line in lines if "making_0" in line]
    status, _, lines = recipe("tiny", OUT=tmp_path / "other", SFT_SETTINGS="none")
    assert status == 0 and model_of(lines, "rl_0_0") == "gp-l"


@pytest.mark.parametrize("name, hinted", [
    ("tiny", ("SEED", "START")), ("study", ("START",)), ("pretrained", ("START",)), ("grid", ()),
    ("gpu", ("SEED",))])
def test_a_setting_that_would_have_no_effect_and_a_city_that_is_not_there_are_refused(
        recipe, tmp_path, name, hinted):
    for setting in "SEED", "START":
        hint = f'; {setting}S="7" has' if setting in hinted else ""
        told = f"{setting}=7: has no effect here{hint}\n"
        assert recipe(name, OUT=tmp_path / "runs", TASK="virl-l", **{setting: 7}) == (2, told, [])
    told = "DATA=7: no such folder; without DATA a synthetic city is made\n"
    if name in ("tiny", "study", "pretrained"):
        assert recipe(name, OUT=tmp_path / "runs", TASK="virl-l", DATA=7) == (2, told, [])
    if name == "study":
        assert recipe(name, OUT=tmp_path / "runs", SIZE="64x2")[0] == 2
    assert not (tmp_path / "runs").exists()


def python_in(name):
    """The Python that a recipe runs within itself."""
    return re.search(r"<<'PY'\n(.*?)\nPY\n", (ROOT / "recipes" / name).read_text(), re.S)[1]


def test_the_grids_table_has_a_checkpoint_once_with_its_newest_test(tmp_path):
    run = tmp_path / "sft_0_9"
    run.mkdir()
    (run / "config.json").write_text('{"lr": 1e-3}')
    rows = [(40, 0.1), (80, 0.2), (40, 0.3)]                  # step 40 was trained and tested again
    zeros = dict.fromkeys(["gflops", "first_try", "first_try_stderr", "success_stderr",
                           "solved_and_read", "solved_and_read_stderr"], 0)
    (run / "eval.jsonl").write_text("".join(
        json.dumps({**zeros, "step": step, "success": success}) + "\n" for step, success in rows))
    done = subprocess.run([sys.executable, "-c", python_in("grid.sh"), str(tmp_path), "gp-l"],
                          capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1].endswith("| 30.0, 20.0 |"), done.stderr


@pytest.mark.parametrize("says, decoded, told", [
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, "0.6 --top-p 0.9", "top-k 50 of "),
    ({"do_sample": True, "top_p": 0.9, "top_k": 7}, "1.0 --top-p 0.9", "top-k 7 of "),
    ({"do_sample": True, "top_k": 0}, "1.0 --top-p 1.0", ""),
    ({"temperature": 0.6}, "0.0 --top-p 1.0", "")])
def test_official_decoding_is_the_checkpoints_and_what_is_left_out_is_said(tmp_path, says, decoded,
                                                                           told):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(says))
    done = subprocess.run([sys.executable, "-c", python_in("official.sh"), str(path)],
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == f"--temperature {decoded}\n"
    assert done.stderr.startswith(told) and bool(done.stderr) == bool(told)


def test_each_part_on_a_gpus_page_has_its_own_command(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\n")        # does nothing, at once
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(["bash", str(ROOT / "tests" / "gpu.sh")], text=True, timeout=60,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
                               "DEVICE": "cpu", "OUT": str(tmp_path / "out"),
                               "PARTS": "update profile"}, capture_output=True)
    page, = (tmp_path / "out").glob("gpu_*.md")
    commands = re.findall(r"## (\w+)\n\n`(\S+ \S+)", page.read_text())
    assert commands == [("update", "update 64x2"), ("profile", "python tests/bench.py")], done


def test_what_lies_where_a_start_is_to_go_is_not_deleted(recipe, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("a model of mine")
    status, told, lines = recipe("base", OUT=tmp_path / "making", BASE=mine)
    assert (status, lines) == (2, []) and "is there already, and not from OUT=" in told
    assert (mine / "config.json").read_text() == "a model of mine"
    # Whoever keeps it has no other folder's word for how it was made.
    assert recipe("base", OUT=tmp_path / "other", BASE=mine, KEEP=1) == (0, "", [])
    assert not (tmp_path / "other").exists()
    # Nor where the folder of the stages is one that has made another start.
    assert recipe("base", OUT=tmp_path / "making", BASE=f"{tmp_path}/base/")[0] == 0
    assert recipe("base", OUT=tmp_path / "making", BASE=mine)[0] == 2 and mine.is_dir()


def test_another_seed_does_not_take_the_place_of_start_0(recipe, tmp_path):
    status, told, lines = recipe("base", OUT=tmp_path / "making", SEED=1)
    assert (status, lines) == (2, [])
    assert told == "SEED=1: needs BASE=folder, since data/base/gp-l is start 0\n"
    for name in "FAULTS", "SIZE", "LRS", "AFTER", "FAULTY_TRIES", "SMOKE":
        given = {name: "" if name == "FAULTS" else "1", "BASE": "data/base/gp-l"}
        status, told, lines = recipe("base", OUT=tmp_path / "making", **given)
        assert (status, lines) == (2, []) and "need another BASE, since data/base/gp-l is" in told


def test_a_smoke_run_leaves_nothing_that_a_whole_run_would_take(recipe, tmp_path):
    """Its files, such as 64 dialogues, do not tell how many were asked for."""
    settings = {"OUT": tmp_path / "making", "BASE": tmp_path / "base"}
    assert recipe("base", SMOKE=1, **settings)[0] == 0
    status, told, lines = recipe("base", **settings)
    assert (status, lines) == (2, []) and "AFTER= SMOKE=1" in told


@pytest.mark.parametrize("setting", ["BAND", "RL_SETTINGS", "RFT_SETTINGS"])
def test_arms_that_the_table_of_the_gpu_run_would_leave_out_are_refused(recipe, tmp_path, setting):
    status, told, lines = recipe("gpu", OUT=tmp_path / "gpu", **{setting: "--lr 1e-3"})
    assert (status, lines, (tmp_path / "gpu").exists()) == (2, [], False)
    assert told.startswith(f"{setting}=--lr 1e-3: this recipe has one arm of PPO")
