"""Replies that are not the expert's, and settings of ours that change how a task is played or paid.

The paper has none of these settings. `envs.make_env` wraps the environment that has one:

faults         errors of an imperfect demonstrator, from whom SFT then learns. Each has its share of
               the replies, such as leave_out:0.4,ten:0.15. FAULTS lists those of each task:
               leave_out     GeneralPoints: the formula lacks its last step, and so a card or two
               ten           GeneralPoints: J, Q and K count as ten whatever the rule says
               walk_past     V-IRL: the agent walks on at an intersection where it should change
                             its direction (a route's first direction comes before any)
               other_word    V-IRL: the direction is named by the paper's other rule; where a rule
                             has a third vocabulary, it is named by the compass word
faulty_tries   how many tries at a position have faults (1: only the first)
reward         "verdict" is the paper's; "random" is 1 or -1 whatever the reply says (a control)
guided         V-IRL: after a failed last try the expert goes on in the agent's place. So every
               position of a route is tried, and one early mistake does not hide the rest. Success
               is still that of a route without a failed position. Replies behind such a position
               have "guided" in their info

The starts of the tiny run are made with such faults (recipes/base.sh).
"""
import copy
import re

from support import settings
from support.solver import solutions


# ---- Failed tries, for dialogues with errors -----------------------------------------------------

def flawed_formula(rng, numbers):
    """A try at a formula of these numbers: it mostly makes another value.

    Sometimes it has a foreign number instead, or a bracket too many.
    """
    numbers = rng.sample(numbers, 4)
    fault = rng.choices(("value", "number", "form"), weights=(6, 2, 1))[0]
    if fault == "number":
        numbers[0] = rng.randint(1, 13)
    a, b, c, d = numbers
    o, p, q = rng.choices("+-*/", weights=(3, 3, 3, 1), k=3)
    formula = rng.choice((
        f"{a}{o}{b}{p}{c}{q}{d}",
        f"({a}{o}{b}){p}{c}{q}{d}",
        f"{a}{o}({b}{p}{c}){q}{d}",
        f"({a}{o}{b}){p}({c}{q}{d})",
        f"({a}{o}{b}{p}{c}){q}{d}"))
    return f"({formula}" if fault == "form" else formula


# ---- Faults of a demonstrator: each takes an environment and gives a reply -----------------------

def without_last_step(formula):
    """The longer operand of a formula's last operation: "(10-4)*3+6" -> "(10-4)*3"."""
    depth, last = 0, None
    for at, sign in enumerate(formula):
        if sign == "(":
            depth += 1
        if sign == ")":
            depth -= 1
        # The last operation is outside all brackets: the last + or - there, else the last * or /.
        if depth == 0 and sign in "+-":
            last = at
        if depth == 0 and sign in "*/" and (last is None or formula[last] in "*/"):
            last = at
    operands = formula[:last], formula[last + 1:]
    return max(operands, key=lambda operand: len(re.findall("[0-9]+", operand)))


def leave_out(env):
    return env.format_reply(without_last_step(env.formula), env.numbers)


def count_ten(env):
    """A formula with J, Q and K as ten; where there is none, the expert's reply."""
    numbers = list(env.numbers)
    for place, card in enumerate(env.cards):
        if card in "JQK":
            numbers[place] = 10
    found = solutions(numbers, env.target)
    return env.format_reply(found[0], numbers) if found else env.expert_reply()


def walk_past(env):
    """At an intersection the agent walks on; elsewhere it is the expert's reply."""
    if not env.position.intersection:
        return env.expert_reply()
    turns = sum(position.kind == "turn" for position in env.rail[:env.at + 1])
    walking = env.sentences[2 * turns - 1]         # each direction has two sentences: turn, go on
    return env.format_reply("forward()", sentence=walking)


def other_word(env):
    """The other rule's word; where the two rules do not differ, the expert's reply."""
    return env.format_reply(env.position.other_action or env.position.action)


HAND_FAULTS = {"leave_out": leave_out, "ten": count_ten}
ROUTE_FAULTS = {"walk_past": walk_past, "other_word": other_word}
FAULTS = {"gp-l": HAND_FAULTS, "gp-vl": HAND_FAULTS,
          "virl-l": ROUTE_FAULTS, "virl-vl": ROUTE_FAULTS}


def parse_faults(text, allowed):
    """"leave_out:0.4,ten:0.15" -> {"leave_out": 0.4, "ten": 0.15}.

    ValueError names what is not `allowed`.
    """
    shares = {}
    for word in filter(None, text.split(",")):
        name, _, share = word.partition(":")
        if not allowed:
            raise ValueError(f"faults {text!r}: the task has none")
        if name not in allowed or not re.fullmatch(r"0?\.\d+|1|1\.0", share):
            raise ValueError(f"faults {text!r}: allowed are {', '.join(allowed)}, each with its "
                             f"share of the replies, such as {next(iter(allowed))}:0.4")
        shares[name] = float(share)
    if sum(shares.values()) > 1:
        raise ValueError(f"faults {text!r}: the shares are more than 1 together")
    return shares


# Settings that touch the expert's replies or the rewards alone.
NOT_OF_OWN_REPLIES = ("faults", "faulty_tries", "solution", "reward")


def refuse_without_effect(given, names, why):
    """ValueError if one of these settings is given; `why` says why it has no effect."""
    for name in names:
        if name in given:
            raise ValueError(f"{name} {given[name]!r}: has no effect here, since {why}")


def check_taught(given):
    """ValueError if a setting has no effect where a model learns the replies of a demonstrator."""
    refuse_without_effect(given, ["guided"], "no route is played to its end")
    if "faults" not in given:
        refuse_without_effect(given, ["faulty_tries"], "the demonstrator has no faults")


def check_own_replies(given):
    """ValueError if a setting has no effect where a model learns its own right replies."""
    refuse_without_effect(given, NOT_OF_OWN_REPLIES, "a model that learns its own right replies "
                          "reads no expert and gets no reward")


def check_format(env):
    """ValueError if the verifier does not take the expert's reply, in the format of a prompt file.

    Then no reply in this format would ever be right.
    """
    if not env.settings.get("prompt_file"):
        return
    trial = copy.copy(env)
    trial.reset("0", begin=False)
    reply = trial.expert_reply()
    verdict = trial.judge(reply)
    cards_read = not env.vision or trial.details(verdict).get("cards_read", True)
    if verdict.status != "correct" or not cards_read:
        told = verdict.status if cards_read else f"{verdict.status}, but without the cards"
        raise ValueError(f"prompt file {env.settings['prompt_file']}: the verifier does not read "
                         f"its format; it judges the expert's reply {reply[:200]!r} as {told}")


# ---- The wrappers --------------------------------------------------------------------------------

class Wrapper:
    """Stands for an environment. What it does not define is read and set on the environment."""

    def __init__(self, env, **more):
        self.__dict__.update(env=env, **more)

    def __getattr__(self, name):           # called only for what the wrapper itself does not have
        if name.startswith("__"):          # asked for when a wrapper is copied, before it has `env`
            raise AttributeError(name)
        return getattr(self.env, name)

    def __setattr__(self, name, value):
        setattr(self.env, name, value)


class ImperfectDemonstrator(Wrapper):
    """Plants faults: `shares` (name -> share) says how often, `faults` (name -> function) how.

    Only the first `faulty_tries` at a position have faults.
    """

    def demonstrate(self):
        draw = 1.0                             # above all shares: no fault
        if self.env.tries < self.faulty_tries:
            draw = self.env.rng.random()
        for name, share in self.shares.items():
            if draw < share:
                return self.faults[name](self.env)
            draw -= share                      # the next fault's share begins here
        return self.env.expert_reply()


class RandomReward(Wrapper):
    """Pays 1 or -1, drawn by the environment's generator after each step."""

    def step(self, reply):
        messages, _, terminated, truncated, info = self.env.step(reply)
        reward = self.env.rng.choice((-1.0, 1.0))
        return messages, reward, terminated, truncated, info


class Guided(Wrapper):
    """A route that goes on with the expert's action where all tries have failed."""

    def reset(self, *args, **kwargs):
        self.lost = False                      # whether a position has failed
        return self.env.reset(*args, **kwargs)

    def step(self, reply):
        messages, reward, terminated, truncated, info = self.env.step(reply)
        if self.lost:
            info = {**info, "guided": True}
        self.lost = self.lost or truncated
        if truncated and self.at < len(self.rail) - 1:
            self.at += 1
            self.done = truncated = False
            self.begin_dialogue()
            messages, info = self.messages, {**info, "new_dialogue": True}
        info = {**info, "success": info["success"] and not self.lost}
        return messages, reward, terminated, truncated, info


def wrap(env, task, faults="", faulty_tries=1, reward="verdict", guided=False):
    """The environment of a task with what these settings plant in it.

    ValueError names a setting that is not allowed.
    """
    settings.check_whole("faulty_tries", faulty_tries, 1)
    settings.check_choice("reward", reward, ("verdict", "random"))
    allowed = FAULTS.get(task, {})
    shares = parse_faults(faults, allowed)
    if shares:
        env = ImperfectDemonstrator(env, faults=allowed, shares=shares, faulty_tries=faulty_tries)
    if guided and len(env.kinds) == 1:
        raise ValueError(f"guided: {task} has one position only, so nobody can go on")
    if guided:
        env = Guided(env)
    return RandomReward(env) if reward == "random" else env
