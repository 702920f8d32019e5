"""Judge a reply: exact arithmetic, one status and one reward per turn, a sentence for the model.

The paper calls this VER: it maps the model's reply to a reward and to text that the model reads before it tries
again (Section 3). The first line that applies decides the turn. GeneralPoints pays the column of appendix A.3:

    status            reward   when
    illegal_formula     -3     no reply object, no formula, or not a legal one (only integers, + - * / (or − × · ÷) and
                               brackets; a division by zero has no value and is illegal too)
    wrong_numbers       -2     legal, but its numbers are not exactly the cards: foreign, used twice or left out
    wrong_value         -1     the cards, each once, but another value than the target
    correct             +5     the left side of the formula makes the target; what follows the first = is not read
    cards misread     -1.5     added to any of the above when the cards come as a picture; a correct equation over
                               misread cards earns 3.5 and still ends the episode
    last try failed     -1     added by the environment (envs.py), which counts the tries

V-IRL pays the column of appendix B.3:

    correct             +1     the action is the expert's
    wrong_observation  -1.5    it is not, and the observation says nothing of the landmark in sight, or of the
                               intersection, or speaks of an intersection where there is none
    wrong_action        -1     it is not, though the observation is right
    last try failed     -1     as above, with the tries counted anew at every position

A reply has one status, only the two penalties that are "added" come on top, and a half-right formula earns nothing. No
`eval`: formulas are read by a tokenizer and a recursive descent over exact fractions, so 8/(3-8/3) is 24 and 9**9**9 is not
a formula. This file knows neither torch nor the environments; `python envs.py gp-l` is the way to meet it.
"""
import json
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from support import violations

REWARDS = {"correct": 5.0, "wrong_value": -1.0, "wrong_numbers": -2.0, "illegal_formula": -3.0}
MISREAD_PENALTY = -1.5
NAVIGATION_REWARDS = {"correct": 1.0, "wrong_observation": -1.5, "wrong_action": -1.0}
LAST_TRY_PENALTY = -1.0
MAX_FORMULA = 100   # characters; four cards need fewer than 40. Also bounds the depth of the recursion.
MAX_ECHO = 100      # characters of what a reply states, when a verdict repeats it
MAX_NAME = 1000     # characters of an observation or an action that are compared
MAX_SCALARS = 500   # words and numbers in an object that is not JSON
MAX_WORK = 3000     # about microseconds; after so many false starts a reply counts as holding no object

# What the model is told. A prompt file may replace any of these by name (envs.py); {braces} are filled in. In those of
# LISTING {violations} may stand as well: all that is wrong, as a list.
LISTING = ("no_formula", "illegal_formula", "wrong_numbers", "wrong_value", "no_action", "wrong_action")
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

    `answer_at` is where in the reply the key of the answer stands, at its end if there is none: rl.py weighs what comes
    before otherwise.
    `cards_read` and `numbers_right` say whether the reply's "cards" and "number" lists match the deal as multisets,
    `ranks_right` how many of the "cards" are right in their place; they are measured in every reply, and only
    `cards_read` is ever paid for (with pictures).
    """
    status: str
    reward: float
    message: str
    answer_at: int = 0
    cards_read: bool | None = None
    numbers_right: bool | None = None
    ranks_right: int | None = None


@lru_cache(maxsize=None)
def split_template(template):
    """["Make ", "{target}", " from ..."]: every second part is a {name}."""
    return re.split(r"(\{\w+\})", template)


def fill(template, **values):
    """Put `values` into the {names} of `template`, leaving every other brace (JSON skeletons) alone."""
    parts = split_template(template).copy()
    for i in range(1, len(parts), 2):
        parts[i] = str(values.get(parts[i][1:-1], parts[i]))
    return "".join(parts)


# ---- Reading a reply ---------------------------------------------------------------------------------------

SCALAR = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|([^{}\[\]:,"'\s][^{}\[\]:,"']*))\s*""", re.S)
OPEN_LIST, CLOSE_LIST, CLOSE_OBJECT = (re.compile(rf"\s*{re.escape(mark)}\s*") for mark in "[]}")
TOKEN = re.compile(r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^{}\[\]:,"'\s][^{}\[\]:,"']*)(\s*:)?|[{}\[\]]""", re.S)
DECODER = json.JSONDecoder()


def unescape(word):
    """A quoted word without its backslashes, read as in JSON where they mean something there."""
    return re.sub(r"""\\(?:u([0-9a-fA-F]{4})|(["'/\\]))""", lambda found: chr(int(found[1], 16)) if found[1] else found[2],
                  word) if "\\" in word else word


def read_scalar(text, position):
    """A quoted string or a run of bare words: (its text, where it ends); the text is None where there is neither."""
    match = SCALAR.match(text, position)
    if match is None:
        return None, position
    return unescape(match[match.lastindex].strip()), match.end()


def read_relaxed(text, position):
    """Read `{key: value, ...}` behind its brace, with single quotes, bare words or trailing commas.

    Values are text or lists of text. Returns (the dict, or None if it is no such object; how many scalars were read,
    never more than MAX_SCALARS).
    """
    found, num_read = {}, 0
    while not CLOSE_OBJECT.match(text, position):
        key, position = read_scalar(text, position)
        num_read += 2                                              # the key and a value
        if key is None or text[position:position + 1] != ":" or num_read > MAX_SCALARS:
            return None, num_read
        opening = OPEN_LIST.match(text, position + 1)
        if opening:
            value, position = [], opening.end()
            while not CLOSE_LIST.match(text, position):
                item, position = read_scalar(text, position)
                num_read += 1
                if item is None or text[position:position + 1] not in (",", "]") or num_read > MAX_SCALARS:
                    return None, num_read
                value.append(item)
                position += text[position] == ","
            position = CLOSE_LIST.match(text, position).end()
        else:
            value, position = read_scalar(text, position + 1)
            if value is None:
                return None, num_read
        found[key] = value
        if text[position:position + 1] == ",":
            position += 1
        elif not CLOSE_OBJECT.match(text, position):
            return None, num_read
    return found, num_read


def read_json(text, position):
    """Read one JSON object at its brace: (the dict or None, where reading stopped)."""
    try:
        return DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        return None, error.pos
    except (ValueError, RecursionError):   # an integer of thousands of digits; thousands of open brackets
        return None, len(text)


def last_object(reply, key):
    """(the last complete object of a reply that has `key`, as a dict, and where it begins); (None, 0) if there is none.

    Each object is read as JSON first, then as models really write it: trailing commas, single quotes, unquoted card
    names; prose and code fences may surround it. An object that JSON finds around the last one is preferred: its
    braces were text. After MAX_WORK microseconds' worth of false starts it gives up.
    """
    if reply.startswith("{"):                                       # the common case: nothing but one JSON object
        found, end = read_json(reply, 0)
        if found is not None and key in found and not reply[end:].strip():
            return found, 0
    work, position = 0, reply.rfind("{", 0, max(0, reply.rfind(key)))
    last, last_start = None, len(reply)
    while position >= 0 and work < MAX_WORK:
        found, end = read_json(reply, position)
        work += 8 + (end - position) // 50
        if found is None and last is None:
            found, num_read = read_relaxed(reply, position + 1)
            work += 2 * num_read
            if found is not None and key in found:
                work += position // 500
                within_quotes = (reply.count('"', 0, position) - reply.count('\\"', 0, position)) % 2
                found = None if within_quotes else found
        if found is not None and key in found and (last is None or end > last_start):
            last, last_start = found, position
        position = reply.rfind("{", 0, position)
    return last, last_start


def find_key(text, start, key):
    """Where in the object that begins at `start` its (last) `key` stands, and where the object ends."""
    at, depth = start, 0
    for token in TOKEN.finditer(text, start):
        depth += (token[0] in "{[") - (token[0] in "}]")
        if depth == 0:
            return at, token.end()
        if depth == 1 and token[1] and token[0][:-len(token[1])].strip("\"' ") == key:
            at = token.start()
    return at, len(text)


def last_value(text, key):
    """(the last quoted text or list behind `key:`, where that key stands); (None, -1) if there is none.

    A key without double quotes counts at the beginning of a line, behind a brace or a comma: elsewhere it is prose.
    """
    quoted, bare = rf'"{key}"', rf"""(?:(?<=[{{,\n])|^)[^\S\n]*(['"]?){key}\1"""
    value, at = None, -1
    if key not in text:
        return value, at
    for match in re.finditer(rf"""(?:{quoted}|{bare})\s*:\s*(?:(["'])((?:\\.|(?!\2)[^\\])*)\2|\[+([^\[\]]*)\])""", text, re.S):
        value = unescape(match[3]) if match[2] else re.findall(r"""[^\s,"']+""", match[4])
        at = match.start() + len(match[0]) - len(match[0].lstrip())
    return value, at


def read_reply(reply, keys):
    """What a reply says of `keys`, the answer's first: (a dict, or None without an answer; where the answer's key stands,
    at the reply's end without one).

    It is read as a person would. Usually it holds an object (`last_object`). Where a quoted answer stands behind the last
    of these, in an object that is cut, lacks a brace or a comma or holds a comment, each key has the last quoted text or list
    behind it.
    """
    # differs 21: theirs reads the first object, and only in few forms
    found, start = last_object(reply, keys[0])
    if found is not None and reply.count(keys[0]) == 1:             # the common case: that is the key
        at = reply.index(keys[0])
        return found, at - (reply[at - 1:at] in ("'", '"'))
    at, end = find_key(reply, start, keys[0]) if found is not None else (len(reply), 0)
    if reply.find(keys[0], end) >= 0:
        answer, answer_at = last_value(reply, keys[0])
        if isinstance(answer, str) and answer_at >= end:
            return {keys[0]: answer, **{key: last_value(reply, key)[0] for key in keys[1:]}}, answer_at
    return found, at


def plain(stated):
    """What a verdict repeats of a reply: short, on one line, and without a character that begins or ends a control token of
    any tokenizer (<|end|>, </s>, [INST], ...), so that a model cannot write one into its own next prompt."""
    return re.sub(r"[^A-Za-z0-9 _().,:;'+*/=-]", "?", " ".join(str(stated).split()))[:MAX_ECHO]


# ---- Arithmetic --------------------------------------------------------------------------------------------

SYMBOLS = str.maketrans("×·÷−", "**/-")   # as people write them
LEGAL_TEXT = re.compile(r"[-+*/()0-9\s]*")
FORMULA_TOKEN = re.compile(r"[0-9]+|[-+*/()]")


@lru_cache(maxsize=2 ** 16)   # within a rollout the same formulas come back many times
def parse_formula(text):
    """Read a formula: its value as an unreduced (numerator, denominator), and the numbers it uses in order.

    Raises ValueError with a short reason if it is not a legal formula or divides by zero.
    """
    text = text.translate(SYMBOLS)
    if len(text) > MAX_FORMULA:
        raise ValueError(f"it is longer than {MAX_FORMULA} characters")
    legal = LEGAL_TEXT.match(text).end()
    if legal < len(text):
        raise ValueError(f"unexpected {plain(text[legal])!r}")
    tokens = FORMULA_TOKEN.findall(text)
    tokens.append("")                                          # sentinel: the end
    numbers, at = [], 0                                        # differs 1: exact; theirs evaluates floats

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
            raise ValueError(f"unexpected {tokens[at]!r}" if tokens[at] else "a bracket is not closed")
        at += 1
        return value

    def multiplicative():
        nonlocal at
        n, d = factor()
        while tokens[at] in ("*", "/"):
            at += 1
            if tokens[at - 1] == "*":
                n2, d2 = factor()
            else:
                d2, n2 = factor()
                if d2 == 0:
                    raise ValueError("it divides by zero")
            n, d = n * n2, d * d2
        return n, d

    def additive():
        nonlocal at
        n, d = multiplicative()
        while tokens[at] in ("+", "-"):
            at += 1
            sign = 1 if tokens[at - 1] == "+" else -1
            n2, d2 = multiplicative()
            n, d = n * d2 + sign * n2 * d, d * d2
        return n, d

    value = additive()
    if tokens[at]:
        raise ValueError(f"unexpected {tokens[at]!r}")
    return value, tuple(numbers)


# ---- Judging -----------------------------------------------------------------------------------------------

def is_plain_list(stated):
    return isinstance(stated, list) and all(isinstance(item, (str, int, float)) for item in stated)


def same_multiset(stated, truth):
    """Whether a list from a reply holds the same words or numbers as `truth`, in any order."""
    return repr(stated) == repr(truth) or is_plain_list(stated) and sorted(map(str, stated)) == sorted(map(str, truth))


def in_place(stated, truth):
    """How many items of a list from a reply are those of `truth`, each in its place."""
    return sum(str(said) == true for said, true in zip(stated, truth)) if is_plain_list(stated) else 0


def fill_verdict(phrases, name, find_violations, **values):
    """The phrase of a verdict, its violations found only where it lists them."""
    if "{violations}" in phrases[name]:
        values["violations"] = ", ".join(fill(phrases[kind], **of) for kind, of in find_violations())
    return fill(phrases[name], **values)


def judge_general_points(reply, cards, numbers, target=24, vision=False, feedback="informative", phrases=FEEDBACK):
    """Judge one GeneralPoints reply (paper A.3; the table at the top of this file). Any string in, never an exception.

    `cards` are ranks as text ("A", "10", "K"), `numbers` their values under the rule in force. `feedback`
    "informative" names the fault and its values, "plain" only says that the try failed; `phrases` are the words.
    """
    found, answer_at = read_reply(reply, ("formula", "cards", "number"))
    cards_read = found is not None and same_multiset(found.get("cards"), cards)
    numbers_right = found is not None and same_multiset(found.get("number"), numbers)
    status, phrase, values = "illegal_formula", "illegal_formula", {"fault": "it is not text"}
    if found is None:
        phrase = "no_formula"
    elif isinstance(found["formula"], str):
        try:
            (numerator, denominator), used = parse_formula(found["formula"].split("=", 1)[0])
            if sorted(used) != sorted(numbers):
                status = "wrong_numbers"
                values = {"used": ", ".join(map(str, used)), "numbers": ", ".join(map(str, numbers))}
            elif numerator != target * denominator:
                status, values = "wrong_value", {"value": Fraction(numerator, denominator), "target": target}
            else:
                status, values = "correct", {}
            phrase = status
        except ValueError as fault:
            values = {"fault": fault}
    reward = REWARDS[status]                                        # differs 2: one status; theirs adds up penalties
    formula = found["formula"].split("=", 1)[0][:MAX_FORMULA] if found and isinstance(found["formula"], str) else None
    message = fill_verdict(phrases, phrase, lambda: violations.of_formula(formula, numbers, target, parse_formula), **values)
    if vision and not cards_read:                                   # differs 19: theirs pays -1.5 instead, and the episode goes on
        reward += MISREAD_PENALTY
        stated = found.get("cards") if found else None
        if is_plain_list(stated):
            named = json.dumps([plain(card) if isinstance(card, str) else card for card in stated[:MAX_ECHO]])[:MAX_ECHO]
            message = fill(phrases["misread_cards"], verdict=message, read=named)
        else:
            message = fill(phrases["no_cards"], verdict=message)
    if feedback == "plain":
        message = phrases["correct" if status == "correct" else "plain"]
    return Verdict(status, reward, message, answer_at, cards_read, numbers_right,
                   in_place(found and found.get("cards"), cards))


NO_INTERSECTION = re.compile(r"(?:\b(?:not?|never|without|cannot)|n't)(?: (?!landmark|but|this)[\w']+){0,5} intersections?"
                             r"|intersections?(?: ahead| here)?: no(?:ne)?\b")


def plain_name(text):
    """A text for comparison: blanks, capitals, accents' spelling and curly apostrophes make no difference."""
    return " ".join(unicodedata.normalize("NFKC", text[:MAX_NAME]).replace("\u2019", "'").split()).casefold()


def plain_action(text):
    """An action for comparison: nor do blanks, capitals, quotes and a full stop."""
    return re.sub(r"[\s\"'.;]", "", plain_name(text))


def judge_navigation(reply, action, landmark, intersection, feedback="informative", phrases=FEEDBACK):
    """Judge one V-IRL reply (paper B.3; the second table at the top). Any string in, never an exception.

    `action` is the expert's, `landmark` the name of the place in sight ("" if there is none), `intersection` whether
    this is one. Names and the word intersection are found in any spelling of capitals. `feedback` "informative" says
    what was wrong, and never what would be right.
    """
    found, answer_at = read_reply(reply, ("action", "current observation"))
    found = found or {}
    stated, observed, name = found.get("action"), found.get("current observation"), plain_name(landmark)
    said = observed if found else last_value(reply, "current observation")[0]
    observed = plain_name(observed) if isinstance(observed, str) else ""
    beside_name = observed.replace(name, "") if name else observed
    sees_intersection = "intersection" in NO_INTERSECTION.sub("", beside_name)
    message = fill_verdict(phrases, "wrong_action" if found else "no_action",
                           lambda: violations.of_step(said, landmark), action=plain(stated))
    if isinstance(stated, str) and plain_action(stated) == plain_action(action):
        status, message = "correct", phrases["correct"]
    elif name not in observed:                                      # differs 16: theirs looks for another word here
        status, message = "wrong_observation", fill(phrases["missed_landmark"], verdict=message)
    elif sees_intersection != intersection:
        fault = "missed_intersection" if intersection else "invented_intersection"
        status, message = "wrong_observation", fill(phrases[fault], verdict=message)
    else:
        status = "wrong_action"
    if feedback == "plain":
        message = phrases["correct" if status == "correct" else "plain"]
    return Verdict(status, NAVIGATION_REWARDS[status], message, answer_at)
