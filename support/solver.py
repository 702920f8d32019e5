"""All formulas that make a target of given numbers, exactly: what the expert of GeneralPoints replies.

    python -c "from support.solver import solutions; print(solutions((3, 3, 8, 8)))"
"""
import itertools
from fractions import Fraction
from functools import lru_cache


def write(operator, left, right):
    """The text of `left operator right` without needless brackets, and how tightly it binds.

    An operand is (text, strength): 0 a sum or difference, 1 a product or quotient, 2 a number.
    """
    strength = 0 if operator in "+-" else 1
    least_right = strength + (operator in "-/")   # a-(b-c) and a/(b*c) need their brackets, a+(b-c) does not
    texts = [f"({text})" if own < least else text
             for (text, own), least in ((left, strength), (right, least_right))]
    return operator.join(texts), strength


def add(found, value, operator, lefts, rights):
    """Enter `left operator right` under its value for every way to write either side."""
    found.setdefault(value, {}).update(write(operator, x, y) for x in lefts.items() for y in rights.items())


def partitions(numbers):
    """The ways to part a sorted tuple into two non-empty sorted tuples, the smaller first, without repeats."""
    found = {}
    for bits in range(1, 2 ** len(numbers) - 1):
        part = tuple(n for i, n in enumerate(numbers) if bits >> i & 1)
        rest = tuple(n for i, n in enumerate(numbers) if not bits >> i & 1)
        if (len(part), part) <= (len(rest), rest):
            found[part, rest] = None
    return list(found)


@lru_cache(maxsize=None)
def expressions(numbers):
    """Every value that a sorted tuple of integers makes, each used once: {value: {text: strength}}."""
    if len(numbers) == 1:
        return {Fraction(numbers[0]): {str(numbers[0]): 2}}
    found = {}
    for part, rest in partitions(numbers):
        for (a, lefts), (b, rights) in itertools.product(expressions(part).items(), expressions(rest).items()):
            for operator, value in [("+", a + b), ("-", a - b), ("*", a * b)] + ([("/", a / b)] if b else []):
                add(found, value, operator, lefts, rights)
            for operator, value in [("+", a + b), ("-", b - a), ("*", a * b)] + ([("/", b / a)] if a else []):
                add(found, value, operator, rights, lefts)
    return found


def last_steps(a, target, others):
    """The last operation of a solution: yield (operator, a stands left, partner b) such that it makes `target`.

    One b solves a + b = target, and so on; where any does (0 * b = 0, 0 / b = 0), b is each of `others`.
    """
    yield from (("+", True, target - a), ("+", False, target - a), ("-", True, a - target), ("-", False, target + a))
    any_partner = others if a == target == 0 else ()
    for b in [target / a] if a else any_partner:
        yield from (("*", True, b), ("*", False, b))
    for b in [a / target] if a and target else any_partner:
        if b:
            yield "/", True, b
    if a:
        yield "/", False, target * a


@lru_cache(maxsize=None)
def solve_sorted(numbers, target):
    """`solutions` of a sorted tuple. For the last operation the partner that hits the target is looked up, so not every
    pair of values is tried: on four numbers that is most of the work."""
    found = {target: dict(expressions(numbers).get(target, ()))} if len(numbers) == 1 else {target: {}}
    for part, rest in partitions(numbers):
        others = expressions(rest)
        for a, texts in expressions(part).items():
            for operator, is_left, b in last_steps(a, target, others):
                if b in others:
                    add(found, target, operator, *((texts, others[b]) if is_left else (others[b], texts)))
    return tuple(sorted(found[target], key=lambda text: (len(text), text)))


def solutions(numbers, target=24):
    """Every formula that makes `target` of all the `numbers`, as text without needless brackets, shortest first."""
    return solve_sorted(tuple(sorted(numbers)), Fraction(target))
