"""support/vocabularies.py: a family of rules for V-IRL, of which the prompt defines the words."""
import hashlib
import json
import random
import re

import pytest

import evaluate
import sft
from conftest import tiny_folder
from envs import TASKS, make_env
from support import reading, running, tiny, vocabularies
from support.chat import read_text
from support.vocabularies import COMPASS, KINDS, RELATIVE
from test_virl import finish, paint, write_data
from verify import judge_navigation

MODEL = tiny_folder()
PAPERS_WORDS = {*COMPASS, *RELATIVE}
# What prompts, flawed and faulty replies of 20 seeds came to before there was a family of rules.
BEFORE = {"id": "c42791ab8ce25324", "rule_ood": "3b5051f2c62dd62a"}


def defined(prompt):
    """{word: meaning} as the prompt's list of actions defines them."""
    listed = re.search(r"\nActions: .* where x is one of (.*)\.\n", prompt)[1]
    return dict(item.split(" for ") for item in listed.split(", "))


def read_only(messages, env):
    """The reply of one who knows no vocabulary and reads what the prompt defines."""
    here = env.position
    if here.kind != "turn":
        return env.expert_reply()
    relative, compass = re.search(r"urn (.*) to face (.*)\.", here.sentence).groups()
    words = {meaning: word for word, meaning in defined(messages[0]["content"]).items()}
    return env.format_reply(f"turn_direction({words.get(compass) or words[relative]})")


# ---- The words -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_is_one_to_one_and_has_no_word_of_the_paper(kind):
    drawn, rng = set(), random.Random(0)
    for _ in range(200):
        vocabulary = vocabularies.draw((kind,), rng)
        assert tuple(vocabulary) in (COMPASS, RELATIVE)
        words = [reading.plain_action(word) for word in vocabulary.values()]
        assert len(set(words)) == len(vocabulary)
        assert not set(words) & set(map(reading.plain_action, PAPERS_WORDS))
        assert all(word == reading.plain(word) for word in vocabulary.values())
        assert set(vocabulary.values()) <= set(vocabularies.words_of((kind,)))
        drawn.add(tuple(vocabulary.values()))
    if KINDS[kind].dealt:
        assert len(drawn) > 150                  # of the 1,680 ways to deal the buttons, for one
    else:
        assert len(drawn) == 1
    assert re.search(rf"^    {kind} .*{'dealt anew' if KINDS[kind].dealt else ''}",
                     vocabularies.__doc__, re.M)


def test_a_family_draws_each_of_its_kinds_about_equally_often():
    rng = random.Random(0)
    for chosen, kinds in (("random", set(KINDS)), ("letters,clock", {"letters", "clock"})):
        names = vocabularies.read_kinds(chosen)
        assert set(names) == kinds
        counts = dict.fromkeys(kinds, 0)
        for _ in range(800):
            words = set(vocabularies.draw(names, rng).values())
            compass = len(words) == len(COMPASS)
            fitting = [name for name in kinds if words <= set(KINDS[name].words)
                       and (KINDS[name].meanings == COMPASS) == compass]
            assert len(fitting) == 1
            counts[fitting[0]] += 1
        assert min(counts.values()) > 0.6 * 800 / len(kinds)


@pytest.mark.parametrize("value", ["", "up", "letters,", "letters,letters", "letters,absolute",
                                   "Letters", "letters, clock", 3])
def test_a_kind_that_does_not_exist_is_named(city, value):
    told = "allowed are absolute, relative, random, or kinds.* letters, degrees, exits, invented"
    with pytest.raises(ValueError, match=f"action_space {value!r}: {told}") as error:
        make_env("virl-l", "rule_family", root=city, action_space=value)
    assert "\n" not in str(error.value)


# ---- The game ------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", BEFORE)
def test_the_papers_two_rules_are_told_and_drawn_as_before(tmp_path, split):
    env = make_env("virl-l", split, root=write_data(tmp_path / "data"),
                   faults="walk_past:0.3,other_word:0.3")
    told = []
    for seed in range(20):
        env.reset(seed=seed)
        while not env.done:
            told += [env.messages[0]["content"], env.flawed_reply(), env.demonstrate()]
            env.step(env.expert_reply())
    assert hashlib.sha256("\n".join(told).encode()).hexdigest()[:16] == BEFORE[split]


@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_and_one_who_only_reads_the_prompt_solve_every_route(city, kind):
    expert, reader = (make_env("virl-l", "rule_family", root=city, action_space=kind,
                               in_order=True) for _ in range(2))
    for episode in range(len(expert.routes)):
        expert.reset(seed=episode, episode=episode)
        num = len(expert.rail)
        rewards, info = finish(expert)
        assert rewards == [1.0] * num and info["success"]
        messages, _ = reader.reset(seed=episode, episode=episode)
        while not reader.done:
            here, reply = reader.position, read_only(messages, reader)
            verdict = judge_navigation(reply, here.action, here.landmark_name, here.intersection)
            assert verdict.status == "correct" and reply == reader.expert_reply()
            messages, *_ = reader.step(reply)


def test_a_seed_fixes_the_words_and_leaves_the_route_as_it_is_by_the_training_rule(city):
    env, plain = (make_env("virl-l", split, root=city) for split in ("rule_family", "id"))
    lists = []
    for seed in range(100):
        prompt = env.reset(seed=seed)[0][0]["content"]
        lists.append(tuple(defined(prompt).items()))
        route = [(here.kind, here.pano, here.heading, here.sentence) for here in env.rail]
        assert env.reset(seed=seed)[0][0]["content"] == prompt
        plain.reset(seed=seed)
        assert route == [(here.kind, here.pano, here.heading, here.sentence)
                         for here in plain.rail]
    assert len(set(lists)) > 35          # five of nine kinds are the same whenever they are drawn
    env.reset(seed=0)
    env.reset()                          # the next route has words of its own
    assert tuple(defined(env.messages[0]["content"]).items()) != lists[0]


def test_past_actions_stand_in_the_history_in_the_drawn_words(city):
    env = make_env("virl-l", "rule_family", root=city)
    for seed in range(50):
        words = defined(env.reset(seed=seed)[0][0]["content"])
        action = json.loads(env.expert_reply())["action"]
        messages, *_ = env.step(env.expert_reply())
        assert f"-> {action}\n" in messages[0]["content"].split("So far:")[1]
        assert action[15:-1] in words
        assert defined(messages[0]["content"]) == words


def test_a_reply_in_the_papers_words_is_wrong_and_is_told_so(city):
    env = make_env("virl-l", "rule_family", root=city)
    for seed in range(50):
        env.reset(seed=seed)
        relative, compass = re.search(r"urn (.*) to face (.*)\.", env.position.sentence).groups()
        for word in (compass, relative):
            messages, reward, *_, info = env.step(env.format_reply(f"turn_direction({word})"))
            assert info["status"] == "wrong_action" and reward < 0
            assert f"The action turn_direction({word}) is wrong here." in messages[-1]["content"]


def test_a_flawed_reply_is_a_wrong_action_in_the_drawn_words(city):
    env, seen = make_env("virl-l", "rule_family", root=city), set()
    for seed in range(200):
        words = defined(env.reset(seed=seed)[0][0]["content"])
        reply = env.flawed_reply()
        assert env.judge(reply).status != "correct"
        action = json.loads(reply)["action"]
        assert action in ("forward()", "stop()") or action[15:-1] in words
        seen.add(action[:4])
    assert seen == {"turn", "forw", "stop"}


def test_who_mixes_the_rules_up_says_the_compass_word_whatever_the_rule(city):
    env = make_env("virl-l", "rule_family", root=city, faults="other_word:1")
    for seed in range(50):
        env.reset(seed=seed)
        compass = re.search(r"to face (.*)\.", env.position.sentence)[1]
        assert json.loads(env.demonstrate())["action"] == f"turn_direction({compass})"
        env.step(env.expert_reply())
        while env.position.kind == "turn" and not env.done:
            env.step(env.expert_reply())
        assert env.demonstrate() == env.expert_reply()


def test_with_pictures_the_words_are_defined_as_well(tmp_path):
    root = write_data(tmp_path / "data")
    (root / "train" / "street_views").mkdir()
    for i in range(32):
        paint(root / "train" / "street_views" / f"pano{i}.jpg", width=64)
    env = make_env("virl-vl", "rule_family", root=root, resolution=8)
    message = env.reset(seed=0)[0][0]
    assert "image" in [part["type"] for part in message["content"]]
    assert set(defined(read_text(message)).values()) <= PAPERS_WORDS
    assert finish(env)[1]["success"]


# ---- Prompt files --------------------------------------------------------------------------------

@pytest.mark.parametrize("file, told", [
    ({"nav_actions": {"absolute": "{words}", "relative": "{words}"}},
     "'nav_actions' is worded for absolute and relative, not for the rule random"),
    ({"nav_actions": "Turn left or right."}, r"'nav_actions' lacks \{words\}"),
    ({"nav_word": "{word}"}, r"'nav_word' lacks \{meaning\}"),
    ({"nav_word": "{meaning}"}, r"'nav_word' lacks \{word\}.*of action_space random")])
def test_a_prompt_file_that_keeps_the_words_from_the_model_is_refused(city, tmp_path, file, told):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=told) as error:
        make_env("virl-l", "rule_family", root=city, prompt_file=str(path))
    assert "\n" not in str(error.value)
    make_env("virl-l", "id", root=city, prompt_file=str(path)).reset(seed=0)


def test_a_prompt_file_can_word_the_definitions_and_address_one_kind(city, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"nav_word": "{meaning} = {word}",
                                "nav_actions": {"letters": "\nSay one of {words}.",
                                                "absolute": "\nSay {words}."}}))
    for space, said in (("letters", "\nSay one of north = N, northeast = NE, east = E,"),
                        ("absolute", "\nSay north, northeast, east,")):
        env = make_env("virl-l", "id", root=city, prompt_file=str(path), action_space=space)
        assert said in env.reset(seed=0)[0][0]["content"]


# ---- The scripts ---------------------------------------------------------------------------------

def test_sft_writes_pairs_of_the_family_and_of_some_of_its_kinds(city, tmp_path):
    for name, mix, allowed in (("all", ("rule_family",), set(KINDS)),
                               ("some", ("rule_family", "action_space=degrees,ship"),
                                {"degrees", "ship"})):
        out = tmp_path / f"{name}.json"
        sft.main(sft.Config(dump=str(out), num=60, task="virl-l", env=(f"root={city}",), mix=mix))
        words = set()
        for record in json.loads(out.read_text()):
            words |= set(defined(record["conversations"][0]["value"]))
        known = {word for kind in allowed for word in KINDS[kind].words}
        assert words <= known and (name == "all" or words == known)


def test_a_model_is_tested_on_the_family_and_on_a_kind_held_out(city, tmp_path, device):
    evaluate.main(evaluate.Config(
        model=MODEL, out=str(tmp_path / "eval"), task="virl-l", env=(f"root={city}",),
        splits=("rule_family", "rule_family", "action_space=clock"), episodes=2,
        max_new_tokens=2, device=device))
    rows = running.read_jsonl(tmp_path / "eval" / "eval.jsonl")
    assert [row["split"] for row in rows] == ["rule_family", "rule_family action_space=clock"]
    assert all({"step_accuracy_turn", "paper_step_accuracy"} <= set(row) for row in rows)
    assert "rule_family" in TASKS["virl-vl"].splits


def test_the_tokenizer_of_a_blank_model_has_every_word_whole(city):
    def ids_of(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    for splits, whole in ((tiny.splits_in_training("virl-l"), True), (("id", "rule_ood"), False)):
        atoms = tiny.atoms_of_splits("virl-l", splits, root=city)
        texts = tiny.sample_texts("virl-l", 30, splits, root=city)
        tokenizer = tiny.train_tokenizer(texts, atoms)
        for word in PAPERS_WORDS:
            assert ids_of(f"turn_direction({word})")[1:-1] == ids_of(word)
            assert len(ids_of(word)) == 1
        lengths = []
        for word in vocabularies.words_of(KINDS):
            assert tokenizer.decode(ids_of(f"turn_direction({word})")) == f"turn_direction({word})"
            lengths.append(len(ids_of(f"turn_direction({word})")[1:-1]))
        assert (max(lengths) == 1) == whole
