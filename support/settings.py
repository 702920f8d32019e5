"""Settings and splits as a user writes them, for the command lines of all scripts and of envs.py.

    id rule=11,11,11 target=36 rule_ood      two splits, the first with settings for it alone
    id:0.7 rule_ood:0.3                      two splits and their weights
"""
import inspect
import json
import re
from pathlib import Path
from typing import NamedTuple

from support.chat import refuse_half_characters
from support.logs import without_twins


RULES = {"rule", "target", "action_space"}       # settings that make another rule


class Split(NamedTuple):
    """A split as a user names it, with settings that are for it alone."""
    name: str
    settings: dict
    weight: float = 1.0
    of_training: tuple = ()     # names of the settings that are as in the run's training

    @property
    def label(self):
        """Such as "id target=36", without the settings that are as in training."""
        words = [f"{key}={value}" for key, value in self.settings.items()
                 if key not in self.of_training]
        return " ".join([self.name, *words])


def read_settings(words):
    """("rule=11,11,11", "target=36") -> {"rule": "11,11,11", "target": "36"}."""
    settings = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise ValueError(f"setting {word!r}: expected KEY=VALUE, such as verify_iter=3")
        settings[key] = value
    return settings


def read_splits(words, weighted=False):
    """The splits that words name. If `weighted`, each may have a weight; else repeats are left out.

    ("id:0.7", "rule=11,11,11", "rule_ood") ->
    [Split("id", {"rule": "11,11,11"}, 0.7), Split("rule_ood", {}, 1.0)]

    A word may be a Split already.
    """
    splits = []
    for word in words:
        if isinstance(word, Split):
            splits.append(word)
            continue
        if "=" in word:
            if not splits:
                raise ValueError(f"setting {word!r}: the name of a split must stand before it, "
                                 f"such as id {word}")
            splits[-1].settings.update(read_settings([word]))
            continue
        name, colon, weight = word.partition(":")
        if colon and not weighted:
            raise ValueError(f"split {word!r}: only --mix has weights")
        try:
            number = float(weight or 1)
        except ValueError:
            number = 0.0                     # as wrong as a weight of 0
        if not 0 < number < float("inf"):
            raise ValueError(f"split {word!r}: its weight {weight!r} must be a number above 0, "
                             "as in id:0.7")
        splits.append(Split(name, {}, number))
    if not splits:
        raise ValueError("no split is named")
    return splits if weighted else list({split.label: split for split in splits}.values())


def read_value(name, value, default):
    """The text of a setting as the type of its default; ValueError if it cannot be that."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if isinstance(default, bool):
        check_choice(name, value, ("true", "false"))
        return value == "true"
    if not re.fullmatch(r"-?\d+", value):
        raise ValueError(f"{name} {value!r}: must be a whole number")
    return int(value)


def by_name(chosen):
    """The settings of a row by name, those of its environment beside the others."""
    return {**chosen, **chosen.get("env", {})}


def check_choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} {value!r}: allowed are {', '.join(allowed)}")


def check_whole(name, value, low, high=None):
    if type(value) is not int or value < low:
        raise ValueError(f"{name} {value!r}: must be a whole number, {low} or more")
    if high is not None and value > high:
        raise ValueError(f"{name} {value}: must be at most {high}")


def check_temperature(value):
    """ValueError if a temperature is so near to 0 that logits divided by it are no numbers."""
    if 0 < value < 0.001:
        raise ValueError(f"--temperature {value}: must be 0, for the likeliest token, or at least "
                         "0.001")


def check_letters(name, value, allowed):
    """ValueError unless a setting is a text of some of the allowed letters, each once."""
    known = isinstance(value, str) and value and set(value) <= set(allowed)
    if not known or len(set(value)) < len(value):
        raise ValueError(f"{name} {value!r}: allowed are letters of {allowed}, each once")


def read_rule(rule, named):
    """What J, Q and K are worth under a rule: a tuple of three, or None for "random".

    `named` holds the rules that have names: {"face_cards_as_10": (10, 10, 10), ...}.
    """
    if rule == "random":
        return None
    if rule in named:
        return named[rule]
    values = rule.split(",") if isinstance(rule, str) else []
    if len(values) == 3 and all(re.fullmatch("[1-9][0-9]?", value.strip()) for value in values):
        return tuple(int(value) for value in values)
    raise ValueError(f"rule {rule!r}: allowed are {', '.join(named)}, random, or three numbers "
                     "from 1 to 99 for J,Q,K such as 3,12,7")


def defaults_of(*makers):
    """{name: default} of all arguments that have one; of two makers' defaults the last counts."""
    found = {}
    for maker in makers:
        for name, parameter in inspect.signature(maker).parameters.items():
            if parameter.default is not parameter.empty:
                found[name] = parameter.default
    return found


def check_known(task, given, allowed, picture_settings):
    """ValueError if a given setting is not `allowed`, or is for pictures that a task lacks.

    `picture_settings` is empty in a task with pictures.
    """
    for name, value in given.items():
        if name not in allowed:
            raise ValueError(f"{name} {value!r}: {task} has no such setting; "
                             f"it has {', '.join(allowed)}")
        if name in picture_settings:
            raise ValueError(f"{name} {value!r}: {task} has no pictures")


def check_open(split, of_split, common, own):
    """ValueError if a setting for all splits contradicts this one, and `own` does not settle it."""
    for name, value in common.items():
        if name in of_split and name not in own:
            raise ValueError(f"{name} {value!r}: split {split} has a {name} of its own "
                             f"({of_split[name]}); to change it, write {split} {name}={value}")


# What a prompt must show, whatever its wording: else nobody could know the hand or the route.
SHOWN = {"gp_input_text": "cards", "gp_card": "card", "nav_instruction": "instruction",
         "nav_sentence": "sentence"}


def load_templates(path, templates, more_values, rule=""):
    """`templates` with those of a JSON file put over them.

    A template may use the {names} of the one that it replaces, and those that `more_values` has
    for it. An object with one template for each rule may stand in its place. ValueError names what
    the file may not hold.
    """
    if not path:
        return templates
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"),
                           object_pairs_hook=without_twins)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"prompt file {path}: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"prompt file {path}: expected a JSON object of templates, "
                         f"got {type(given).__name__}")
    chosen = {**templates, **given}
    for name, text in given.items():
        if name not in templates:
            raise ValueError(f"prompt file {path}: unknown template {name!r}; "
                             f"allowed: {', '.join(templates)}")
        if isinstance(text, dict):
            if rule not in text:
                raise ValueError(f"prompt file {path}: template {name!r} is worded for "
                                 f"{' and '.join(text) or 'no rule'}, not for the rule {rule}")
            text = chosen[name] = text[rule]
        if not isinstance(text, str):
            raise ValueError(f"prompt file {path}: template {name!r} must be text, "
                             f"got {type(text).__name__}")
        refuse_half_characters(text, f"prompt file {path}: template {name!r}")
        allowed = set(re.findall(r"\{(\w+)\}", templates[name])) | more_values.get(name, set())
        foreign = set(re.findall(r"\{(\w+)\}", text)) - allowed
        if foreign:
            raise ValueError(f"prompt file {path}: template {name!r} uses {{{min(foreign)}}}; "
                             f"allowed: {', '.join(sorted(allowed)) or 'none'}")
        if name in SHOWN and f"{{{SHOWN[name]}}}" not in text:
            raise ValueError(f"prompt file {path}: template {name!r} lacks {{{SHOWN[name]}}}, so "
                             "no prompt would show it")
    return chosen
