"""What evaluations keep to be read: dialogues.jsonl, envs.py --read, and the page of --compare."""
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import envs
import evaluate
from support import compare, digests, evaluation, report, running, transcripts

HOSTILE = '</p><script>alert(1)</script>\x1b]0;owned\x07 "number": [<b>9</b>, 2]'


def play(folder, step, replies, splits=("id", "rule_ood"), task="gp-l", model="", **env):
    """Evaluate a model that says these replies in turn; {} stands for the expert's. As evaluate.py
    does it for a run."""
    for split in splits:
        recorder = evaluation.Recorder(3)
        watched = [recorder.watch(envs.make_env(task, split, verify_iter=2, **env))
                   for _ in range(4)]

        def reply(turn, pending):
            texts = [replies[turn % len(replies)] for _ in pending]
            return [(watched[i].expert_reply() if text == {} else text, "stop")
                    for i, text in zip(pending, texts)]
        episodes = evaluate.play_episodes(reply, watched, 0)
        row = {"checkpoint": model or str(folder), "split": split, "seed": 0,
               **evaluate.summarise(episodes, 2, watched[0].kinds),
               "settings": {"task": task, "env": dict(watched[0].settings)}}
        evaluation.log_evaluation(folder, row, recorder.rows(), step=step, gflops=10.0 * step,
                                  gflops_paper=10.0 * step)


def run_of(folder, steps, replies, begins="no", model="start", **options):
    """A run whose start says `begins`, and whose checkpoints say these replies."""
    folder.mkdir()
    length = {"steps": 2} if "sft" in folder.name else {"updates": 2}
    config = {"task": options.get("task", "gp-l"), "model": model, "dtype": "float32", **length}
    (folder / "config.json").write_text(json.dumps(config))
    running.log_jsonl(folder / "metrics.jsonl", step=2, seconds=90.0)
    play(folder, 0, [begins], model=model, **options)
    for step in steps:
        play(folder, step, replies, **options)
    return str(folder)


@pytest.fixture
def study(tmp_path):
    """(runs, the Study of an SFT run that says something hostile and an RL run that is right)."""
    runs = [run_of(tmp_path / "sft", [1, 2], [HOSTILE, {}]), run_of(tmp_path / "rl", [1, 2], [{}])]
    metrics = {name: task.metrics for name, task in envs.TASKS.items()}
    paper = compare.Reference(evaluate.PAPER, evaluate.SIGNS, metrics)
    return runs, compare.study_runs(runs, paper), paper


def test_the_dialogues_of_the_first_episodes_are_kept_the_same_hands_for_all(tmp_path):
    run_of(tmp_path / "rl", [1], ["no", {}])
    rows = transcripts.read_dialogues(tmp_path / "rl" / "dialogues.jsonl")
    assert len(rows) == 2 * 2 * 3                       # steps, splits, episodes
    prompts = {}
    for row in rows:
        prompt = row["messages"][0]["content"]
        assert prompts.setdefault((row["split"], row["episode"]), prompt) == prompt
        env = envs.make_env("gp-l", row["split"], verify_iter=2)
        messages, _ = env.reset(f"0/evaluate/{row['episode']}", row["episode"])
        assert messages[0] == row["messages"][0] and row["expert"] == env.expert_reply()
        verdicts = [status for status, _ in row["verdicts"]]
        assert verdicts == ["illegal_formula", "correct" if row["step"] else "illegal_formula"]
        assert row["success"] == bool(row["step"]) and len(row["messages"]) == 5
    # An evaluation that is made again takes the place of the first.
    play(tmp_path / "rl", 1, ["no"])
    rows = transcripts.read_dialogues(tmp_path / "rl" / "dialogues.jsonl")
    assert len(rows) == 12 and not any(row["success"] for row in rows)


def test_what_is_kept_changes_no_number(tmp_path, city):
    """On routes a dialogue is a position, with the action that is right there."""
    for folder, num in ("kept", 2), ("not", 0):
        recorder = evaluation.Recorder(num)
        watched = [recorder.watch(envs.make_env("virl-l", "id", root=city)) for _ in range(2)]

        def reply(turn, pending):
            return [(watched[i].expert_reply(), "stop") for i in pending]
        found = evaluate.play_episodes(reply, watched, 0)
        if num:
            kept, rows = found, recorder.rows()
    assert kept == found and recorder.rows() == []
    assert [row["position"] for row in rows if row["episode"] == 0] == list(range(len(kept[0])))
    assert all(row["success"] and row["messages"][-1]["role"] == "assistant" or row["done"]
               for row in rows)
    assert [row["done"] for row in rows].count(True) == 2


@pytest.mark.parametrize("words, num", [
    ([], 12), (["failed"], 6), (["solved", "split=rule_ood"], 3), (["step=0", "episode=2"], 2),
    (["face_card", "split=rule_ood"], 6), (["seed=7"], None), (["step"], None)])
def test_dialogues_are_read_and_chosen_in_the_terminal(tmp_path, capsys, words, num):
    run_of(tmp_path / "rl", [1], [{}])
    message = "holds no such dialogue" if words == ["seed=7"] else "--only step: allowed are failed"
    if num is None:
        with pytest.raises(ValueError, match=message):
            transcripts.read_run(tmp_path / "rl", "", envs.make_env, words)
        return
    transcripts.read_run(tmp_path / "rl", "", envs.make_env, words)
    assert capsys.readouterr().out.count("---- ") == 2 * num / 2
    transcripts.read_run(tmp_path / "rl", str(tmp_path / "a.html"), envs.make_env, words)
    assert (tmp_path / "a.html").read_text().count("<article>") == num


def test_the_page_has_what_each_arm_says_and_nothing_that_runs_or_loads(study):
    _, found, paper = study
    page = report.page(found, paper, envs.make_env)
    assert page.count('<section class="hand"') == 2 * 3
    # Each arm stands at each hand, and once where it was made.
    for arm in ("start", "SFT", "RL"):
        assert page.count(f"<h3>{arm}<") == 7
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert not re.search(r"(src|href)=\"?(?!data:)|url\(|@import|https?://", page)
    assert 'data-differ="yes"' in page and "correct, +5" in page and "1.5 minutes" in page
    assert "On the other rule, in % of hands solved within 2 tries: SFT from 0.0 to 100.0" in page


@pytest.mark.parametrize("reply, expert, shown", [
    ('{"number": [10, 2], "formula": "10-2"}', '{"number": [11, 2], "formula": "11+2"}',
     '{&quot;number&quot;: [<mark>10</mark>, 2], '
     '&quot;formula&quot;: &quot;<mark>10</mark>-2&quot;}'),
    ('"cards": ["K", 3], x', '{"cards": ["K", "4"]}',
     '&quot;cards&quot;: [&quot;K&quot;, <mark>3</mark>], x'),
    ('"cards": ["4", "K"]', '{"cards": ["K", "4"]}',
     '&quot;cards&quot;: [&quot;4&quot;, &quot;K&quot;]'),
    ('"formula": "13*2+9-2=24"', '{"number": [13, 9, 2, 12], "formula": "(13-9)*12/2=24"}',
     '&quot;formula&quot;: &quot;13*2+9-<mark>2</mark>=24&quot;'),
    ('"number": [1, 2, 3]', '{"number": [1, 2]}', '&quot;number&quot;: [1, 2, <mark>3</mark>]'),
    ('"action": "forward()"', '{"action": "stop()"}',
     '&quot;action&quot;: <mark>&quot;forward()&quot;</mark>'),
    ('"action": "stop()', '{"action": "stop()"}', '&quot;action&quot;: &quot;stop()'),
    ('"action": "Turn_direction( North ) ."', '{"action": "turn_direction(north)"}',
     '&quot;action&quot;: &quot;Turn_direction( North ) .&quot;'),
    ('"number": [<b>]', '{"number": [1]}', '&quot;number&quot;: [<mark>&lt;b&gt;</mark>]'),
    ("<b>", "no JSON", "&lt;b&gt;"),
])
def test_a_number_a_card_and_an_action_that_are_not_right_are_marked(reply, expert, shown):
    assert report.marked(reply, expert) == shown


def test_a_page_of_pictures_shows_them(tmp_path):
    run_of(tmp_path / "sft", [2], ["no"], task="gp-vl", resolution=48, splits=("id",))
    run_of(tmp_path / "rl", [2], [{}], task="gp-vl", resolution=48, splits=("id",))
    evaluate.compare_runs(evaluate.Config(compare=(f"{tmp_path}/sft,{tmp_path}/rl",),
                                          html=str(tmp_path / "page.html")))
    assert (tmp_path / "page.html").read_text().count("<img alt=") == 3


def first_replies(page):
    """{arm: its first reply at the first hand}."""
    hand = page.split('<section class="hand"')[1]
    said = r'<h3>([^<]+)</h3>\n<div class="said">.*?<p class="reply">(.*?)</p>'
    return dict(re.findall(said, hand, re.S))


def test_each_hand_shows_what_its_own_start_said_under_the_settings_of_the_table(tmp_path):
    """Two starts that were tested on the same seed, and runs that were tested twice."""
    metrics = {name: task.metrics for name, task in envs.TASKS.items()}
    paper = compare.Reference(evaluate.PAPER, evaluate.SIGNS, metrics)
    runs = []
    for start in "mn":
        for arm in ("sft", "rl"):
            (tmp_path / start).mkdir(exist_ok=True)
            folder = tmp_path / start / arm
            runs.append(run_of(folder, [2], [f"{arm} from {start}"], begins=f"start {start}",
                               model=start))
    page = report.page(compare.study_runs(runs, paper), paper, envs.make_env)
    assert first_replies(page) == {"start": "start m", "SFT": "sft from m", "RL": "rl from m"}
    for folder in runs[:2]:
        play(Path(folder), 0, ["again"], model="m", feedback="plain")
        play(Path(folder), 2, ["again"], feedback="plain")
    page = report.page(compare.study_runs(runs[:2], paper), paper, envs.make_env)
    assert first_replies(page) == {"start": "again", "SFT": "again", "RL": "again"}
    assert len(transcripts.read_dialogues(Path(runs[0]) / "dialogues.jsonl")) == 2 * 2 * 2 * 3


@pytest.mark.parametrize("change, told", [
    ({"verdicts": None}, "key 'verdicts' is 'None', must be a list"),
    ({"messages": 5}, "key 'messages' is '5', must be a list"),
    ({"expert": None}, "key 'expert' is 'None', must be a text"),
    ({"position": "1"}, "key 'position' is '1', must be a whole number"),
    ({"verdicts": [["correct"]]}, "a verdict must be"), ("none", "a dialogue must be an object")])
def test_a_damaged_file_of_dialogues_is_named_before_anything_is_played(tmp_path, change, told):
    run_of(tmp_path / "rl", [1], [{}])
    path = tmp_path / "rl" / "dialogues.jsonl"
    rows = running.read_jsonl(path)
    rows[0]["dialogues"][0] = change if change == "none" else rows[0]["dialogues"][0] | change
    running.write_jsonl(path, rows)
    with pytest.raises(ValueError, match=f"dialogues.jsonl, line 1.*{told}"):
        transcripts.read_run(path, "", envs.make_env)
    with pytest.raises(ValueError, match=told):
        evaluation.open_logs(tmp_path / "rl")
    (tmp_path / "rl" / "config.json").unlink()
    with pytest.raises(ValueError, match=told):
        evaluation.open_out(str(tmp_path / "rl"), "x")


def test_a_checkpoint_is_the_same_with_a_slash_behind_it(tmp_path):
    (tmp_path / "out").mkdir()
    play(tmp_path / "out", 0, ["no"])
    for name in (f"{tmp_path}/out", f"{tmp_path}/out/", f"{tmp_path}/./out"):
        known, _ = evaluation.open_out(str(tmp_path / "out"), name)
        assert len(known) == 2


def test_other_weights_under_the_same_path_are_another_checkpoint(tmp_path):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(b"0" * 100_000)
    known, write = evaluation.open_out(str(tmp_path / "out"), tmp_path / "model")
    row = {"checkpoint": str(tmp_path / "model"), "split": "id", "seed": 0, "settings": {}}
    write(row, [])
    known, _ = evaluation.open_out(str(tmp_path / "out"), tmp_path / "model")
    assert [each["split"] for each in known] == ["id"]
    for changed in (b"0" * 99_999 + b"1", b"0" * 9_999 + b"1" + b"0" * 90_000):
        weights.write_bytes(changed)
        assert evaluation.open_out(str(tmp_path / "out"), tmp_path / "model")[0] == []


def test_a_tower_that_was_not_trained_does_not_hide_what_was(tmp_path):
    """It stands at the end of a file. The file is too large to be read whole."""
    path, found = tmp_path / "model.safetensors", set()
    for trained in (b"1", b"2"):
        path.write_bytes(trained * 1_000_000 + b"0" * 9_000_000)
        found.add(digests.weights_of(tmp_path))
    assert len(found) == 2


def study_of(*runs):
    metrics = {name: task.metrics for name, task in envs.TASKS.items()}
    paper = compare.Reference(evaluate.PAPER, evaluate.SIGNS, metrics)
    return compare.study_runs([str(run) for run in runs], paper), paper


def page_of(*runs):
    return report.page(*study_of(*runs), envs.make_env)


def test_a_run_that_was_moved_keeps_its_own_dialogues(tmp_path):
    """Another run has its name now, so both have checkpoints of one path."""
    run_of(tmp_path / "sft", [2], ["first"])
    (tmp_path / "sft").rename(tmp_path / "sft_moved")
    config = json.loads((tmp_path / "sft_moved/config.json").read_text())
    (tmp_path / "sft_moved/config.json").write_text(json.dumps({**config, "lr": 0.1}))
    run_of(tmp_path / "sft", [2], ["second", {}])
    run_of(tmp_path / "rl", [2], [{}])
    for order in (("sft", "sft_moved"), ("sft_moved", "sft")):
        said = first_replies(page_of(tmp_path / "rl", *[tmp_path / name for name in order]))
        assert (said["SFT lr 1e-06"], said["SFT lr 0.1"]) == ("second", "first")


def test_a_hand_that_was_not_kept_is_no_hand_that_was_not_reached(tmp_path):
    run_of(tmp_path / "sft", [2], ["no"])
    run_of(tmp_path / "rl", [2], ["no"])
    path = tmp_path / "sft/dialogues.jsonl"
    rows = running.read_jsonl(path)
    for row in rows:
        row["dialogues"] = row["dialogues"][:1]
    running.write_jsonl(path, rows)
    page = page_of(tmp_path / "sft", tmp_path / "rl")
    assert page.count("was not kept") == 2 * 2 and "did not get here" not in page
    assert 'data-differ="yes"' not in page


def test_the_command_of_a_run_has_its_zeros_and_its_quotes():
    config = {"out": "runs/a b", "updates": 2, "gamma": 0, "warmup_ratio": 0.0, "freeze": "",
              "gradient_checkpointing": False, "balance": True, "env": [],
              "split": ["id", "rule=1,2,3"], "num": 1}
    assert report.command_of(config) == (
        "python rl.py --out 'runs/a b' --updates 2 --gamma 0 --warmup-ratio 0.0 --balance "
        "--split id rule=1,2,3 --num 1")
    assert report.command_of({"rounds": 8}) == "python recipes/rft.py --rounds 8"


def test_the_page_names_the_command_that_made_the_start_and_whose_replies_were_cut(tmp_path):
    run_of(tmp_path / "sft_of_start", [], [])
    start = tmp_path / "sft_of_start" / "step_000002"
    run_of(tmp_path / "sft", [1], ["no"], model=str(start))
    run_of(tmp_path / "rl", [1], [{}], model=str(start))
    rows = running.read_jsonl(tmp_path / "sft" / "eval.jsonl")
    for row in rows:
        row["endings"] = {"stop": row["replies"] - 2, "length": 2 if row["step"] else 0}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "sft" / "eval.jsonl").write_text(text)
    metrics = {name: task.metrics for name, task in envs.TASKS.items()}
    paper = compare.Reference(evaluate.PAPER, evaluate.SIGNS, metrics)
    found = compare.study_runs([str(tmp_path / "sft"), str(tmp_path / "rl")], paper)
    assert rows[-1]["replies"] == 8
    assert compare.cut_replies(found) == "Replies cut at --max-new-tokens: SFT 25 %."
    page = report.page(found, paper, envs.make_env)
    assert "Replies cut at --max-new-tokens: SFT 25 %." in page
    assert "python sft.py --task gp-l --model start --dtype float32 --steps 2</pre>" in page


def test_a_page_can_be_made_of_rows_without_errors_and_says_what_arms_were_trained_on(tmp_path):
    for name in ("sft", "rl"):
        run_of(tmp_path / name, [2], ["no" if name == "sft" else {}])
        path = tmp_path / name / "eval.jsonl"
        rows = [{key: value for key, value in row.items()
                 if not key.endswith("_stderr") and key != "solved"}
                for row in running.read_jsonl(path)]
        running.write_jsonl(path, rows)
    page = page_of(tmp_path / "sft", tmp_path / "rl")
    assert "No arm is trained on the other rule." in page
    assert "0 go as in the paper, 0 go the other way, 4 are undecided" in page
    config = json.loads((tmp_path / "sft/config.json").read_text())
    (tmp_path / "sft/config.json").write_text(json.dumps({**config, "mix": ["id", "rule_ood"]}))
    assert "SFT was trained on id rule_ood." in page_of(tmp_path / "sft", tmp_path / "rl")


def test_dialogues_of_an_evaluation_that_was_not_finished_are_dropped(tmp_path):
    run_of(tmp_path / "rl", [1], [{}])
    log = tmp_path / "rl" / "eval.jsonl"
    rows = running.read_jsonl(log)
    running.write_jsonl(log, rows[:-1])
    before = (tmp_path / "rl" / "dialogues.jsonl").read_text().splitlines()
    evaluation.open_logs(tmp_path / "rl")
    assert (tmp_path / "rl" / "dialogues.jsonl").read_text().splitlines() == before[:-1]


PRESS = """<script>
const shown = () => hands.map(hand => hand.hidden ? '-' : 'x').join('');
const seen = [shown()];
split.value = ''; only.checked = false; choose(); seen.push(shown());
const press = key => document.body.dispatchEvent(
    new KeyboardEvent('keydown', {key, bubbles: true}));
press('ArrowRight'); seen.push(shown());
document.getElementById('next').click(); seen.push(shown());
press('ArrowLeft'); press('ArrowLeft'); press('ArrowLeft'); seen.push(shown());
split.value = 'rule_ood'; split.onchange(); seen.push(shown());
only.checked = true; only.onchange(); seen.push(where.textContent);
document.title = seen.join(' ');
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
def test_a_browser_goes_through_the_hands(study, tmp_path):
    _, found, paper = study
    page = report.page(found, paper, envs.make_env).replace("</html>", PRESS + "</html>")
    (tmp_path / "page.html").write_text(page)
    done = subprocess.run(["chromium", "--headless=new", "--no-sandbox", "--disable-gpu",
                           "--dump-dom", f"file://{tmp_path}/page.html"],
                          capture_output=True, text=True, timeout=60)
    title = re.search("<title>(.*?)</title>", done.stdout)[1]
    # It opens on the other rule where arms differ, then shows all.
    assert title == "---x-- x----- -x---- --x--- -----x ---x-- 1 of 3"
