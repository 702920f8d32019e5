"""What a person would read in a model's reply, also where it is no clean JSON object.

The prompts ask for one JSON object with an answer ("formula" or "action") and some keys beside it.
Models also write single quotes, unquoted keys, trailing or missing commas, comments and prose.
They forget a brace, or the limit on tokens cuts the object. `read_reply` reads all of these:

    read_reply("So: {'action': stop(),} Done.", ("action", "current observation"))
    -> Reading(values={"action": "stop()"}, answer_at=5)

Before that, `without_thought` takes out what the model thinks up to </think>.

Any string may come in, and none raises an error or takes long. The functions below `read_reply`
compare with the truth what was read, and word it for the model.
"""
import json
import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

THOUGHT, END_OF_THOUGHT = "<think>", "</think>"
MAX_SCALARS = 500   # words and numbers of an object that is not JSON; beyond these it is not read
MAX_DEPTH = 100     # levels of nested lists and objects in a JSON object; a deeper one is not read
MAX_NAME = 1000     # characters of an observation or an action that are compared
MAX_ECHO = 100      # characters of what a reply states, when a verdict repeats it

# Every { of a reply may begin the object, and reading from there may go on to the reply's end.
# So a reply of ten thousand braces would be read ten thousand times, which takes seconds.
# Therefore reading from one { costs work: about its microseconds on an ordinary processor. The last
# { is read first. When MAX_WORK is spent, no earlier { is read, and what was found until then
# counts. The work is counted, not timed, so a reply gets the same verdict on every machine.
MAX_WORK = 3000         # for all { of one reply
WORK_PER_TRY = 8        # to call the JSON reader at one {
WORK_PER_SCALAR = 2     # to read one word or number of an object that is not JSON
JSON_PER_WORK = 50      # characters that the JSON reader passes in one unit of work
COUNT_PER_WORK = 500    # characters in which quotes are counted in one unit of work


class Reading(NamedTuple):
    """What `read_reply` found in a reply.

    `values` maps keys to what stands behind them. It is {} if the reply holds no answer.
    `answer_at` is where the answer's key stands in the reply, or the reply's length without one.
    """
    values: dict
    answer_at: int


# ---- One object, as JSON or more tolerantly ------------------------------------------------------

# SCALAR reads one key or value and keeps its text. TOKEN only walks over an object: it passes
# quoted strings whole, so that brackets in them are not counted, and marks keys by their colon.
SCALAR = re.compile(r"""
    \s*
    (?: "( (?: [^"\\] | \\. )* )"               # "in double quotes"
      | '( (?: [^'\\] | \\. )* )'               # 'in single quotes'
      | ( [^{}\[\]:,"'\s] [^{}\[\]:,"']* )      # bare words: all up to the next mark
    )
    \s*""", re.VERBOSE | re.DOTALL)
TOKEN = re.compile(r"""
    (?: "(?: [^"\\] | \\. )*"
      | '(?: [^'\\] | \\. )*'
      | [^{}\[\]:,"'\s] [^{}\[\]:,"']*
    )
    (?P<colon> \s* : )?                         # behind a key
    | [{}\[\]]""", re.VERBOSE | re.DOTALL)
OPEN_LIST = re.compile(r"\s*\[\s*")
CLOSE_LIST = re.compile(r"\s*\]\s*")
CLOSE_OBJECT = re.compile(r"\s*\}\s*")
ESCAPE = re.compile(r"""\\(?: u(?P<code>[0-9a-fA-F]{4}) | (?P<mark>["'/\\]) )""", re.VERBOSE)
DECODER = json.JSONDecoder()


def escaped_character(match):
    """The character that an escape stands for."""
    if match["code"]:
        return chr(int(match["code"], 16))
    return match["mark"]


def unescape(word):
    """A quoted word with the escapes that JSON has for single characters replaced."""
    if "\\" not in word:
        return word
    return ESCAPE.sub(escaped_character, word)


def read_scalar(text, position):
    """Read a quoted string or bare words: (the text, or None if neither stands there; its end)."""
    match = SCALAR.match(text, position)
    if match is None:
        return None, position
    word = match[match.lastindex]           # the one group of SCALAR that matched
    return unescape(word.strip()), match.end()


def read_list(text, position, max_items):
    """Read a list behind its [: (the items, or None; where it ends; how many were read)."""
    items = []
    num_read = 0
    while not CLOSE_LIST.match(text, position):
        item, position = read_scalar(text, position)
        num_read += 1
        if item is None or num_read > max_items or text[position:position + 1] not in (",", "]"):
            return None, position, num_read
        items.append(item)
        if text[position] == ",":
            position += 1
    return items, CLOSE_LIST.match(text, position).end(), num_read


def read_relaxed(text, position):
    """Read `{key: value, ...}` behind its brace, if it is not JSON.

    Single quotes, bare words and trailing commas are allowed; values are text or lists of text.
    Returns the dict, or None if it is no such object; and how many keys and values were read.
    """
    found = {}
    num_read = 0
    while not CLOSE_OBJECT.match(text, position):
        key, position = read_scalar(text, position)
        num_read += 2                                           # the key and a value
        if key is None or num_read > MAX_SCALARS or text[position:position + 1] != ":":
            return None, num_read
        opening = OPEN_LIST.match(text, position + 1)
        if opening:
            value, position, num_items = read_list(text, opening.end(), MAX_SCALARS - num_read)
            num_read += num_items
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


def is_deep(value):
    """Whether lists and objects are nested more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        within = []                         # what the lists and objects of this level hold
        for part in level:
            if isinstance(part, dict):
                within += part.values()
            elif isinstance(part, list):
                within += part
        level = within
    return bool(level)


def read_json(text, position):
    """Read one JSON object at its brace: (the dict, or None; where reading stopped)."""
    try:
        found, end = DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        return None, error.pos
    except (ValueError, RecursionError):    # thousands of digits in a number, or of brackets
        return None, len(text)
    # Versions of Python differ in how many brackets their JSON reader takes: hundreds, or any.
    brackets = text.count("[", position, end) + text.count("{", position, end)
    if brackets > MAX_DEPTH and is_deep(found):
        return None, len(text)
    return found, end


# ---- The object that counts ----------------------------------------------------------------------

def is_quoted(text, position):
    """Whether an odd number of double quotes stands before `position`, escaped ones aside."""
    quotes = text.count('"', 0, position) - text.count('\\"', 0, position)
    return quotes % 2 == 1


def last_object(reply, key):
    """The last complete object of a reply that has `key`: (the dict, or None; where it begins).

    From the last { backwards, each object is read as JSON. Until one is found, what is not JSON is
    read by `read_relaxed`. The search goes on after a find, since that may be another one's value:

        So: {"steps": {"formula": "3*8"}, "formula": "8/(3-8/3)"}

    So a JSON object that begins earlier and ends behind where the find begins replaces it.
    """
    # The usual reply is one JSON object and nothing else.
    if reply.startswith("{"):
        found, end = read_json(reply, 0)
        if found is not None and key in found and not reply[end:].strip():
            return found, 0

    # Else each { in front of the last mention of the key is tried, the last { first.
    last = None
    last_start = len(reply)
    work = 0
    last_mention = max(0, reply.rfind(key))                     # 0: there is none, so no { either
    position = reply.rfind("{", 0, last_mention)
    while position >= 0 and work < MAX_WORK:
        found, end = read_json(reply, position)
        work += WORK_PER_TRY + (end - position) // JSON_PER_WORK
        if found is None and last is None:
            found, num_read = read_relaxed(reply, position + 1)
            work += WORK_PER_SCALAR * num_read
            if found is not None and key in found:
                work += position // COUNT_PER_WORK
                if is_quoted(reply, position):                  # braces in a quoted text
                    found = None
        if found is not None and key in found and (last is None or end > last_start):
            last = found
            last_start = position
        position = reply.rfind("{", 0, position)
    return last, last_start


def find_key(text, start, key):
    """Of the object that begins at `start`: where its `key` stands (the last one), and its end."""
    at = start
    depth = 0
    for token in TOKEN.finditer(text, start):
        word = token[0]
        if word in ("{", "["):
            depth += 1
        elif word in ("}", "]"):
            depth -= 1
        if depth == 0:
            return at, token.end()
        if depth == 1 and token["colon"]:
            name = word.removesuffix(token["colon"]).strip("\"' ")
            if name == key:
                at = token.start()
    return at, len(text)


# ---- Without a complete object -------------------------------------------------------------------

LIST_ITEM = re.compile(r"""[^\s,"']+""")


@lru_cache(maxsize=None)
def value_pattern(key):
    """The pattern of `key:` with a quoted text or a list behind it, as in these lines:

        "cards": ["3", "8"], "formula": "3*8"
        formula: '3*8'
        I tried {'formula': '3*8'

    A key without double quotes counts at the beginning of a line, behind a brace or a comma.
    Elsewhere it is prose.
    """
    return re.compile(rf"""
        (?: "{re.escape(key)}"
          | (?: (?<= [{{,\n] ) | ^ )                        # behind a brace, a comma, a line break
            (?P<blanks> [^\S\n]* )
            (?P<key_quote> ['"]? ) {re.escape(key)} (?P=key_quote)
        )
        \s* : \s*
        (?: (?P<quote> ["'] )                               # a quoted text
            (?P<text> (?: \\. | (?! (?P=quote) ) [^\\] )* )
            (?P=quote)
          | \[+ (?P<items> [^\[\]]* ) \]                    # or a list, perhaps within a list
        )""", re.VERBOSE | re.DOTALL)


def last_value(text, key):
    """(The last quoted text or list behind `key:`, where that key stands), or (None, -1)."""
    value = None
    at = -1
    if key not in text:
        return value, at
    for match in value_pattern(key).finditer(text):
        if match["quote"]:
            value = unescape(match["text"])
        else:
            value = LIST_ITEM.findall(match["items"])
        at = match.start() + len(match["blanks"] or "")
    return value, at


# ---- A reply -------------------------------------------------------------------------------------

def without_thought(reply):
    """A reply with blanks in place of its thought, so that all else keeps its position.

    Thought is all that stands before the last </think>. The reply may lack the <think>, since a
    chat template may write it. Thought is also what stands behind a <think> that never ends.
    """
    # differs 31: theirs reads an answer within the thought, too
    before, mark, rest = reply.rpartition(END_OF_THOUGHT)
    answer, _, _ = rest.partition(THOUGHT)
    return (" " * len(before + mark) + answer).ljust(len(reply))


def read_reply(reply, keys):
    """Read a reply as a person would: a `Reading` of `keys`, of which the first is the answer's.

    Usually the last complete object with an answer counts (`last_object`). A quoted answer behind
    it counts instead, such as one in an object that is cut. So does any quoted answer where no
    object is complete. Then each key has the last quoted text or list behind it (`last_value`).
    """
    # differs 21: theirs reads the first object, and only in few forms
    answer_key, *other_keys = keys
    found, start = last_object(reply, answer_key)

    # The usual reply names the answer's key once, and there the answer stands.
    if found is not None and reply.count(answer_key) == 1:
        at = reply.index(answer_key)
        if reply[at - 1:at] in ("'", '"'):
            at -= 1
        return Reading(found, at)

    # What was found so far, and where the search for a later answer begins.
    complete = Reading({}, len(reply))
    end = 0
    if found is not None:
        at, end = find_key(reply, start, answer_key)
        complete = Reading(found, at)

    # Does a quoted answer stand behind it?
    if reply.find(answer_key, end) >= 0:
        answer, at = last_value(reply, answer_key)
        if isinstance(answer, str) and at >= end:
            beside = {key: last_value(reply, key)[0] for key in other_keys}
            return Reading({answer_key: answer, **beside}, at)
    return complete


# ---- Comparing with the truth --------------------------------------------------------------------

def is_plain_list(stated):
    """Whether what a reply states is a list of texts and numbers only."""
    return isinstance(stated, list) and all(isinstance(item, (str, int, float)) for item in stated)


def same_multiset(stated, truth):
    """Whether a list from a reply holds the same words or numbers as `truth`, in any order."""
    return is_plain_list(stated) and sorted(map(str, stated)) == sorted(map(str, truth))


def count_in_place(stated, truth):
    """How many items of a list from a reply are those of `truth`, each in its place."""
    if not is_plain_list(stated):
        return 0
    return len([said for said, true in zip(stated, truth) if str(said) == true])


# Texts such as "no intersection", "I don't see an intersection" or "intersection ahead: none". In
# "no landmark at this intersection" the "no" speaks of something else, so this does not match.
DENIED_INTERSECTION = re.compile(r"""
    (?: \b (?: not? | never | without | cannot ) | n't )
    (?: [ ] (?! landmark | but | this ) [\w']+ ){0,5} [ ] intersections?
    | intersections? (?: [ ]ahead | [ ]here )? : [ ] no (?: ne )? \b""", re.VERBOSE)


def plain_name(text):
    """A text as it is compared: lower case, single blanks, one spelling of accents and '."""
    text = unicodedata.normalize("NFKC", text[:MAX_NAME]).replace("\u2019", "'")
    return " ".join(text.split()).casefold()


def plain_action(text):
    """An action as it is compared: its `plain_name` without blanks, quotes and the marks . and ;"""
    return re.sub(r"[\s\"'.;]", "", plain_name(text))


def names_intersection(observation, landmark):
    """Whether an observation says that there is an intersection; both texts are `plain_name`s.

    The word does not count within the landmark's name ("Intersection Bar") or where it is denied.
    """
    if landmark:
        observation = observation.replace(landmark, "")
    return "intersection" in DENIED_INTERSECTION.sub("", observation)


# ---- Repeating to the model ----------------------------------------------------------------------

def plain(stated):
    """What a verdict repeats of a reply: short, on one line, and with harmless characters only.

    A character that begins or ends a control token (<|end|>, </s>, [INST]) becomes a question mark.
    So a model cannot write such a token into its next prompt.
    """
    return re.sub(r"[^A-Za-z0-9 _().,:;'+*/=-]", "?", " ".join(str(stated).split()))[:MAX_ECHO]


def plain_list(stated):
    """What a verdict repeats of a list (`is_plain_list`) in a reply, as JSON."""
    shown = []
    for item in stated[:MAX_ECHO]:
        shown.append(plain(item) if isinstance(item, str) else item)
    return json.dumps(shown)[:MAX_ECHO]
