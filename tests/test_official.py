"""The official wording: prompt files made from a copy of that code, and our dialogues against those that it makes.

The second needs a copy: OFFICIAL_REPO=PATH python -m pytest tests/test_official.py
"""
import json
import os
import random
import subprocess
import sys

import pytest

from conftest import ROOT
from envs import make_env
from support.chat import read_text

EPISODES, SEED = 40, 7
needs_repo = pytest.mark.skipif("OFFICIAL_REPO" not in os.environ,
                                reason="OFFICIAL_REPO is not set: it names a copy of github.com/LeslieTrue/SFTvsRL")


# ---- Against the official code ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def wording(tmp_path_factory):
    out = tmp_path_factory.mktemp("official")
    subprocess.run([sys.executable, ROOT / "data" / "official_prompts.py", "--repo", os.environ["OFFICIAL_REPO"], "--out", out],
                   check=True, capture_output=True)
    return out


def play_theirs(task, split, routes):
    command = [sys.executable, ROOT / "tests" / "official_side.py", os.environ["OFFICIAL_REPO"], task, split, str(EPISODES), routes,
               str(SEED)]
    played = subprocess.run(command, capture_output=True, text=True, timeout=1000)
    assert played.returncode == 0, played.stderr[-3000:]
    return json.loads(played.stdout)


def follow(env, dialogues):
    """Give an environment the replies of an episode of theirs; every message that a model reads must be the same."""
    asked = 0
    for dialogue in dialogues:
        for at in range(0, len(dialogue), 2):
            if env.done:                                           # theirs asks once more, and reads no answer
                assert dialogue is dialogues[-1] and at == len(dialogue) - 2
                return asked
            assert [[message["role"], read_text(message)] for message in env.messages] == dialogue[:at + 1]
            env.step(dialogue[at + 1][1])
            asked += 1
    assert env.done
    return asked


def verdicts(played):
    return {text for episode in played for dialogue in episode["dialogues"] for role, text in dialogue[2::2]}


@needs_repo
@pytest.mark.parametrize("task", ["gp-l", "gp-vl"])
@pytest.mark.parametrize("split", ["id", "rule_ood"])
def test_dialogues_about_cards_are_byte_for_byte_those_of_the_official_code(task, split, wording):
    played = play_theirs(task, split, ".")
    env = make_env(task, split, prompt_file=str(wording / f"{task}.json"))
    env.picture = lambda: None
    for episode in played:
        hand = [(rank, "S") for rank in episode["cards"]]
        numbers = [env.rule_jqk["JQK".index(rank)] if rank in "JQK" else 1 if rank == "A" else int(rank) for rank, _ in hand]
        env.deal = lambda: (hand, numbers)
        env.reset(seed=0)
        follow(env, episode["dialogues"])
    assert len(played) == EPISODES and len(verdicts(played)) > 40


@needs_repo
@pytest.mark.parametrize("task", ["virl-l", "virl-vl"])
@pytest.mark.parametrize("split", ["id", "rule_ood"])
def test_dialogues_on_a_walk_are_byte_for_byte_those_of_the_official_code(task, split, wording, city):
    played = play_theirs(task, split, city / "train")
    env = make_env("virl-l", split, root=city, turn_words="plain", prompt_file=str(wording / f"{task}.json"))
    env.vision, env.picture = task == "virl-vl", lambda: None      # the city has no pictures, the words are the same
    for number, episode in enumerate(played):
        env.rng = random.Random(SEED + number)
        env.lay_out(0)
        env.turn, env.done = 0, False
        env.begin_dialogue()
        follow(env, episode["dialogues"])
    assert len(played) == EPISODES and len(verdicts(played)) == 2
