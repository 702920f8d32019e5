"""The conversations of a run, read in the terminal and as a page."""
import base64
import html
import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

import envs
import rl
from conftest import ROOT, tiny_folder, write_conversations
from envs import make_env
from support import running, transcripts
from support.chat import printable
from test_play import envs_py
from test_scripts import RL


def train(out, device, **knobs):
    rl.main(rl.Config(out=str(out), device=device, **{**RL, "updates": 2, **knobs}))
    return running.read_jsonl(out / "turns.jsonl")


@pytest.fixture(scope="module")
def words(tmp_path_factory, device):
    """A run in words and its rows."""
    out = tmp_path_factory.mktemp("words") / "rl"
    return out, train(out, device, model=tiny_folder())


def test_a_run_is_read_in_the_terminal_with_the_verdict_on_every_reply(words):
    run, rows = words
    done = envs_py("--read", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^---- update (\d+), environment (\d+), episode (\d+): (.*) ----$",
                      done.stdout, re.M) == [
        (str(row["step"]), str(row["env"]), str(row["episode"]),
         "out of tries" if row["done"] else "goes on") for row in rows]
    assert {row["done"] for row in rows} == {True, False}
    said = [printable(message["content"]) for row in rows for message in row["messages"]]
    place = 0
    for text in said:                                              # all of it, in its order
        place = done.stdout.index(text, place) + len(text)
    marks = re.findall(r"^> \[(\w+), reward ([-+\d.]+)\] ", done.stdout, re.M)
    assert marks == [(status, f"{reward:+g}") for row in rows for status, reward in row["verdicts"]]
    assert marks.count(("illegal_formula", "-4")) == sum(row["done"] for row in rows)


def test_a_run_in_words_becomes_a_page_without_pictures_that_loads_nothing(words, tmp_path):
    run, rows = words
    done = envs_py("--read", run, "--html", tmp_path / "page.html")
    assert (done.returncode, done.stdout) == (0,
                                              f"{tmp_path / 'page.html'}: {len(rows)} dialogues\n")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("<article>") == page.count("</article>") == len(rows)
    assert "http" not in page and "<img" not in page and "<script" not in page
    assert page.count('<p class="wrong">') == sum(len(row["verdicts"]) for row in rows)
    assert "Make 24 from four cards." in page


def test_the_page_of_a_run_in_pictures_shows_what_the_model_saw(tmp_path, device, monkeypatch):
    seen, collect = {}, rl.collect_turns

    def keep(*arguments):
        turns = collect(*arguments)
        seen.update((turn.dialogue_key[:2], turn.picture) for turn in turns)
        return turns
    monkeypatch.setattr(rl, "collect_turns", keep)
    rows = train(tmp_path / "rl", device, task="gp-vl", env=("resolution=60", "verify_iter=4"),
                 split=("rule_ood", "suits=H"),
                 model=tiny_folder(vision=True))
    transcripts.read_run(tmp_path / "rl", tmp_path / "page.html", make_env)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(shown) == len(rows) and "http" not in page
    for row, data in zip(rows, shown):
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.size == (60, 60)
        assert picture.tobytes() == seen[row["env"], row["episode"]].tobytes()
    assert len(set(shown)) > 1


@pytest.mark.parametrize("task", ["gp-l", "gp-vl"])
def test_hands_with_a_face_card_are_found_whatever_the_prompt_shows_of_them(tmp_path, capsys, task):
    """In pictures it shows none, and a prompt file may write them in another way."""
    texts, env = tmp_path / "texts.json", []
    texts.write_text(json.dumps({"gp_card": "'{card}'"}))
    if task == "gp-l":
        env = [f"prompt_file={texts}"]
    rows, num = [], 0
    for episode in range(8):
        own = make_env(task, "id", [word.split("=") for word in env])
        own.reset(f"0/rl/0/{episode}", episode)
        num += any(card in "JQK" for card in own.cards)
        prompt = ROW["messages"][0] if own.vision else own.messages[0]
        rows.append({**ROW, "episode": episode,
                     "messages": [prompt, {"role": "assistant", "content": "no"}]})
    run = write_conversations(tmp_path / "run", *rows, task=task, env=env)
    assert 0 < num < 8
    transcripts.read_run(run, "", make_env, ["face_card"])
    assert capsys.readouterr().out.count("---- update") == num


def test_a_dialogue_that_goes_on_has_not_failed(tmp_path, capsys):
    """Also on a route, where rows of training name their position, too."""
    going = {**ROW, "done": False, "success": False, "position": 3,
             "verdicts": [["wrong_action", -1.0]]}
    run = write_conversations(tmp_path / "run", going, {**going, "done": True, "episode": 1})
    transcripts.read_run(run, "", make_env, ["failed"])
    out = capsys.readouterr().out
    assert out.count("---- ") == 1 and "episode 1: out of tries" in out


def test_tests_of_several_models_or_settings_can_be_told_apart(tmp_path, capsys):
    """Where --out holds them, or one run was tested with other settings later."""
    def row(checkpoint, step=0, **chosen):
        env = {"feedback": chosen.pop("feedback", "informative")}
        talk = {"episode": 0, "position": 0, "expert": "", "done": True, "success": True,
                "verdicts": ROW["verdicts"], "messages": ROW["messages"][:2]}
        return {"step": step, "checkpoint": checkpoint, "split": "id", "seed": 0,
                "settings": {"task": "gp-l", "temperature": 0.0, **chosen, "env": env},
                "dialogues": [talk]}

    def titles(rows, *only):
        running.write_jsonl(tmp_path / "dialogues.jsonl", rows)
        transcripts.read_run(tmp_path / "dialogues.jsonl", "", make_env, only)
        return re.findall("^---- (.*): solved ----$", capsys.readouterr().out, re.M)
    two = [row("base"), row("runs/sft/step_000004")]
    assert titles(two) == ["id, base, seed 0, episode 0",
                           "id, runs/sft/step_000004, seed 0, episode 0"]
    assert titles(two, "checkpoint=base/") == ["id, base, seed 0, episode 0"]
    assert titles([row("base"), row("runs/a/step_000004", 4)]) == [
        "id, step 0, seed 0, episode 0", "id, step 4, seed 0, episode 0"]
    again = row("runs/a/step_000004", 4, temperature=1.0, feedback="plain")
    assert titles([row("runs/a/step_000004", 4), again]) == [
        "id, step 4, temperature 0.0, feedback informative, seed 0, episode 0",
        "id, step 4, temperature 1.0, feedback plain, seed 0, episode 0"]


ROW = {"step": 1, "env": 0, "episode": 0, "done": True, "success": True,
       "verdicts": [["correct", 5]],
       "messages": [{"role": "user", "content": "a <b> & c"},
                    {"role": "assistant", "content": "<script>x</script>"},
                    {"role": "user", "content": "Correct."}]}


def test_what_a_model_writes_is_text_on_the_page_and_right_replies_stand_out(tmp_path, capsys):
    run = write_conversations(tmp_path / "run", ROW)
    with open(run / "turns.jsonl", "a") as file:
        file.write('{"torn')
    transcripts.read_run(run, tmp_path / "page.html", make_env)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt; &amp; c" in page and "&lt;script&gt;x&lt;/script&gt;</p>" in page
    assert "<script" not in page
    assert page.count('<p class="right">') == 1 and page.count('<p class="user">') == 2
    assert "update 1, environment 0, episode 0: solved" in page and "correct, reward +5" in page
    transcripts.read_run(run, "", make_env)
    assert "> [correct, reward +5] <script>x</script>\n" in capsys.readouterr().out


def test_a_run_without_conversations_is_named(tmp_path):
    with pytest.raises(ValueError,
                       match="nowhere.*needs turns.jsonl, which rl.py writes"):
        transcripts.read_run(tmp_path / "nowhere", "", make_env)
    with pytest.raises(ValueError, match="turns.jsonl: holds no conversation yet"):
        transcripts.read_run(write_conversations(tmp_path / "run"), "", make_env)
    with pytest.raises(ValueError, match="page.html: there is no folder"):
        transcripts.read_run(write_conversations(tmp_path / "other", ROW),
                             tmp_path / "none" / "page.html", make_env)
    done = envs_py("--read", tmp_path / "run")
    assert done.returncode == 2 and "holds no conversation yet" in done.stderr
    assert "Traceback" not in done.stderr


def test_garbage_in_the_file_is_named(tmp_path):
    run = write_conversations(tmp_path / "run", ROW)
    with open(run / "turns.jsonl", "a") as file:
        file.write("\nnot json\n")
    with pytest.raises(ValueError, match="turns.jsonl, line 3: Expecting value"):
        transcripts.read_rows(run)


@pytest.mark.parametrize("row, told", [
    ([0], "turns.jsonl, line 1: expected a JSON object"),
    (3, "turns.jsonl, line 1: expected a JSON object"),
    ({**ROW, "step": "3"}, "line 1: key 'step' is '3', must be a whole number"),
    ({**ROW, "messages": {}}, "line 1: key 'messages' is '{}', must be a list"),
    ({**ROW, "messages": [[0]]}, "conversation 1: a message must be an object with the texts"),
    ({**ROW, "messages": [{"content": "a"}]}, "conversation 1: a message must be an object"),
    ({**ROW, "messages": [{"role": "user"}]}, "conversation 1: a message must be an object"),
    ({**ROW, "verdicts": []}, "conversation 1: 0 verdicts for 1 replies"),
    ({**ROW, "verdicts": [5]}, "conversation 1: a verdict must be [status, reward], got 5"),
    ({**ROW, "verdicts": [["correct", "5"]]}, "conversation 1: a verdict must be [status, reward]"),
    ({key: value for key, value in ROW.items() if key != "done"}, "conversation 1: has no 'done'"),
])
def test_a_damaged_row_is_named(tmp_path, row, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        transcripts.read_rows(write_conversations(tmp_path / "run", row))


@pytest.mark.parametrize("config, told", [
    ("{}", "config.json: key 'task' must be a text, got None"),
    ("[]", "config.json: expected a JSON object, got list"),
    ("{", "config.json: Expecting property name"),
    ('{"task": "gp-l", "split": [5]}',
     "config.json: key 'split' must be a list of texts, got [5]"),
    ('{"task": "gp-l", "split": ["id"], "env": [], "seed": true, "num_envs": 1}',
     "config.json: key 'seed' must be a whole number, got True")])
def test_a_damaged_config_is_named(tmp_path, config, told):
    run = write_conversations(tmp_path / "run", ROW)
    (run / "config.json").write_text(config)
    with pytest.raises(ValueError, match=re.escape(told)):
        transcripts.read_run(run, tmp_path / "page.html", make_env)


def test_what_cannot_be_written_or_is_off_the_route_is_one_line(tmp_path, monkeypatch, capsys):
    run = write_conversations(tmp_path / "run", ROW)
    (tmp_path / "file").write_text("")
    (tmp_path / "page.html").mkdir()
    for words, named in ((["--read", str(run), "--html", str(tmp_path / "page.html")], "page.html"),
                         (["gp-l", "--show", str(tmp_path / "file" / "shown")], "file/shown")):
        monkeypatch.setattr("sys.argv", ["envs.py", *words])
        with pytest.raises(SystemExit) as stop:
            envs.main()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1
        assert err.startswith("envs.py: error: [Errno ") and f"{named}'" in err
    env = SimpleNamespace(vision=True, reset=lambda *_: None, rail=(None,))
    with pytest.raises(ValueError, match="update 1, .*: position 99 is not on its route of"):
        transcripts.picture_of_row({**ROW, "position": 99}, lambda *_, **__: env,
                                   {"task": "x", "split": ["id"], "env": [], "seed": 0,
                                    "num_envs": 1})


HOSTILE = {      # what a reply says: how it is shown
    "\x1b]0;owned\x07": "\ufffd]0;owned\ufffd", "\x1b[2J": "\ufffd[2J", "\x9b2J": "\ufffd2J",
    "\x07": "\ufffd", "\r": "\ufffd", "\x00": "\ufffd", "\u202e": "\ufffd", "\ud800": "\ufffd",
    "é\n\t日": "é\n\t日"}


def write_hostile_run(folder):
    """A run whose replies hold what a terminal would obey."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(
        {"task": "gp-l", "split": ["id"], "env": [], "seed": 0, "num_envs": 1}))
    rows = []
    for reply in HOSTILE:
        messages = [{"role": "user", "content": "Make 24."},
                    {"role": "assistant", "content": f"<{reply}>"}]
        rows.append({"step": 1, "env": 0, "episode": 0, "success": False, "done": True,
                     "verdicts": [["illegal_formula", -4.0]], "messages": messages})
    running.write_jsonl(folder / "turns.jsonl", rows)


def test_what_a_terminal_would_obey_is_neither_printed_nor_put_on_the_page(tmp_path):
    write_hostile_run(tmp_path / "run")
    done = envs_py("--read", tmp_path / "run")
    assert done.returncode == 0
    transcripts.read_run(tmp_path / "run", tmp_path / "page.html", make_env)
    page = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    for text in (done.stdout, page):
        assert not set(text) & set("\x1b\x07\x9b\r\x00\u202e\ud800")
        for shown in HOSTILE.values():
            assert f"<{shown}>" in text


def test_a_page_is_not_written_over_another_kind_of_file(tmp_path):
    write_hostile_run(tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="config.json: must be a file named .html"):
        transcripts.read_run(tmp_path / "run", tmp_path / "run" / "config.json", make_env)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_reader_who_has_enough_ends_it_without_a_traceback(tmp_path):
    write_hostile_run(tmp_path / "run")
    rows = running.read_jsonl(tmp_path / "run" / "turns.jsonl")
    running.write_jsonl(tmp_path / "run" / "turns.jsonl", rows * 2000)     # more than a pipe holds
    command = f"{sys.executable} envs.py --read {tmp_path / 'run'} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (141, "")
    assert done.stdout.startswith("---- update 1")
