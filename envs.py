"""The tasks as conversations: GeneralPoints and V-IRL (paper Section 4, appendices A and B).

GeneralPoints: four cards, a target (24), one equation that uses each card once. The paper trains on one setting of
what J, Q and K are worth and tests on another:

    split         J, Q, K        hands                      used for
    id            10, 10, 10     any solvable               training and in-distribution tests
    rule_ood      11, 12, 13     at least one face card     the rule never trained on
    unseen        10, 10, 10     the held-out tenth         hands never trained on, if all training had fold="train"
    visual_ood    10, 10, 10     red suits                  cards that look different; in pictures only, where all
                                                            other splits have black suits
    rule_family   1..13 each,    any solvable               not in the paper: the stand-in for pre-training; the
                  drawn anew                                two rules above are never drawn

V-IRL: follow written instructions through a city to a destination. Every turn is named in both vocabularies there; the
rule says which of them an action takes. The data are folders in the released format; data/synthetic_city.py makes some:

    split         turn_direction(x)   routes                used for
    id            compass words       train/                training and in-distribution tests
    rule_ood      left, right, ...    train/                the rule never trained on
    unseen        compass words       unseen/               routes of the training city never trained on
    visual_ood    compass words       mini/, in file order  cities that look different; with pictures only

An environment is a conversation with the verifier (sequential revision, Section 3, Fig. 2-3):

    messages, info = env.reset(seed=0)                                  # user: the prompt
    messages, reward, terminated, truncated, info = env.step(reply)     # + assistant: reply, user: the verdict

`messages` is the Hugging Face chat format. In turn two the model sees all of turn one and the verdict:

    user         Make 24 from four cards. ... J counts as 10, Q counts as 10 and K counts as 10. Cards: ["Q", "10", ...
    assistant    {"cards": ["Q", "10", "A", "3"], "number": [10, 10, 1, 3], "formula": "(10-1)*3-10=24"}
    user         Your formula uses the right numbers, but it makes 17, not 24. Try another formula in the same format.

A correct equation terminates a GeneralPoints episode. V-IRL goes on rails: a correct action moves the agent on, and a
new dialogue begins whose prompt tells what was seen and done before, failed tries left out; a wrong one moves nobody;
the right stop() at the destination terminates. After `verify_iter` judged replies, to a hand or at one position, an
episode is truncated, and that turn is charged STEP_LIMIT on top. `env.expert_reply()` is what SFT learns from.

    python envs.py gp-l                                # play an episode yourself
    python envs.py gp-l --split rule_ood --show        # print a prompt, an expert reply and a verdict
    python envs.py virl-l --root city0 --show DIR      # write what is seen along a route: views and prompts
    python envs.py gp-vl --show DIR                    # the same for GeneralPoints: the cards as a picture

Neither torch nor transformers is imported here. Cards are dealt without replacement from 52 (26 where one colour is
shown), as the paper says. Left out of V-IRL: relocation with the official code's other thresholds, and its free (off
the rails) mode.
"""
import argparse
import inspect
import itertools
import json
import math
import pickle
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from verify import FEEDBACK, STEP_LIMIT, fill, judge_general_points, judge_navigation, solutions

# Our words for the paper's prompt structure (A.2: task, input, output; B.2: task, instruction, what an observation is,
# actions, history, output). A prompt file may replace each by name.
PROMPTS = {
    "gp_task": "Make {target} from four cards. Combine their values with addition, subtraction, multiplication, "
               "division and parentheses, and use every card exactly once. An ace counts as 1, J counts as {J}, "
               "Q counts as {Q} and K counts as {K}.",
    "gp_input_text": "\nCards: {cards}",
    "gp_input_picture": "\nThe picture shows the four cards.",
    "gp_output": "\nReply with a JSON object:\n"
                 "{\"cards\": [the ranks you see], \"number\": [their values], "
                 "\"formula\": \"an equation ending in ={target}\"}",
    "gp_retry": "{verdict} Try another formula in the same format.",
    "nav_task": "Walk to a destination: follow the instructions, one action at a time.",
    "nav_instruction": "\nInstructions:{instruction}",
    "nav_sentence": "\n{sentence}",
    "nav_first_turn": "First turn {rel} to face {dir}.",
    "nav_turn": "Turn {rel} to face {dir}.",
    "nav_move": "Go on to the next intersection.",
    "nav_move_landmark": "Go on to the next intersection, where {landmarks}.",
    "nav_last_move": "Go on until you are there: {landmarks}.",
    "nav_see_words": "\nAn observation names the landmark in sight, and the intersection if you are at one.",
    "nav_see_views": "\nThe picture shows what you see now: front and right above, back and left below.",
    "nav_actions": "\nActions: forward(), stop() at the destination, or turn_direction(x) where x is one of {words}.",
    "nav_history": "\nSo far:{obs_act_seq}",
    "nav_past": "\n{observation} -> {action}",
    "nav_between": "{landmark}",
    "nav_at_intersection": "{landmark}; intersection",
    "nav_no_landmark": "No landmark",
    "nav_views": "The picture",
    "nav_output": "\nReply with a JSON object:\n{\"current observation\": what you see now, "
                  "\"current instruction\": the sentence you follow now, \"action\": your action}",
    "nav_retry": "{verdict} Try another action in the same format.",
    **{f"feedback_{name}": text for name, text in FEEDBACK.items()},
}
MORE_VALUES = {"nav_sentence": {"n"}, "nav_past": {"n"}}   # not in our words: for prompt files


def load_prompts(path):
    """PROMPTS with the templates of a JSON file put over them; ValueError names what the file may not hold."""
    if not path:
        return PROMPTS
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"prompt file {path}: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"prompt file {path}: expected a JSON object of templates, got {type(given).__name__}")
    for name, text in given.items():
        if name not in PROMPTS:
            raise ValueError(f"prompt file {path}: unknown template {name!r}; allowed: {', '.join(PROMPTS)}")
        if not isinstance(text, str):
            raise ValueError(f"prompt file {path}: template {name!r} must be text, got {type(text).__name__}")
        allowed = set(re.findall(r"\{(\w+)\}", PROMPTS[name])) | MORE_VALUES.get(name, set())
        foreign = set(re.findall(r"\{(\w+)\}", text)) - allowed
        if foreign:
            raise ValueError(f"prompt file {path}: template {name!r} uses {{{min(foreign)}}}; "
                             f"allowed: {', '.join(sorted(allowed)) or 'none'}")
    return {**PROMPTS, **given}


def open_picture(path):
    """A picture file as RGB, read to its end; ValueError names one that is missing or broken."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, NotImplementedError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture that can be read: {error}") from None   # PIL's decoders raise them all


def user_message(text, picture=None):
    """A user's message in the Hugging Face chat format, the picture before the text if there is one."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}] if picture else text
    return {"role": "user", "content": content}


def read_text(message):
    """The text of a message, its picture left out."""
    content = message["content"]
    return content if isinstance(content, str) else content[-1]["text"]


RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = "SHDC"


# ---- GeneralPoints: the cards as a picture, drawn by us ----------------------------------------------------

MIN_SIZE, MAX_SIZE = 48, 4096       # of a picture, in pixels
CANVAS, CARD, CARDS_X, CARDS_Y = 1200, (270, 378), (5, 302, 599, 896), 411      # the official geometry, in pixels
FELT, NAVY, CREAM, GOLD = (53, 101, 77), (32, 48, 104), (252, 246, 226), (226, 170, 44)
INKS = {"S": (10, 10, 8), "H": (192, 36, 42), "D": (192, 36, 42), "C": (10, 10, 8)}
FINE = 3                # cards are drawn this many times larger and reduced, which smooths the edges


def arc(x, y, across, down, start=0, end=360):
    """Points on an ellipse around (x, y); angles in degrees, 0 is right and 90 is below."""
    angles = [(start + (end - start) * step / 60) * math.pi / 180 for step in range(61)]
    return [(x + across * math.cos(angle), y + down * math.sin(angle)) for angle in angles]


# Ranks as pen strokes, 1 high. What looks alike at 50 x 70 pixels is kept apart: the 3 has a flat top (8, J), the J a
# bar (3), the Q a long tail (0).
SIX = [*arc(.53, .69, .52, .69, 268, 180), *arc(.3, .69, .29, .31, 180, 540)]
STROKES = {
    "A": [[(0, 1), (.32, 0), (.64, 1)], [(.11, .68), (.53, .68)]],
    "2": [[*arc(.3, .29, .28, .29, 195, 395), (.02, 1), (.6, 1)]],
    "3": [[(.04, 0), (.55, 0), (.27, .4), *arc(.26, .7, .31, .3, -80, 145)]],
    "4": [[(.45, 1), (.45, 0), (0, .69), (.64, .69)]],
    "5": [[(.54, 0), (.09, 0), (.05, .45), *arc(.27, .69, .31, .31, -120, 140)]],
    "6": [SIX], "9": [[(.6 - x, 1 - y) for x, y in SIX]],
    "7": [[(0, 0), (.58, 0), (.2, 1)]],
    "8": [arc(.3, .24, .24, .24), arc(.3, .74, .3, .26)],
    "10": [[(0, .2), (.13, 0), (.13, 1)], arc(.58, .5, .21, .5)],
    "J": [[(.16, 0), (.66, 0)], [(.44, 0), *arc(.2, .72, .24, .28, 0, 165)]],
    "Q": [arc(.33, .47, .33, .47), [(.36, .66), (.68, 1.03)]],
    "K": [[(0, 0), (0, 1)], [(.58, 0), (0, .62)], [(.2, .42), (.62, 1)]],
}
# Suits as polygons, about 1 high, around (0, 0).
HEART = [(math.sin(t) ** 3 * 16 / 33,
          -(2.5 + 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 31)
         for t in (step * math.pi / 30 for step in range(60))]
STEM = [(-.06, -.2), (.06, -.2), (.09, .35), (.22, .5), (-.22, .5), (-.09, .35)]
SIGNS = {
    "S": [[(x, -.92 * y - .06) for x, y in HEART], STEM],
    "H": [HEART],
    "D": [[(.42 * x * abs(x) ** 1.3, .54 * y * abs(y) ** 1.3) for x, y in arc(0, 0, 1, 1)]],
    "C": [arc(0, -.26, .24, .24), arc(-.25, .1, .24, .24), arc(.25, .1, .24, .24), STEM],
}
# Where a card has its suit: (drawn twice, the second time turned by 180 degrees; drawn once).
FOUR, SIDES, CENTRE = [(100, 58), (170, 58)], [(100, 189), (170, 189)], (135, 189)
EIGHT = [*FOUR, (100, 145), (170, 145)]
PIPS = {
    "A": ([], [CENTRE]), "2": ([(135, 58)], []), "3": ([(135, 58)], [CENTRE]), "4": (FOUR, []), "5": (FOUR, [CENTRE]),
    "6": (FOUR, SIDES), "7": (FOUR, [*SIDES, (135, 123)]), "8": ([*FOUR, (135, 123)], SIDES), "9": (EIGHT, [CENTRE]),
    "10": ([*EIGHT, (135, 101)], []), **dict.fromkeys("JQK", ([(94, 61)], [])),
}


def placed(points, x, y, size):
    """Points of a shape 1 high, in fine pixels, with its (0, 0) at (x, y) of the card."""
    return [(FINE * (x + u * size), FINE * (y + v * size)) for u, v in points]


def draw_suit(pen, suit, x, y, size=40):
    """Fill a suit's sign around (x, y)."""
    for polygon in SIGNS[suit]:
        pen.polygon(placed(polygon, x, y, size), INKS[suit])


def draw_rank(pen, rank, ink, x, y, height, thickness):
    """Write a rank around (x, y) with a round pen."""
    middle = max(u for stroke in STROKES[rank] for u, _ in stroke) / 2
    for stroke in STROKES[rank]:
        points = placed(stroke, x - middle * height, y - height / 2, height)
        pen.line(points, ink, FINE * thickness)
        for point in points:                                # rounds ends and joints; joint="curve" leaves notches
            pen.circle(point, FINE * thickness / 2, ink)


def draw_card(rank, suit):
    """One card, an RGB picture of CARD pixels; the felt around its round corners makes a paste mask needless."""
    fine = (FINE * CARD[0], FINE * CARD[1])
    card, (twice, once) = Image.new("RGB", fine, FELT), PIPS[rank]
    pen = ImageDraw.Draw(card)
    pen.rounded_rectangle((0, 0, fine[0] - 1, fine[1] - 1), FINE * 16, "white")
    if rank in "JQK":
        pen.rectangle((FINE * 67, FINE * 32, fine[0] - 1 - FINE * 67, fine[1] - 1 - FINE * 32), CREAM, NAVY, FINE * 4)
    draw_rank(pen, rank, INKS[suit], 34, 46, 60, 10)        # the corner index, then the suit under it and the pips
    for x, y in [(34, 108), *twice]:
        draw_suit(pen, suit, x, y)
    # All of it once more, turned by 180 degrees: the darker of two pixels is the drawn one.
    card = ImageChops.darker(card, card.transpose(Image.Transpose.ROTATE_180))
    pen = ImageDraw.Draw(card)
    for x, y in once:
        draw_suit(pen, suit, x, y, 120 if rank == "A" else 40)
    if rank in "JQK":
        draw_rank(pen, rank, INKS[suit], 135, 202, 125, 20)
        steps = {"J": 2, "Q": 4, "K": 8}[rank]              # a crown: 2, 3 or 5 tips with a valley between two
        crown = [(step / steps - .5, step % 2 * .22) for step in range(steps + 1)]
        pen.polygon(placed([*crown, (.4, .44), (-.4, .44)], 135, 90, 62), GOLD, NAVY, FINE * 2)
        for tip in placed(crown[::2], 135, 90, 62):
            pen.circle(tip, FINE * 5, GOLD, NAVY, FINE * 2)
    return card.resize(CARD, Image.Resampling.LANCZOS)


@lru_cache(maxsize=520)
def card_picture(rank, suit, width, height, card_dir=""):
    """A card scaled to width x height: ours, or the file of a directory with the official names (HT.png: H 10)."""
    name = f"{suit}{'T' if rank == '10' else rank}.png"
    picture = open_picture(Path(card_dir, name)) if card_dir else draw_card(rank, suit)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def draw_hand(hand, resolution, card_dir=""):
    """Four (rank, suit) cards in a row on felt, RGB, resolution x resolution; ValueError names a card's bad file."""
    scale = resolution / CANVAS
    width, height = round(CARD[0] * scale), round(CARD[1] * scale)
    canvas = Image.new("RGB", (resolution, resolution), FELT)
    for (rank, suit), x in zip(hand, CARDS_X):
        canvas.paste(card_picture(rank, suit, width, height, card_dir), (round(x * scale), round(CARDS_Y * scale)))
    return canvas


# ---- GeneralPoints -----------------------------------------------------------------------------------------

RULES = {"face_cards_as_10": (10, 10, 10), "face_cards_as_11_12_13": (11, 12, 13)}
FOLDS = ("all", "train", "test")


def parse_rule(rule):
    """What J, Q, K are worth under a rule: three numbers, or None for "random" (drawn every episode)."""
    if rule == "random":
        return None
    if rule in RULES:
        return RULES[rule]
    values = rule.split(",") if isinstance(rule, str) else []
    if len(values) == 3 and all(re.fullmatch("[1-9][0-9]?", value.strip()) for value in values):
        return tuple(int(value) for value in values)
    raise ValueError(f"rule {rule!r}: allowed are {', '.join(RULES)}, random, or three numbers from 1 to 99 for J,Q,K "
                     "such as 3,12,7")


def held_out(numbers):
    """Whether a hand's multiset of values belongs to the test fold: a tenth of them, by hash."""
    return crc32(repr(sorted(numbers)).encode()) % 10 == 0


class GeneralPoints:
    """One GeneralPoints conversation at a time.

    rule          "face_cards_as_10", "face_cards_as_11_12_13", "random", or "J,Q,K" values
    target        what the formula must make
    face_card     deal only hands with at least one of J, Q, K (the paper's OOD sampling)
    suits         the suits of the deck, a subset of "SHDC"
    verify_iter   judged replies per episode (5 in the paper)
    feedback      "informative" names the fault, "plain" only says the try failed
    fold          "all", or value multisets in ("test") or out of ("train") the held-out tenth
    solution      the expert's formula: "fixed" (the shortest) or "random" (seeded, any of them)
    vision        show the cards in a picture instead of telling them; misread cards cost extra
    resolution    pixels of the picture's side (1200 in the paper)
    card_dir      a folder with the official card pictures; "" draws our own
    prompt_file   JSON object of templates that replace those of PROMPTS
    """
    answer_key = '"formula"'   # rl.py weighs the reply's tokens from here on fully

    def __init__(self, rule="face_cards_as_10", target=24, face_card=False, suits=SUITS, verify_iter=5,
                 feedback="informative", fold="all", solution="fixed", vision=False, resolution=1200, card_dir="",
                 prompt_file=""):
        self.values = parse_rule(rule)
        for name, value, allowed in [("feedback", feedback, ("informative", "plain")), ("fold", fold, FOLDS),
                                     ("solution", solution, ("fixed", "random"))]:
            if value not in allowed:
                raise ValueError(f"{name} {value!r}: allowed are {', '.join(allowed)}")
        if not isinstance(suits, str) or not suits or set(suits) - set(SUITS) or len(set(suits)) < len(suits):
            raise ValueError(f"suits {suits!r}: allowed are letters of {SUITS}, each once")
        for name, value, least in [("target", target, 0), ("verify_iter", verify_iter, 1),
                                   ("resolution", resolution, MIN_SIZE)]:
            if type(value) is not int or value < least:
                raise ValueError(f"{name} {value!r}: must be a whole number, {least} or more")
        if resolution > MAX_SIZE:
            raise ValueError(f"resolution {resolution}: must be at most {MAX_SIZE}")
        self.target, self.face_card, self.verify_iter = target, face_card, verify_iter
        self.feedback, self.fold, self.solution = feedback, fold, solution
        self.vision, self.resolution, self.card_dir = vision, resolution, card_dir
        self.deck = [(rank, suit) for suit in suits for rank in range(13)]
        for rank, suit in self.deck if card_dir else ():           # a bad file is an error now, not in mid-training
            card_picture(RANKS[rank], suit, *CARD, card_dir)
        self.prompts = load_prompts(prompt_file)
        self.phrases = {name: self.prompts[f"feedback_{name}"] for name in FEEDBACK}
        self.done = True

    def draw_rule(self):
        """Values for J, Q, K that are neither rule of the paper."""
        while (jqk := tuple(self.rng.randint(1, 13) for _ in range(3))) in RULES.values():
            pass
        return jqk

    def deal(self):
        """Draw hands until one fits, a face card if asked for, a solution, the right fold: [(rank, suit)], numbers."""
        for _ in range(100_000):
            cards = self.rng.sample(self.deck, 4)
            ranks = [rank for rank, _ in cards]
            numbers = [self.jqk[rank - 10] if rank > 9 else rank + 1 for rank in ranks]
            if self.face_card and max(ranks) < 10 or not solutions(numbers, self.target):
                continue
            if self.fold == "all" or held_out(numbers) == (self.fold == "test"):
                return [(RANKS[rank], suit) for rank, suit in cards], numbers
        raise ValueError(f"no hand makes {self.target} with J,Q,K = {self.jqk}, fold {self.fold}, suits and "
                         f"face_card as given (100,000 deals tried): try another target")

    def reset(self, seed, episode=0):
        """Deal a hand; the seed (an int or a string) fixes the whole episode. Returns (messages, info).

        `episode`, the number of a test episode, means nothing here: only a route list is played in order.
        """
        self.rng = random.Random(str(seed))   # as text: numbers would lose their sign
        self.jqk = self.values or self.draw_rule()
        self.hand, self.numbers = self.deal()
        self.cards = [rank for rank, _ in self.hand]
        found = solutions(self.numbers, self.target)
        self.formula = found[0] if self.solution == "fixed" else self.rng.choice(found)
        self.turn, self.done = 0, False
        self.messages = [user_message(self.prompt(), self.picture() if self.vision else None)]
        return self.messages, {"status": "", "success": False, "turn": 0, "new_dialogue": True}

    def picture(self):
        """The hand as a picture; ValueError if one of the folder's cards cannot be read."""
        return draw_hand(self.hand, self.resolution, self.card_dir)

    def skip_ahead(self, rng, balance):
        """Go where the expert will be at some time: a hand has one position only. Returns the messages there."""
        return self.messages

    def prompt(self):
        task = fill(self.prompts["gp_task"], target=self.target, **dict(zip("JQK", self.jqk)))
        shown = fill(self.prompts["gp_input_picture" if self.vision else "gp_input_text"], cards=json.dumps(self.cards))
        return task + shown + fill(self.prompts["gp_output"], target=self.target)

    def judge(self, reply):
        return judge_general_points(reply, self.cards, self.numbers, self.target, self.vision, self.feedback,
                                    self.phrases)

    def step(self, reply):
        """Judge one reply and append it with the verdict: (messages, reward, terminated, truncated, info)."""
        if self.done:
            raise RuntimeError("the episode is over: call reset() first")
        verdict = self.judge(reply)
        self.turn += 1
        terminated = verdict.status == "correct"
        truncated = not terminated and self.turn == self.verify_iter
        self.done = terminated or truncated
        told = verdict.message if self.done else fill(self.prompts["gp_retry"], verdict=verdict.message)
        self.messages = self.messages + [{"role": "assistant", "content": reply}, {"role": "user", "content": told}]
        info = {"status": verdict.status, "success": terminated, "turn": self.turn, "kind": "formula",
                "try": self.turn, "new_dialogue": False, "numbers_right": verdict.numbers_right,
                "cards_read": verdict.cards_read, "ranks_right": verdict.ranks_right}
        return self.messages, verdict.reward + STEP_LIMIT * truncated, terminated, truncated, info

    def format_reply(self, formula):
        return json.dumps({"cards": self.cards, "number": self.numbers, "formula": f"{formula}={self.target}"})

    def expert_reply(self):
        """A correct reply to the present hand, as valid JSON."""
        return self.format_reply(self.formula)

    def flawed_reply(self):
        """A reply in the right format that is not correct: wrong value (mostly), wrong number, or broken formula.

        For dialogues with failed tries before the expert's reply (the paper trains on such in appendix D, Fig. 15).
        """
        while True:
            numbers = self.rng.sample(self.numbers, 4)
            fault = self.rng.choices(("value", "number", "form"), weights=(6, 2, 1))[0]
            if fault == "number":
                numbers[0] = self.rng.randint(1, 13)
            a, b, c, d = numbers
            o, p, q = self.rng.choices("+-*/", weights=(3, 3, 3, 1), k=3)
            formula = self.rng.choice((f"{a}{o}{b}{p}{c}{q}{d}", f"({a}{o}{b}){p}{c}{q}{d}",
                                       f"{a}{o}({b}{p}{c}){q}{d}", f"({a}{o}{b}){p}({c}{q}{d})",
                                       f"({a}{o}{b}{p}{c}){q}{d}"))
            if fault == "form":
                formula = f"({formula}"
            reply = self.format_reply(formula)
            if self.judge(reply).status != "correct":
                return reply

    def atoms(self):
        """The strings that a small tokenizer should keep whole: ranks, values, operators."""
        values = [*range(1, 14), *(self.values or ()), self.target]
        return list(dict.fromkeys([*RANKS, *map(str, values), *"+-*/()="]))


# ---- V-IRL: the data set -----------------------------------------------------------------------------------

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
RELATIVE = ("left", "right", "slightly left", "slightly right")
ACTION_SPACES = {"absolute": COMPASS, "relative": RELATIVE}
FOLDERS = {"train": ("train", "nyc_1k_routes"), "unseen": ("unseen",), "mini": ("mini", "VLN_mini")}
VIEW_HEADINGS = {"prompt": (0, 90, 180, 270), "official": (-135, -45, 45, 135)}
NO_LANDMARK = "No landmark nearby"           # as the files spell it
REACH = 20.0                                 # metres: a point is moved to the nearest panorama within this
SPACING = 8.0                                # metres: a step keeps this distance from both ends of its leg
SHORT_LEG = 5.0                              # metres: a leg that is no longer has no steps
STEPS, DROP_RATE = 5, 0.5                    # a leg is cut in so many steps, each left out with this probability


class ScalarType:
    """Stands in for numpy.dtype, whose state a file could set so that bytes are taken for addresses."""

    def __init__(self, name, *_):
        if not re.fullmatch("[iuf][248]|U[0-9]{1,3}", name):
            raise pickle.UnpicklingError(f"numpy type {name} is not allowed in it")
        self.name = "<" + name

    def __setstate__(self, state):
        self.name = self.name.replace("<", ">") if state[1] == ">" else self.name


class MappingUnpickler(pickle.Unpickler):
    """Reads numbers, strings, tuples, dicts and numpy scalars; the name of anything else ends the reading.

    Nothing that it reads can run. How much memory a file asks for is not bounded.
    """

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            return ScalarType
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return lambda kind, data: np.frombuffer(data, kind.name).item()
        if (module, name) == ("_codecs", "encode"):                 # how protocol 2 spells bytes
            return lambda text, _: text.encode("latin-1")
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")


def geodesic(a, b):
    """Metres between two (latitude, longitude) points in degrees, on the WGS-84 ellipsoid; for up to a kilometre."""
    latitude = math.radians((a[0] + b[0]) / 2)
    w = 1 - 0.00669437999014 * math.sin(latitude) ** 2
    north = 6378137.0 * (1 - 0.00669437999014) / w ** 1.5 * math.radians(b[0] - a[0])
    return math.hypot(north, 6378137.0 / math.sqrt(w) * math.cos(latitude) * math.radians(b[1] - a[1]))


def read_point(value, where="a key"):
    """(latitude, longitude) from a list of two numbers in degrees; ValueError says where there is none."""
    if not (isinstance(value, list) and len(value) == 2
            and all(type(x) in (int, float) and abs(x) <= 180 for x in value)):
        raise ValueError(f"{where}: expected latitude and longitude, got {str(value)[:40]}")
    return float(value[0]), float(value[1])


class Panoramas:
    """The mapping (latitude, longitude) -> panorama, with the nearest one within REACH of any point.

    Every place is entered in its cell of at least REACH by REACH and the eight around it, so that a search looks at
    one cell. Distances are on a sphere, as in the official code; the first of equals wins.
    """

    def __init__(self, path):
        try:
            with open(path, "rb") as file:
                mapping = MappingUnpickler(file).load()
            self.ids = {read_point(list(key)): str(pano) for key, pano in mapping.items()
                        if isinstance(key, tuple) and isinstance(pano, (str, int))}
            if not self.ids or len(self.ids) < len(mapping):
                raise ValueError("it is empty or holds something else")
        except Exception as error:   # a broken pickle can raise anything
            raise ValueError(f"{path}: not a dict of (latitude, longitude) -> panorama: {error}") from None
        self.lat_cell = math.degrees(REACH / 6.3e6)
        self.lon_cell = self.lat_cell / max(0.01, min(math.cos(math.radians(lat)) for lat, _ in self.ids))
        self.cells = {}
        for lat, lon in self.ids:
            row, column = self.cell(lat, lon)
            for cell in itertools.product((row - 1, row, row + 1), (column - 1, column, column + 1)):
                self.cells.setdefault(cell, []).append((lat, lon))

    def cell(self, lat, lon):
        return int(lat // self.lat_cell), int(lon // self.lon_cell)

    def nearest(self, point):
        """The place nearest to `point` that has a panorama, or None if none is within reach."""
        if point in self.ids:
            return point
        lat, lon = map(math.radians, point)
        best, found = math.sin(REACH / 6371e3 / 2) ** 2, None
        for place in self.cells.get(self.cell(*point), ()):
            lat2, lon2 = math.radians(place[0]), math.radians(place[1])
            haversine = (math.sin((lat2 - lat) / 2) ** 2
                         + math.cos(lat) * math.cos(lat2) * math.sin((lon2 - lon) / 2) ** 2)
            if haversine < best:
                best, found = haversine, place
        return found


@dataclass(frozen=True)
class Route:
    """One route: k milestones, k + 1 points (start, turning points, destination), and what may lie between them."""
    init_heading: int    # degrees; 0 means random
    headings: tuple      # (k,) degrees, of the legs
    directions: tuple    # (k,) the same as compass words
    landmarks: tuple     # (k,) what is said on arrival at points 1..k; "" where there is no landmark
    panos: tuple         # (k + 1,) panorama of each point
    between: tuple       # (k,) of each leg: () if it is too short, else STEPS panoramas, None where no place fits


def parse_milestones(text):
    """The blocks of `milestone_info` as a list of dicts: `{`, lines of "key": "value", and `}` (virl data format)."""
    blocks = []
    for block in text.split("}"):
        pairs = (line.strip().strip(",").partition(":") for line in block.strip().lstrip("{").splitlines())
        fields = {key.strip().strip("\"'"): value.strip().strip("\"'") for key, colon, value in pairs if colon}
        if block.strip():
            blocks.append(fields)
    return blocks


def read_key(record, path, where):
    """record["a"]["b"] for the path "a.b"; ValueError names the key that is missing."""
    for key in path.split("."):
        if not isinstance(record, dict) or key not in record:
            raise ValueError(f"{where}: key {path!r} is missing")
        record = record[key]
    return record


def read_route(record, panoramas, where):
    """A Route from one record of route_infos.json; ValueError names file, route and key."""
    start = read_point(read_key(record, "start_place.relocated_geocode", where), f"{where}, relocated_geocode")
    geocodes = read_key(record, "route_results.geocode_list", where)
    if not isinstance(geocodes, list) or not geocodes:
        raise ValueError(f"{where}, key 'geocode_list': expected a list of points")
    points = [start] + [read_point(value, f"{where}, geocode_list {i}") for i, value in enumerate(geocodes)]
    text, init_heading = read_key(record, "milestone_info", where), record.get("init_heading", 0)
    blocks = parse_milestones(text) if isinstance(text, str) else []
    if len(blocks) != len(geocodes):
        raise ValueError(f"{where}: {len(blocks)} blocks in 'milestone_info', {len(geocodes)} points in 'geocode_list'")
    if type(init_heading) is not int or abs(init_heading) > 360:
        raise ValueError(f"{where}, key 'init_heading': expected whole degrees, got {init_heading!r}")
    legs = []
    for i, block in enumerate(blocks):
        heading = re.fullmatch(r"(-?\d{1,3}) \((\w+)\)", block.get("to_next_intersection_heading", ""))
        if heading is None or heading[2] not in COMPASS:
            raise ValueError(f"{where}, 'milestone_info' block {i}: key 'to_next_intersection_heading' must read like "
                             f"'212 (southwest)', got {block.get('to_next_intersection_heading')!r}")
        legs.append((int(heading[1]), heading[2], block.get("landmarks", NO_LANDMARK).replace(NO_LANDMARK, "")))
    nearest, ids = (panoramas.nearest, panoramas.ids) if panoramas else (lambda point: point, defaultdict(str))
    panos, between, previous = [], [], start
    for i, point in enumerate(points):                              # the first leg has no length and so no steps
        length = geodesic(previous, point)                          # before the point is moved to its panorama
        place = nearest(point)
        if place is None:
            raise ValueError(f"{where}, {f'geocode_list {i - 1}' if i else 'relocated_geocode'}: no panorama within "
                             f"{REACH:g} m of {point}")
        fitting = []
        # The last step is the point itself and never fits; but a rail draws for it, as in the official code.
        for step in range(1, STEPS + 1) if length > SHORT_LEG else ():
            share = step / STEPS
            wanted = tuple(p * (1 - share) + q * share for p, q in zip(previous, place))
            found = nearest(wanted)
            apart = found and geodesic(previous, found) > SPACING and geodesic(place, found) > SPACING
            fitting.append(ids[found] if apart else None)
        panos.append(ids[place])
        between.append(tuple(fitting))
        previous = place
    return Route(init_heading, *map(tuple, zip(*legs)), tuple(panos), tuple(between[1:]))


@lru_cache(maxsize=8)
def load_routes(folder, vision):
    """The routes of a data folder; ValueError names file, route and key of what is wrong with it.

    Without a mapping file the rail uses the points as they are, which is enough for words. With `vision` every
    panorama that a rail may visit must be there, twice as wide as high.
    """
    path, panoramas = folder / "route_infos.json", None
    try:
        routes, _ = json.loads(path.read_text(encoding="utf-8"))
        records = list(routes)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected [routes, cursor]: {error}") from None
    if (folder / "gps_pano_mapping.pkl").is_file() or vision:
        panoramas = Panoramas(folder / "gps_pano_mapping.pkl")
    routes = [read_route(record, panoramas, f"{path}, route {i}") for i, record in enumerate(records)]
    if not routes:
        raise ValueError(f"{path}: holds no route")
    checked = set()
    for i, route in enumerate(routes if vision else ()):
        for pano in {*route.panos, *itertools.chain(*route.between)} - checked - {None}:
            checked.add(pano)
            for file in (picture := folder / "street_views" / f"{pano}.jpg", picture.with_suffix(".metadata.json")):
                if not file.is_file():
                    raise ValueError(f"{path}, route {i}: {file} is missing")
            open_panorama(picture), read_rotation(picture)
    return routes


# ---- V-IRL: views ------------------------------------------------------------------------------------------

def open_panorama(path):
    """An equirectangular picture, not yet decoded; ValueError if it is none."""
    try:
        picture = Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture: {error}") from None
    if picture.width != 2 * picture.height:
        raise ValueError(f"{path}: a panorama must be twice as wide as high, not {picture.width}x{picture.height}")
    return picture


def read_rotation(path):
    """The rotation of a panorama in degrees, from the metadata beside it."""
    path = path.with_suffix(".metadata.json")
    try:
        rotation = float(json.loads(path.read_text())["rotation"])
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
        rotation = math.nan
    if not math.isfinite(rotation):
        raise ValueError(f"{path}: expected a JSON object with a number 'rotation', in degrees")
    return rotation


@lru_cache(maxsize=64)
def read_panorama(path):
    """(the panorama (H, W), the four bytes of a pixel as one number; its rotation in degrees)."""
    open_panorama(path).close()                                     # names a wrong shape
    pixels = np.asarray(open_picture(path).convert("RGBX"))
    return pixels.view(np.uint32)[..., 0], read_rotation(path)


@lru_cache(maxsize=4)
def view_table(size, width):
    """Where in a panorama of `width` a view of size x size pixels looks that is 90 degrees wide and level.

    Columns in 1/256ths, to which a heading only adds; index of the first pixel of the upper row; weight of the lower
    row in 1/256ths. (size, size) each.
    """
    offset = (np.arange(size) - (size - 1) / 2) / (size / 2)
    u, v = np.meshgrid(offset, offset)                                              # in focal lengths
    x = (np.arctan2(u, 1) / (2 * np.pi) + 0.5) * (width - 1)
    y = (np.arctan2(v, np.hypot(u, 1)) / np.pi + 0.5) * (width // 2 - 1)
    upper = np.minimum(y.astype(np.int32), width // 2 - 2)
    return (x * 256).astype(np.int32), upper * width, ((y - upper) * 256).astype(np.uint16)[..., None]


def crop_view(panorama, rotation, heading, size):
    """The level view (size, size, 3) of 90 degrees towards a compass heading: bilinear, in whole numbers of 8 bits,
    which is several times faster than with floats."""
    width = panorama.shape[1]
    x, row, below = view_table(size, width)
    turn, around = ((heading - 180) % 360 + rotation) % 360, (width - 1) * 256      # 0: towards the centre column
    x = x + int(turn / 360 * around)
    x -= np.where(x >= around, around, 0)
    right, at, flat = (x & 255).astype(np.uint16)[..., None], row + (x >> 8), panorama.reshape(-1)

    def mix(at):
        """Of the pixels at and right of an index, weighted: (size, size, 4), at most 255 * 256."""
        here, beside = (flat.take(index)[..., None].view(np.uint8) for index in (at, at + 1))
        return here * (256 - right) + beside * right

    return (((mix(at) >> 8) * (256 - below) + (mix(at + width) >> 8) * below) >> 8).astype(np.uint8)[..., :3]


@lru_cache(maxsize=64)
def view_grid(path, heading, view_headings, size):
    """Four views as one picture, 2 x 2 with a black line of 5 pixels: the first two above the other two."""
    panorama, rotation = read_panorama(path)
    grid = Image.new("RGB", (2 * size + 5, 2 * size + 5))
    for i, turn in enumerate(view_headings):
        grid.paste(Image.fromarray(crop_view(panorama, rotation, heading + turn, size)),
                   (i % 2 * (size + 5), i // 2 * (size + 5)))
    return grid


# ---- V-IRL: the environment --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Position:
    """One place on the rail: what the expert sees there, does there, and which instruction is current."""
    kind: str            # "turn", "forward" or "stop"
    action: str
    pano: str
    heading: int
    landmark: str        # "Aldo Cafe is on your left", or ""
    intersection: bool
    sentence: str


def relative_turn(turn):
    """The word for a turn by so many degrees, taken modulo 360; straight on counts as slightly left."""
    turn = (turn + 180) % 360 - 180
    return "left" if turn < -45 else "right" if turn > 45 else "slightly left" if turn <= 0 else "slightly right"


class Navigation:
    """One V-IRL route at a time, on rails: only the expert's action moves the agent (paper Section 4.2, appendix B).

    root          a folder with the data sets; allowed names: FOLDERS
    data          which of them: "train", "unseen" or "mini"
    in_order      play route `episode` of the file, not one drawn by the seed
    action_space  what turn_direction(x) takes: "absolute" compass words or "relative" ones
    vision        show four views of the place instead of the landmark's name
    view_headings where the four views look, relative to the agent: "prompt" (front, right, back, left, as the prompt
                  says) or "official" (what the official code crops)
    resolution    pixels of a view; the grid of four is 2 * resolution + 5 wide
    verify_iter   judged replies per position (2 in the paper)
    feedback, prompt_file   as in GeneralPoints
    """
    answer_key = '"action"'

    def __init__(self, root="", data="train", in_order=False, action_space="absolute", vision=False,
                 view_headings="prompt", resolution=448, verify_iter=2, feedback="informative", prompt_file=""):
        for name, value, allowed in [("data", data, FOLDERS), ("action_space", action_space, ACTION_SPACES),
                                     ("view_headings", view_headings, VIEW_HEADINGS),
                                     ("feedback", feedback, ("informative", "plain"))]:
            if value not in allowed:
                raise ValueError(f"{name} {value!r}: allowed are {', '.join(allowed)}")
        for name, value in [("resolution", resolution), ("verify_iter", verify_iter)]:
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} {value!r}: must be a whole number, 1 or more")
        if resolution > MAX_SIZE:
            raise ValueError(f"resolution {resolution}: must be at most {MAX_SIZE}")
        folders = [Path(root) / name for name in FOLDERS[data]]
        self.folder = next((folder for folder in folders if folder.is_dir()), None)
        if not root or self.folder is None:
            raise ValueError(f"root {str(root)!r}: V-IRL needs a folder that holds {' or '.join(FOLDERS[data])}; "
                             "data/synthetic_city.py makes one")
        self.routes = load_routes(self.folder, vision)
        self.in_order, self.action_space, self.vision = in_order, action_space, vision
        self.view_headings, self.resolution = VIEW_HEADINGS[view_headings], resolution
        self.verify_iter, self.feedback = verify_iter, feedback
        self.prompts = load_prompts(prompt_file)
        self.phrases = {name: self.prompts[f"feedback_{name}"] for name in FEEDBACK}
        self.actions = ["forward()", *(f"turn_direction({word})" for word in ACTION_SPACES[action_space]), "stop()"]
        self.done = True

    def reset(self, seed, episode=0):
        """Draw a route and its rail; the seed (an int or a string) fixes the whole episode. Returns (messages, info).

        The draws come in the order of the official code, though not from its seeds: route, heading, then one for each
        step of each leg.
        """
        self.rng = random.Random(str(seed))
        self.number = episode % len(self.routes) if self.in_order else None
        route = self.routes[self.number] if self.in_order else self.rng.choice(self.routes)
        heading = route.init_heading or self.rng.randint(0, 359)
        turns = [relative_turn(new - old) for old, new in zip((heading, *route.headings), route.headings)]
        self.sentences = self.instruct(route, turns)
        self.rail = list(self.lay_rail(route, heading, turns))
        self.turn, self.done = 0, False
        return self.arrive(0), {"status": "", "success": False, "turn": 0, "new_dialogue": True}

    def instruct(self, route, turns):
        """Two sentences for every milestone: turn, then go on; the turn is named in both vocabularies."""
        sentences, last = [], len(turns) - 1
        for i, (turn, direction, landmark) in enumerate(zip(turns, route.directions, route.landmarks)):
            turning = "nav_first_turn" if i == 0 < last else "nav_turn"
            sentences.append(fill(self.prompts[turning], rel=turn, dir=direction))
            move = "nav_last_move" if i == last else "nav_move_landmark" if landmark else "nav_move"
            sentences.append(fill(self.prompts[move], landmarks=landmark))
        return sentences

    def lay_rail(self, route, heading, turns):
        """The positions from start to destination: at each point a turn or the stop, between them a few forwards."""
        for i, pano in enumerate(route.panos):
            heading = route.headings[i - 1] if i else heading       # of arrival: a turn is taken on leaving
            landmark = route.landmarks[i - 1] if i else ""
            for between in route.between[i - 1] if i else ():
                if self.rng.random() >= DROP_RATE and between is not None:
                    yield Position("forward", "forward()", between, heading, "", False, self.sentences[2 * i - 1])
            if i == len(turns):
                yield Position("stop", "stop()", pano, heading, landmark, False, self.sentences[-1])
            else:
                word = turns[i] if self.action_space == "relative" else route.directions[i]
                yield Position("turn", f"turn_direction({word})", pano, heading, landmark, i > 0, self.sentences[2 * i])

    def arrive(self, at):
        """Stand at position `at` of the rail, where a new dialogue begins; its messages."""
        self.at, self.position, self.tries = at, self.rail[at], 0
        self.messages = [user_message(self.prompt(), self.picture() if self.vision else None)]
        return self.messages

    def skip_ahead(self, rng, balance):
        """Go where the expert will be at some time, drawn by `rng`: any position, or with `balance` any kind first."""
        kind = rng.choice(sorted({position.kind for position in self.rail})) if balance else ""
        return self.arrive(rng.choice([at for at, position in enumerate(self.rail) if kind in ("", position.kind)]))

    def picture(self):
        """The four views from here as one picture; ValueError if it has none."""
        path = self.folder / "street_views" / f"{self.position.pano}.jpg"
        return view_grid(path, self.position.heading, self.view_headings, self.resolution)

    def observe(self, landmark, intersection):
        return fill(self.prompts["nav_at_intersection" if intersection else "nav_between"], landmark=landmark)

    def observation(self, position):
        return self.observe(position.landmark or self.prompts["nav_no_landmark"], position.intersection)

    def prompt(self):
        prompts, here = self.prompts, self.position
        numbered = "".join(fill(prompts["nav_sentence"], n=n, sentence=sentence)
                           for n, sentence in enumerate(self.sentences, 1))
        past = [(self.observation(position), position.action) for position in self.rail[:self.at]]
        seen = self.observe(prompts["nav_views"], here.intersection) if self.vision else self.observation(here)
        history = "".join(fill(prompts["nav_past"], n=n, observation=observation, action=action)
                          for n, (observation, action) in enumerate([*past, (seen, "")], 1))
        return (prompts["nav_task"] + fill(prompts["nav_instruction"], instruction=numbered)
                + prompts["nav_see_views" if self.vision else "nav_see_words"]
                + fill(prompts["nav_actions"], words=", ".join(ACTION_SPACES[self.action_space]))
                + fill(prompts["nav_history"], obs_act_seq=history) + prompts["nav_output"])

    def judge(self, reply):
        name = self.position.landmark.removeprefix("The destination ").split(" is on your ")[0]
        return judge_navigation(reply, self.position.action, name, self.position.intersection, self.feedback,
                                self.phrases)

    def step(self, reply):
        """Judge one reply: (messages, reward, terminated, truncated, info).

        After a correct action the agent moves on and a new dialogue begins; after a wrong one it stays, and the
        dialogue goes on with the verdict.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset() first")
        position, verdict = self.position, self.judge(reply)
        self.turn, self.tries = self.turn + 1, self.tries + 1
        correct = verdict.status == "correct"
        terminated = correct and self.at == len(self.rail) - 1
        truncated = not correct and self.tries == self.verify_iter
        self.done = terminated or truncated
        info = {"status": verdict.status, "success": terminated, "turn": self.turn, "kind": position.kind,
                "try": self.tries, "new_dialogue": correct and not terminated, "route": self.number}
        if info["new_dialogue"]:
            messages = self.arrive(self.at + 1)
        else:
            told = verdict.message if self.done else fill(self.prompts["nav_retry"], verdict=verdict.message)
            messages = self.messages + [{"role": "assistant", "content": reply}, {"role": "user", "content": told}]
            self.messages = messages
        return messages, verdict.reward + STEP_LIMIT * truncated, terminated, truncated, info

    def format_reply(self, action, position=None):
        return json.dumps({"current observation": self.observation(position or self.position),
                           "current instruction": self.position.sentence, "action": action})

    def expert_reply(self):
        """A correct reply at the present position, as valid JSON."""
        return self.format_reply(self.position.action)

    def flawed_reply(self):
        """A reply in the right format with a wrong action; one in three is about another place."""
        action = self.rng.choice([action for action in self.actions if action != self.position.action])
        return self.format_reply(action, self.rng.choice(self.rail) if self.rng.random() < 1 / 3 else None)

    def atoms(self):
        """The strings that a small tokenizer should keep whole: directions, actions, and what may border on a name."""
        return [*COMPASS, *RELATIVE, "front", "behind", "turn_direction(", "forward()", "stop()", "\n", ", where ",
                "The destination ", " is on your ", "; ", '{"current observation": "', '", "current instruction": "']


# ---- Making one --------------------------------------------------------------------------------------------

GP_SPLITS = {
    "id": dict(rule="face_cards_as_10"),
    "rule_ood": dict(rule="face_cards_as_11_12_13", face_card=True),
    "unseen": dict(rule="face_cards_as_10", fold="test"),
    "rule_family": dict(rule="random"),
}
BLACK, RED = "SC", "HD"
NAVIGATION_SPLITS = {
    "id": dict(data="train"),
    "rule_ood": dict(data="train", action_space="relative"),
    "unseen": dict(data="unseen"),
}
TASKS = {
    "gp-l": (GeneralPoints, GP_SPLITS),
    "gp-vl": (partial(GeneralPoints, vision=True),
              {**{split: dict(settings, suits=BLACK) for split, settings in GP_SPLITS.items()},
               "visual_ood": dict(rule="face_cards_as_10", suits=RED)}),
    "virl-l": (Navigation, NAVIGATION_SPLITS),
    "virl-vl": (partial(Navigation, vision=True),
                {**NAVIGATION_SPLITS, "visual_ood": dict(data="mini", in_order=True)}),
}


def make_env(task, split, **overrides):
    """The environment of a task (TASKS) and split (tables at the top); `overrides` are its keyword arguments.

    An override of "" or None leaves that argument as it is. ValueError names what is not allowed.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: allowed are {', '.join(TASKS)}")
    build, splits = TASKS[task]
    if split not in splits:
        raise ValueError(f"split {split!r}: {task} has {', '.join(splits)}")
    known = inspect.signature(build).parameters
    arguments = {name: value for name, value in overrides.items() if value not in ("", None)}
    for name, value in arguments.items():
        if name not in known:
            raise ValueError(f"{name} {value!r}: {task} has no such setting; it has {', '.join(known)}")
        if name in ("resolution", "card_dir") and not task.endswith("-vl"):
            raise ValueError(f"{name} {value!r}: {task} has no pictures")
        if name in ("fold", "data") and name in splits[split]:
            raise ValueError(f"{name} {value!r}: split {split} has a {name} of its own ({splits[split][name]})")
    return build(**{**splits[split], **arguments})


def sample_texts(task, num=200, **overrides):
    """Prompts, replies and verdicts of the splits of a task in words, for training a small tokenizer."""
    for split, settings in TASKS[task][1].items():
        if settings.get("data", "train") != "train":   # the other data sets may not be there
            continue
        env = make_env(task, split, **overrides)
        env.picture = lambda: None                                 # only words are needed, and drawing takes time
        yield " ".join(env.atoms() * 2)
        for i in range(num):
            env.reset(seed=f"texts/{i}")
            messages = env.skip_ahead(env.rng, balance=False)
            yield read_text(messages[-1])
            for reply in (env.flawed_reply(), env.expert_reply()):
                messages, *_ = env.step(reply)
                yield reply
                yield read_text(messages[-1])


def main():
    parser = argparse.ArgumentParser(description="Play an episode against the verifier, or --show what it is.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--split", default="id")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", default="", help="V-IRL: the folder with the data sets")
    parser.add_argument("--prompt-file", default="")
    parser.add_argument("--show", nargs="?", const="-", metavar="DIR",
                        help="print one prompt, expert reply and verdict; with DIR write there every prompt and expert "
                             "reply of the episode, V-IRL: and the four views, if there are pictures")
    args = parser.parse_args()
    try:
        env = make_env(args.task, args.split, root=args.root, prompt_file=args.prompt_file)
        messages, _ = env.reset(seed=args.seed)
        if args.show not in (None, "-"):
            Path(args.show).mkdir(parents=True)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(read_text(messages[-1]))
    while not env.done:
        if args.show:
            reply = env.expert_reply()
            print("\n>", reply)
        else:
            try:
                reply = input("\n> ")
            except EOFError:
                return
            if reply and "{" not in reply:   # a bare formula or action will do for people
                reply = env.format_reply(reply.split("=")[0].strip())
        if args.show not in (None, "-"):
            file = Path(args.show) / f"{env.turn:02d}.txt"
            file.write_text(f"{read_text(messages[-1])}\n\n> {reply}\n")
            if env.vision or args.task == "virl-l" and (env.folder / "street_views").is_dir():
                try:
                    env.picture().save(file.with_suffix(".png"))
                except ValueError as error:
                    parser.error(str(error))
        messages, reward, _, truncated, info = env.step(reply)
        print(f"{read_text(messages[-1])}   [{info['status']}, reward {reward:+g}{', last try' * truncated}]")
        if args.show == "-":
            return


if __name__ == "__main__":
    main()
