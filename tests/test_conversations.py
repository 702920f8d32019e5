"""Conversations in files: the released shape, what is close to it, what is refused and written."""
import errno
import json
import os
import time
from functools import partial

import pytest
from PIL import Image

import model
import sft
import verify
from conftest import tiny_folder
from model import IMAGE_TOKEN
from support import conversations, running
from support.chat import read_text
from support.conversations import read_conversations


def texts(pairs):
    """Pairs without the place that they come from."""
    return [(pair.messages, pair.reply) for pair in pairs]


def record(*turns):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text}
                              for i, text in enumerate(turns)]}


def test_records_of_the_released_text_sets_are_read_as_they_are_and_their_replies_judged_correct(
        tmp_path):
    """Their replies are not JSON: card lists in single quotes, a comma before the last brace, a
    line break around them."""
    cards = record("\n[Task]\nMake 24. {\n  \"cards\": [x, y, z, w],\n}\n\n",
                   "\n{\n  \"cards\": ['A', 'K', '2', '7'],\n  \"number\": [1, 10, 2, 7],\n"
                   "  \"formula\": \"(1*2)*7+10=24\",\n}")
    walk = record("\n[Task]\nGo on.\n\nO_1: No landmark; \nA_1: \n\n{\n  \"action\": x,\n}\n",
                  "\n{\n  \"current observation\": \"No landmark; \",\n"
                  "  \"current instruction\": \"Go to Café \u00d8.\",\n"
                  "  \"action\": \"forward()\",\n}\n")
    for name, records in (("gp-l", [cards, cards | {"image": None}]),
                          ("virl-l", [walk, walk | {"image": [], "id": 7}])):
        folder = tmp_path / "SFT_Data" / name
        folder.mkdir(parents=True)
        (folder / "data.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        pairs = read_conversations(folder / "data.json", False, IMAGE_TOKEN)
        assert [(messages[0]["content"], reply) for messages, reply in texts(pairs)] == [
            tuple(turn["value"] for turn in record["conversations"]) for record in records]
        # without routes
        samples = sft.Samples(sft.Config(task=name, data=str(folder / "data.json")))
        assert samples[0] in texts(pairs)
    reply = cards["conversations"][1]["value"]
    verdict = verify.judge_general_points(reply, ["A", "K", "2", "7"], [1, 10, 2, 7])
    assert verdict.status == "correct" and verdict.cards_read and verdict.numbers_right
    verdict = verify.judge_navigation(walk["conversations"][1]["value"], "forward()", "", False)
    assert verdict.status == "correct"


def test_the_released_data_shape_is_read_one_sample_a_reply_in_seeded_order(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record("q1", "a1"), record("q2", "a2", "again", "a3")]))
    pairs = read_conversations(path, False, IMAGE_TOKEN)
    lengths = [(len(messages), reply) for messages, reply in texts(pairs)]
    assert lengths == [(1, "a1"), (1, "a2"), (3, "a3")]
    samples = sft.Samples(sft.Config(data=str(path), seed=1))
    replies = [samples[i][1] for i in range(300)]
    assert all(sorted(replies[i:i + 3]) == ["a1", "a2", "a3"] for i in range(0, 300, 3))
    assert len({tuple(replies[i:i + 3]) for i in range(0, 300, 3)}) == 6


@pytest.mark.parametrize("content, told", [
    ("{", "data.json"), ("{}", "record 0: key 'conversations'"),
    ("[]", "expected a non-empty list"),
    (json.dumps([record("q", "a"), {"conversation": []}]), "record 1: key 'conversations'"),
    (json.dumps([record("q")]), "record 0: key 'conversations'"),
    (json.dumps([{"conversations": [{"from": "gpt", "value": "a"},
                                    {"from": "human", "value": "q"}]}]), "key 'from' of turn 0"),
    (json.dumps([{"conversations": [{"from": "human", "value": "a"},
                                    {"from": "gpt", "value": 3}]}]), "key 'value' of turn 1"),
    (json.dumps([record("q", "a") | {"image": "x.png"}]),
     "record 0: key 'image': a task with pictures needs one"),
    (json.dumps([record("<image>\nq", "a")]), "turn 0 must hold <image> 0 times"),
])
def test_a_broken_data_file_is_refused_by_file_record_and_key(tmp_path, content, told):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="data.json") as error:
        read_conversations(path, False, IMAGE_TOKEN)
    assert told in str(error.value)


def test_a_dump_is_read_back_as_the_same_samples(tmp_path, city):
    for knobs in (dict(), dict(env=("solution=random",)),
                  dict(task="virl-l", env=(f"root={city}",), balance=True)):
        config = sft.Config(dump=str(tmp_path / f"{len(knobs)}.json"), num=20, **knobs)
        sft.main(config)
        samples, pairs = sft.Samples(config), read_conversations(config.dump, False, IMAGE_TOKEN)
        assert texts(pairs) == [samples[i] for i in range(20)]


def test_a_dump_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "data.json").write_text("mine")
    with pytest.raises(SystemExit):
        sft.main(sft.Config(dump=str(tmp_path / "data.json")))
    assert "must be a new file" in capsys.readouterr().err
    assert (tmp_path / "data.json").read_text() == "mine"
    with pytest.raises(SystemExit):
        sft.main(sft.Config(dump=str(tmp_path / "nowhere" / "data.json")))
    assert "there is no folder" in capsys.readouterr().err


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pairs_of(tmp_path, *records, name="data.json", vision=False):
    (tmp_path / name).write_text(json.dumps(records))
    return texts(read_conversations(tmp_path / name, vision, IMAGE_TOKEN))


PAIR = [([user("q")], "a")]


@pytest.mark.parametrize("changed", [
    {"messages": [user("q"), assistant("a")]},
    {"conversations": [user("q"), assistant("a")], "id": 7, "source": "x", "width": 3,
     "image": None, "tools": None, "images": []},
    {"messages": [{"from": "user", "value": "q", "weight": None},
                  {"from": "assistant", "value": "a", "loss": True}]},
    {"conversations": [{"role": "human", "content": "q"},
                       {"role": "model", "content": "a", "weight": 1, "tool_calls": []}]},
    {"messages": [user([{"type": "text", "text": "q"}]),
                  assistant([{"type": "text", "text": "a"}])], "conversations": None},
    {"messages": [user("q"), assistant("a")], "system": ""},
])
def test_other_spellings_of_a_record_mean_the_same(tmp_path, changed):
    assert pairs_of(tmp_path, changed) == PAIR


@pytest.mark.parametrize("changed", [
    {"system": "Be brief.", **record("q", "a", "r", "b")},
    {"conversations": [{"from": "system", "value": "Be brief."},
                       *record("q", "a", "r", "b")["conversations"]]},
    {"messages": [system("Be brief."), user("q"), assistant("a"), user("r"), assistant("b")]},
])
def test_a_system_text_is_context_of_every_reply(tiny, tmp_path, changed):
    first = [system("Be brief."), user("q")]
    pairs = pairs_of(tmp_path, changed)
    assert pairs == [(first, "a"), ([*first, assistant("a"), user("r")], "b")]
    prompt = tiny[1].decode(model.encode(tiny[1], pairs[1][0]))
    assert prompt.endswith(
        "<|system|>Be brief.<|end_of_turn|><|user|>q<|end_of_turn|><|assistant|>a<|end_of_turn|>"
                           "<|user|>r<|end_of_turn|><|assistant|>")


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"train": False},
                                  {"loss": False, "weight": 1}])
def test_a_reply_that_is_marked_is_context_and_no_target(tmp_path, mark):
    data = record("q", "failed", "again", "a")
    data["conversations"][1].update(mark)
    assert pairs_of(tmp_path, data) == [([user("q"), assistant("failed"), user("again")], "a")]
    data["conversations"][3].update(mark)
    with pytest.raises(ValueError, match="data.json: no reply in it is to be learnt"):
        pairs_of(tmp_path, data)


@pytest.mark.parametrize("name, text", [
    ("data.jsonl", "{0}\n\n{0}\n"), ("data.jsonl", "{0}"), ("data.json", "{0}\n{0}"),
    ("data.json", "[{0},\n{0}]"),
    ("data.json", "\ufeff[{0}]"), ("data.jsonl", "\ufeff{0}\r\n{0}\r\n"), ("data.json", "[{1}]")])
def test_a_file_is_a_list_or_one_record_a_line_with_or_without_a_byte_order_mark(
        tmp_path, name, text):
    one = json.dumps(record("q", "a\u2028"), ensure_ascii=False)
    path = tmp_path / name
    path.write_bytes(text.format(one, json.dumps(record("q", "a\u2028"), indent=1)).encode())
    pairs = read_conversations(path, False, IMAGE_TOKEN)
    assert texts(pairs) == [([user("q")], "a\u2028")] * (text.count("{0}") or 1)


@pytest.mark.parametrize("record_, told", [
    ({"messages": [user("q"), assistant("a")], **record("q", "a")},
     "key 'conversations' or 'messages', one of them"),
    (record("q", "a") | {"tools": [{"name": "f"}]}, "key 'tools' is not understood"),
    (record("q", "a") | {"rejected": "b"}, "key 'rejected' is not understood"),
    (record("q", "a") | {"weight": 0.5}, "key 'weight' belongs to a turn"),
    (record("q", "a") | {"system": 5}, "key 'system' must be text"),
    ({"messages": [user("q"), {"role": "tool", "content": "x"}]},
     "key 'role' of turn 1 must be 'gpt' or 'assistant' or 'model', got 'tool'"),
    ({"messages": [user("q"), assistant("a"), system("s")]},
     "key 'role' of turn 2 must be 'human' or 'user', got 'system'"),
    ({"system": "s", "messages": [system("t"), user("q"), assistant("a")]},
     "key 'role' of turn 0 must be 'human' or 'user', got 'system'"),
    ({"messages": [system("s")]}, "must be a list of human and gpt turns in pairs"),
    ({"messages": ["q", "a"]}, "turn 0 must be an object"),
    ({"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [1]}]},
     "key 'tool_calls' of turn 1 is not understood"),
    ({"messages": [user("q"), {**assistant("a"), "tool_calls": [1]}]},
     "key 'tool_calls' of turn 1 is not understood"),
    ({"messages": [user("q"), {**assistant("a"), "reasoning_content": "hm"}]},
     "key 'reasoning_content' of turn 1"),
    ({"messages": [{**user("q"), "images": ["x.png"]}, assistant("a")]},
     "key 'images' of turn 0 is not understood"),
    ({"messages": [user("q"), {**assistant("a"), "weight": 0.5}]},
     "key 'weight' of turn 1 must be false or true"),
    ({"messages": [user("q"), {**assistant("a"), "loss": "false"}]},
     "key 'loss' of turn 1 must be false or true"),
    ({"messages": [{**user("q"), "loss": True}, assistant("a")]},
     "key 'loss' of turn 0 must be false or true, and true of a reply only"),
    ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("a")]},
     "key 'content' of turn 0 must be text"),
    ({"messages": [user([]), assistant("a")]}, "key 'content' of turn 0 must be text"),
    (record("q", "half \ud83d"), "key 'value' of turn 1 holds half a character, '\\ud83d'"),
    (record("q", "a") | {"system": "\udc00"}, "key 'system' holds half a character"),
])
def test_what_would_change_the_meaning_of_a_record_is_refused_by_name(tmp_path, record_, told):
    with pytest.raises(ValueError, match="data.json, record 1: ") as error:
        pairs_of(tmp_path, record("q", "a"), record_)
    assert told in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(record("q", "a")) + '\n{"conversations": [')
    with pytest.raises(ValueError, match="data.jsonl: .*line 2 column"):
        read_conversations(tmp_path / "data.jsonl", False, IMAGE_TOKEN)


def test_one_picture_a_record_in_a_list_or_not_and_its_place_is_the_start(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a b.png")
    for key, value in (("image", "a b.png"), ("image", ["a b.png"]), ("images", ["a b.png"]),
                       ("images", "a b.png")):
        for text in ("<image>\nq", "<image>q", " \n<image>\nq"):
            changed = {key: value, "system": "s", **record(text, "a")}
            (messages, reply), = pairs_of(tmp_path, changed, vision=True)
            assert messages[1]["content"] == [{"type": "image", "image": tmp_path / "a b.png"},
                                              {"type": "text", "text": "q"}]
            opened = conversations.open_pictures(messages)
            assert opened[0] == system("s")
            assert model.picture_of(opened).getpixel((0, 0)) == (255, 0, 0) and reply == "a"
            assert model.picture_of(messages) == tmp_path / "a b.png"       # it is opened in a copy
    for more, told in (({"images": ["a b.png"] * 2},
                        "key 'images': a task with pictures needs one file"),
                       ({"image": "a b.png", "images": ["a b.png"]},
                        "key 'images': a task with pictures needs one"),
                       ({"image": {"bytes": "x"}}, "key 'image': a task with pictures needs one"),
                       ({"images": [5]}, "key 'images'")):
        with pytest.raises(ValueError, match=f"record 0: {told}"):
            pairs_of(tmp_path, {**more, **record("<image>\nq", "a")}, vision=True)
    for text in ("q\n<image>", "see <image> here"):
        with pytest.raises(ValueError, match="record 0: key 'value' of turn 0 must begin with "
                                             "<image>, as a picture stands before the text"):
            pairs_of(tmp_path, {"image": "a b.png", **record(text, "a")}, vision=True)


def test_a_system_text_before_a_picture_reaches_the_model(tiny_vl, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "system": "Be brief.",
                                                     **record("<image>\nq", "a")}]))
    messages, reply = sft.Samples(sft.Config(task="gp-vl", data=str(tmp_path / "data.json")))[0]
    ids = model.encode(tiny_vl[1], messages)
    assert "Be brief." in tiny_vl[1].tokenizer.decode(ids)
    assert ids.count(tiny_vl[1].image_token_id) == 1 and reply == "a"


@pytest.mark.parametrize("name", ["two words.json", "Übung.json", "two\nlines.json", "a.b.json"])
def test_a_dump_and_its_pictures_may_have_any_name(tmp_path, name):
    folder = tmp_path / f"in {name}"
    folder.mkdir()
    config = sft.Config(dump=str(folder / name), num=2, task="gp-vl", env=("resolution=60",))
    sft.main(config)
    pairs, samples = read_conversations(config.dump, True, IMAGE_TOKEN), sft.Samples(config)
    for i, (messages, reply) in enumerate(texts(pairs)):
        made, expected = samples[i]
        assert reply == expected and read_text(messages[0]) == read_text(made[0])
        picture = model.picture_of(conversations.open_pictures(messages))
        assert picture.tobytes() == model.picture_of(made).tobytes()
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([name, name.removesuffix(".json")])


@pytest.mark.parametrize("spoilt", ["save", "write_text", "mkdir"])
def test_a_dump_that_does_not_fit_on_the_disk_leaves_nothing_and_says_one_line(
        tmp_path, monkeypatch, capsys, spoilt):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Image.Image if spoilt == "save" else conversations.Path, spoilt, full)
    with pytest.raises(SystemExit) as stop:
        sft.main(sft.Config(dump=str(tmp_path / "data.json"), num=2, task="gp-vl",
                            env=("resolution=60",)))
    told = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and len(told) == 1
    assert "data.json: [Errno 28] No space left on device" in told[0]
    assert list(tmp_path.iterdir()) == []


def test_a_dump_of_a_data_file_is_refused(tmp_path, capsys):
    pairs_of(tmp_path, record("q", "a", "r", "b"))
    with pytest.raises(SystemExit):
        sft.main(sft.Config(data=str(tmp_path / "data.json"), dump=str(tmp_path / "again.json")))
    assert "--dump with --data" in capsys.readouterr().err
    assert not (tmp_path / "again.json").exists()


# ---- All records are looked at with the tokenizer, before the first step

LONG = record("q", "a " * 5000)


@pytest.mark.parametrize("bad, told", [
    (record("q", "a <|end_of_turn|>"), "holds <|end_of_turn|>, a control token of the model"),
    (record("q <|user|>", "a"), "holds <|user|>, a control token of the model"),
    (LONG | {"system": "s"}, "tokens does not fit the model's context of 4096"),
    (record("q", "a", "again", LONG["conversations"][1]["value"]), "does not fit the model's")])
def test_a_record_that_the_model_cannot_read_is_named_before_anything_is_written(
        tmp_path, capsys, device, bad, told):
    pairs_of(tmp_path, *[record(f"q{i}", "a", "r", "b") for i in range(30)], bad)
    with pytest.raises(SystemExit) as stop:
        sft.main(sft.Config(data=str(tmp_path / "data.json"), out=str(tmp_path / "run"),
                            model=tiny_folder(), device=device, batch_size=1, steps=2))
    err, = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and f"error: data file {tmp_path}/data.json, record 30: " in err
    assert told in err
    assert "checkpoint" not in err and "--max-new-tokens" not in err
    assert not (tmp_path / "run").exists()


def test_with_pictures_the_size_of_each_picture_counts(tmp_path, device):
    policy, processor = model.load_policy(tiny_folder(family="qwen3_vl"), device=device,
                                          vision=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    Image.new("RGB", (1024, 512)).save(tmp_path / "large.png")
    rows = [{"image": name, **record("<image>\nq", "a")} for name in ("small.png", "large.png")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    pairs = read_conversations(tmp_path / "data.json", True, IMAGE_TOKEN)
    lengths = []
    for pair in pairs:
        messages = conversations.open_pictures(pair.messages)
        lengths.append(policy.num_tokens(*sft.encode_pair(processor, messages, pair.reply),
                                         model.picture_of(messages)))
    assert lengths[1] > lengths[0]
    policy.context = lengths[1]
    check = partial(conversations.check_pairs, "data.json", pairs, policy, processor)
    check(sft.encode_pair)
    policy.context -= 1
    with pytest.raises(ValueError, match=f"data.json, record 1: a dialogue of {lengths[1]} "):
        check(sft.encode_pair)


def test_a_fault_in_the_first_step_speaks_of_no_checkpoint(tmp_path, device, capsys, monkeypatch):
    pairs_of(tmp_path, record("q", "a"))

    def refuse(*_):
        raise ValueError("too long")
    monkeypatch.setattr(model.Policy, "forward", refuse)
    config = sft.Config(data=str(tmp_path / "data.json"), out=str(tmp_path / "run"), save_every=1,
                        model=tiny_folder(), device=device, batch_size=1, steps=1)
    with pytest.raises(SystemExit):
        sft.main(config)
    assert "error: step 1, samples 0 to 0: too long\n" in capsys.readouterr().err
    monkeypatch.undo()
    sft.main(config)
    capsys.readouterr()
    with pytest.raises(SystemExit), running.one_line_errors("step 2", config.out):
        refuse()
    assert capsys.readouterr().err.endswith("step 2: too long; the last checkpoint is whole\n")


def test_a_picture_outside_of_the_folder_is_not_read_unless_pictures_names_its_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    path = tmp_path / "data" / "data.json"
    for name in ("../elsewhere/a.png", str(tmp_path / "elsewhere" / "a.png"), "link.png",
                 "x/../../elsewhere/a.png"):
        path.write_text(json.dumps([{"image": name, **record("<image>\nq", "a")}]))
        with pytest.raises(ValueError, match="data.json, record 0: key 'image': .* is not below "
                                             "the pictures' folder .*; --pictures names another"):
            read_conversations(path, True, IMAGE_TOKEN)
    for name in ("a.png", str(tmp_path / "elsewhere" / "a.png")):
        path.write_text(json.dumps([{"image": name, **record("<image>\nq", "a")}]))
        samples = sft.Samples(sft.Config(task="gp-vl", data=str(path),
                                         pictures=str(tmp_path / "elsewhere")))
        assert model.picture_of(samples[0][0]).getpixel((0, 0)) == (255, 0, 0)


def test_blanks_behind_a_picture_are_read_in_no_time(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    began = time.process_time()
    pairs = pairs_of(tmp_path, {"image": "a.png",
                                **record(" \n<image>\n" + " " * 300_000 + "q", "a")}, vision=True)
    assert pairs[0][0][0]["content"][1]["text"] == " " * 300_000 + "q"
    assert time.process_time() - began < 1


def test_a_run_does_not_go_on_with_a_file_that_has_changed(tmp_path, device, capsys):
    """Nor is it finished: what it was asked to learn, it has not seen."""
    pairs_of(tmp_path, record("q", "a"))
    config = sft.Config(data=str(tmp_path / "data.json"), out=str(tmp_path / "run"), save_every=1,
                        model=tiny_folder(), device=device, batch_size=1, steps=1)
    sft.main(config)
    before = (tmp_path / "data.json").read_text()
    pairs_of(tmp_path, record("q", "another"))
    with pytest.raises(SystemExit):
        sft.main(config)
    assert (f"--data {tmp_path}/data.json: is not what it was when {tmp_path}/run/step_000001 was "
            "saved") in capsys.readouterr().err
    (tmp_path / "data.json").write_text(before)
    sft.main(config)
    # A checkpoint of an earlier version does not tell.
    path = tmp_path / "run" / "step_000001" / "resume" / "state.json"
    state = json.loads(path.read_text())
    del state["data"]
    path.write_text(json.dumps(state))
    pairs_of(tmp_path, record("q", "another"))
    sft.main(config)
