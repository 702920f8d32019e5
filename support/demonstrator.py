"""Replies that are not the expert's: failed tries for dialogues with errors, and an imperfect demonstrator.

The second makes the starts of the tiny run (recipes/base.sh), as settings of an environment: `faults=leave_out:0.4,ten:0.15` has
0.4 of a GeneralPoints demonstrator's replies leave a card out, and 0.15 count J, Q and K as ten whatever the rule says.
"""
import re

from support.solver import solutions


def parse_faults(text, allowed):
    """"leave_out:0.4,ten:0.15" -> {"leave_out": 0.4, "ten": 0.15}; ValueError names what is not allowed."""
    shares = {}
    for word in filter(None, text.split(",")):
        name, _, share = word.partition(":")
        if name not in allowed or not re.fullmatch(r"0?\.\d+|1|1\.0", share):
            raise ValueError(f"faults {text!r}: allowed are {', '.join(allowed)}, each with its share of the replies, such as "
                             f"{allowed[0]}:0.4")
        shares[name] = float(share)
    if sum(shares.values()) > 1:
        raise ValueError(f"faults {text!r}: the shares are more than 1 together")
    return shares


def flawed_formula(rng, numbers):
    """A try at a formula of these numbers: another value (mostly), a foreign number, or a bracket too many."""
    numbers = rng.sample(numbers, 4)
    fault = rng.choices(("value", "number", "form"), weights=(6, 2, 1))[0]
    if fault == "number":
        numbers[0] = rng.randint(1, 13)
    a, b, c, d = numbers
    o, p, q = rng.choices("+-*/", weights=(3, 3, 3, 1), k=3)
    formula = rng.choice((f"{a}{o}{b}{p}{c}{q}{d}", f"({a}{o}{b}){p}{c}{q}{d}", f"{a}{o}({b}{p}{c}){q}{d}",
                          f"({a}{o}{b}){p}({c}{q}{d})", f"({a}{o}{b}{p}{c}){q}{d}"))
    return f"({formula}" if fault == "form" else formula


def without_last_step(formula):
    """The longer operand of a formula's last operation: "(10-4)*3+6" -> "(10-4)*3"."""
    depth, last = 0, None
    for at, sign in enumerate(formula):
        depth += (sign == "(") - (sign == ")")
        if depth == 0 and (sign in "+-" or sign in "*/" and (last is None or formula[last] in "*/")):
            last = at
    return max(formula[:last], formula[last + 1:], key=lambda part: len(re.findall("[0-9]+", part)))


def faulty_hand(env, fault):
    """A GeneralPoints reply that leaves a card out ("leave_out") or counts J, Q, K as ten ("ten")."""
    numbers = [10 if card in "JQK" else number for card, number in zip(env.cards, env.numbers)] if fault == "ten" else env.numbers
    found = solutions(numbers, env.target)
    if not found:
        return env.expert_reply()
    return env.format_reply(found[0] if fault == "ten" else without_last_step(env.formula), numbers)


def faulty_step(env, fault):
    """A V-IRL reply that walks past an intersection ("walk_past") or takes the other rule's word ("other_word")."""
    here = env.position
    if fault == "walk_past" and here.intersection:
        turns = sum(position.kind == "turn" for position in env.rail[:env.at + 1])     # two sentences each
        return env.format_reply("forward()", sentence=env.sentences[2 * turns - 1])
    return env.format_reply(here.other_action if fault == "other_word" else here.action)
