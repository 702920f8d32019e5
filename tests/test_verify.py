"""verify.py: replies are judged exactly, tolerantly and quickly, whatever string comes in."""
import ast
import itertools
import json
import operator
import random
import re
import time
from collections import Counter
from dataclasses import FrozenInstanceError
from fractions import Fraction
from functools import lru_cache

import pytest

import noise
import verify
from support.solver import solutions
from verify import REWARDS, Verdict, judge_general_points, parse_formula

RANKS = ["A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K"]
CARDS, NUMBERS = ["3", "3", "8", "8"], [3, 3, 8, 8]
RIGHT = "8/(3-8/3)"
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def formula_value(text):
    """The exact value of a formula as a Fraction."""
    (numerator, denominator), _ = parse_formula(text)
    return Fraction(numerator, denominator)


def judge(reply, cards=CARDS, numbers=NUMBERS, **how):
    return judge_general_points(reply, cards, numbers, **how)


def judge_formula(formula, numbers=NUMBERS, **how):
    return judge(json.dumps({"formula": formula}), [str(n) for n in numbers], numbers, **how)


def good_reply(formula=RIGHT + "=24", cards=CARDS, numbers=NUMBERS):
    return json.dumps({"cards": list(cards), "number": list(numbers), "formula": formula})


# ---- Independent definitions to compare with -----------------------------------------------------

def value_by_python(text):
    """The value of a formula by Python's parser, over fractions; None if it is not legal."""
    def walk(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in (ast.Add, ast.Sub, ast.Mult, ast.Div):
            symbol = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}[type(node.op)]
            return OPERATORS[symbol](walk(node.left), walk(node.right))
        raise SyntaxError("not a formula")
    if not re.fullmatch(r"[-+*/()0-9\s]+", text):
        return None
    plain = re.sub(r"(?<![0-9])0+(?=[0-9])", "", " ".join(text.split()))    # Python forbids 08
    try:
        return walk(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None


def trees(numbers):
    """Every way to bracket `numbers` in this order with every operator: (bracketed text, value)."""
    if len(numbers) == 1:
        return [(str(numbers[0]), Fraction(numbers[0]))]
    return [(f"({x}{symbol}{y})", act(a, b))
            for cut in range(1, len(numbers))
            for (x, a), (y, b) in itertools.product(trees(numbers[:cut]), trees(numbers[cut:]))
            for symbol, act in OPERATORS.items() if symbol != "/" or b]


def brute_force(numbers, target):
    """The fully bracketed formulas that make `target`: it tries every order and bracketing."""
    found = set()
    for order in set(itertools.permutations(numbers)):
        found.update(text for text, value in trees(order) if value == target)
    return found


@lru_cache(maxsize=None)
def value_of_shape(shape):
    """The value of a formula whose numbers are all #, with large primes in their places.

    Two shapes have the same value there only if they always have.
    """
    primes = iter((10007, 20011, 30011, 40009))
    return eval(re.sub("#", lambda _: f"Fraction({next(primes)})", shape))


@lru_cache(maxsize=None)
def prune_shape(shape):
    """`shape` without the brackets that make no difference to what is computed."""
    for start in (i for i, c in enumerate(shape) if c == "("):
        depth, end = 1, start
        while depth:
            end += 1
            depth += (shape[end] == "(") - (shape[end] == ")")
        without = shape[:start] + shape[start + 1:end] + shape[end + 1:]
        if value_of_shape(without) == value_of_shape(shape):
            return prune_shape(without)
    return shape


def prune(text):
    numbers = iter(re.findall("[0-9]+", text))
    return re.sub("#", lambda _: next(numbers), prune_shape(re.sub("[0-9]+", "#", text)))


@pytest.fixture(scope="module")
def solvable():
    """The multisets of four values 1..13 that make 24."""
    hands = itertools.combinations_with_replacement(range(1, 14), 4)
    return [hand for hand in hands if solutions(hand)]


# ---- Formulas ------------------------------------------------------------------------------------

TABLE = [  # formula, numbers on the cards, status
    ("8/(3-8/3)", (3, 3, 8, 8), "correct"),
    ("8/(3-8/3)=24", (3, 3, 8, 8), "correct"),
    (" 8 / ( 3 - 8 / 3 ) = 24 ", (3, 3, 8, 8), "correct"),
    ("(((8)))/(3-(8/3))", (8, 3, 8, 3), "correct"),
    ("8/(3-8/3)=25", (3, 3, 8, 8), "correct"),              # what follows the first = is not read
    ("8/(3-8/3)=nonsense=(", (3, 3, 8, 8), "correct"),
    ("5*(5-1/5)", (1, 5, 5, 5), "correct"),
    ("7*(3+3/7)", (3, 3, 7, 7), "correct"),
    ("(10*10-4)/4", (4, 4, 10, 10), "correct"),
    ("10-4-4*4", (4, 4, 4, 10), "wrong_value"),
    ("8-3-3+8", (3, 3, 8, 8), "wrong_value"),
    ("12/(3-1)/2", (1, 2, 3, 12), "wrong_value"),           # left to right: 3
    ("12/((3-1)/2)", (1, 2, 3, 12), "wrong_value"),         # 12
    ("12*(3-1)/1", (1, 1, 3, 12), "correct"),
    ("3-8-3-8", (3, 3, 8, 8), "wrong_value"),               # a negative value
    ("1/3+8/3+8", (1, 3, 3, 8, 8), "wrong_value"),
    (f"{24 * 10 ** 20 + 1}/{10 ** 20}", (24 * 10 ** 20 + 1, 10 ** 20), "wrong_value"),  # not 24.0
    ("3*8", (3, 3, 8, 8), "wrong_numbers"),                 # two cards left out, though it makes 24
    ("24", (3, 3, 8, 8), "wrong_numbers"),
    ("8/(3-8/3)+3-3", (3, 3, 8, 8), "wrong_numbers"),       # a card used twice
    ("8*3*(8-7)", (3, 3, 8, 8), "wrong_numbers"),           # a foreign number
    ("33-8/8", (3, 3, 8, 8), "wrong_numbers"),              # digits of two cards glued together
    ("8", (3, 3, 8, 8), "wrong_numbers"),                   # a solution's beginning earns nothing
    ("8/(3-8/3", (3, 3, 8, 8), "illegal_formula"),
    ("8/(3", (3, 3, 8, 8), "illegal_formula"),
    ("8/(3-8/3))", (3, 3, 8, 8), "illegal_formula"),
    ("8/(3-3)*8", (3, 3, 8, 8), "illegal_formula"),         # divides by zero
    ("0*8/(3-3)", (0, 3, 3, 8), "illegal_formula"),
    ("8**3/3-8", (3, 3, 8, 8), "illegal_formula"),
    ("8//3+3*8", (3, 3, 8, 8), "illegal_formula"),
    ("8%3+3*8", (3, 3, 8, 8), "illegal_formula"),
    ("8^3+3*8", (3, 3, 8, 8), "illegal_formula"),
    ("-3+3+8+8", (3, 3, 8, 8), "illegal_formula"),          # no signs, only operations
    ("8*+3-8+3", (3, 3, 8, 8), "illegal_formula"),
    ("8(3-8/3)3", (3, 3, 8, 8), "illegal_formula"),
    ("8 3 + 8 3", (3, 3, 8, 8), "illegal_formula"),
    ("1 2+12", (12, 12), "illegal_formula"),
    ("8.0/(3-8/3)", (3, 3, 8, 8), "illegal_formula"),
    ("8e0/(3-8/3)", (3, 3, 8, 8), "illegal_formula"),
    ("8_/(3-8/3)", (3, 3, 8, 8), "illegal_formula"),
    ("\u0668/(3-8/3)", (3, 3, 8, 8), "illegal_formula"),    # an Arabic 8: int() would read it
    ("8/(3-8/3)\u0668", (3, 3, 8, 8), "illegal_formula"),    # nor is it passed over
    ("8\u00d73\u00d7(8-7)", (3, 3, 8, 8), "wrong_numbers"),  # a foreign number, whatever the sign
    ("8\u00f7(3\u22128\u00f73)", (3, 3, 8, 8), "correct"),       # division sign, minus sign
    ("(8\u22123)\u00d73+8", (3, 3, 8, 8), "wrong_value"),
    ("3\u00b78", (3, 8), "correct"),                       # a dot in the middle
    ("08/(003-8/3)", (3, 3, 8, 8), "correct"),            # leading zeros spell the same number
    ("8\\div(3-8\\div3)", (3, 3, 8, 8), "illegal_formula"),
    ("\u22123+3+8+8", (3, 3, 8, 8), "illegal_formula"),
    ("sum((3,3,8,8))", (3, 3, 8, 8), "illegal_formula"),
    ("K+Q-J*A", (1, 11, 12, 13), "illegal_formula"),        # card names are not numbers
    ("", (3, 3, 8, 8), "illegal_formula"),
    ("=24", (3, 3, 8, 8), "illegal_formula"),
    ("()", (3, 3, 8, 8), "illegal_formula"),
    ("+", (3, 3, 8, 8), "illegal_formula"),
    ("x=8/(3-8/3)", (3, 3, 8, 8), "illegal_formula"),
]


@pytest.mark.parametrize("formula, numbers, status", TABLE)
def test_a_formula_gets_the_one_status_and_reward_that_it_deserves(formula, numbers, status):
    verdict = judge_formula(formula, numbers)
    assert (verdict.status, verdict.reward) == (status, REWARDS[status])
    assert verdict.message


def test_the_table_reaches_every_status_and_the_rewards_are_the_papers():
    assert {status for _, _, status in TABLE} == set(REWARDS)
    assert REWARDS == {"correct": 5, "wrong_value": -1, "wrong_numbers": -2, "illegal_formula": -3}
    assert (verify.MISREAD_PENALTY, verify.LAST_TRY_PENALTY) == (-1.5, -1)


def test_a_verdict_cannot_be_changed_afterwards():
    with pytest.raises(FrozenInstanceError):
        judge_formula(RIGHT).reward = 10.0


def test_formula_value_is_an_exact_fraction():
    assert parse_formula(RIGHT) == ((24, 1), (8, 3, 8, 3))
    assert formula_value("1/3+1/3+1/3") == 1
    assert formula_value("8/3") == Fraction(8, 3) and isinstance(formula_value("8/3"), Fraction)
    assert formula_value("3-8/3-1") == Fraction(-2, 3)
    assert formula_value("1/(2-3)") == -1
    assert formula_value("99999999999999999999*99999999999999999999") == (10 ** 20 - 1) ** 2


@pytest.mark.parametrize("text, reason", [
    ("", "breaks off"), ("1+", "breaks off"), ("1/0", "divides by zero"),
    ("1/(2-2)", "divides by zero"), ("(1", "not closed"), ("1)", "'[)]'"), ("2**3", "'[*]'"),
    ("1=1", "'='"), ("one", "'o'"), ("1 2", "'2'"), ("1+" * 50 + "1", "longer than 100")])
def test_formula_value_says_why_a_text_is_not_a_formula(text, reason):
    with pytest.raises(ValueError, match=reason):
        formula_value(text)


@pytest.mark.parametrize("formula, words", [
    ("3*8+x", "'x'"), ("8/(3-8/3", "not closed"), ("8/(3-3)*8", "divides by zero"),
    ("8*", "breaks off"), ("(" * 10_000, "longer"), ("3*8", "3, 8"), ("33-8/8", "33, 8, 8"),
    ("8/3+8/3", "16/3")])
def test_informative_feedback_names_the_fault(formula, words):
    assert words in judge_formula(formula).message


def test_random_formulas_are_judged_as_pythons_parser_and_fractions_judge_them():
    rng = random.Random(1)
    seen = Counter()
    tokens = ["3", "8", "3", "8", "+", "-", "*", "/", "(", ")", " ", "38", "0"]
    for _ in range(8_000):
        if rng.random() < 0.5:
            text = "".join(rng.choices(tokens, k=rng.randint(1, 9)))
        else:                               # well-formed, with the cards, now and then one flaw
            numbers = rng.sample(NUMBERS, 4)
            text = rng.choice(SHAPES).replace("#", "{}").format(*numbers)
            if rng.random() < 0.3:
                at = rng.randrange(len(text))
                text = text[:at] + rng.choice(["", *tokens]) + text[at + 1:]
        value, status = value_by_python(text), judge_formula(text).status
        used = sorted(int(n) for n in re.findall("[0-9]+", text))
        if value is None:
            expected = "illegal_formula"
        elif used != NUMBERS:
            expected = "wrong_numbers"
        else:
            expected = "correct" if value == 24 else "wrong_value"
        assert status == expected, (text, value)
        seen[status] += 1
    assert set(seen) == set(REWARDS), seen


SHAPES = [re.sub("[0-9]", "#", text)[1:-1] for text, _ in trees([2, 3, 5, 7])]


# ---- Solutions -----------------------------------------------------------------------------------

def test_there_are_566_solvable_multisets_of_values_1_to_10_and_1362_of_1_to_13(solvable):
    assert sum(max(hand) <= 10 for hand in solvable) == 566
    assert len(solvable) == 1362


def test_solutions_are_what_trying_every_order_bracketing_and_operator_finds():
    rng = random.Random(2)
    hands = rng.sample(list(itertools.combinations_with_replacement(range(1, 14), 4)), 70)
    found = {hand: set(solutions(hand)) for hand in hands}
    assert any(found.values()) and not all(found.values())
    for hand in hands:
        assert found[hand] == {prune(text) for text in brute_force(hand, 24)}, hand


@pytest.mark.parametrize("numbers, target", [
    ((24,), 24), ((7,), 24), ((7,), 7), ((4, 6), 24), ((1, 24), 24), ((5, 5), 0), ((0, 5), 0),
    ((0, 0), 0), ((2, 3, 4), 24), ((2, 2, 4), 0), ((0, 3, 3), 0), ((1, 2, 3), 1),
    ((8, 3, 3), Fraction(8, 9)), ((1, 2, 3), -5), ((2, 3, 5, 7), 0), ((1, 1, 2, 2), 0),
    ((0, 0, 1, 2), 0), ((3, 3, 8, 8), 10), ((1, 5, 10, 13), 100), ((1, 2, 3, 4), 1)])
def test_solutions_for_other_targets_and_other_numbers_of_cards_are_complete(numbers, target):
    assert set(solutions(numbers, target)) == {prune(text) for text in brute_force(numbers, target)}


def test_the_order_of_the_numbers_does_not_matter_to_the_solutions():
    assert len({solutions(order) for order in itertools.permutations((1, 4, 6, 9))}) == 1
    assert solutions([3, 8, 3, 8]) == solutions((8, 8, 3, 3))


def test_solutions_come_shortest_first_without_repeats_and_without_needless_brackets(solvable):
    for hand in solvable:
        found = solutions(hand)
        assert len(set(found)) == len(found), hand
        assert list(found) == sorted(found, key=len), hand
        for text in found:
            assert prune(text) == text


def test_every_solution_is_correct_and_with_one_number_changed_by_one_it_is_not(solvable):
    """Values 1..13; the hands of values 1..10 are among them, and the judge knows numbers only."""
    replies = 0
    for hand in solvable:
        cards, numbers = [str(n) for n in hand], list(hand)

        def status_of(formula):
            return judge_general_points(f'{{"formula":"{formula}"}}', cards, numbers).status

        for formula in solutions(hand):
            assert status_of(f"{formula}=24") == "correct", formula
            for number in re.finditer("[0-9]+", formula):
                off_by_one = int(number[0]) + (1 if replies % 2 else -1)
                changed = f"{formula[:number.start()]}{off_by_one}{formula[number.end():]}"
                status = status_of(changed)
                if status == "illegal_formula":
                    assert value_by_python(changed) is None, changed
                else:
                    assert status == "wrong_numbers", changed
                replies += 1
    assert replies > 100_000                # four numbers in each of some thirty thousand formulas


# ---- Reading a reply -----------------------------------------------------------------------------

BRACES_IN_A_STRING = good_reply().replace("{", '{"thought": "from {3,3,8,8}", ')
OBJECT_WITHIN = good_reply().replace("{", '{"values": {"J": 10}, ')
READABLE = {
    "valid JSON": good_reply(),
    "JSON over several lines": json.dumps(json.loads(good_reply()), indent=2),
    "a trailing comma": good_reply()[:-1] + ",}",
    "a trailing comma and a line break": good_reply()[:-1] + ",\n}",
    "a trailing comma in a list":
        '{"cards": ["3", "3", "8", "8",], "number": [3, 3, 8, 8,], "formula": "8/(3-8/3)=24"}',
    "a trailing comma and a space in a list":
        '{"cards": ["3", "3", "8", "8", ], "number": [3, 3, 8, 8, ], "formula": "8/(3-8/3)=24"}',
    "lists over several lines with trailing commas":
        '{\n "cards": [\n  "3",\n  "3",\n  "8",\n  "8",\n ],\n'
        ' "number": [\n  3,\n  3,\n  8,\n  8,\n ],\n "formula": "8/(3-8/3)",\n}',
    "a space before a comma":
        "{'cards': ['3', '3', '8', '8'] , 'number': [3, 3, 8, 8] , 'formula': '8/(3-8/3)=24' }",
    "single quotes":
        "{'cards': ['3', '3', '8', '8'], 'number': [3, 3, 8, 8], 'formula': '8/(3-8/3)=24'}",
    "the official code's mixture":
        "{\n\"cards\": ['3', '3', '8', '8'],\n\"number\": [3, 3, 8, 8],\n"
        "\"formula\": \"8/(3-8/3)=24\",\n}",
    "unquoted card names":
        '{"cards": [3, 3, 8, 8], "number": [3, 3, 8, 8], "formula": "8/(3-8/3)=24"}',
    "unquoted everything": "{cards: [3, 3, 8, 8], number: [3, 3, 8, 8], formula: 8/(3-8/3)=24}",
    "a code fence": f"```json\n{good_reply()}\n```",
    "prose around": f"I tried 3*8 first. So: {good_reply()} Done!",
    "a stray brace before": f"Let me {{ think. {good_reply()}",
    "a stray brace behind": f"{good_reply()} }} and that is it {{",
    "LaTeX before": f"$\\frac{{8}}{{3-8/3}}$ {good_reply()}",
    "an apostrophe in a string":
        good_reply()[:-1].replace("{", '{"thought": "it\'s easy", ') + ",}",
    "a line break in a string": good_reply().replace("3-8/3", "3-\n8/3"),
    "several objects, the last one right":
        f"{good_reply('3+3+8+8')} no, {good_reply('3*8')} but {good_reply()}",
    "an object without a formula behind it": good_reply() + ' {"confidence": 1}',
    "an object cut off behind it":
        good_reply() + ' {"cards": ["3", "3", "8", "8"], "formula": "3+3',
    "a formula given twice": good_reply().replace("{", '{"formula": "3+3", '),
    "a list of objects": f"[{good_reply('3+3')}, {good_reply()}]",
    "numbers in quotes": good_reply(numbers=["3", "3", "8", "8"]),
    "another order": good_reply(cards=["8", "3", "8", "3"], numbers=[8, 8, 3, 3]),
    "braces in a string of valid JSON": BRACES_IN_A_STRING,
    "braces in a string, in a code fence": f"```json\n{BRACES_IN_A_STRING}\n```",
    "an object within, valid JSON": OBJECT_WITHIN,
    "an object within, prose around": f"So: {OBJECT_WITHIN} Done.",
    "the last brace missing": good_reply()[:-1],
    "the first brace missing": good_reply()[1:],
    "no braces": good_reply()[1:-1],
    "cut behind the formula": good_reply()[:-1] + ', "explanation": "because 8 and',
    "no commas":
        '{\n"cards": ["3", "3", "8", "8"]\n"number": [3, 3, 8, 8]\n"formula": "8/(3-8/3)=24"\n}',
    "a comment":
        '{"cards": ["3", "3", "8", "8"], // there\'s a pair\n"number": [3, 3, 8, 8],'
        ' "formula": "8/(3-8/3)"}',
    "quotes in another value":
        good_reply()[:-1].replace("{", '{"thought": "an "8" and a "3"", ') + "}",
    "a list in a list and a trailing comma":
        '{"cards": [["3", "3", "8", "8"]], "number": [[3, 3, 8, 8]], "formula": "8/(3-8/3)",}',
    "an object behind it that speaks of the key":
        good_reply() + ' {"note": "that was the "formula""}',
    "no braces, no quotes around the keys":
        'cards: [3, 3, 8, 8]\nnumber: [3, 3, 8, 8]\nformula: "8/(3-8/3)"',
    "a cut object behind a wrong one": f"{good_reply('3*8')} No: {good_reply()[:-1]}",
}


@pytest.mark.parametrize("name", READABLE)
def test_a_right_reply_is_read_in_the_forms_that_models_write(name):
    verdict = judge(READABLE[name], vision=True)
    assert (verdict.status, verdict.reward) == ("correct", 5), verdict
    assert verdict.cards_read and verdict.numbers_right, verdict


NOTHING = ["", " ", "I do not know.", RIGHT, "formula", "{}", "[]", "null", '"formula"',
           "formula: 8/(3-8/3)", '{"Formula": "8/(3-8/3)"}', '{"cards": ["3", "3", "8", "8"]}',
           "{formula}", '{"cards": ["3"], "formula": "8/(3-8/3)', 'The "formula" is "8/(3-8/3)"',
           '"my_formula": "8/(3-8/3)"']


@pytest.mark.parametrize("reply", NOTHING)
def test_a_reply_without_an_answer_is_told_so(reply):
    verdict = judge(reply)
    assert (verdict.status, verdict.reward) == ("illegal_formula", -3)
    assert "No JSON object" in verdict.message
    assert not verdict.cards_read and not verdict.numbers_right


@pytest.mark.parametrize("formula", [24, None, True, ["8/(3-8/3)"], {"text": "8/(3-8/3)"}, 8.5])
def test_a_formula_that_is_not_text_is_illegal(formula):
    assert judge(json.dumps({"formula": formula})).status == "illegal_formula"


# A reply with thought: what an answer in its place {right} or {wrong} is worth.
THOUGHTS = {
    "the answer stands in the thought only": ("<think>{right}</think>", "none"),
    "the template wrote <think>": ("{right}</think>", "none"),
    "taken back": ("<think>{right}</think> No, I cannot do it.", "none"),
    "taken back, the template wrote <think>": ("{right} No.</think> I cannot do it.", "none"),
    "cut within the thought": ("<think> I try {right}", "none"),
    "cut within a second thought": ("<think>hm</think><think> {right}", "none"),
    "the mark stands in the thought": ("<think>a <think> {right} </think>hm</think>", "none"),
    "another answer than in the thought": ("<think>{right}</think>{wrong}", "wrong"),
    "another answer, the template wrote <think>": ("{right}</think>\n\n{wrong}", "wrong"),
    "the answer behind the thought": ("<think>{wrong} or {right}</think>{right}", "right"),
    "behind it, the template wrote <think>": ("{wrong}</think>\n\n{right}", "right"),
    "an odd quote in the thought": ("<think>so \" {{ {wrong}</think>So: {right}", "right"),
    "an empty thought": ("<think>\n\n</think>\n\n{right}", "right"),
    "a thought behind the answer that is cut": ("{right} <think> or {wrong}", "right"),
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_an_answer_within_the_thought_is_no_answer(name):
    shape, expected = THOUGHTS[name]
    statuses = {"right": "correct", "wrong": "wrong_numbers", "none": "illegal_formula"}
    reply = shape.format(right=good_reply(), wrong=good_reply("3*8"))
    verdict = judge(reply, vision=True)
    assert verdict.status == statuses[expected]
    assert verdict.cards_read is (expected != "none")
    answer = {"right": '"formula": "8/', "wrong": '"formula": "3*8', "none": ""}[expected]
    assert reply[verdict.answer_at:].startswith(answer)
    assert (verdict.answer_at == len(reply)) is (expected == "none")

    right = '{"current observation": "Marn Cafe", "action": "forward()"}'
    reply = shape.format(right=right, wrong='{"action": "stop()"}')
    verdict = verify.judge_navigation(reply, "forward()", "Marn Cafe", False)
    assert verdict.status == ("correct" if expected == "right" else "wrong_observation")
    assert verdict.message.startswith("No JSON object") is (expected == "none")
    assert (verdict.answer_at == len(reply)) is (expected == "none")


@pytest.mark.parametrize("last, status", [
    (good_reply("3+3+8+8=24"), "wrong_value"), (good_reply("3*8"), "wrong_numbers"),
    (good_reply("8*"), "illegal_formula"),
    ("{'formula': '3*8',}", "wrong_numbers"),
    (good_reply("3*8").replace("{", '{"steps": {"first": 1}, '), "wrong_numbers")])
def test_the_last_complete_object_counts_though_an_earlier_one_is_right(last, status):
    assert judge(f"{good_reply()} On second thoughts: {last}").status == status


@pytest.mark.parametrize("last, status", [
    (good_reply("3*8")[:-1], "wrong_numbers"), ('"formula": "8*"', "illegal_formula")])
def test_the_last_answer_counts_though_its_object_is_not_complete(last, status):
    assert judge(f"{good_reply()} On second thoughts: {last}").status == status


@pytest.mark.parametrize("reply, status", [
    # a brace is missing
    ('{"formula": "3+3+8+8", "note": "not formula: \'8/(3-8/3)\'"', "wrong_value"),
    # a comma is missing
    ('{"formula": "3+3+8+8" "why": "formula: \'8/(3-8/3)\' is too easy"}', "wrong_value"),
    ('{"note":"formula: \'8/(3-8/3)\'", "formula": "3+3', "illegal_formula"),
    ('{"thoughts": "try {formula: 8/(3-8/3)}", "formula": "3+3', "illegal_formula"),
    (good_reply() + "\n\nIn this formula: '*' means times.", "correct"),
    (good_reply() + '\nReason for this formula: "it is short"', "correct")])
def test_what_is_said_of_the_answer_in_prose_or_in_another_text_is_not_the_answer(reply, status):
    assert judge(reply).status == status


@pytest.mark.parametrize("reply, thought", [
    (good_reply(), good_reply().split('"formula"')[0]), ("{'formula': '1'}", "{"),
    ("{formula: 1}", "{"), ("none", "none"), ('{"formula": "1"} so the "formula" is 1', "{"),
    ('{"note": "\'formula\': 2", "formula": "1"}', '{"note": "\'formula\': 2", '),
    ('{"formula": "2"} {"formula": "1"}', '{"formula": "2"} {'), ('so "formula": "1"', "so "),
    ('{"formula": "1", "steps": {"formula": "2"}}', "{")])
def test_the_verdict_says_where_the_answer_that_it_read_begins(reply, thought):
    assert judge(reply).answer_at == len(thought)


def test_the_last_objects_cards_count_with_its_formula():
    verdict = judge(good_reply() + good_reply(cards=["3", "3", "8", "9"]), vision=True)
    assert (verdict.reward, verdict.cards_read) == (3.5, False)


# ---- Cards, numbers, pictures --------------------------------------------------------------------

HAND, VALUES = ["A", "10", "K", "K"], [1, 10, 13, 13]


@pytest.mark.parametrize("cards, right", [
    (["A", "10", "K", "K"], True), (["K", "A", "K", "10"], True), (["A", 10, "K", "K"], True),
    (["A", "10", "K"], False), (["A", "10", "K", "K", "K"], False), (["A", "10", "10", "K"], False),
    (["A", "1", "K", "K"], False), ([], False), ("A10KK", False), (None, False),
    ({"A": "10", "K": "K"}, False), (10, False)])
def test_cards_read_compares_the_cards_as_a_multiset(cards, right):
    reply = json.dumps({"cards": cards, "number": VALUES, "formula": "1"})
    assert judge(reply, HAND, VALUES).cards_read is right
    assert judge(reply, HAND, VALUES).numbers_right is True


@pytest.mark.parametrize("numbers, right", [
    ([1, 10, 13, 13], True), ([13, 1, 13, 10], True), (["1", "10", "13", "13"], True),
    ([1, 10, 10, 10], False), ([1, 10, 13], False), ([1, 10, 13, 13, 13], False),
    ([1, 10, 10, 13], False), ([[1], [10], [13], [13]], False), (None, False),
    ("1, 10, 13, 13", False)])
def test_numbers_right_compares_the_values_as_a_multiset(numbers, right):
    reply = json.dumps({"cards": HAND, "number": numbers, "formula": "1"})
    assert judge(reply, HAND, VALUES).numbers_right is right
    assert judge(reply, HAND, VALUES).cards_read is True


@pytest.mark.parametrize("spelt", [
    [1, 10, 13, 13], ["1", "10", "13", "13"], [1.0, 10.0, 13.0, 13.0], [True, 10, 13, 13]])
def test_the_order_of_the_stated_numbers_never_matters(spelt):
    answers = {judge(json.dumps({"number": order, "formula": "1"}), HAND, VALUES).numbers_right
               for order in itertools.permutations(spelt)}
    assert len(answers) == 1


def test_the_face_rule_decides_the_numbers_and_not_the_cards():
    reply = json.dumps({"cards": HAND, "number": [1, 10, 10, 10], "formula": "1+10+10+10"})
    ten, thirteen = judge(reply, HAND, [1, 10, 10, 10]), judge(reply, HAND, VALUES)
    assert (ten.cards_read, ten.numbers_right, ten.status) == (True, True, "wrong_value")
    assert (thirteen.cards_read, thirteen.numbers_right) == (True, False)
    assert thirteen.status == "wrong_numbers"


@pytest.mark.parametrize("formula, reward", [
    (RIGHT, 3.5), ("3+3+8+8", -2.5), ("3*8", -3.5), ("8*", -4.5)])
def test_misread_cards_cost_one_and_a_half_more_when_the_cards_are_a_picture(formula, reward):
    misread = good_reply(formula, cards=["3", "3", "8", "9"])
    seen, told = judge(misread, vision=True), judge(misread)
    assert (seen.reward, seen.status) == (reward, told.status)
    assert told.reward == reward + 1.5              # in text the list of cards is not paid for
    assert judge(good_reply(formula), vision=True).reward == told.reward
    assert '"9"' in seen.message and '"9"' not in told.message


def test_a_reply_without_an_object_has_not_read_the_picture():
    assert judge("no idea", vision=True).reward == -4.5


@pytest.mark.parametrize("beside", [
    "", ', "number": [3, 3, 8, 8]', ', "number": [3, 3, 8, 8], "form', ', "number": [3, 3, 8, 8]}',
    ', "formula": 5}'])
def test_a_reply_without_a_readable_formula_is_misread_only_if_its_cards_are(beside):
    read = judge('{"cards": ["3", "3", "8", "8"]' + beside, vision=True)
    assert (read.status, read.reward, read.cards_read) == ("illegal_formula", -3.0, True)
    assert read.ranks_right == 4 and "cards" not in read.message
    misread = judge('{"cards": ["3", "3", "8", "K"]' + beside, vision=True)
    assert (misread.status, misread.reward, misread.cards_read) == ("illegal_formula", -4.5, False)
    assert 'You read the cards as ["3", "3", "8", "K"]' in misread.message
    unread = judge('{"number": [3]' + beside, vision=True)
    assert unread.reward == -4.5 and 'Your reply lists no "cards"' in unread.message


def test_the_message_about_misread_cards_does_not_claim_a_reading_that_was_never_given():
    for reply in ("no idea", '{"formula": "8/(3-8/3)"}'):
        assert "None" not in judge(reply, vision=True).message


# ---- Feedback ------------------------------------------------------------------------------------

@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("formula", ["3+3+8+8", "3*8", "33-8/8", "8*", "7%7", 24])
def test_plain_feedback_says_that_the_try_failed_and_leaks_no_number(formula, vision):
    for cards in (CARDS, ["7", "7", "7", "7"]):
        plain = judge(good_reply(formula, cards), vision=vision, feedback="plain")
        informative = judge(good_reply(formula, cards), vision=vision)
        assert plain.message == "That is not correct."
        assert informative.message != plain.message
        assert (plain.status, plain.reward) == (informative.status, informative.reward)


def test_plain_feedback_names_no_cards_even_when_the_equation_is_right():
    misread = judge(good_reply(cards=["3", "3", "8", "9"]), vision=True, feedback="plain")
    assert misread.status == "correct"
    assert not re.search("[0-9]", misread.message)


def test_other_phrases_replace_ours_by_name():
    phrases = {**verify.FEEDBACK, "wrong_value": "got {value}, want {target} {unknown}"}
    assert judge_formula("3+3+8+8", phrases=phrases).message == "got 22, want 24 {unknown}"


def test_judging_does_not_change_its_arguments():
    cards, numbers = ["8", "3", "8", "3"], [8, 3, 8, 3]
    judge(good_reply(), cards, numbers, vision=True)
    assert (cards, numbers) == (["8", "3", "8", "3"], [8, 3, 8, 3])


def test_other_targets_are_judged_too():
    assert judge_formula("3-3+8-8=0", target=0).status == "correct"
    assert judge_formula("8/3-8/3", target=0).status == "correct"
    assert judge_formula("3-3+8/8", target=0).status == "wrong_value"
    assert judge_formula(RIGHT, target=25).status == "wrong_value"


# ---- Any string at all ---------------------------------------------------------------------------

def check_any_string(reply, vision):
    verdict = judge(reply, vision=vision)
    reward = REWARDS[verdict.status]
    assert verdict.reward in (reward, reward + (-1.5 if vision else 0))
    assert isinstance(verdict.cards_read, bool) and isinstance(verdict.numbers_right, bool)
    if verdict.status == "correct":                 # then a right formula really stands there
        texts = re.findall(r"[-+*/()0-9\s]+", reply.replace("\\n", " ").replace("\\t", " "))
        assert any(value_by_python(text) == 24 for text in texts), reply
    return verdict.status


def test_random_bytes_are_judged_without_an_exception():
    rng = random.Random(3)
    for i in range(30_000):
        raw = rng.randbytes(rng.randint(0, 40))
        encoding = ("latin-1", "utf-8", "utf-16-le")[i % 3]
        check_any_string(raw.decode(encoding, errors="replace"), vision=i % 2 == 0)


def test_json_like_strings_are_judged_without_an_exception():
    rng = random.Random(4)
    tokens = ["{", "}", "{", "}", "[", "]", '"', "'", ":", ",", "\\", " ", "\n", "formula",
              "cards", "number", '"formula":', "'formula':", '"cards":', RIGHT, f'"{RIGHT}"',
              f"'{RIGHT}=24'", "=24", "3", "8", "-", "1e999", "null", "NaN", "9" * 50, "\\u0041",
              "\\ud800", "```", "\x00", "\u2028", "\ud800"]
    seen = Counter()
    for i in range(35_000):
        body = "".join(rng.choices(tokens, k=rng.randint(1, 14)))
        if i % 2:
            body = '{"formula":' + body + "}"
        seen[check_any_string(body, vision=i % 3 == 0)] += 1
    assert seen["correct"] and seen["illegal_formula"], seen


def test_mutated_good_replies_are_judged_without_an_exception():
    rng = random.Random(5)
    alphabet = [*"{}[]()\"':,\\+-*/=0123456789 \n", "\u00e9", "formula", "e", "\ud800"]
    seen = Counter()
    for i in range(35_000):
        letters = list(rng.choice(list(READABLE.values())))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(letters))
            new = rng.choices(alphabet, k=rng.randint(0, 2)) or [rng.choice(alphabet)]
            letters[at:at + rng.randint(0, 3)] = new
        seen[check_any_string("".join(letters), vision=i % 2 == 0)] += 1
    assert set(seen) == set(REWARDS), seen


@pytest.mark.parametrize("cards", [
    '"\\ud800"', '["\\ud800"]', '["\\ud83d", "3"]', '{"\\udfff": 1}'])
def test_a_message_can_always_be_written_as_utf_8(cards):
    """A JSON escape can name half a character. Tokenizers and log files take whole ones only."""
    judge(f'{{"cards": {cards}, "formula": "8/(3-8/3)"}}', vision=True).message.encode("utf-8")


# ---- At once -------------------------------------------------------------------------------------

def test_templates_are_filled_in_once():
    assert verify.fill("{a} and {b}: {c}", a="{b}", b=2) == "{b} and 2: {c}"


def slow(reply, limit=0.010):
    """Whether judging takes more than `limit` CPU seconds in each of three tries."""
    for _ in range(3):
        start = time.thread_time()
        judge(reply, vision=True)
        if time.thread_time() - start <= limit:
            return False
    return True


@pytest.mark.parametrize("formula", [
    "9**9**9**9", "99**98**97", "9" * 9_000, " " * 9_000, "(" * 10_000,
    "(" * 5_000 + "1" + ")" * 5_000, "1*" * 5_000 + "1", "(" * 49 + "1" + ")" * 49,
    "9*" * 49 + "9", "1/" * 49 + "1"])
def test_a_huge_formula_is_turned_down_at_once(formula):
    assert judge_formula(formula).status in ("illegal_formula", "wrong_numbers")
    assert not slow(json.dumps({"formula": formula}))


UNITS = ["{", "}", "{}", "[", "]", "[]", '"', "'", "\\", '\\"', "\\'", '"\\', "'\\", "'\"", "\\\"'",
         '\\" ', "\\\"\\'", '" ', "' ", '",', "',", " ", "\n", "\t", "\x00", "\u2003", "a", "9",
         "1,", "(", "-", ":", ",", "e", '"a":1,', '"a":[],', "a:1,", "{a:", '{"a":',
         '{"formula":1}', "{formula}", "{formula:}", "{formula:[}", '{"formula":"', "{'formula':'",
         "{formula: [ \"\\\"", '{"formula":"8/(3-8/3)"}', "formula", '"formula":', '"formula",',
         "\\u0041", "\\ud800", " a", " ,", " :", "' '", '"\'" ', "1e9,", "\u00e9", "```", "null,",
         "[[],"]
OPENINGS = ["", "{", "[", '{"formula": ', '{"formula": "', "{'formula': '", '{"formula": [',
            '{"formula": ["', "{formula: ", '{"formula": 1, ', '{"cards": [',
            '{"formula": "8/(3-8/3)", "cards": [', '{"formula": "8/(3-8/3)", "cards": ["',
            "{formula"]
CLOSINGS = ["", "}", '"}', "']}", "]}", "],}", '"],}', ",}", " }"]


@pytest.mark.parametrize("opening", OPENINGS)
def test_ten_thousand_hostile_characters_take_at_most_ten_milliseconds(opening):
    for unit, closing in itertools.product(UNITS, CLOSINGS):
        room = 10_000 - len(opening) - len(closing)
        reply = opening + (unit * room)[:room] + closing
        assert not slow(reply), f"{opening} + {unit!r} repeated + {closing}"


@pytest.mark.parametrize("depth", [10, 900, 1_000, 2_000, 4_900])
def test_deep_nesting_is_judged_quickly_and_without_an_exception(depth):
    for inner in ("[" * depth + "]" * depth, '{"a":' * (depth // 4) + "1" + "}" * (depth // 4)):
        for reply in (inner, f'{{"formula": {inner}}}',
                      f'{{"formula": "{RIGHT}", "cards": {inner}, "number": {inner}}}'):
            assert not slow(reply)


def test_huge_integers_are_judged_quickly_and_without_an_exception():
    for digits in (300, 4_299, 4_300, 4_301, 9_900):        # Python refuses to read over 4,300
        for text in ("9" * digits, "-" + "9" * digits, "1e" + "9" * digits, "0." + "9" * digits):
            for reply in (text, f'{{"formula": {text}}}',
                          f'{{"formula": "{RIGHT}", "cards": [{text}], "number": [{text}]}}'):
                assert not slow(reply)


def test_a_reply_of_thousands_of_objects_still_gets_its_last_one_judged():
    tiny = '{"formula":1}'
    assert judge(tiny * 700 + good_reply()).status == "correct"
    assert not slow(tiny * 700 + good_reply()) and not slow("{formula}" * 1_100)


def test_remembering_formulas_changes_no_verdict():
    parse_formula.cache_clear()
    texts = [RIGHT, "3+3+8+8", "8/(3-3)*8", "8*"]
    first = [judge_formula(text).status for text in texts]
    assert [judge_formula(text).status for text in texts] == first


MARKERS = ["<|eot_id|>", "<|start_header_id|>user", "<|im_end|>", "<end_of_turn>",
           "<|end_of_turn|><|assistant|>", "</s>", "[INST]", "<|image|>",
           "<\uff5cend\u2581of\u2581sentence\uff5c>", "\u2028<|eot_id|>", "\ud800<|image|>"]


@pytest.mark.parametrize("marker", MARKERS)
def test_a_verdict_repeats_no_control_token_of_any_tokenizer(marker):
    """With ordinary tokens, such a reply would put a real end of turn into the next prompt."""
    game = json.dumps({"cards": [marker, "3", marker], "number": [3], "formula": marker})
    pictured = judge(game, vision=True).message
    step = json.dumps({"current observation": marker, "action": f"turn_direction({marker})"})
    walked = verify.judge_navigation(step, "forward()", "", False).message
    for message in (pictured, walked):
        assert marker not in message
        # Our texts quote one unexpected character, and put a list of cards into brackets.
        ours = re.sub(r"unexpected '.*?'|\[\"|\"\]", "", message)
        assert not set("<>[]|\uff5c") & set(ours), message
        assert message.encode() and message.isprintable()
    assert "turn_direction(" in walked and '"3"' in pictured


@pytest.mark.parametrize("play", [noise.general_points, noise.navigation])
def test_noisy_replies_are_judged_as_an_oracle_judges_them(play):
    found, examples = noise.count(play, 4000, 7)
    assert found["correct"] > 1000 and found["harmless"] > 700
    assert not found["exceptions"] and not found["wrongly correct"] and not found["lost"], examples


def test_the_oracle_of_noisy_replies_finds_a_judge_that_is_wrong(monkeypatch):
    def wrong_judge(reply, cards, numbers, **_):
        return judge_general_points(reply, cards, [1, *numbers[1:]])

    monkeypatch.setattr(noise, "judge_general_points", wrong_judge)
    assert noise.count(noise.general_points, 4000, 7)[0]["lost"] > 10
    monkeypatch.setattr(noise, "judge_general_points", lambda *_, **__: Verdict("correct", 5.0, ""))
    assert noise.count(noise.general_points, 400, 7)[0]["wrongly correct"] > 10
