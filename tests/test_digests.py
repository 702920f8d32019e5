"""Files that changed under the same name: what was made with the old ones is not taken for new."""
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import envs
import evaluate
import sft
from conftest import tiny_folder
from support import (api, conversations, digests, evaluation, run_folder, running,
                     transcripts)

TINY = tiny_folder()


def say(path, text):
    path.write_text(json.dumps({"gp_output": text}))


def test_weights_in_a_pickle_of_torch_are_told_apart_too(tmp_path):
    found = set()
    for weights in b"1", b"2":
        (tmp_path / "pytorch_model.bin").write_bytes(weights)
        found.add(digests.weights_of(tmp_path))
    assert len(found) == 2


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "config.json"])
def test_a_folder_with_another_template_or_tokenizer_is_another_model(tmp_path, name):
    (tmp_path / name).write_text("1")
    content = evaluation.content_of(tmp_path)
    assert transcripts.is_of({**content, "step": 1}, content) and transcripts.is_of({}, content)
    (tmp_path / "README.md").write_text("notes")
    assert evaluation.content_of(tmp_path) == content
    (tmp_path / name).write_text("2")
    assert not transcripts.is_of(content, evaluation.content_of(tmp_path))


def test_the_files_behind_settings_are_told_apart(tmp_path, city):
    assert digests.files_of([envs.make_env("gp-l")]) == "" == digests.files_of([])
    found = []
    for text in "one", "two", "one":
        say(tmp_path / "p.json", text)
        found.append(digests.files_of([envs.make_env("gp-l", prompt_file=f"{tmp_path}/p.json")]))
    assert found[0] == found[2] != found[1]

    shutil.copytree(city, tmp_path / "city")
    env = envs.make_env("virl-l", root=str(tmp_path / "city"), guided="true")
    before = digests.files_of([env])
    assert before == digests.files_of([envs.make_env("virl-l", root=str(city))])
    path = tmp_path / "city/train/route_infos.json"
    path.write_text(path.read_text() + " ")
    assert digests.files_of([env]) != before
    (tmp_path / "city/train/street_views").mkdir()
    env.vision, before = True, digests.files_of([env])
    (tmp_path / "city/train/street_views/1.jpg").touch()
    assert env.env.vision and digests.files_of([env]) != before
    # What a file browser leaves there is no picture, nor is a link to nowhere.
    before = digests.files_of([env])
    for name in ".DS_Store", "Thumbs.db", "._1.jpg":
        (tmp_path / "city/train/street_views" / name).touch()
    (tmp_path / "city/train/street_views/2.jpg").symlink_to("nowhere")
    (tmp_path / "city/train/street_views/3.jpg").mkdir()
    assert digests.files_of([env]) == before


def test_an_evaluation_with_another_prompt_file_is_another_one(monkeypatch, tmp_path):
    """Its rows would be those of prompts that no file holds any more."""
    played = []
    monkeypatch.setattr(evaluate, "LocalModel", lambda *_: SimpleNamespace(
        reply=lambda of, split, seed, turn, pending: [("", "length") for _ in pending],
        forget=played.append))
    config = evaluate.Config(model=TINY, out=str(tmp_path / "out"), splits=("id",), episodes=2,
                             dtype="float32", device="cpu", env=(f"prompt_file={tmp_path}/p.json",))
    for text, times in ("one", 1), ("one", 1), ("two", 2):
        say(tmp_path / "p.json", text)
        evaluate.evaluate_checkpoint(config)
        assert len(played) == times
    # A row of an earlier version does not tell, and is taken.
    rows = running.read_jsonl(tmp_path / "out/eval.jsonl")
    assert rows[0]["settings"].pop("files") != rows[1]["settings"].pop("files")
    running.write_jsonl(tmp_path / "out/eval.jsonl", rows[1:])
    evaluate.evaluate_checkpoint(config)
    assert len(played) == 2


def test_weights_that_come_back_are_those_that_tables_show(monkeypatch, tmp_path):
    """A checkpoint is trained anew, tested, and then put back from a copy."""
    played = []
    monkeypatch.setattr(evaluate, "LocalModel", lambda *_: SimpleNamespace(
        reply=lambda of, split, seed, turn, pending: [("", "length") for _ in pending],
        forget=played.append))
    step = tmp_path / "run/step_000001"
    step.mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(json.dumps({"task": "gp-l", "model": "m"}))
    running.log_jsonl(tmp_path / "run/metrics.jsonl", step=1, gflops=1.0, gflops_paper=1.0)
    config = evaluate.Config(run_folder=str(tmp_path / "run"), start=False, splits=("id",),
                             episodes=2, dtype="float32", device="cpu")
    for weights, times in ((b"1", 1), (b"2", 2), (b"1", 2), (b"1", 2)):
        (step / "model.safetensors").write_bytes(weights)
        evaluate.evaluate_run(config)
        assert len(played) == times
        *_, last = running.read_jsonl(tmp_path / "run/eval.jsonl")
        assert last["weights"] == digests.weights_of(step)
    assert len(running.read_jsonl(tmp_path / "run/eval.jsonl")) == 3


def test_a_run_goes_on_with_the_files_and_is_tested_with_the_start_that_it_began_with(tmp_path,
                                                                                     capsys):
    start, prompts = tmp_path / "start", tmp_path / "p.json"
    shutil.copytree(TINY, start)
    say(prompts, "one")
    config = sft.Config(model=str(start), out=str(tmp_path / "run"), steps=2, save_every=1,
                        batch_size=2, dtype="float32", env=(f"prompt_file={prompts}",))
    sft.main(config)
    run_folder.check_start(tmp_path / "run", start)
    shutil.rmtree(tmp_path / "run/step_000002")
    say(prompts, "two")
    with pytest.raises(SystemExit):
        sft.main(config)
    assert "a prompt file, city or card_dir of its settings is not what" in capsys.readouterr().err
    # Nor is it tested with other texts, unless they are named.
    trained = running.read_run_config(tmp_path / "run")
    check = partial(evaluation.check_files, tmp_path / "run", trained, envs.make_env)
    with pytest.raises(ValueError, match="is not what it was in training: put it back, or name"):
        check()
    check(named=("id", f"prompt_file={prompts}"))
    check(task="gp-vl")
    say(prompts, "one")
    check()

    # Its checkpoint has the weights, so it goes on without the start.
    weights = load_file(start / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, start / "model.safetensors",
              metadata={"format": "pt"})
    sft.main(config)
    with pytest.raises(ValueError, match="start .* has other weights than those that .* began"):
        evaluation.list_checkpoints(tmp_path / "run", trained, with_start=True)
    assert len(evaluation.list_checkpoints(tmp_path / "run", trained, with_start=False)) == 2
    # A run that has no checkpoint yet begins anew, with what is there then.
    shutil.rmtree(tmp_path / "run/step_000001")
    shutil.rmtree(tmp_path / "run/step_000002")
    sft.main(config)
    run_folder.check_start(tmp_path / "run", start)


def test_dialogues_of_other_weights_do_not_stand_beside_a_row(tmp_path):
    """The later evaluation kept none, or the earlier weights have come back."""
    row = {"checkpoint": "m", "split": "id", "seed": 0, "settings": {}}
    dialogue = {"episode": 0, "position": 0, "expert": "", "done": True, "success": False,
                "verdicts": [], "messages": []}
    evaluation.log_evaluation(tmp_path, row, [dialogue], step=1, weights="a", texts="t")
    evaluation.log_evaluation(tmp_path, row, [], step=1, weights="b", texts="t")
    kept, = transcripts.read_dialogues(tmp_path / "dialogues.jsonl")
    rows = running.read_jsonl(tmp_path / "eval.jsonl")
    assert [transcripts.is_of(kept, row) for row in rows] == [True, False]
    assert transcripts.is_of(dialogue, rows[1])       # of an earlier version


def test_replies_kept_by_a_killed_process_of_the_same_number_stay_readable(tmp_path,
                                                                                  capsys):
    """In a container a process often has the number that it had before."""
    path = tmp_path / f"kept_{os.getpid()}.jsonl"
    path.write_text('{"of": "a", "turn": 0, "replies": {"0": [1]}}\n{"of": "a", "tu')
    evaluation.KeptReplies(tmp_path / "kept").add("a", 1, {0: [2]})
    kept = evaluation.KeptReplies(tmp_path / "kept")
    # Only an evaluation that is the same goes on with them.
    assert kept.find("b", 1, 0) is None and capsys.readouterr().out == ""
    assert (kept.find("a", 0, 0), kept.find("a", 1, 0)) == ([1], [2])
    assert capsys.readouterr().out == "goes on with 2 replies of an earlier evaluation\n"


def test_a_row_that_lost_its_line_break_counts_and_a_torn_one_does_not(tmp_path):
    path = tmp_path / "log.jsonl"
    for text, steps in ('{"step": 1}\n{"step": 2}', [1, 2]), ('{"step": 1}\n{"step": 2', [1]):
        path.write_text(text)
        assert [row["step"] for row in running.read_jsonl(path)] == steps
        running.write_whole_lines(path)
        running.log_jsonl(path, step=3)
        assert [row["step"] for row in running.read_jsonl(path)] == [*steps, 3]


def test_a_temperature_that_no_logit_stands_is_refused():
    config = evaluate.Config(model="m", temperature=1e-40)
    with pytest.raises(ValueError, match="--temperature 1e-40: must be 0"):
        evaluation.check_options(config)
    evaluation.check_options(replace(config, temperature=0.0))
    evaluation.check_options(replace(config, temperature=0.001))


def test_the_names_of_texts_are_those_that_a_folder_of_ours_has():
    own = {path.name for path in Path(TINY).iterdir() if path.suffix != ".safetensors"}
    assert own - {"generation_config.json"} <= set(digests.TEXTS)


@pytest.mark.parametrize("text, read", [
    ('{"gp_output": "A", "gp_output": "B"}',
     lambda path: envs.make_env("gp-l", prompt_file=str(path))),
    ('[{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", '
     '"value": "b"}]}]', lambda path: conversations.read_conversations(path, False, "<|image|>")),
    ('{"seed": 1, "seed": 2}', lambda path: api.read_extra(path.read_text()))])
def test_a_key_that_stands_twice_is_named(tmp_path, text, read):
    """Else the last value would count, without a word."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="key '(gp_output|value|seed)' stands twice in one object"):
        read(tmp_path / "x.json")
