"""A million noisy replies to both judges, against an oracle that shares no code with them.

    python tests/noise.py --replies 1000000 > results/noise.md

Half of the replies are a player's that answers right or wrong, written in one of the forms that models use, and then damaged:
characters are lost, doubled, swapped, changed or put in, the end is cut off. The other half is harmed only beside the answer.
Counted are exceptions; replies called correct of which the oracle finds no right answer behind the answer's key; and harmless
damage of right replies that cost the verdict. The oracle for formulas is Python's parser over fractions; for actions it compares
letters. Not collected by pytest.
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

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.solver import solutions
from verify import judge_general_points, judge_navigation

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
LIKE_PYTHON = str.maketrans("×·÷−", "**/-")
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
ALPHABET = '{}[]:,"\'\\ \n+-*/()=0123456789ABCJQKabefnorx×÷−·.;<|>_\u2028é'
WORDS = ["", "Let me think. ", "I try 3*8 first { no }. ", "It's easy: ", "```json\n", "<think>formula?</think>", "So the \"formula\" is: "]
ENDS = ["", "\n```", " Done.", " }", "\n\nThat's my formula.", " {\"confidence\": 1}", "<|end|>"]
PLACES = ("Marn Cafe", "Café d'Or", "The Briry Hotel", "Intersection Bar")
ACTIONS = ("forward()", "stop()", *(f"turn_direction({word})" for word in ("north", "southwest", "left", "slightly right")))


# ---- The oracle ----------------------------------------------------------------------------------------------

def value_and_numbers(text):
    """Of a formula by Python's parser: (its value, the sorted numbers in it); None if it is no such formula."""
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
    """For every "formula" in the reply that something like a formula follows: whether it is a right one."""
    reply = re.sub(r"\\u(00b7|00d7|00f7|2212)", lambda found: chr(int(found[1], 16)), reply).replace("\\/", "/")   # as in JSON
    runs = re.findall(r"formula[\"'\\ \s]*:?[\s\[]*[\"']?([0-9+\-*/()×·÷−\s]*[0-9][0-9+\-*/()×·÷−\s]*)", reply)
    return [value_and_numbers(run) == (target, sorted(numbers)) for run in runs]


def right_actions(reply, action):
    """For every "action" in the reply: whether the right one follows, letter by letter."""
    def bare(text):
        return re.sub(r"[\s\"'’.;]", "", text).casefold()
    return [bare(rest).lstrip(":").startswith(bare(action)) for rest in re.split("action", reply)[1:]]


# ---- Replies -------------------------------------------------------------------------------------------------

def write(rng, fields):
    """An object in one of the forms that models write; a person reads the same from each."""
    form = rng.randrange(8)
    text = json.dumps(fields, indent=rng.choice((None, None, 2)), ensure_ascii=rng.random() < 0.5)
    quoted = [(key, json.dumps(value, ensure_ascii=False)) for key, value in fields.items()]
    if form == 1:
        text = "{" + ", ".join(f"{key}: {value}" for key, value in quoted) + "}"
    elif form == 2:
        text = "{" + ", ".join(f'"{key}": {value}' for key, value in quoted) + ",}"
    elif form == 3:
        text = "{\n" + "\n".join(f'"{key}": {value}' for key, value in quoted) + "\n}"             # no commas
    elif form == 4:
        text = text[:-1]                                                                          # no last brace
    elif form == 5:
        text = ", ".join(f'"{key}": {value}' for key, value in quoted)                            # no braces
    elif form == 6:
        text = "{ // my answer\n" + ",\n".join(f'"{key}": {value} ' for key, value in quoted) + "}"
    elif form == 7 and "'" not in "".join(value for _, value in quoted):
        text = "{" + ", ".join(f"'{key}': " + value.replace('"', "'") for key, value in quoted) + "}"
    return text


def damage(rng, text):
    for _ in range(rng.randint(1, 8)):
        at, fault = rng.randrange(len(text) + 1), rng.randrange(6)
        text = (text[:at] + text[at + 1:] if fault == 0 else text[:at] + text[at:at + 1] * 2 + text[at + 1:] if fault == 1
                else text[:at] + text[at + 1:at + 2] + text[at:at + 1] + text[at + 2:] if fault == 2
                else text[:at] + rng.choice(ALPHABET) + text[at + (fault == 3):] if fault < 5
                else text[:at] + text[at + rng.randint(1, 20):])
    return text[:rng.randrange(len(text) + 1)] if text and rng.random() < 0.15 else text


def formula_of(rng, numbers, found):
    """A right formula, or one that somebody might have tried, in signs as people write them."""
    if found and rng.random() < 0.6:
        text = rng.choice(found)
    else:
        a, b, c, d = rng.sample(numbers, 4)
        o, p, q = rng.choices("+-*/", k=3)
        text = rng.choice((f"{a}{o}{b}{p}{c}{q}{d}", f"({a}{o}{b}){p}({c}{q}{d})", f"({a}{o}{b}{p}{c}){q}{d}", f"{a}{o}{b}"))
    if rng.random() < 0.2:
        text = text.translate(str.maketrans("*/-", rng.choice(("×÷−", "·÷-"))))
    if rng.random() < 0.2:
        text = re.sub(r"([^0-9])", r" \1 ", text)
    return text + rng.choice(("", "=24", " = 24"))


def general_points(rng):
    """(what the judge says of a reply, whether it is right by the oracle, whether it must be called right, the reply)."""
    cards = [rng.choice(RANKS) for _ in range(4)]
    numbers = [min(RANKS.index(card) + 1, 10) for card in cards]
    found = solutions(numbers, 24)
    fields = {"cards": cards, "number": numbers, "formula": formula_of(rng, numbers, found)}
    if rng.random() < 0.3:
        fields = {rng.choice(("thought", "note")): rng.choice(('an "ace" and more', "it's {odd}", "3*8", "formula")), **fields}
    reply = rng.choice(WORDS) + write(rng, fields) + rng.choice(ENDS)
    harmless = rng.random() < 0.5
    expected = harmless and value_and_numbers(fields["formula"].split("=")[0]) == (24, sorted(numbers))
    reply = reply if harmless else damage(rng, reply)
    verdict = judge_general_points(reply, cards, numbers, vision=rng.random() < 0.5)
    return verdict.status == "correct", right_formulas(reply, numbers, 24), expected, reply


def navigation(rng):
    action, name = rng.choice(ACTIONS), rng.choice(("", *PLACES))
    stated = action if rng.random() < 0.6 else rng.choice(ACTIONS)
    said = rng.choice((stated, stated.upper(), stated.replace("(", " ( "), stated + ".", stated.replace("_", "_").title()))
    fields = {"current observation": rng.choice((f"{name} is on your left", "No landmark", 'I see "nothing"', "an intersection")),
              "current instruction": "Turn left to face north.", "action": said}
    reply = rng.choice(WORDS) + write(rng, fields) + rng.choice(ENDS)
    harmless = rng.random() < 0.5
    reply = reply if harmless else damage(rng, reply)
    verdict = judge_navigation(reply, action, name, rng.random() < 0.5)
    return verdict.status == "correct", right_actions(reply, action), harmless and stated == action, reply


# ---- The count -----------------------------------------------------------------------------------------------

def count(play, replies, seed):
    rng, found, examples = random.Random(seed), Counter(), {}
    for _ in range(replies):
        try:
            correct, rights, expected, reply = play(rng)
        except Exception as error:                                  # what must not happen
            found["exceptions"] += 1
            examples.setdefault("exceptions", repr(error))
            continue
        found["correct"] += correct
        found["harmless"] += expected
        for fault, is_fault in (("wrongly correct", correct and not any(rights)), ("lost", expected and not correct),
                                ("not the last", correct and any(rights) and not rights[-1])):
            found[fault] += is_fault
            if is_fault:
                examples.setdefault(fault, reply)
    return found, examples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=1_000_000, help="to each judge")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"# Noisy replies\n\n`python tests/noise.py --replies {args.replies} --seed {args.seed}`, {platform.machine()}, Python "
          f"{platform.python_version()}\n")
    print("| judge | replies | called correct | exceptions | called correct, the oracle finds no right answer | right answers "
          "with harmless damage | of them not called correct | called correct by an answer that is not the last | seconds |")
    print("|---" * 9 + "|")
    shown = {}
    for name, play in (("GeneralPoints", general_points), ("V-IRL", navigation)):
        started = time.perf_counter()
        found, examples = count(play, args.replies, args.seed)
        cells = [found[key] for key in ("correct", "exceptions", "wrongly correct", "harmless", "lost", "not the last")]
        print(f"| {name} | {args.replies:,} | " + " | ".join(f"{cell:,}" for cell in cells)
              + f" | {time.perf_counter() - started:.0f} |", flush=True)
        shown |= {f"{name}, {fault}": reply for fault, reply in examples.items()}
    for fault, reply in shown.items():
        print(f"\n{fault}, the first: `{reply!r}`")


if __name__ == "__main__":
    main()
