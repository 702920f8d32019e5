"""envs.py as a game: a person plays the model's part."""
import builtins
import json
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import pytest
from PIL import Image

from conftest import ROOT
from envs import Environment, make_env
from support import play
from verify import Verdict


@pytest.fixture
def played(monkeypatch, capsys):
    """played(env, *said, seed=3): what the screen shows to a player who types this and Ctrl-D.

    An exception among them is raised.
    """
    def run(env, *said, seed=3):
        lines = iter(said)

        def answer(prompt):
            print(prompt, end="")
            line = next(lines, EOFError())
            if isinstance(line, BaseException) or isinstance(line, type):
                raise line
            print(line)
            return line
        monkeypatch.setattr(builtins, "input", answer)
        play.play(env, seed)
        return capsys.readouterr().out
    return run


def solution(env, seed=3):
    env.reset(seed)
    return env.expert_reply()


def verdicts(shown):
    last = "(?:; -1 of it because the last try failed)?"
    return re.findall(rf"\[(\w+), reward ([-+\d.]+)(?:, tries left: (\d+))?{last}\]", shown)


def envs_py(*arguments, stdin=""):
    return subprocess.run([sys.executable, "envs.py", *map(str, arguments)], cwd=ROOT, input=stdin,
                          capture_output=True, text=True,
                          timeout=60)


def test_a_person_can_play_with_json_or_bare_formulas_and_stop_at_any_time(played):
    shown = envs_py("gp-l", "--seed", "3", "--show").stdout
    reply = json.loads(shown.split("\n> ")[1].splitlines()[0])
    done = envs_py("gp-l", "--seed", "3", stdin=f"1+1\nwhat?\n{json.dumps(reply)}\nnever read\n")
    assert (done.returncode, done.stderr) == (0, "")
    for shown in (done.stdout, *(played(make_env("gp-l"), "1+1", "what?", answer, "never read")
                                 for answer in (json.dumps(reply), reply["formula"],
                                                reply["formula"].removesuffix("=24")))):
        assert verdicts(shown) == [("wrong_numbers", "-2", "4"), ("illegal_formula", "-3", "3"),
                                   ("correct", "+5", "")]
        assert shown.endswith("Solved after 3 replies, total reward +0.\n")
        assert "A right reply" not in shown
    left = envs_py("gp-l", "--seed", "3", stdin="1\n")
    assert (left.returncode, left.stderr) == (0, "") and left.stdout.count("wrong_numbers") == 1


def test_the_tries_that_are_left_are_counted_down_and_a_solution_is_shown_after_the_last(played):
    env = make_env("gp-l")
    right = solution(env)
    lost = played(env, *["1"] * 9)
    assert verdicts(lost) == [("wrong_numbers", "-2", str(left))
                              for left in (4, 3, 2, 1)] + [("wrong_numbers", "-3", "0")]
    assert lost.endswith("tries left: 0; -1 of it because the last try failed]\n"
                         f"A right reply would have been: {right}\n"
                         "Not solved after 5 replies, total reward -11.\n")
    assert lost.count("A right reply") == 1


def test_help_and_prompt_cost_no_try(played):
    shown = played(make_env("gp-l"), "help", "?", "", "prompt", "PROMPT", "1")
    assert shown.count("A reply is the JSON object") == 3
    assert shown.count("Make 24 from four cards.") == 3
    assert verdicts(shown) == [("wrong_numbers", "-2", "4")]


@pytest.mark.parametrize("word", ["quit", "exit", "q", EOFError(), KeyboardInterrupt()])
def test_whoever_leaves_is_shown_a_right_reply_and_asked_nothing_more(played, word):
    env = make_env("gp-l")
    right = solution(env)
    shown = played(env, "1", word, "1")
    assert verdicts(shown) == [("wrong_numbers", "-2", "4")]
    assert shown.endswith(f"A right reply would have been: {right}\n")
    assert "olved after" not in shown
    assert played(env, word, "1", seed=None).count("---- episode") == 1


def test_a_seed_is_one_episode_and_without_one_there_is_always_another(played):
    env = make_env("gp-l", verify_iter=1)
    assert "---- episode 3 (--seed 3 plays it again) ----" in played(env, "1", "1")
    assert env.turn == 1
    shown = played(env, "1", "1", "quit", seed=None)
    assert shown.count("---- episode") == 3
    assert shown.count("Not solved after 1 reply, total reward -3.") == 2
    numbers = re.findall(r"---- episode (\d+) \(--seed \1 plays", shown)
    assert len(set(numbers)) == 3


def test_a_person_can_play_with_bare_actions(city):
    done = envs_py("virl-l", f"root={city}", stdin="forward()\nstop()\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert verdicts(done.stdout) == [("wrong_action", "-1", "1"), ("wrong_action", "-2", "0")]


def test_on_a_route_the_verdict_stands_before_the_next_place_of_which_only_the_news_is_told(
        played, city):
    env = make_env("virl-l", root=city)
    env.reset(3)
    actions = [position.action for position in env.rail]
    shown = played(env, *actions)
    assert verdicts(shown) == [("correct", "+1", "")] * len(actions)
    assert f"Solved after {len(actions)} replies" in shown
    first, *later = shown.split("\n> ")[1:]
    # what follows an answer: the verdict, then the next place
    for action, part in zip(actions, [first, *later][:-1]):
        answer, verdict, *news = part.splitlines()
        assert answer == action and verdict == "Correct.   [correct, reward +1]"
        assert f"-> {action}" in "\n".join(news)
    assert shown.count("Walk to a destination") == 1 and shown.count("Instructions:") == 1
    assert later[-1].splitlines()[1] == "Correct.   [correct, reward +1]"


def test_a_hand_in_pictures_is_written_where_the_player_is_told(played, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = make_env("gp-vl", resolution=60)
    seen = []

    def look(env, text):
        """A player who opens the picture before the first reply."""
        seen.extend(Image.open(path).tobytes() for path in tmp_path.glob("envs_*/*.png"))
        return "1"
    monkeypatch.setattr(play, "ask", look)
    shown = played(env)
    assert len(re.findall(r"\(the picture: .*\)", shown)) == 1
    assert seen == [env.picture().tobytes()] * 5 and not list(tmp_path.iterdir())


def test_one_split_at_a_time_is_played():
    done = envs_py("gp-l", "id", "rule_ood")
    assert done.returncode == 2 and "one split at a time, not rule_ood as well" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_card_s_letter_in_a_formula_costs_no_try_and_a_split_may_stand_behind_its_settings():
    told = envs_py("gp-l", "--seed", "3", stdin="(J-1)*8\n1+1\nquit\n").stdout
    assert "not its letter" in told and told.count("tries left: 4") == 1
    one, other = (envs_py("gp-l", *words, "--show").stdout
                  for words in (("rule_ood", "target=10"), ("target=10", "rule_ood")))
    assert one == other and "K counts as 13" in one and "Make 10" in one


class Number(NamedTuple):
    kind: str
    value: int


class Parity(Environment):
    """Say whether each of two numbers is even: a third game, with two positions in an episode."""
    kinds = ("first", "second")
    retry_prompt = "nav_retry"

    def lay_out(self, episode):
        self.rail = [Number(kind, self.rng.randint(1, 99)) for kind in self.kinds]

    def prompt(self):
        return f"Is this number even?\n{self.position.value}"

    def picture(self):
        raise ValueError("there is none")

    def judge(self, reply):
        right = reply == self.expert_reply()
        return Verdict("correct", 1.0, "Yes.") if right else Verdict("wrong", -1.0, "No.")

    def format_reply(self, answer):
        return json.dumps({"answer": answer})

    def expert_reply(self):
        return self.format_reply("odd" if self.position.value % 2 else "even")

    def flawed_reply(self):
        return self.format_reply("maybe")


def test_a_third_game_is_played_in_its_words(played, tmp_path):
    env = Parity(verify_iter=3)
    env.reset(3)
    right = ["odd" if number.value % 2 else "even" for number in env.rail]
    shown = played(env, "help", "A", *right)                   # no card: a letter is an answer
    told = shown.split("> help\n")[1].splitlines()
    assert told[0] == "A reply is the JSON object that the prompt asks for, or just the answer."
    assert not re.search("forward|card|letter", shown)
    assert verdicts(shown) == [("wrong", "-1", "2"), ("correct", "+1", ""), ("correct", "+1", "")]
    assert shown.endswith(f"\n{env.rail[1].value}\n\n> {right[1]}\nYes.   [correct, reward +1]\n"
                          "Solved after 3 replies, total reward +1.\n")
    env.example = "even"
    assert "or just the answer, such as\n    even\n" in played(env, "help")
    play.show(env, 3, str(tmp_path / "shown"))
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == ["00.txt", "01.txt"]


def test_help_shows_an_answer_of_the_game_that_is_played(played, city):
    assert "    (1+2)*8*1\n" in played(make_env("gp-l"), "help")
    assert "    forward()\n" in played(make_env("virl-l", root=city), "help")


def test_faults_of_an_expert_who_shows_none_are_refused():
    done = envs_py("gp-l", "faults=ten:0.5", "--show")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("envs.py: error: faults 'ten:0.5': has no effect here, since")
