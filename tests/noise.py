"""A million noisy replies to both judges, against an oracle that shares no code with them.

    python tests/noise.py --replies 1000000 > noise.md

A player answers right or wrong, in one of the forms that models use. Half of the replies are then
damaged: characters are lost, doubled, swapped, changed or put in, or the end is cut off. The other
half has noise beside the answer only, which is harmless.

Three faults are counted: exceptions, replies that are wrongly called correct, and right replies
with harmless noise that are not called correct. A reply is wrongly called correct if the oracle
finds no right answer behind the answer's key. For formulas the oracle is Python's parser over
fractions, for actions it compares letters. pytest does not collect this file.
"""
import argparse
import ast
import json
import operator
import platform
import random
import re
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.solver import solutions
from verify import judge_general_points, judge_navigation

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}
LIKE_PYTHON = str.maketrans("×·÷−", "**/-")
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
ALPHABET = '{}[]:,"\'\\ \n+-*/()=0123456789ABCJQKabefnorx×÷−·.;<|>_\u2028é'
WORDS = ["", "Let me think. ", "I try 3*8 first { no }. ", "It's easy: ", "```json\n",
         "<think>formula?</think>", "So the \"formula\" is: "]
ENDS = ["", "\n```", " Done.", " }", "\n\nThat's my formula.", " {\"confidence\": 1}", "<|end|>"]
PLACES = ("Marn Cafe", "Café d'Or", "The Briry Hotel", "Intersection Bar")
ACTIONS = ("forward()", "stop()", "turn_direction(north)", "turn_direction(southwest)",
           "turn_direction(left)", "turn_direction(slightly right)")


# ---- The oracle ----------------------------------------------------------------------------------

def value_and_numbers(text):
    """(The value of a formula by Python's parser, its numbers sorted), or None if it is none."""
    text = re.sub(r"(?<![0-9])0+(?=[0-9])", "", " ".join(text.translate(LIKE_PYTHON).split()))

    def walk(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            (left, some), (right, more) = walk(node.left), walk(node.right)
            return OPERATORS[type(node.op)](left, right), some + more
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value), [node.value]
        raise ValueError
    try:
        value, numbers = walk(ast.parse(text, mode="eval").body)
        return value, sorted(numbers)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def right_formulas(reply, numbers, target):
    """For every "formula" in the reply with something like a formula behind it: is it right?"""
    def character(found):
        return chr(int(found[1], 16))

    # Signs that are escaped as in JSON are read first.
    reply = re.sub(r"\\u(00b7|00d7|00f7|2212)", character, reply).replace("\\/", "/")
    signs = r"[0-9+\-*/()×·÷−\s]*"
    runs = re.findall(rf"formula[\"'\\ \s]*:?[\s\[]*[\"']?({signs}[0-9]{signs})", reply)
    return [value_and_numbers(run) == (target, sorted(numbers)) for run in runs]


def right_actions(reply, action):
    """For every "action" in the reply: whether the right one follows, letter by letter."""
    def bare(text):
        return re.sub(r"[\s\"'’.;]", "", text).casefold()

    behind_each = re.split("action", reply)[1:]
    return [bare(text).lstrip(":").startswith(bare(action)) for text in behind_each]


# ---- Replies -------------------------------------------------------------------------------------

def write(rng, fields):
    """An object in one of the forms that models write; a person reads the same from each."""
    form = rng.randrange(8)
    indent = rng.choice((None, None, 2))
    text = json.dumps(fields, indent=indent, ensure_ascii=rng.random() < 0.5)
    quoted = [(key, json.dumps(value, ensure_ascii=False)) for key, value in fields.items()]
    lines = [f'"{key}": {value}' for key, value in quoted]
    if form == 1:       # no quotes around the keys
        text = "{" + ", ".join(f"{key}: {value}" for key, value in quoted) + "}"
    elif form == 2:     # a comma behind the last value
        text = "{" + ", ".join(lines) + ",}"
    elif form == 3:     # no commas
        text = "{\n" + "\n".join(lines) + "\n}"
    elif form == 4:     # no last brace
        text = text[:-1]
    elif form == 5:     # no braces
        text = ", ".join(lines)
    elif form == 6:     # a comment
        text = "{ // my answer\n" + ",\n".join(f"{line} " for line in lines) + "}"
    elif form == 7 and not any("'" in value for _, value in quoted):    # single quotes
        single = [f"'{key}': " + value.replace('"', "'") for key, value in quoted]
        text = "{" + ", ".join(single) + "}"
    return text


def damage(rng, text):
    """The text with one to eight faults, and sometimes without its end."""
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(text) + 1)
        fault = rng.randrange(6)
        before, here, behind = text[:at], text[at:at + 1], text[at + 1:]
        if fault == 0:          # a character is lost
            text = before + behind
        elif fault == 1:        # doubled
            text = before + here + here + behind
        elif fault == 2:        # swapped with the next
            text = before + behind[:1] + here + behind[1:]
        elif fault == 3:        # changed
            text = before + rng.choice(ALPHABET) + behind
        elif fault == 4:        # put in
            text = before + rng.choice(ALPHABET) + here + behind
        else:                   # up to twenty are lost
            text = before + text[at + rng.randint(1, 20):]
    if text and rng.random() < 0.15:
        text = text[:rng.randrange(len(text) + 1)]
    return text


def formula_of(rng, numbers, found):
    """A right formula, or one that somebody might have tried, in signs as people write them."""
    if found and rng.random() < 0.6:
        text = rng.choice(found)
    else:
        a, b, c, d = rng.sample(numbers, 4)
        o, p, q = rng.choices("+-*/", k=3)
        text = rng.choice((f"{a}{o}{b}{p}{c}{q}{d}", f"({a}{o}{b}){p}({c}{q}{d})",
                           f"({a}{o}{b}{p}{c}){q}{d}", f"{a}{o}{b}"))
    if rng.random() < 0.2:
        text = text.translate(str.maketrans("*/-", rng.choice(("×÷−", "·÷-"))))
    if rng.random() < 0.2:
        text = re.sub(r"([^0-9])", r" \1 ", text)
    return text + rng.choice(("", "=24", " = 24"))


class Trial(NamedTuple):
    """One reply and what became of it."""
    reply: str
    correct: bool               # what the judge says
    rights: list[bool]          # for each answer in the reply: whether the oracle finds it right
    expected: bool              # whether the judge must call it correct


def general_points(rng):
    cards = [rng.choice(RANKS) for _ in range(4)]
    numbers = [min(RANKS.index(card) + 1, 10) for card in cards]
    formula = formula_of(rng, numbers, solutions(numbers, 24))
    fields = {"cards": cards, "number": numbers, "formula": formula}
    if rng.random() < 0.3:
        key = rng.choice(("thought", "note"))
        fields = {key: rng.choice(('an "ace" and more', "it's {odd}", "3*8", "formula")), **fields}
    reply = rng.choice(WORDS) + write(rng, fields) + rng.choice(ENDS)
    harmless = rng.random() < 0.5
    is_right = value_and_numbers(formula.split("=")[0]) == (24, sorted(numbers))
    if not harmless:
        reply = damage(rng, reply)
    verdict = judge_general_points(reply, cards, numbers, vision=rng.random() < 0.5)
    rights = right_formulas(reply, numbers, 24)
    return Trial(reply, verdict.status == "correct", rights, harmless and is_right)


def navigation(rng):
    action = rng.choice(ACTIONS)
    name = rng.choice(("", *PLACES))
    stated = action if rng.random() < 0.6 else rng.choice(ACTIONS)
    spelt = rng.choice((stated, stated.upper(), stated.replace("(", " ( "), stated + ".",
                        stated.title()))
    observation = rng.choice((f"{name} is on your left", "No landmark", 'I see "nothing"',
                              "an intersection"))
    fields = {"current observation": observation,
              "current instruction": "Turn left to face north.", "action": spelt}
    reply = rng.choice(WORDS) + write(rng, fields) + rng.choice(ENDS)
    harmless = rng.random() < 0.5
    if not harmless:
        reply = damage(rng, reply)
    verdict = judge_navigation(reply, action, name, rng.random() < 0.5)
    rights = right_actions(reply, action)
    return Trial(reply, verdict.status == "correct", rights, harmless and stated == action)


# ---- The count -----------------------------------------------------------------------------------

def faults_of(trial):
    """The names of what is wrong with the judge's verdict, or of what is worth a look."""
    if trial.expected and not trial.correct:
        yield "lost"
    if trial.correct and not any(trial.rights):
        yield "wrongly correct"
    elif trial.correct and not trial.rights[-1]:
        yield "not the last"


def count(play, replies, seed):
    """(How often each thing happened, {fault: the first reply that shows it})."""
    rng = random.Random(seed)
    found = Counter()
    examples = {}
    for _ in range(replies):
        try:
            trial = play(rng)
        except Exception as error:                  # what must not happen
            found["exceptions"] += 1
            examples.setdefault("exceptions", repr(error))
            continue
        if trial.correct:
            found["correct"] += 1
        if trial.expected:
            found["harmless"] += 1
        for fault in faults_of(trial):
            found[fault] += 1
            examples.setdefault(fault, trial.reply)
    return found, examples


COLUMNS = ("judge", "replies", "called correct", "exceptions",
           "called correct, the oracle finds no right answer",
           "right answers with harmless damage", "of them not called correct",
           "called correct by an answer that is not the last", "seconds")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=1_000_000, help="to each judge")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = f"python tests/noise.py --replies {args.replies} --seed {args.seed}"
    print(f"# Noisy replies\n\n`{command}`, {platform.machine()}, "
          f"Python {platform.python_version()}\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    shown = {}
    for name, play in (("GeneralPoints", general_points), ("V-IRL", navigation)):
        started = time.perf_counter()
        found, examples = count(play, args.replies, args.seed)
        counts = [args.replies, found["correct"], found["exceptions"], found["wrongly correct"],
                  found["harmless"], found["lost"], found["not the last"]]
        cells = " | ".join(f"{number:,}" for number in counts)
        print(f"| {name} | {cells} | {time.perf_counter() - started:.0f} |", flush=True)
        for fault, reply in examples.items():
            shown[f"{name}, {fault}"] = reply
    for fault, reply in shown.items():
        print(f"\n{fault}, the first: `{reply!r}`")


if __name__ == "__main__":
    main()
