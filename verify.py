"""VER, the verifier: it gives each reply a status, a reward and a sentence for the model.

A reply is a JSON object with an answer, "formula" or "action", and some keys beside it. The
paper's VER maps it to a reward and to text, which the model reads before it tries again
(Section 3). GeneralPoints pays these rewards (appendix A.3):

    status             reward  when
    illegal_formula      -3    the reply holds no formula, or an illegal one
    wrong_numbers        -2    the formula is legal, but does not use each card's value just once
    wrong_value          -1    the formula uses the right numbers, but does not make the target
    correct              +5    the formula uses the right numbers and makes the target
    cards misread      -1.5    added with pictures only: the list "cards" is not what is shown
    last try failed      -1    added by envs.py, which counts the tries

V-IRL pays these (appendix B.3):

    status             reward  when
    correct              +1    the action is the expert's
    wrong_observation  -1.5    the action is wrong, and so is the observation: it does not name the
                               landmark in sight, misses an intersection or invents one
    wrong_action         -1    the action is wrong, though the observation is right
    last try failed      -1    added by envs.py, which counts the tries anew at each position

The first line that applies decides the status and its reward; every "added" line that applies is
paid on top. A formula that is partly right earns nothing for that. A formula is judged by the true
cards, not by those in the reply. So it can be `correct` though a picture was misread: that earns
5 - 1.5 and ends the episode. A formula that fits only the misread cards has wrong numbers.

A formula holds integers, + - * / (or − × · ÷) and brackets. A division by zero is illegal. What
follows the first = is not read. Values are exact fractions, so 8/(3-8/3) makes 24. No `eval` runs.

`reading.read_reply` finds the answer even in damaged JSON or within prose. Of several answers the
last one counts. An answer in the model's thought, before </think>, does not count. No reply raises
an error or takes long to read. To try the verifier: `python envs.py gp-l`. A comment `# differs 1`
marks where we do not follow the official code; docs/differences.md explains each number.
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
MAX_FORMULA = violations.MAX_FORMULA     # characters; so `parse_formula` cannot recurse deep

# The sentences for the model; `fill` puts values into the {names}. A prompt file (envs.py) may
# replace any sentence: its key "feedback_correct" replaces "correct", and so on. The new sentence
# may also hold {violations}, a list of all that is wrong, if the one it replaces is in LISTING.
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

    `answer_at` is the index of the character at which the answer's key begins; without an answer,
    the reply's length. rl.py gives the text before that index another weight. Only GeneralPoints
    fills the last three fields. `cards_read`: is the reply's list "cards" the hand, in any order?
    `numbers_right`: likewise its list "number". `ranks_right`: how many of its "cards" are right in
    their place. Only `cards_read` changes the reward, and only with pictures.
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
    """Cut a template at its {names}, which get the odd indices: ["Make ", "{target}", " from"]."""
    return re.split(r"(\{\w+\})", template)


def fill(template, **values):
    """Put `values` into the {names} of `template`; all other braces (JSON skeletons) stay."""
    parts = split_template(template).copy()        # the cache keeps the original
    for i in range(1, len(parts), 2):
        name = parts[i][1:-1]                      # without its braces
        if name in values:
            parts[i] = str(values[name])
    return "".join(parts)


def list_violations(found, phrases):
    """The text for {violations}: what support/violations.py found, in words."""
    return ", ".join(fill(phrases[name], **values) for name, values in found)


# ---- Arithmetic ----------------------------------------------------------------------------------

SYMBOLS = str.maketrans("×·÷−", "**/-")   # signs that people write for these
LEGAL_TEXT = re.compile(r"[-+*/()0-9\s]*")
FORMULA_TOKEN = re.compile(r"[0-9]+|[-+*/()]")


@lru_cache(maxsize=2 ** 16)   # within a rollout the same formulas come back many times
def parse_formula(text):
    """Read a formula: its value as an unreduced (numerator, denominator), and its numbers in order.

    Raises ValueError with a short reason if it is not a legal formula or divides by zero. Each
    rule of this grammar is a function that returns its part's value n / d (recursive descent):

        additive       = multiplicative, then any number of: + or -, multiplicative
        multiplicative = factor, then any number of: * or /, factor
        factor         = an integer, or ( additive )

    parse_formula("(1+2)*3") == ((9, 1), (1, 2, 3))
    """
    text = text.translate(SYMBOLS)
    if len(text) > MAX_FORMULA:
        raise ValueError(f"it is longer than {MAX_FORMULA} characters")
    num_legal = LEGAL_TEXT.match(text).end()
    if num_legal < len(text):
        raise ValueError(f"unexpected {reading.plain(text[num_legal])!r}")
    tokens = FORMULA_TOKEN.findall(text)
    tokens.append("")       # marks the end
    at = 0                  # the next token's index
    numbers = []

    # differs 1: exact fractions n / d; the official code computes with floats
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
    """The status of a formula, and the values to fill into the sentence for this status."""
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
    `vision`: they are shown as a picture. `phrases` are the sentences for the model. `feedback`:
    "informative" names the fault and its values, "plain" only says that the try failed.
    """
    reply = reading.without_thought(reply)     # as long: blanks replace the thought
    # `stated` is {"formula": ..., "cards": ..., "number": ...}, or {} if there is no formula.
    stated, answer_at = reading.read_reply(reply, ("formula", "cards", "number"))
    stated_cards = stated.get("cards")
    if vision and not stated:      # a reply that is cut before its formula may still list "cards"
        stated_cards, _ = reading.last_value(reply, "cards")
    cards_read = reading.same_multiset(stated_cards, cards)

    # The status is decided here, by what stands before the formula's first =.
    formula = stated.get("formula")
    if isinstance(formula, str):
        formula = formula.split("=", 1)[0]
        status, values = check_formula(formula, numbers, target)
    else:      # not text; if there is no formula at all, the message below is "no_formula"
        status, values = "illegal_formula", {"fault": "it is not text"}

    # The reward follows from the status. With pictures, misread cards cost 1.5 more.
    # differs 2: one status and its reward; the official code adds up several penalties
    # differs 19: -1.5 on top; the official code pays it instead of the formula's reward
    misread = vision and not cards_read
    reward = REWARDS[status] + (MISREAD_PENALTY if misread else 0)

    # The message is worded here.
    if feedback == "plain":
        message = phrases["correct" if status == "correct" else "plain"]
    else:
        phrase = phrases[status if stated else "no_formula"]
        if "{violations}" in phrase:        # only in a prompt file, such as the official wording
            found = violations.of_formula(formula, numbers, target, parse_formula)
            values = {**values, "violations": list_violations(found, phrases)}
        message = fill(phrase, **values)
        if misread and reading.is_plain_list(stated_cards):
            read = reading.plain_list(stated_cards)
            message = fill(phrases["misread_cards"], verdict=message, read=read)
        elif misread:
            message = fill(phrases["no_cards"], verdict=message)

    return Verdict(status, reward, message, answer_at, cards_read,
                   numbers_right=reading.same_multiset(stated.get("number"), numbers),
                   ranks_right=reading.count_in_place(stated_cards, cards))


def judge_navigation(reply, action, landmark, intersection, feedback="informative",
                     phrases=FEEDBACK):
    """Judge one V-IRL reply (paper B.3; the second table above). No string raises an error.

    `action` is the expert's. `landmark` is the name of the landmark in sight, "" if there is none.
    `intersection`: is the position at one? Capitals and blanks make no difference. `feedback`
    "informative" says what was wrong, but never what would be right. `reading.names_intersection`
    decides whether an observation names or denies an intersection.
    """
    reply = reading.without_thought(reply)     # as long: blanks replace the thought
    # `stated` is {"action": ..., "current observation": ...}, or {} if there is no action.
    stated, answer_at = reading.read_reply(reply, ("action", "current observation"))
    said = stated.get("action")
    observation = stated.get("current observation")
    observed = reading.plain_name(observation) if isinstance(observation, str) else ""
    landmark_name = reading.plain_name(landmark)
    sees_intersection = reading.names_intersection(observed, landmark_name)

    # The status is decided here; `remark` names the sentence about a wrong observation.
    # differs 16: the landmark's name is sought; the official code seeks the word "intersection"
    remark = None
    if isinstance(said, str) and reading.plain_action(said) == reading.plain_action(action):
        status = "correct"
    elif landmark_name not in observed:            # false without a landmark: "" is in every text
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
        if "{violations}" in phrase:        # only in a prompt file, such as the official wording
            found = violations.of_step(reply, stated, landmark)
            values["violations"] = list_violations(found, phrases)
        message = fill(phrase, **values)
        if remark:
            message = fill(phrases[remark], verdict=message)

    return Verdict(status, NAVIGATION_REWARDS[status], message, answer_at)
