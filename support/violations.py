"""All that is wrong with a reply, item by item, as the official code finds it: {violations} in the verdicts of a prompt file.

A violation is (name of its text in TEXTS, {values}). They change no status and no reward.
"""
import re
from collections import Counter
from functools import lru_cache
from itertools import permutations, product

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
SHAPES = ("{}{}{}{}{}{}{}", "({}{}{}){}{}{}{}", "({}{}{}{}{}){}{}", "{}{}({}{}{}){}{}", "{}{}({}{}{}{}{})",
          "{}{}{}{}({}{}{})", "({}{}{}){}({}{}{})")
TOKEN = re.compile(r"[0-9]+|[-+*/()]")
# What a token may follow, by kinds: n a number, o an operator, brackets as they are, "" the beginning.
FOLLOWS = {"n": ("", "o", "("), "o": ("n", ")"), "(": ("", "o", "("), ")": ("n", ")")}
MISPLACED = {"n": "number", "o": "operator", "(": "opening", ")": "closing"}


@lru_cache(maxsize=4096)
def bracketed_solutions(numbers, target, evaluate):
    """All formulas of four numbers (a sorted tuple) in SHAPES that make `target`, redundant brackets included."""
    def makes_target(text):
        try:
            (numerator, denominator), _ = evaluate(text)
        except ValueError:
            return False
        return numerator == target * denominator

    texts = (shape.format(a, o, b, p, c, q, d) for a, b, c, d in sorted(set(permutations(numbers)))
             for o, p, q in product("+-*/", repeat=3) for shape in SHAPES)
    return tuple(filter(makes_target, texts))


def of_form(tokens):
    """The violations of the order of tokens."""
    last, depth = "", 0
    for token in tokens:
        kind = token if token in "()" else "o" if token in "+-*/" else "n"
        if last not in FOLLOWS[kind]:
            yield f"violation_{MISPLACED[kind]}", {}
        elif kind == ")" and depth == 0:
            yield "violation_unmatched", {}
        else:
            depth += (kind == "(") - (kind == ")")
        last = kind


def of_numbers(used, dealt):
    """The violations of the numbers that a formula uses."""
    used, dealt = Counter(used), Counter(dealt)
    for name, wrong in (("foreign", [number for number in used if number not in dealt]),
                        ("repeated", [number for number in used if used[number] > dealt[number]])):
        if wrong:
            yield f"violation_{name}", {"numbers": ", ".join(map(str, wrong))}
            break
    if unused := [number for number in dealt if dealt[number] > used[number]]:
        yield "violation_unused", {"numbers": ", ".join(map(str, unused))}


def of_formula(formula, numbers, target, evaluate):
    """The violations of a formula (text, or None) that uses `numbers` to make `target`, and does not; `evaluate` is
    verify.parse_formula."""
    tokens = TOKEN.findall(formula or "None")
    if "".join(tokens) != formula:
        return [("violation_characters", {})]
    found = [*of_form(tokens), *of_numbers([int(token) for token in tokens if token.isdigit()], numbers)]
    if found:
        return found
    solutions = bracketed_solutions(tuple(sorted(numbers)), target, evaluate)

    def begins_one(text):
        return any(solution.startswith(text) for solution in solutions)

    try:
        evaluate(formula)
    except ValueError:
        if begins_one(formula):
            return [("violation_breaks_off", {})]
    beginnings = ["".join(tokens[:end]) for end in range(len(tokens) + 1)]
    for before, beginning in zip(beginnings, beginnings[1:]):
        if not begins_one(beginning):
            return [("violation_end", {"beginning": before}) if before else ("violation_no_solution", {})]
    return []


def of_step(observed, landmark):
    """The violation of a V-IRL reply whose action is wrong: by whether what it observed, and the landmark in sight, name an
    intersection."""
    says, there = isinstance(observed, str) and "intersection" in observed, "intersection" in landmark
    name = "action" if says == there else "intersection" if says else "no_intersection"
    return [(f"violation_{name}", {})]
