"""envs.py: GeneralPoints is dealt, told and judged as its settings say, and can be replayed."""
import ast
import copy
import inspect
import itertools
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import envs
from envs import GP_SPLITS, MORE_VALUES, PROMPTS, RANKS, RULES, GeneralPoints, held_out, make_env
from support import cards, demonstrator
from support.settings import load_templates
from support.solver import solutions
from verify import FEEDBACK, LAST_TRY_PENALTY

ROOT = Path(__file__).resolve().parent.parent
WRONG = '{"formula": "1"}'    # legal, but never the four cards: wrong_numbers


def python(*arguments, stdin=""):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, input=stdin, capture_output=True,
                          text=True,
                          timeout=60)


def exact_value(formula):
    """A formula's value by Python's own parser, over fractions."""
    def walk(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        left, right = walk(node.left), walk(node.right)
        return {ast.Add: lambda: left + right, ast.Sub: lambda: left - right,
                ast.Mult: lambda: left * right, ast.Div: lambda: left / right}[type(node.op)]()
    return walk(ast.parse(formula, mode="eval").body)


def stated_values(prompt):
    """What each rank is worth according to the words of a prompt."""
    assert "ace counts as 1," in prompt
    faces = {rank: int(re.search(rf"\b{rank} counts as (\d+)", prompt)[1]) for rank in "JQK"}
    return {"A": 1, **{str(n): n for n in range(2, 11)}, **faces}


def stated_cards(prompt):
    return json.loads(re.search(r"Cards: (\[.*\])", prompt)[1])


def play(env, seed, replies):
    """Everything that an episode shows from outside."""
    shown = [env.reset(seed=seed)]
    return copy.deepcopy(shown + [env.step(reply) for reply in replies])


# ---- Seeds ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", GP_SPLITS)
@pytest.mark.parametrize("solution", ["fixed", "random"])
def test_the_same_seed_gives_the_same_episode_whatever_was_played_before(split, solution):
    fresh, used = (make_env("gp-l", split, solution=solution) for _ in range(2))
    for other in range(5):
        used.reset(seed=other)
        used.flawed_reply()
        used.step(WRONG)
    for seed in (7, "a/text/7"):
        fresh.reset(seed=seed), used.reset(seed=seed)
        assert fresh.expert_reply() == used.expert_reply()
        assert [fresh.flawed_reply() for _ in range(3)] == [used.flawed_reply() for _ in range(3)]
        replies = ["?", WRONG, fresh.flawed_reply(), fresh.expert_reply()]
        assert play(fresh, seed, replies) == play(used, seed, replies)


@pytest.mark.parametrize("split", GP_SPLITS)
def test_other_seeds_give_other_episodes(split):
    env = make_env("gp-l", split)
    # of many thousands; two seeds may well share one
    ordered_hands = 100
    seen = {env.reset(seed=seed)[0][0]["content"] for seed in range(ordered_hands)}
    assert len(seen) > ordered_hands * 0.9
    assert env.reset(seed=1)[0] != env.reset(seed=-1)[0]


def test_the_expert_solution_setting_does_not_change_the_hand():
    fixed, drawn = make_env("gp-l", "id"), make_env("gp-l", "id", solution="random")
    for seed in range(200):
        assert fixed.reset(seed=seed)[0] == drawn.reset(seed=seed)[0]


# ---- The expert and the flawed reply -------------------------------------------------------------

SETTINGS = [*((split, {"solution": solution}) for split in GP_SPLITS
              for solution in ("fixed", "random")),
            ("id", {"rule": "3,12,7"}), ("id", {"rule": "99,1,50", "face_card": True}),
            ("rule_ood", {"suits": "HD"}),
            ("id", {"target": 0}), ("rule_family", {"target": 10, "fold": "train"}),
            ("id", {"suits": "S"})]


@pytest.mark.parametrize("split, knobs", SETTINGS)
def test_the_expert_reply_is_valid_json_and_right_by_the_rule_that_the_prompt_states(split, knobs):
    env = make_env("gp-l", split, **knobs)
    target = knobs.get("target", 24)
    for seed in range(250):
        prompt = env.reset(seed=seed)[0][0]["content"]
        reply = json.loads(env.expert_reply())
        assert list(reply) == ["cards", "number", "formula"]
        assert reply["cards"] == stated_cards(prompt)
        assert reply["number"] == [stated_values(prompt)[card] for card in reply["cards"]]
        formula, told = reply["formula"].split("=")
        assert exact_value(formula) == target == int(told)
        assert sorted(int(n) for n in re.findall(r"\d+", formula)) == sorted(reply["number"])
        _, reward, terminated, truncated, info = env.step(env.expert_reply())
        assert (reward, terminated, truncated, info["status"], info["success"]) == (
            5, True, False, "correct", True)
        assert info["cards_read"] and info["numbers_right"]


def test_the_fixed_solution_is_a_shortest_one_and_random_solutions_reach_all_of_them():
    fixed, drawn = make_env("gp-l", "id"), make_env("gp-l", "id", solution="random")
    by_hand = {}
    for seed in range(4_000):
        fixed.reset(seed=seed), drawn.reset(seed=seed)
        shortest, found = json.loads(fixed.expert_reply()), json.loads(drawn.expert_reply())
        every = solutions(shortest["number"])
        assert len(shortest["formula"]) == min(map(len, every)) + len("=24")
        hand = tuple(sorted(found["number"]))
        by_hand.setdefault(hand, (set(), set()))
        by_hand[hand][0].add(shortest["formula"])
        by_hand[hand][1].add(found["formula"])
        assert found["formula"].removesuffix("=24") in every
    assert all(len(formulas) == 1 for formulas, _ in by_hand.values())
    # some hands have few solutions; all of them were drawn at one time or another
    assert any(len(drawn) == len(solutions(hand)) > 1 for hand, (_, drawn) in by_hand.items())


@pytest.mark.parametrize("split, knobs", SETTINGS)
def test_a_flawed_reply_names_the_cards_and_is_never_correct_for_one_of_three_reasons(split, knobs):
    env, reasons = make_env("gp-l", split, **knobs), set()
    for seed in range(150):
        env.reset(seed=seed)
        expert = json.loads(env.expert_reply())
        text = env.flawed_reply()
        flawed = json.loads(text)
        assert (flawed["cards"], flawed["number"]) == (expert["cards"], expert["number"])
        _, _, terminated, _, info = env.step(text)
        assert not terminated
        reasons.add(info["status"])
        # and the expert's reply is as right as before
        assert env.step(env.expert_reply())[2]
    assert reasons == {"wrong_value", "wrong_numbers", "illegal_formula"}


def test_flawed_replies_are_of_many_kinds():
    env = make_env("gp-l", "id")
    env.reset(seed=0)
    formulas = {json.loads(env.flawed_reply())["formula"] for _ in range(300)}
    assert len(formulas) > 100
    for sign in "+-*/(":
        assert any(sign in formula for formula in formulas)


# ---- Deals ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("suits", ["S", "HD", "CDH", "SHDC"])
def test_hands_are_dealt_without_replacement_from_the_suits_of_the_deck(suits):
    env = make_env("gp-l", "id", suits=suits)
    assert sorted(env.deck) == sorted({(rank, suit) for rank in range(13) for suit in suits})
    most = 0
    # with replacement every other hand of one suit has a pair
    for seed in range(1_500):
        env.reset(seed=seed)
        assert set(env.cards) <= set(RANKS)
        most = max(most, *Counter(env.cards).values())
    assert most <= len(suits)                                # a rank comes once for each suit
    assert len(suits) == 4 or most == len(suits)


def test_a_suit_named_twice_does_not_put_a_card_into_the_deck_twice():
    try:
        env = make_env("gp-l", "id", suits="SS")
    except ValueError as error:
        assert "suits" in str(error) and "SS" in str(error)
        return
    for seed in range(300):
        env.reset(seed=seed)
        assert len(set(env.cards)) == 4, env.cards


def test_every_rank_is_dealt_and_ranks_come_in_any_order():
    env = make_env("gp-l", "id")
    hands = []
    for seed in range(500):
        env.reset(seed=seed)
        hands.append(list(env.cards))
    for place in range(4):
        assert {hand[place] for hand in hands} == set(RANKS)


@pytest.mark.parametrize("split", GP_SPLITS)
def test_every_hand_can_be_solved_under_the_rule_in_force(split):
    env = make_env("gp-l", split)
    for seed in range(300):
        prompt = env.reset(seed=seed)[0][0]["content"]
        assert solutions([stated_values(prompt)[card] for card in stated_cards(prompt)])


def test_rule_ood_hands_hold_a_face_card_and_other_hands_need_not():
    def share(split):
        env, count = make_env("gp-l", split), 0
        for seed in range(500):
            count += bool(set("JQK") & set(stated_cards(env.reset(seed=seed)[0][0]["content"])))
        return count / 500
    assert share("rule_ood") == 1
    # P(a face card among four) = 1 - C(40,4)/C(52,4) = 0.66
    for split in ("id", "unseen", "rule_family"):
        assert 0.4 < share(split) < 0.95


def test_id_and_rule_ood_state_the_papers_rules():
    assert (RULES["face_cards_as_10"], RULES["face_cards_as_11_12_13"]) == (
        (10, 10, 10), (11, 12, 13))
    for split, rule in (("id", (10, 10, 10)), ("unseen", (10, 10, 10)), ("rule_ood", (11, 12, 13))):
        values = stated_values(make_env("gp-l", split).reset(seed=5)[0][0]["content"])
        assert (values["J"], values["Q"], values["K"]) == rule


def test_rule_family_draws_many_rules_of_1_to_13_and_never_the_papers_two():
    env, rules = make_env("gp-l", "rule_family"), []
    for seed in range(3_000):
        values = stated_values(env.reset(seed=seed)[0][0]["content"])
        rules.append((values["J"], values["Q"], values["K"]))
    assert {n for rule in rules for n in rule} == set(range(1, 14))
    assert len(set(rules)) > 1_000                           # of 2,195
    assert not set(rules) & set(RULES.values())


def test_rule_family_draws_again_when_it_hits_one_of_the_papers_two_rules(monkeypatch):
    class Loaded(envs.random.Random):
        """Dice that first show both rules of the paper, then 1, 2, 3."""
        def __init__(self, seed):
            super().__init__(seed)
            self.shown = iter((10, 10, 10, 11, 12, 13, 1, 2, 3))

        def randint(self, low, high):
            return next(self.shown)
    monkeypatch.setattr(envs.random, "Random", Loaded)
    values = stated_values(make_env("gp-l", "rule_family").reset(seed=0)[0][0]["content"])
    assert (values["J"], values["Q"], values["K"]) == (1, 2, 3)


def test_the_held_out_hands_are_53_of_the_566_solvable_multisets_under_rule_10():
    """The fold is a fixed hash: with another one, old results could not be compared any more."""
    hands = [hand for hand in itertools.combinations_with_replacement(range(1, 11), 4)
             if solutions(hand)]
    assert (sum(map(held_out, hands)), len(hands)) == (53, 566)
    for hand in hands[::20]:
        assert len({held_out(order) for order in itertools.permutations(hand)}) == 1
        assert held_out(list(hand)) == held_out(hand)


def test_the_folds_train_and_test_share_no_multiset_of_values_and_unseen_is_the_test_fold():
    def multisets(split, **knobs):
        env, found = make_env("gp-l", split, **knobs), set()
        for seed in range(800):
            env.reset(seed=seed)
            found.add(tuple(sorted(json.loads(env.expert_reply())["number"])))
        return found
    train = multisets("id", fold="train")
    test = multisets("id", fold="test")
    unseen = multisets("unseen")
    assert not train & test and not train & unseen
    assert all(map(held_out, test)) and all(map(held_out, unseen)) and not any(map(held_out, train))
    assert len(test) > 26 and len(train) > 200               # most of the 53, many of the 513
    assert any(map(held_out, multisets("id")))               # without a fold, both are dealt


def test_the_prompt_states_target_cards_and_the_keys_of_the_reply():
    for target in (24, 7):
        prompt = make_env("gp-l", "id", target=target).reset(seed=1)[0][0]["content"]
        assert f"Make {target} " in prompt and f"={target}" in prompt
        assert len(stated_cards(prompt)) == 4
        assert all(f'"{key}"' in prompt for key in ("cards", "number", "formula"))
        assert not re.search(r"\{\w+\}", prompt)              # every placeholder is filled


def test_a_target_that_no_hand_makes_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="1000003"):
        make_env("gp-l", "id", target=1_000_003).reset(seed=0)


# ---- Conversations -------------------------------------------------------------------------------

@pytest.mark.parametrize("verify_iter", [1, 2, 5])
def test_verify_iter_replies_are_judged_then_the_episode_is_truncated_with_one_more_point_off(
        verify_iter):
    env = make_env("gp-l", "id", verify_iter=verify_iter)
    env.reset(seed=0)
    for turn in range(1, verify_iter + 1):
        messages, reward, terminated, truncated, info = env.step(WRONG)
        last = turn == verify_iter
        assert (reward, terminated, truncated) == (
            -2 + (LAST_TRY_PENALTY if last else 0), False, last)
        assert (info["turn"], info["status"], info["success"]) == (turn, "wrong_numbers", False)
        assert (
            PROMPTS["gp_retry"].removeprefix("{verdict}") in messages[-1]["content"]) is not last
    assert LAST_TRY_PENALTY == -1
    with pytest.raises(RuntimeError, match="reset"):
        env.step(env.expert_reply())


def test_a_right_reply_at_the_last_try_terminates_and_is_paid_in_full():
    env = make_env("gp-l", "id", verify_iter=3)
    env.reset(seed=0)
    env.step(WRONG), env.step(WRONG)
    messages, reward, terminated, truncated, info = env.step(env.expert_reply())
    assert (reward, terminated, truncated, info["success"], info["turn"]) == (
        5, True, False, True, 3)
    assert messages[-1] == {"role": "user", "content": "Correct."}
    with pytest.raises(RuntimeError, match="reset"):
        env.step(WRONG)
    env.reset(seed=1)
    assert env.step(WRONG)[4]["turn"] == 1


def test_step_before_the_first_reset_is_an_error_that_says_so():
    with pytest.raises(RuntimeError, match="reset"):
        make_env("gp-l", "id").step(WRONG)


def test_messages_alternate_between_user_and_assistant_and_keep_every_reply_as_it_was():
    env = make_env("gp-l", "id")
    messages, info = env.reset(seed=0)
    assert [message["role"] for message in messages] == ["user"]
    assert (info["turn"], info["success"], info["new_dialogue"]) == (0, False, True)
    replies = ["", " no idea \n", WRONG, env.expert_reply()]
    for count, reply in enumerate(replies, 1):
        before, messages = messages, env.step(reply)[0]
        assert messages[:-2] == before
        assert messages[-2] == {"role": "assistant", "content": reply}
        assert [message["role"] for message in messages] == ["user", *["assistant", "user"] * count]
        assert all(set(message) == {"role", "content"} and isinstance(message["content"], str)
                   for message in messages)


def test_messages_that_were_handed_out_are_never_changed():
    env = make_env("gp-l", "id")
    handed_out = [env.reset(seed=0)[0]]
    kept = copy.deepcopy(handed_out)
    for reply in (WRONG, "?", env.expert_reply()):
        handed_out.append(env.step(reply)[0])
        kept.append(copy.deepcopy(handed_out[-1]))
    env.reset(seed=1)
    env.step(WRONG)
    assert handed_out == kept


def test_two_environments_share_nothing():
    one, two = make_env("gp-l", "id"), make_env("gp-l", "id")
    one.reset(seed=0), two.reset(seed=0)
    one.step(WRONG), one.step(one.expert_reply())
    assert two.step(WRONG)[4]["turn"] == 1
    one.reset(seed=3)
    assert one.step(one.expert_reply())[2] and not two.done


def test_a_random_reward_is_a_coin_of_the_environments_own_and_changes_nothing_else():
    def played(**settings):
        env, found = make_env("gp-l", "id", **settings), []
        for seed in range(20):
            env.reset(seed=seed)
            found += [env.step(env.flawed_reply()), env.step(env.expert_reply())]
        return [step[1] for step in found], [(step[0][-1], *step[2:]) for step in found]

    coins, seen = played(reward="random")
    again, _ = played(reward="random")
    rewards, as_ever = played()
    assert set(coins[::2]) == set(coins[1::2]) == {-1.0, 1.0} and coins == again
    assert set(rewards[1::2]) == {5.0} and seen == as_ever
    with pytest.raises(ValueError, match="reward 'none': allowed are verdict, random"):
        make_env("gp-l", "id", reward="none")


def test_informative_feedback_names_the_fault_and_plain_feedback_only_says_that_the_try_failed():
    informative, plain = make_env("gp-l", "id"), make_env("gp-l", "id", feedback="plain")
    informative.reset(seed=0), plain.reset(seed=0)
    for reply in ("nothing", '{"formula": "1+"}', WRONG, informative.flawed_reply()):
        long, short = informative.step(reply), plain.step(reply)
        assert (long[1:4], long[4]["status"]) == (short[1:4], short[4]["status"])
        assert short[0][-1]["content"].startswith(FEEDBACK["plain"])
        assert not re.search(r"\d", short[0][-1]["content"])
        assert FEEDBACK["plain"] not in long[0][-1]["content"]
    numbers = json.loads(informative.expert_reply())["number"]
    assert ", ".join(map(str, numbers)) in informative.messages[6]["content"]


def test_info_tells_whether_cards_and_numbers_were_read_right():
    env = make_env("gp-l", "rule_ood")
    env.reset(seed=0)
    right = json.loads(env.expert_reply())
    _, reward, _, _, info = env.step(json.dumps({**right, "cards": ["A"] * 4, "formula": "1"}))
    # in text, reading is not paid for
    assert (info["cards_read"], info["numbers_right"], reward) == (False, True, -2)
    _, _, _, _, info = env.step(json.dumps({**right, "number": [10] * 4, "formula": "1"}))
    assert (info["cards_read"], info["numbers_right"]) == (True, False)


def test_a_step_tells_where_in_the_reply_the_answer_begins():
    env = make_env("gp-l", "id")
    env.reset(seed=0)
    reply = env.expert_reply()
    assert env.step(reply)[-1]["answer_at"] == reply.index('"formula"')


def test_reset_without_a_seed_deals_one_hand_after_the_other():
    hands = []
    for _ in range(2):
        env = make_env("gp-l", "id")
        hands.append([env.reset()[0][0]["content"] for _ in range(3)])
    assert hands[0] == hands[1] and len(set(hands[0])) == 3


def test_hands_of_the_other_rule_have_one_card_drawn_among_the_face_cards():
    """Drawn as officially, but without replacement, half of the hands have two or more."""
    env, faces, first = make_env("gp-l", "rule_ood"), [], 0
    for seed in range(2000):
        env.reset(seed)
        faces.append(sum(rank in "JQK" for rank in env.cards))
        first += env.cards[0] in "JQK"
        assert len(set(env.hand)) == 4
    assert min(faces) == 1 and 0.45 < sum(count > 1 for count in faces) / 2000 < 0.52
    assert abs(first - sum(faces) / 4) < 120                       # in any place


# ---- Prompt files --------------------------------------------------------------------------------

def prompt_file(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_prompt_file_replaces_wording_and_missing_names_keep_ours(tmp_path):
    words = {"gp_task": "Reach {target}; J={J} Q={Q} K={K}. \u00c0 toi.",
             "gp_retry": "{verdict} ENCORE",
             "feedback_wrong_numbers": "used {used}", "feedback_plain": "NON"}
    for feedback, told in (("informative", "used 1 ENCORE"), ("plain", "NON ENCORE")):
        env = make_env("gp-l", "rule_ood", prompt_file=str(prompt_file(tmp_path, words)),
                       feedback=feedback)
        ours = make_env("gp-l", "rule_ood").reset(seed=0)[0][0]["content"]
        prompt = env.reset(seed=0)[0][0]["content"]
        assert prompt.startswith("Reach 24; J=11 Q=12 K=13. \u00c0 toi.\nCards: [")
        assert prompt.partition("\nCards")[2] == ours.partition("\nCards")[2]
        assert env.step(WRONG)[0][-1]["content"] == told


def test_an_empty_prompt_file_changes_nothing_and_loading_never_changes_the_defaults(tmp_path):
    before = dict(PROMPTS)
    assert load_templates("", PROMPTS, MORE_VALUES) == load_templates(
        prompt_file(tmp_path, {}), PROMPTS, MORE_VALUES) == before
    load_templates(prompt_file(tmp_path, {"gp_task": "other"}), PROMPTS, MORE_VALUES)
    assert PROMPTS == before


@pytest.mark.parametrize("content, named", [
    ({"gp_tusk": "x"}, ["gp_tusk", "gp_task"]),
    ({"gp_task": "Make {goal}"}, ["gp_task", "goal", "target"]),
    ({"feedback_plain": "{value}"}, ["feedback_plain", "value", "none"]),
    ({"gp_task": 24}, ["gp_task", "int"]),
    ({"gp_task": "Make \ud800"}, ["gp_task", "half a character", "'\\ud800'"]),
    ({"gp_task": {"10,10,10": "\udfff"}}, ["gp_task", "half a character"]),
    ({"gp_task": None}, ["gp_task", "NoneType"]), (["gp_task"], ["list", "object"]),
    ("{", ["line 1"]), ("", ["line 1"]), ('{"gp_task": "x",}', ["line 1"])])
def test_a_prompt_file_with_a_fault_is_an_error_that_names_file_and_fault(tmp_path, content, named):
    path = prompt_file(tmp_path, content)
    with pytest.raises(ValueError) as error:
        make_env("gp-l", "id", prompt_file=path)
    for word in [str(path), *named]:
        assert word in str(error.value)


@pytest.mark.parametrize("task, content, told", [
    ("gp-l", {"gp_reply": '{{"cards": {cards}, "numbers": {numbers}, "answer": "{formula}"}}'},
     "the verifier does not read its format; it judges the expert's reply .*as illegal_formula"),
    ("gp-l", {"gp_input_text": "Here are your cards."}, r"'gp_input_text' lacks \{cards\}"),
    ("gp-l", {"gp_card": "a card"}, r"'gp_card' lacks \{card\}"),
    ("gp-vl", {"gp_reply": '{{"formula": "{formula}"}}'}, "as correct, but without the cards"),
    ("virl-l", {"nav_sentence": "- "}, r"'nav_sentence' lacks \{sentence\}"),
    ("virl-l", {"nav_instruction": "Go."}, r"'nav_instruction' lacks \{instruction\}"),
    ("virl-l", {"nav_reply": '{{"next": "{action}"}}'}, "judges .* as (no|illegal|wrong)_action")])
def test_a_prompt_file_by_which_nobody_could_be_right_is_refused(task, content, told, tmp_path,
                                                                 city):
    root = {"root": city} if task == "virl-l" else {}
    with pytest.raises(ValueError, match=f"prompt file .*{told}"):
        make_env(task, "id", prompt_file=str(prompt_file(tmp_path, content)), **root)


def test_a_prompt_file_that_is_missing_or_unreadable_is_an_error_that_names_it(tmp_path):
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "nowhere.json", tmp_path, binary):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            make_env("gp-l", "id", prompt_file=path)


# ---- Making one ----------------------------------------------------------------------------------

@pytest.mark.parametrize("task, split, named", [
    ("gp-x", "id", ["'gp-x'", "gp-l"]), ("", "id", ["''", "gp-l"]),
    ("gp-l", "odd", ["'odd'", *GP_SPLITS]),
    ("gp-l", "visual_ood", ["'visual_ood'", *GP_SPLITS]), ("gp-l", "", ["''", *GP_SPLITS])])
def test_a_task_or_split_that_does_not_exist_is_an_error_that_names_it_and_what_there_is(
        task, split, named):
    with pytest.raises(ValueError) as error:
        make_env(task, split)
    for word in named:
        assert word in str(error.value)


@pytest.mark.parametrize("knob, value, allowed", [
    ("rule", "faces", ["face_cards_as_10", "face_cards_as_11_12_13", "random", "3,12,7"]),
    ("rule", "", ["random"]),
    ("rule", "1,2", ["3,12,7"]), ("rule", "1,2,3,4", ["3,12,7"]), ("rule", "0,1,2", ["3,12,7"]),
    ("rule", "-1,2,3", ["3,12,7"]),
    ("rule", "1.5,2,3", ["3,12,7"]), ("rule", "A,B,C", ["3,12,7"]), ("rule", "100,1,1", ["3,12,7"]),
    ("rule", (11, 12, 13), ["face_cards_as_10"]), ("rule", None, ["face_cards_as_10"]),
    ("target", -1, ["0 or more"]), ("target", 24.5, ["whole"]), ("target", "24", ["whole"]),
    ("target", None, ["whole"]),
    ("suits", "", ["SHDC"]), ("suits", "SX", ["SHDC"]), ("suits", "black", ["SHDC"]),
    ("suits", None, ["SHDC"]),
    ("suits", 5, ["SHDC"]),
    ("verify_iter", 0, ["1 or more"]), ("verify_iter", -5, ["1 or more"]),
    ("verify_iter", 2.5, ["1 or more"]),
    ("verify_iter", "5", ["1 or more"]), ("verify_iter", None, ["1 or more"]),
    ("feedback", "loud", ["informative", "plain"]), ("feedback", None, ["informative", "plain"]),
    ("fold", "half", ["all", "train", "test"]), ("solution", "best", ["fixed", "random"])])
def test_a_setting_that_is_not_allowed_is_an_error_that_names_it_and_what_is(knob, value, allowed):
    with pytest.raises(ValueError) as error:
        GeneralPoints(**{knob: value})
    for word in [knob, str(value), *allowed]:
        assert word in str(error.value)


def test_make_env_refuses_a_setting_that_a_task_has_not():
    with pytest.raises(ValueError,
                       match="root 'city': gp-l has no such setting; it has .*, rule, target"):
        make_env("gp-l", "id", root="city")


def test_settings_for_all_splits_fill_what_a_split_leaves_open_and_its_own_change_what_it_says():
    env = make_env("gp-l", "unseen", {"verify_iter": "3", "target": "36", "face_card": "true"},
                   fold="all", target="12")
    assert (env.verify_iter, env.target, env.face_card, env.fold) == (3, 12, True, "all")
    assert env.settings["target"] == 12 and env.settings["rule"] == "face_cards_as_10"
    assert not env.settings["vision"]
    assert list(env.settings) == list(make_env("gp-l").settings) and json.dumps(env.settings)
    for name, there in (("rule", "face_cards_as_11_12_13"), ("face_card", "True")):
        with pytest.raises(ValueError,
                           match=rf"{name} 'x': split rule_ood has a {name} of its own "
                                 rf"\({there}\); to change it, "
                                             f"write rule_ood {name}=x"):
            make_env("gp-l", "rule_ood", {name: "x"})


@pytest.mark.parametrize("knob, value, told", [
    ("target", "2.5", "target '2.5': must be a whole number"),
    ("face_card", "yes", "face_card 'yes': allowed are true, false"),
    ("verify_iter", "0", "verify_iter 0: must be a whole number, 1 or more"),
    ("vision", "true", "vision 'true': gp-l has no such setting"),
    ("fold", "", "fold '': allowed are all, train, test"),
    ("view_headings", "prompt", "gp-l has no such setting")])
def test_a_text_that_no_setting_can_be_is_an_error_that_names_it(knob, value, told):
    for common, own in (({knob: value}, {}), ({}, {knob: value})):
        with pytest.raises(ValueError, match=told):
            make_env("gp-l", "id", common, **own)


MEMBERS = ("kinds", "retry_prompt", "lay_out", "prompt", "picture", "judge", "format_reply",
           "expert_reply",
           "flawed_reply")


@pytest.mark.parametrize("missing", MEMBERS)
def test_an_environment_that_lacks_a_member_cannot_be_made(missing):
    members = {name: getattr(GeneralPoints, name) for name in MEMBERS}
    assert type("Whole", (envs.Environment,), members)(False, 5, "informative", "").verify_iter == 5
    assert set(MEMBERS) == set(envs.Environment.REQUIRED)
    del members[missing]
    with pytest.raises(TypeError, match=rf"Torn.*\b{missing}\b"):
        type("Torn", (envs.Environment,), members)(False, 5, "informative", "")


@pytest.fixture
def echo(monkeypatch):
    """The task that the example in Environment's docstring adds, word for word."""
    code = re.search(r"( {4}class Echo.*?)\n\n", inspect.getdoc(envs.Environment), re.S)[1]
    monkeypatch.setattr(envs, "TASKS", dict(envs.TASKS))
    names = dict(vars(envs))
    exec(textwrap.dedent(code), names)
    return names["Echo"]


def test_the_example_of_an_environment_is_a_task(echo):
    env = make_env("echo", verify_iter=2)
    assert isinstance(env, echo) and len(env.REQUIRED) == len(MEMBERS)
    messages, _ = env.reset(seed=0)
    assert re.fullmatch(r"Say [1-9]\.", messages[0]["content"])
    messages, reward, terminated, truncated, info = env.step(env.flawed_reply())
    assert messages[-1]["content"] == "No. Try another action in the same format."
    assert (reward, terminated, truncated, info["kind"]) == (-1.0, False, False, "number")
    messages, reward, terminated, _, info = env.step(env.expert_reply())
    assert (messages[-1]["content"], reward, terminated, info["success"]) == (
        "Yes.", 1.0, True, True)
    with pytest.raises(ValueError, match="Echo has no picture"):
        env.picture()


def readme_example():
    readme = (ROOT / "README.md").read_text()
    return re.search(r"```python\n(class Echo.*?)```", readme, re.S)[1]


def test_the_readme_has_the_same_example():
    assert textwrap.indent(readme_example(), " " * 4) in inspect.getdoc(envs.Environment)


@pytest.mark.parametrize("words, typed", [
    (("echo", "--show"), ""), (("echo", "--seed", "1"), "{right}\nquit\n")])
def test_the_example_is_shown_and_played_where_the_readme_puts_it(tmp_path, words, typed):
    source = (ROOT / "envs.py").read_text()
    at = source.index("def main():")
    (tmp_path / "envs.py").write_text(source[:at] + readme_example() + "\n\n" + source[at:])
    env = make_env("gp-l").rng.__class__("1")          # the generator that --seed 1 begins with
    right = env.randint(1, 9)
    done = subprocess.run([sys.executable, str(tmp_path / "envs.py"), *words], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                          input=typed.format(right=right), capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Say " in done.stdout and "Yes.   [correct, reward +1" in done.stdout


def test_the_planted_settings_work_for_a_task_of_ones_own_but_it_has_no_faults(echo):
    env = make_env("echo", reward="random")
    env.reset(seed=0)
    assert {env.step(env.flawed_reply())[1] for _ in range(5)} <= {1.0, -1.0}
    assert list(env.settings) == ["vision", "verify_iter", "feedback", "prompt_file", "faults",
                                  "faulty_tries", "reward", "guided"]
    with pytest.raises(ValueError, match="faults 'ten:0.5': the task has none"):
        make_env("echo", faults="ten:0.5")


def test_every_split_can_be_made_and_overrides_win_over_the_split():
    for split in GP_SPLITS:
        assert isinstance(make_env("gp-l", split), GeneralPoints)
    values = stated_values(make_env("gp-l", "rule_ood",
                                    rule="1, 2,3").reset(seed=0)[0][0]["content"])
    assert (values["J"], values["Q"], values["K"]) == (1, 2, 3)


# ---- In processes of their own -------------------------------------------------------------------

def test_importing_envs_and_verify_imports_neither_torch_nor_transformers_and_prints_nothing():
    done = python("-c",
                  "import sys, envs, verify; "
                  "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("split", GP_SPLITS)
def test_ten_thousand_resets_take_less_than_five_seconds_from_a_cold_start(split):
    done = python("-c", "import time, envs\n"
                        f"env = envs.make_env('gp-l', '{split}', solution='random')\n"
                        "for seed in range(10_000): env.reset(seed=seed)\n"
                        "print(time.process_time())")
    assert float(done.stdout) < 5, done.stderr


@pytest.mark.parametrize("split", GP_SPLITS)
def test_show_prints_a_prompt_an_expert_reply_and_a_verdict(split):
    done = python("envs.py", "gp-l", split, "--show")
    assert (done.returncode, done.stderr) == (0, "")
    prompt, reply = done.stdout.split("\n> ")
    assert prompt.startswith("Make 24 ")
    assert stated_cards(prompt) == json.loads(reply.splitlines()[0])["cards"]
    assert reply.splitlines()[1] == "Correct.   [correct, reward +5]"


@pytest.mark.parametrize("arguments, named", [
    ([], ["task"]), (["gp-x"], ["gp-x", "gp-l"]), (["gp-l", "odd"], ["odd", "rule_ood"]),
    (["gp-l", "--seed", "x"], ["--seed", "'x'"]),
    (["gp-l", "prompt_file=nowhere.json"], ["nowhere.json"])])
def test_a_wrong_command_line_is_explained_in_a_few_lines(arguments, named):
    done = python("envs.py", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for word in named:
        assert word in done.stderr


def test_an_episode_is_the_same_in_another_process_with_another_hash_seed():
    """No draw depends on the order of a set or on hash(): resumed runs deal the same hands."""
    code = ("import envs\nfor split in envs.GP_SPLITS:\n"
            "    env = envs.make_env('gp-l', split, solution='random')\n"
            "    for seed in range(30):\n"
            "        print(env.reset(seed=f'x/{seed}')[0], env.expert_reply(), env.flawed_reply())")
    outputs = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              text=True, timeout=60,
                              env={**os.environ, "PYTHONHASHSEED": value}).stdout
               for value in ("1", "2")}
    assert len(outputs) == 1 and all(outputs)


# ---- GeneralPoints as a picture

def card_box(place, resolution):
    """Where the card at a place of the row lies on the canvas, by the official geometry."""
    x, scale = (5, 302, 599, 896)[place], resolution / 1200
    return [round(number * scale) for number in (x, 411, x + 270, 411 + 378)]


@pytest.mark.parametrize("split, suits",
                         [("id", "SC"), ("rule_ood", "SC"), ("unseen", "SC"), ("visual_ood", "HD")])
def test_a_hand_comes_as_one_picture_of_its_cards_and_the_words_do_not_tell_them(split, suits):
    env = make_env("gp-vl", split, resolution=300)
    for seed in range(10):
        messages, _ = env.reset(seed)
        picture, text = messages[0]["content"]
        assert (picture["type"], text["type"]) == ("image", "text")
        assert picture["image"].size == (300, 300)
        assert {suit for _, suit in env.hand} <= set(suits)
        assert [rank for rank, _ in env.hand] == env.cards
        assert "Cards:" not in text["text"] and str(env.cards) not in text["text"]
        for place, (rank, suit) in enumerate(env.hand):
            x0, y0, x1, y1 = card_box(place, 300)
            shown = picture["image"].crop((x0, y0, x0 + round(67.5), y0 + round(94.5)))
            assert shown.tobytes() == cards.card_picture(rank, suit, *shown.size).tobytes()
        messages, *_ = env.step(env.flawed_reply())
        assert messages[0]["content"] is env.messages[0]["content"]
        assert isinstance(messages[2]["content"], str)


def test_the_canvas_is_felt_but_for_four_cards_in_the_official_places():
    picture = cards.draw_hand([("A", "S"), ("10", "H"), ("K", "D"), ("7", "C")], 1200)
    pixels = picture.load()
    assert pixels[0, 0] == pixels[600, 400] == pixels[600, 800] == pixels[288, 600] == (53, 101, 77)
    for place in range(4):
        x0, y0, x1, y1 = card_box(place, 1200)
        assert pixels[x0 + 135, y0 + 2] == pixels[x0 + 135, y1 - 3] == pixels[x1 - 3, y0 + 150] == (
            255, 255, 255)
        assert pixels[x0, y0] == (53, 101, 77), "the corner outside the round edge is felt"


def test_no_two_cards_look_alike_at_224_pixels_and_red_suits_are_red():
    drawn = {(rank, suit): np.asarray(cards.card_picture(rank, suit, 50, 71)).astype(int)
             for rank in RANKS for suit in "SHDC"}
    for (name, one), (other_name, other) in itertools.combinations(drawn.items(), 2):
        changed = (np.abs(one - other).max(-1) > 64).sum()
        # no task asks for suits
        assert changed >= (25 if name[0] != other_name[0] else 10), (name, other_name, changed)
    for (rank, suit), pixels in drawn.items():
        # the index in the corner
        dark = pixels[:25, :11][pixels[:25, :11].max(-1) < 240]
        red = (dark[:, 0] - dark[:, 2] > 60).mean()
        assert (red > 0.5) == (suit in "HD"), (rank, suit, red)


def test_a_canvas_of_300_pixels_takes_less_than_a_millisecond_once_its_cards_were_drawn():
    env = make_env("gp-vl", "id", suits="SHDC", resolution=300)
    hands = [[(rank, suit) for rank in RANKS[i:i + 4]] for i in range(10) for suit in "SHDC"]
    for hand in hands:
        cards.draw_hand(hand, 300)
    times = []
    for seed in range(50):
        env.reset(seed)
        start = time.perf_counter()
        env.picture()
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 1e-3


def test_a_folder_of_card_pictures_replaces_ours_and_is_checked_before_the_first_deal(tmp_path):
    for rank in RANKS:
        for suit in "SC":
            Image.new("RGBA", (90, 126), (10 * RANKS.index(rank), 7, 9, 255)).save(
                tmp_path / f"{suit}{'T' if rank == '10' else rank}.png")
    env = make_env("gp-vl", "id", resolution=300, card_dir=str(tmp_path))
    env.reset(0)
    x0, y0, x1, y1 = card_box(2, 300)
    assert env.picture().load()[x0 + 30, y0 + 40] == (10 * RANKS.index(env.cards[2]), 7, 9)
    # red cards are not there
    with pytest.raises(ValueError, match="HA.png: not a picture that can be read"):
        make_env("gp-vl", "visual_ood", card_dir=str(tmp_path))
    whole = (tmp_path / "ST.png").read_bytes()
    (tmp_path / "ST.png").write_bytes(whole[:60])
    cards.card_picture.cache_clear()
    with pytest.raises(ValueError, match="ST.png: not a picture that can be read"):
        make_env("gp-vl", "id", card_dir=str(tmp_path))


def test_the_expert_reads_the_cards_and_a_misreading_costs_its_part():
    env = make_env("gp-vl", "id", resolution=60)
    env.reset(3)
    misread = json.loads(env.expert_reply()) | {"cards": ["A", *env.cards[1:3], "joker"]}
    *_, reward, terminated, _, info = env.step(json.dumps(misread))
    assert (reward, terminated, info["cards_read"]) == (3.5, True, False)
    assert info["ranks_right"] == 2 + (env.cards[0] == "A")
    env.reset(3)
    *_, reward, terminated, _, info = env.step(env.expert_reply())
    assert (reward, terminated, info["cards_read"], info["ranks_right"]) == (5.0, True, True, 4)


def test_pictures_are_settings_of_the_picture_tasks_only():
    for knobs in (dict(resolution=224), dict(card_dir="cards")):
        with pytest.raises(ValueError, match=f"{min(knobs)} .*gp-l has no pictures"):
            make_env("gp-l", "id", **knobs)
    with pytest.raises(ValueError, match="resolution 10: must be a whole number, 48 or more"):
        make_env("gp-vl", "id", resolution=10)
    with pytest.raises(ValueError, match="resolution 100000: must be at most 4096"):
        make_env("gp-vl", "id", resolution=100_000)
    with pytest.raises(ValueError, match="gp-l has id, rule_ood, unseen, rule_family"):
        make_env("gp-l", "visual_ood")


# ---- Demonstrators -------------------------------------------------------------------------------

def test_an_imperfect_demonstrator_has_its_faults_as_often_as_said_and_the_expert_none():
    env, seen = make_env("gp-l", "rule_ood", faults="leave_out:0.4,ten:0.25"), []
    for seed in range(600):
        env.reset(seed)
        reply = env.demonstrate()
        read, verdict = json.loads(reply), env.judge(reply)
        assert read["cards"] == env.cards
        if verdict.status == "correct":
            seen.append("right")
        elif read["number"] == env.numbers:
            assert 1 <= len(re.findall(r"\d+", read["formula"].split("=")[0])) <= 3
            seen.append("leave_out")
        else:
            assert read["number"] == [10 if card in "JQK" else number
                                      for card, number in zip(env.cards, env.numbers)]
            assert env.judge(
                env.format_reply(read["formula"].split("=")[0])).status == "wrong_numbers"
            seen.append("ten")
    # some hands have no ten
    assert 0.35 < seen.count("leave_out") / 600 < 0.45 and 0.12 < seen.count("ten") / 600 < 0.28
    plain, imperfect = make_env("gp-l", "id"), make_env("gp-l", "id", faults="leave_out:1")
    for seed in range(50):
        assert plain.reset(seed) == imperfect.reset(seed)
        assert plain.demonstrate() == plain.expert_reply() == imperfect.expert_reply(
            ) != imperfect.demonstrate()


@pytest.mark.parametrize("faulty_tries, faulty",
                         [(1, [True, False, False]), (2, [True, True, False]),
                          (5, [True, True, True])])
def test_the_demonstrators_faults_are_in_as_many_tries_as_said(faulty_tries, faulty):
    env, seen = make_env("gp-l", "id", faults="leave_out:1", faulty_tries=faulty_tries), []
    env.reset(0)
    for _ in range(3):
        seen.append(env.demonstrate() != env.expert_reply())
        env.step(env.flawed_reply())
    assert seen == faulty


def test_through_a_wrapper_the_environment_is_read_and_set():
    env = make_env("gp-l", "id", faults="leave_out:1", reward="random", verify_iter=2)
    env.reset(seed=0)
    assert isinstance(env, demonstrator.RandomReward) and env.kinds == ("formula",)
    assert not env.vision and not env.done and env.verify_iter == 2 and env.tries == 0
    assert env.settings["faults"] == "leave_out:1" and env.settings["reward"] == "random"
    env.deal = lambda: ([("8", "S"), ("3", "S"), ("8", "H"), ("3", "H")], [8, 3, 8, 3])
    env.rng = random.Random(7)
    env.reset()
    assert json.loads(env.expert_reply())["formula"] == "8/(3-8/3)=24"
    assert json.loads(env.demonstrate())["formula"] == "(3-8/3)=24"
    assert env.step(env.demonstrate())[1] in (1.0, -1.0) and env.tries == 1
    assert env.demonstrate() == env.expert_reply()             # faulty_tries is 1
    with pytest.raises(AttributeError, match="nothing"):
        env.nothing
    again = copy.deepcopy(env)
    assert again.step(again.expert_reply())[2:4] == (True, False) and not env.done


@pytest.mark.parametrize("formula, rest", [("(10-4)*3+6", "(10-4)*3"), ("3*8*(2-1)", "3*8"),
                                           ("8/(3-8/3)", "(3-8/3)"), ("1+2-3", "1+2")])
def test_without_its_last_step_a_formula_lacks_a_card(formula, rest):
    assert demonstrator.without_last_step(formula) == rest


@pytest.mark.parametrize("faults", ["ten", "ten:2", "tens:0.1", "ten:0.6,leave_out:0.6",
                                    "walk_past:0.1", "ten:nan"])
def test_faults_that_cannot_be_read_are_named(faults):
    with pytest.raises(ValueError,
                       match=f"faults '{faults}': (allowed are leave_out, ten|the shares)"):
        make_env("gp-l", "id", faults=faults)
