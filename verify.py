"""VER, the verifier: it judges a reply by a status, a reward and a sentence for the model.

The paper's VER maps what the model says to a reward and to text, which the model reads before it
tries again (Section 3). GeneralPoints pays these rewards (appendix A.3):

    status             reward  when
    illegal_formula      -3    the reply holds no formula, or not a legal one
    wrong_numbers        -2    it is legal, but its numbers are not the cards, each once
    wrong_value          -1    its numbers are the cards, but it makes another value than the target
    correct              +5    it makes the target from the cards
    cards misread      -1.5    added if the cards are a picture, and "cards" is not what it shows
    last try failed      -1    added by envs.py, which counts the tries

V-IRL pays these (appendix B.3):

    status             reward  when
    correct              +1    the action is the expert's
    wrong_observation  -1.5    it is not, and the observation is wrong: it does not name the
                               landmark in sight, misses an intersection or invents one
    wrong_action         -1    it is not, though the observation is right
    last try failed      -1    added by envs.py, which counts the tries anew at each position

A status is decided by checks in a fixed order: the first that fails gives it. Only the "added"
lines come on top, and a formula that is partly right earns nothing. A formula is judged by the true
cards. So it can be `correct` with a misread "cards" list: 5 - 1.5 with pictures, and the episode
ends. A formula that fits only the misread cards has wrong numbers.

A formula holds integers, + - * / (or − × · ÷) and brackets. A division by zero is illegal. What
follows the first = is not read. Values are exact fractions, so 8/(3-8/3) makes 24. No `eval` runs.

`reading.read_reply` (support/reading.py) finds the answer in the reply. It reads what a person
would read, also where the JSON is damaged or stands within prose. Of several answers the last one
counts. What the model thinks, up to </think>, is no answer. `read_reply` never raises an error, and
its work on a hostile reply is bounded. This file knows neither torch nor the environments. Try the
verifier with `python envs.py gp-l`.
"""
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from support import reading, violations

REWARDS = {"correct": 5.0, "wrong_value": -1.0, "wrong_numbers": -2.0, "illegal_formula": -3.0}
MISREAD_PENALTY = -1.5
NAVIGATION_REWARDS = {"correct": 1.0, "wrong_observation": -1.5, "wrong_action": -1.0}
LAST_TRY_PENALTY = -1.0
MAX_FORMULA = violations.MAX_FORMULA     # characters; also bounds the depth of the recursion

# What the model is told; {names} are filled in. In a prompt file the key "feedback_correct"
# replaces the text "correct" (envs.py), and so on. The texts in LISTING may, when replaced, also
# hold {violations}: a list of all that is wrong.
LISTING = ("no_formula", "illegal_formula", "wrong_numbers", "wrong_value", "no_action",
           "wrong_action")
FEEDBACK = {
    "correct": "Correct.",
    "no_formula": "No JSON object with a \"formula\" was found in your reply.",
    "illegal_formula": "Your formula is not legal: {fault}.",
    "wrong_numbers": "Your formula uses {used}, but the cards give {numbers}.",
    "wrong_value": "Your formula uses the right numbers, but it makes {value}, not {target}.",
    "misread_cards": "{verdict} You read the cards as {read}; that is not what they show.",
    "no_cards": "{verdict} Your reply lists no \"cards\".",
    "no_action": "No JSON object with an \"action\" was found in your reply.",
    "wrong_action": "The action {action} is wrong here.",
    "missed_landmark": "{verdict} You did not name the landmark in sight.",
    "missed_intersection": "{verdict} You did not see the intersection.",
    "invented_intersection": "{verdict} There is no intersection here.",
    "plain": "That is not correct.",
    **violations.TEXTS,
}


@dataclass(frozen=True)
class Verdict:
    """What the verifier found in one reply.

    `answer_at` is the character of the reply at which the answer's key begins; without an answer,
    the reply's length. rl.py weighs the text before it differently. `cards_read` and
    `numbers_right` say whether "cards" and "number" list the deal, in any order. `ranks_right`
    counts the "cards" that are right in their place. Of these only `cards_read` is paid for, and
    only with pictures.
    """
    status: str
    reward: float
    message: str
    answer_at: int = 0
    cards_read: bool | None = None
    numbers_right: bool | None = None
    ranks_right: int | None = None


# ---- Words for the model -------------------------------------------------------------------------

@lru_cache(maxsize=None)
def split_template(template):
    """["Make ", "{target}", " from ..."]: every second part is a {name}."""
    return re.split(r"(\{\w+\})", template)


def fill(template, **values):
    """Put `values` into the {names} of `template`; all other braces (JSON skeletons) stay."""
    parts = split_template(template).copy()        # the cache keeps the original
    for i in range(1, len(parts), 2):
        name = parts[i][1:-1]
        if name in values:
            parts[i] = str(values[name])
    return "".join(parts)


def list_violations(found, phrases):
    """The text for {violations}: what support/violations.py found, in words."""
    return ", ".join(fill(phrases[name], **values) for name, values in found)


# ---- Arithmetic ----------------------------------------------------------------------------------

SYMBOLS = str.maketrans("×·÷−", "**/-")   # as people write them
LEGAL_TEXT = re.compile(r"[-+*/()0-9\s]*")
FORMULA_TOKEN = re.compile(r"[0-9]+|[-+*/()]")


@lru_cache(maxsize=2 ** 16)   # within a rollout the same formulas come back many times
def parse_formula(text):
    """Read a formula: its value as an unreduced (numerator, denominator), and its numbers in order.

    Raises ValueError with a short reason if it is not a legal formula or divides by zero. Each
    rule of this grammar is a function that returns its value as n, d (recursive descent):

        additive       = multiplicative, then any number of: + or -, multiplicative
        multiplicative = factor, then any number of: * or /, factor
        factor         = an integer, or ( additive )

    parse_formula("(1+2)*3") == ((9, 1), (1, 2, 3))
    """
    text = text.translate(SYMBOLS)
    if len(text) > MAX_FORMULA:
        raise ValueError(f"it is longer than {MAX_FORMULA} characters")
    legal = LEGAL_TEXT.match(text).end()
    if legal < len(text):
        raise ValueError(f"unexpected {reading.plain(text[legal])!r}")
    tokens = FORMULA_TOKEN.findall(text)
    tokens.append("")       # marks the end
    at = 0                  # the next token's index
    numbers = []

    # differs 1: exact fractions n / d; theirs evaluates floats
    def factor():
        nonlocal at
        token = tokens[at]
        at += 1
        if token.isdigit():
            numbers.append(int(token))
            return numbers[-1], 1
        if token != "(":
            raise ValueError(f"unexpected {token!r}" if token else "it breaks off")
        value = additive()
        if tokens[at] != ")":
            fault = f"unexpected {tokens[at]!r}" if tokens[at] else "a bracket is not closed"
            raise ValueError(fault)
        at += 1
        return value

    def multiplicative():
        nonlocal at
        n, d = factor()
        while tokens[at] in ("*", "/"):
            operator = tokens[at]
            at += 1
            n2, d2 = factor()
            if operator == "*":
                n, d = n * n2, d * d2
            elif n2 == 0:
                raise ValueError("it divides by zero")
            else:
                n, d = n * d2, d * n2
        return n, d

    def additive():
        nonlocal at
        n, d = multiplicative()
        while tokens[at] in ("+", "-"):
            operator = tokens[at]
            at += 1
            n2, d2 = multiplicative()
            if operator == "+":
                n, d = n * d2 + n2 * d, d * d2
            else:
                n, d = n * d2 - n2 * d, d * d2
        return n, d

    value = additive()
    if tokens[at]:
        raise ValueError(f"unexpected {tokens[at]!r}")
    return value, tuple(numbers)


# ---- Judging -------------------------------------------------------------------------------------

def check_formula(text, numbers, target):
    """The status of a formula, and the values that the sentence about this status names."""
    try:
        (numerator, denominator), used = parse_formula(text)
    except ValueError as fault:
        return "illegal_formula", {"fault": fault}
    if sorted(used) != sorted(numbers):
        return "wrong_numbers", {"used": ", ".join(map(str, used)),
                                 "numbers": ", ".join(map(str, numbers))}
    if numerator != target * denominator:          # numerator / denominator != target, exactly
        return "wrong_value", {"value": Fraction(numerator, denominator), "target": target}
    return "correct", {}


def judge_general_points(reply, cards, numbers, target=24, vision=False, feedback="informative",
                         phrases=FEEDBACK):
    """Judge one GeneralPoints reply (paper A.3; the first table above). No string raises an error.

    `cards` are ranks as text ("A", "10", "K"), `numbers` their values under the rule in force.
    `feedback` "informative" names the fault and its values, "plain" only says that the try failed.
    The message is made of `phrases`.
    """
    reply = reading.without_thought(reply)         # blanks in its place, so positions stay
    # `stated` is {"formula": ..., "cards": ..., "number": ...}, or {} if there is no formula.
    stated, answer_at = reading.read_reply(reply, ("formula", "cards", "number"))
    named = stated.get("cards")
    if vision and not stated:      # a reply that is cut before its formula may still list "cards"
        named, _ = reading.last_value(reply, "cards")
    cards_read = reading.same_multiset(named, cards)

    # The status is decided here, from what stands before the first =.
    formula = stated.get("formula")
    if isinstance(formula, str):
        formula = formula.split("=", 1)[0]
        status, values = check_formula(formula, numbers, target)
    else:      # the formula is a list or a number; or there is none, and "no_formula" is told below
        status, values = "illegal_formula", {"fault": "it is not text"}

    # The reward follows from the status. With pictures, misread cards cost 1.5 more.
    # differs 2: one status; theirs adds up penalties
    # differs 19: -1.5 on top; theirs pays it in place of the formula's reward, and plays on
    misread = vision and not cards_read
    reward = REWARDS[status] + (MISREAD_PENALTY if misread else 0)

    # The message is worded here.
    if feedback == "plain":
        message = phrases["correct" if status == "correct" else "plain"]
    else:
        phrase = phrases[status if stated else "no_formula"]
        if "{violations}" in phrase:        # as in the official wording, never in ours
            found = violations.of_formula(formula, numbers, target, parse_formula)
            values = {**values, "violations": list_violations(found, phrases)}
        message = fill(phrase, **values)
        if misread and reading.is_plain_list(named):
            shown = reading.plain_list(named)
            message = fill(phrases["misread_cards"], verdict=message, read=shown)
        elif misread:
            message = fill(phrases["no_cards"], verdict=message)

    return Verdict(status, reward, message, answer_at, cards_read,
                   numbers_right=reading.same_multiset(stated.get("number"), numbers),
                   ranks_right=reading.count_in_place(named, cards))


def judge_navigation(reply, action, landmark, intersection, feedback="informative",
                     phrases=FEEDBACK):
    """Judge one V-IRL reply (paper B.3; the second table above). No string raises an error.

    `action` is the expert's. `landmark` is the name of the place in sight, "" if there is none.
    `intersection` says whether the place is one. Capitals and blanks make no difference.
    `feedback` "informative" says what was wrong, but never what would be right.
    `reading.names_intersection` decides whether an observation names or denies an intersection.
    """
    reply = reading.without_thought(reply)         # blanks in its place, so positions stay
    # `stated` is {"action": ..., "current observation": ...}, or {} if there is no action.
    stated, answer_at = reading.read_reply(reply, ("action", "current observation"))
    said = stated.get("action")
    observation = stated.get("current observation")
    observed = reading.plain_name(observation) if isinstance(observation, str) else ""
    name = reading.plain_name(landmark)
    sees_intersection = reading.names_intersection(observed, name)

    # The status is decided here; `remark` names the sentence about a wrong observation.
    remark = None
    if isinstance(said, str) and reading.plain_action(said) == reading.plain_action(action):
        status = "correct"
    elif name not in observed:      # false if name is ""; differs 16: theirs seeks "intersection"
        status, remark = "wrong_observation", "missed_landmark"
    elif intersection and not sees_intersection:
        status, remark = "wrong_observation", "missed_intersection"
    elif sees_intersection and not intersection:
        status, remark = "wrong_observation", "invented_intersection"
    else:
        status = "wrong_action"

    # The message is worded here.
    if status == "correct":
        message = phrases["correct"]
    elif feedback == "plain":
        message = phrases["plain"]
    else:
        phrase = phrases["wrong_action" if stated else "no_action"]
        values = {"action": reading.plain(said)}
        if "{violations}" in phrase:        # as in the official wording, never in ours
            found = violations.of_step(reply, stated, landmark)
            values["violations"] = list_violations(found, phrases)
        message = fill(phrase, **values)
        if remark:
            message = fill(phrases[remark], verdict=message)

    return Verdict(status, NAVIGATION_REWARDS[status], message, answer_at)
