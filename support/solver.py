"""All formulas that make a target of given numbers: what the expert of GeneralPoints replies.

    python -c "from support.solver import solutions; print(solutions((3, 3, 8, 8)))"
"""
import itertools
from fractions import Fraction
from functools import lru_cache


def write(operator, left, right):
    """The text of `left operator right` without needless brackets, and how tightly it binds.

    An operand is (text, strength). A sum or difference has strength 0, a product or quotient 1,
    a number 2.
    """
    strength = 0 if operator in "+-" else 1
    least_right = strength       # a+(b-c) needs no brackets, but a-(b-c) and a/(b*c) do
    if operator in "-/":
        least_right += 1
    (left_text, left_strength), (right_text, right_strength) = left, right
    if left_strength < strength:
        left_text = f"({left_text})"
    if right_strength < least_right:
        right_text = f"({right_text})"
    return f"{left_text}{operator}{right_text}", strength


def add(found, value, operator, lefts, rights):
    """Enter `left operator right` under its value for every way to write either side."""
    texts = found.setdefault(value, {})
    for left, right in itertools.product(lefts.items(), rights.items()):
        text, strength = write(operator, left, right)
        texts[text] = strength


def partitions(numbers):
    """The ways to part a sorted tuple into two non-empty sorted tuples, without repeats.

    The smaller part stands first: (3, 8, 8) -> [((3,), (8, 8)), ((8,), (3, 8))].
    """
    found = {}                   # a dict and not a set, since it keeps the order
    for bits in range(1, 2 ** len(numbers) - 1):     # bit i: is number i in the first part?
        part = tuple(n for i, n in enumerate(numbers) if bits >> i & 1)
        rest = tuple(n for i, n in enumerate(numbers) if not bits >> i & 1)
        if (len(part), part) <= (len(rest), rest):
            found[part, rest] = None
    return list(found)


@lru_cache(maxsize=None)
def expressions(numbers):
    """Every value that a sorted tuple of integers makes: {value: {text: strength}}.

    Each integer is used once, and values are fractions:
    (2, 3) -> {5: {"2+3": 0, "3+2": 0}, -1: {"2-3": 0}, ...}.
    """
    if len(numbers) == 1:
        return {Fraction(numbers[0]): {str(numbers[0]): 2}}
    found = {}
    for part, rest in partitions(numbers):
        pairs = itertools.product(expressions(part).items(), expressions(rest).items())
        for (a, lefts), (b, rights) in pairs:
            add(found, a + b, "+", lefts, rights)
            add(found, a - b, "-", lefts, rights)
            add(found, a * b, "*", lefts, rights)
            if b:
                add(found, a / b, "/", lefts, rights)
            add(found, a + b, "+", rights, lefts)
            add(found, b - a, "-", rights, lefts)
            add(found, a * b, "*", rights, lefts)
            if a:
                add(found, b / a, "/", rights, lefts)
    return found


def last_steps(a, target, others):
    """The last operations that make `target` of a: yield (operator, whether a stands left, b).

    Each operation has one partner b that makes the target, such as b = target - a for a + b. For
    a = target = 0 every b does in a * b and a / b; then each of `others` is tried.
    """
    yield "+", True, target - a
    yield "+", False, target - a
    yield "-", True, a - target
    yield "-", False, target + a
    any_partner = others if a == target == 0 else ()
    for b in [target / a] if a else any_partner:
        yield "*", True, b
        yield "*", False, b
    for b in [a / target] if a and target else any_partner:
        if b:
            yield "/", True, b
    if a:
        yield "/", False, target * a


@lru_cache(maxsize=None)
def solve_sorted(numbers, target):
    """`solutions` of a sorted tuple.

    For the last operation the partner that hits the target is looked up. To try every pair of
    values would be most of the work on four numbers.
    """
    found = {target: {}}
    if len(numbers) == 1:
        found[target].update(expressions(numbers).get(target, ()))
    for part, rest in partitions(numbers):
        others = expressions(rest)
        for a, texts in expressions(part).items():
            for operator, is_left, b in last_steps(a, target, others):
                if b in others:
                    lefts, rights = (texts, others[b]) if is_left else (others[b], texts)
                    add(found, target, operator, lefts, rights)
    return tuple(sorted(found[target], key=lambda text: (len(text), text)))


def solutions(numbers, target=24):
    """Every formula that makes `target` of all the `numbers`, shortest first.

    The formulas are texts without needless brackets.
    """
    return solve_sorted(tuple(sorted(numbers)), Fraction(target))
