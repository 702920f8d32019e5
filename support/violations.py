"""All that is wrong with a reply, item by item, as the official code finds it.

A prompt file lists these violations where a verdict's text holds {violations} (verify.LISTING).
A violation is (the name of its text in TEXTS, {values for that text}). Violations change neither
status nor reward.
"""
import re
from collections import Counter
from functools import lru_cache
from itertools import permutations, product

from support import reading

MAX_FORMULA = 100   # characters; four cards need fewer than 40

TEXTS = {
    "violation_characters": "it is no formula",
    "violation_number": "a number stands at a wrong place",
    "violation_operator": "an operator stands at a wrong place",
    "violation_opening": "( stands at a wrong place",
    "violation_closing": ") stands at a wrong place",
    "violation_unmatched": ") closes nothing",
    "violation_foreign": "no card gives {numbers}",
    "violation_repeated": "{numbers} used too often",
    "violation_unused": "{numbers} not used",
    "violation_breaks_off": "a solution begins like that",
    "violation_no_solution": "no solution begins like that",
    "violation_end": "a solution begins with {beginning}, but goes on otherwise",
    "violation_intersection": "there is no intersection here",
    "violation_no_intersection": "there is an intersection here",
    "violation_action": "the action is wrong",
}
# The forms of a solution: the first {} is a number, the second an operator, and so on in turn.
SHAPES = (
    "{}{}{}{}{}{}{}",
    "({}{}{}){}{}{}{}",
    "({}{}{}{}{}){}{}",
    "{}{}({}{}{}){}{}",
    "{}{}({}{}{}{}{})",
    "{}{}{}{}({}{}{})",
    "({}{}{}){}({}{}{})",
)
TOKEN = re.compile(r"[0-9]+|[-+*/()]")
# What a token may follow, by kind: n a number, o an operator, a bracket itself, "" the beginning.
FOLLOWS = {
    "n": ("", "o", "("),
    "o": ("n", ")"),
    "(": ("", "o", "("),
    ")": ("n", ")"),
}
MISPLACED = {"n": "number", "o": "operator", "(": "opening", ")": "closing"}


# ---- GeneralPoints -------------------------------------------------------------------------------

@lru_cache(maxsize=4096)
def bracketed_solutions(numbers, target, evaluate):
    """All formulas of four numbers (a sorted tuple) in SHAPES that make `target`.

    Formulas with redundant brackets are among them. `evaluate` is verify.parse_formula.
    """
    found = []
    for a, b, c, d in sorted(set(permutations(numbers))):
        for o, p, q in product("+-*/", repeat=3):
            for shape in SHAPES:
                text = shape.format(a, o, b, p, c, q, d)
                try:
                    (numerator, denominator), _ = evaluate(text)
                except ValueError:          # it divides by zero
                    continue
                if numerator == target * denominator:
                    found.append(text)
    return tuple(found)


def kind_of(token):
    """The kind of a token: n a number, o an operator, a bracket itself."""
    if token in ("(", ")"):
        return token
    if token in ("+", "-", "*", "/"):
        return "o"
    return "n"


def of_form(tokens):
    """The violations of the order of tokens."""
    last = ""
    depth = 0
    for token in tokens:
        kind = kind_of(token)
        if last not in FOLLOWS[kind]:
            yield f"violation_{MISPLACED[kind]}", {}
        elif kind == "(":
            depth += 1
        elif kind == ")" and depth == 0:
            yield "violation_unmatched", {}
        elif kind == ")":
            depth -= 1
        last = kind


def of_numbers(used, dealt):
    """The violations of the numbers that a formula uses.

    Numbers used too often are listed only where no number is foreign, as in the official code.
    """
    used = Counter(used)
    dealt = Counter(dealt)
    foreign = [number for number in used if number not in dealt]
    repeated = [number for number in used if used[number] > dealt[number]]
    unused = [number for number in dealt if dealt[number] > used[number]]
    if foreign:
        yield "violation_foreign", {"numbers": ", ".join(map(str, foreign))}
    elif repeated:
        yield "violation_repeated", {"numbers": ", ".join(map(str, repeated))}
    if unused:
        yield "violation_unused", {"numbers": ", ".join(map(str, unused))}


def of_formula(formula, numbers, target, evaluate):
    """The violations of a formula that should make `target` of `numbers`, and does not.

    `formula` is whatever the reply states, None if it states nothing. `evaluate` is
    verify.parse_formula.
    """
    if not isinstance(formula, str):
        return [("violation_characters", {})]
    formula = formula[:MAX_FORMULA]
    tokens = TOKEN.findall(formula)
    if "".join(tokens) != formula:
        return [("violation_characters", {})]
    used = [int(token) for token in tokens if token.isdigit()]
    found = [*of_form(tokens), *of_numbers(used, numbers)]
    if found:
        return found

    # Form and numbers are right. Where does the formula leave all solutions?
    solutions = bracketed_solutions(tuple(sorted(numbers)), target, evaluate)

    def begins_one(text):
        return any(solution.startswith(text) for solution in solutions)

    try:
        evaluate(formula)
    except ValueError:
        if begins_one(formula):
            return [("violation_breaks_off", {})]
    before = ""
    for token in tokens:
        if not begins_one(before + token):
            if before:
                return [("violation_end", {"beginning": before})]
            return [("violation_no_solution", {})]
        before += token
    return []


# ---- V-IRL ---------------------------------------------------------------------------------------

def of_step(reply, stated, landmark):
    """The violation of a V-IRL reply whose action is wrong.

    The official code looks for the word intersection in the observation and in the landmark.
    `stated` is what verify.py read in the reply. If it is empty, because the reply has no action,
    the last observation in the reply counts.
    """
    key = "current observation"
    observed = stated.get(key) if stated else reading.last_value(reply, key)[0]
    is_named = isinstance(observed, str) and "intersection" in observed
    is_there = "intersection" in landmark
    if is_named and not is_there:
        return [("violation_intersection", {})]
    if is_there and not is_named:
        return [("violation_no_intersection", {})]
    return [("violation_action", {})]
