"""The tasks as conversations: GeneralPoints and V-IRL (paper Section 4, appendices A and B).

GeneralPoints: four cards, a target (24), one equation that uses each card once. The paper trains on one setting of
what J, Q and K are worth and tests on another:

    split         J, Q, K        hands                      used for
    id            10, 10, 10     any solvable               training and in-distribution tests
    rule_ood      11, 12, 13     at least one face card     the rule never trained on
    unseen        10, 10, 10     the held-out tenth         hands never trained on, if all training had fold=train
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

`messages` is the Hugging Face chat format (token ids: `model.encode`). In turn two the model sees turn one and the verdict:

    user         Make 24 from four cards. ... J counts as 10, Q counts as 10 and K counts as 10. Cards: ["Q", "10", ...
    assistant    {"cards": ["Q", "10", "A", "3"], "number": [10, 10, 1, 3], "formula": "(10-1)*3-10=24"}
    user         Your formula uses the right numbers, but it makes 17, not 24. Try another formula in the same format.

Every setting of an environment (the lists at `GeneralPoints` and `Navigation`) is a word KEY=VALUE, in all scripts:

    --env root=city0 verify_iter=3                        for all splits (an error where one sets it itself)
    --split id rule=11,11,11        (rl.py)               words behind a split's name are for it alone, and
    --splits id rule_ood id target=36    (evaluate.py)    also change what the table above says of it
    --mix id:0.7 suits=HD rule_ood:0.3   (sft.py)         the same with weights

    python envs.py gp-l                                # play an episode yourself
    python envs.py gp-l rule=11,11,11 target=36        # by a rule of your own
    python envs.py gp-l rule_ood --show                # print a prompt, an expert reply and a verdict
    python envs.py virl-l root=city0 --show DIR        # write what is seen along a route: views and prompts
    python envs.py --read runs/rl                      # read the conversations of a run; --html FILE as a page

Left out of V-IRL: the official code's mode off the rails, in which a wrong action moves the agent as well.
"""
import inspect
import json
import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from support import cards, demonstrator, play, settings, streets
from support.chat import user_message, within_quotes
from support.solver import solutions
from verify import FEEDBACK, LAST_TRY_PENALTY, LISTING, fill, judge_general_points, judge_navigation

# Our words for the paper's prompt structure (A.2: task, input, output; B.2: task, instruction, what an observation is,
# actions, history, output). A prompt file may replace each by name, by a text or one for each rule: {"absolute": ..., ...},
# {"10,10,10": ..., ...} (data/official_prompts.py writes such).
PROMPTS = {                                  # differs 15: ours; theirs by a prompt file
    "gp_task": "Make {target} from four cards. Combine their values with + - * / and parentheses, and use every card "
               "exactly once. An ace counts as 1, J counts as {J}, Q counts as {Q} and K counts as {K}.",
    "gp_input_text": "\nCards: {cards}",
    "gp_card": "\"{card}\"",
    "gp_input_picture": "\nThe picture shows the four cards.",
    "gp_output": "\nReply with a JSON object:\n"
                 "{\"cards\": [the ranks you see], \"number\": [their values], "
                 "\"formula\": \"an equation ending in ={target}\"}",
    "gp_reply": "{\"cards\": {cards}, \"number\": {numbers}, \"formula\": \"{formula}\"}",
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
    "nav_no_landmark_at_intersection": "No landmark",
    "nav_views": "The picture",
    "nav_output": "\nReply with a JSON object:\n{\"current observation\": what you see now, "
                  "\"current instruction\": the sentence you follow now, \"action\": your action}",
    "nav_reply": "{\"current observation\": \"{observation}\", \"current instruction\": \"{instruction}\", "
                 "\"action\": \"{action}\"}",
    "nav_retry": "{verdict} Try another action in the same format.",
    **{f"feedback_{name}": text for name, text in FEEDBACK.items()},
}
MORE_VALUES = {"nav_sentence": {"n"}, "nav_past": {"n"},    # what a prompt file may use beside the {names} above
               **{f"feedback_{name}": {"violations"} for name in LISTING}}


# ---- What an environment must have -------------------------------------------------------------------------

class Environment(ABC):
    """One conversation with the verifier at a time: what all environments share, and what each must have.

    A new one adds a class with the members below (Python refuses one that lacks any), its texts in PROMPTS, a row in TASKS, and
    a judge with its texts in verify.py. Its constructor has a default for every setting, and hands the common ones on to this.

    An episode is a row of positions (GeneralPoints: one, the hand); at each the model has `verify_iter` tries. A correct
    reply leads to the next position, where a new dialogue begins, or terminates the episode at the last; a wrong one is
    answered with the verdict, and after the last try the episode is truncated and that turn charged LAST_TRY_PENALTY on top.

    `info` of a step: status of the verdict, success (the episode is solved), turn (replies so far in the episode), kind
    of the position (in V-IRL "turn" is one where a direction must be named), try (replies so far at the position),
    new_dialogue (whether one began), answer_at (where in the reply the answer begins), and `details`.
    """
    kinds: tuple         # of positions; metrics are reported for each apart
    retry_prompt: str    # the template around a verdict that asks for another try
    known_faults = ()    # what an imperfect demonstrator may do (the setting `faults`)
    rule_name = ""       # by which a prompt file may have several texts

    def __init_subclass__(cls):
        if missing := [name for name in ("kinds", "retry_prompt") if not hasattr(cls, name)]:
            raise TypeError(f"environment {cls.__name__} has no {missing[0]}")

    def __init__(self, vision=False, verify_iter=5, feedback="informative", prompt_file="", faults="", faulty_tries=1,
                 reward="verdict"):
        settings.check_whole("verify_iter", verify_iter, 1)
        settings.check_whole("faulty_tries", faulty_tries, 1)
        settings.check_choice("feedback", feedback, ("informative", "plain"))
        settings.check_choice("reward", reward, ("verdict", "random"))
        self.vision, self.verify_iter, self.feedback, self.reward = vision, verify_iter, feedback, reward
        self.prompts = settings.load_templates(prompt_file, PROMPTS, MORE_VALUES, self.rule_name)
        self.phrases = {name: self.prompts[f"feedback_{name}"] for name in FEEDBACK}
        self.shares, self.faulty_tries = demonstrator.parse_faults(faults, self.known_faults), faulty_tries
        self.rng, self.done = random.Random("0"), True

    @abstractmethod
    def lay_out(self, episode):
        """Draw an episode from `self.rng` and stand at its first position (`episode`: its number, for data played in order)."""

    @abstractmethod
    def prompt(self):
        """What the model is told at the present position."""

    @abstractmethod
    def picture(self):
        """What it is shown there, if the task has pictures (PIL); ValueError if that cannot be read."""

    @abstractmethod
    def judge(self, reply):
        """The Verdict on a reply at the present position; no state changes."""

    @abstractmethod
    def format_reply(self, answer):
        """A reply in the right format with this answer, the rest of it right."""

    @abstractmethod
    def expert_reply(self):
        """A correct reply at the present position, as valid JSON."""

    @abstractmethod
    def flawed_reply(self):
        """A reply in the right format that is not correct (appendix D, Fig. 15, trains on dialogues with such)."""

    @abstractmethod
    def atoms(self):
        """The strings that a small tokenizer should keep whole."""

    # What one may change: an episode of one position only needs none of it.

    kind = property(lambda self: self.kinds[0], doc="the kind of the present position")
    at_end = True                    # whether the present position is the last

    def move_on(self):
        """Go to the next position and `begin_dialogue` there."""

    def skip_ahead(self, rng, balance):
        """Go where the expert will be at some time, drawn by `rng` (with `balance` its kind first); the messages there."""
        return self.messages

    def details(self, verdict):
        """What `info` tells beside the common keys."""
        return {}

    def faulty_reply(self, fault):
        """A reply with one of `known_faults`; the expert's where it cannot be made here."""
        raise NotImplementedError

    def demonstrate(self):
        """What SFT learns from: the expert's reply, or at the first `faulty_tries` an imperfect demonstrator's, with its shares."""
        draw = self.rng.random() if self.shares and self.tries < self.faulty_tries else 1.0
        for fault, share in self.shares.items():
            if draw < share:
                return self.faulty_reply(fault)
            draw -= share
        return self.expert_reply()

    # The conversation.

    def reset(self, seed=None, episode=0):
        """Begin the episode that a seed (an int or text) fixes, or the next one of the generator: (messages, info)."""
        if seed is not None:
            self.rng = random.Random(str(seed))                    # as text: numbers would lose their sign
        self.lay_out(episode)
        self.turn, self.done = 0, False
        self.begin_dialogue()
        return self.messages, {"status": "", "success": False, "turn": 0, "new_dialogue": True}

    def begin_dialogue(self):
        """Begin a dialogue at the present position, with its prompt and picture."""
        self.tries = 0
        self.messages = [user_message(self.prompt(), self.picture() if self.vision else None)]

    def step(self, reply):
        """Judge one reply: (messages, reward, terminated, truncated, info)."""
        if self.done:
            raise RuntimeError("the episode is over: call reset() first")
        verdict = self.judge(reply)
        self.turn, self.tries = self.turn + 1, self.tries + 1
        correct = verdict.status == "correct"
        terminated = correct and self.at_end
        # differs 3: the last reply that is judged pays the limit; theirs asks for one more that nobody reads, and charges it
        truncated = not correct and self.tries == self.verify_iter
        self.done = terminated or truncated
        info = {"status": verdict.status, "success": terminated, "turn": self.turn, "kind": self.kind,
                "try": self.tries, "new_dialogue": correct and not terminated, "answer_at": verdict.answer_at,
                **self.details(verdict)}
        if info["new_dialogue"]:
            self.move_on()
        else:
            told = verdict.message if self.done else fill(self.prompts[self.retry_prompt], verdict=verdict.message)
            self.messages = self.messages + [{"role": "assistant", "content": reply}, {"role": "user", "content": told}]
        reward = verdict.reward + LAST_TRY_PENALTY * truncated if self.reward == "verdict" else self.rng.choice((-1.0, 1.0))
        return self.messages, reward, terminated, truncated, info


# ---- GeneralPoints -----------------------------------------------------------------------------------------

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = "SHDC"
RULES = {"face_cards_as_10": (10, 10, 10), "face_cards_as_11_12_13": (11, 12, 13)}


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


class GeneralPoints(Environment):
    """Make the target from four cards.

    rule          "face_cards_as_10", "face_cards_as_11_12_13", "random", or the values of J,Q,K such as "3,12,7"
    target        what the formula must make
    face_card     one card at least is J, Q or K (the paper's OOD sampling)
    suits         the suits of the deck, a subset of "SHDC"
    fold          "all", or value multisets in ("test") or out of ("train") the held-out tenth
    solution      the expert's formula: "fixed" (the shortest) or "random" (seeded, any of them)
    resolution    pixels of the picture's side (1200 in the paper)
    card_dir      a folder with the official card pictures; "" draws our own
    vision        show the cards in a picture instead of telling them; misread cards cost extra (set by the task)
    verify_iter   judged replies per episode (5 in the paper)
    feedback      "informative" names the fault, "plain" only says the try failed
    reward        "verdict" is the paper's, "random" is 1 or -1 whatever the reply (a control)
    prompt_file   JSON object of templates that replace those of PROMPTS
    faults        of an imperfect demonstrator: leave_out (a card), ten (J, Q, K count ten whatever the rule), with shares
    faulty_tries  how many tries have them (1: only the first)
    """
    kinds = ("formula",)
    retry_prompt = "gp_retry"
    known_faults, faulty_reply = ("leave_out", "ten"), demonstrator.faulty_hand

    def __init__(self, rule="face_cards_as_10", target=24, face_card=False, suits=SUITS, fold="all", solution="fixed",
                 resolution=1200, card_dir="", **common):
        self.rule_jqk = parse_rule(rule)
        settings.check_choice("fold", fold, ("all", "train", "test"))
        settings.check_choice("solution", solution, ("fixed", "random"))
        if not isinstance(suits, str) or not suits or set(suits) - set(SUITS) or len(set(suits)) < len(suits):
            raise ValueError(f"suits {suits!r}: allowed are letters of {SUITS}, each once")
        settings.check_whole("target", target, 0)
        settings.check_whole("resolution", resolution, cards.MIN_SIZE, cards.MAX_SIZE)
        self.target, self.face_card, self.fold, self.solution = target, face_card, fold, solution
        self.resolution, self.card_dir = resolution, card_dir
        self.deck = [(rank, suit) for suit in suits for rank in range(13)]
        for rank, suit in self.deck if card_dir else ():           # a bad file is an error now, not in mid-training
            cards.card_picture(RANKS[rank], suit, *cards.CARD, card_dir)
        self.rule_name = ",".join(map(str, self.rule_jqk or ("random",)))
        super().__init__(**common)

    def draw_rule(self):
        """Values for J, Q, K that are neither rule of the paper."""
        while (jqk := tuple(self.rng.randint(1, 13) for _ in range(3))) in RULES.values():
            pass
        return jqk

    def draw_hand(self):
        """Four cards as (index of the rank, suit); with `face_card` one is drawn among J, Q, K, three from the rest."""
        if not self.face_card:
            return self.rng.sample(self.deck, 4)                   # differs 4: theirs draws with replacement
        face = self.rng.choice([card for card in self.deck if card[0] > 9])
        return self.rng.sample([face, *self.rng.sample([card for card in self.deck if card != face], 3)], 4)

    def deal(self):
        """Draw hands until one fits: there is a solution, and the fold is the right one; [(rank, suit)], numbers."""
        for _ in range(100_000):
            hand = self.draw_hand()
            numbers = [self.jqk[rank - 10] if rank > 9 else rank + 1 for rank, _ in hand]
            if solutions(numbers, self.target) and self.fold in ("all", "test" if held_out(numbers) else "train"):
                return [(RANKS[rank], suit) for rank, suit in hand], numbers
        raise ValueError(f"no hand makes {self.target} with J,Q,K = {self.jqk}, fold {self.fold}, suits and "
                         f"face_card as given (100,000 deals tried): try another target")

    def lay_out(self, episode):
        """Deal a hand."""
        self.jqk = self.rule_jqk or self.draw_rule()
        self.hand, self.numbers = self.deal()
        self.cards = [rank for rank, _ in self.hand]
        found = solutions(self.numbers, self.target)
        # differs 23: the shortest by default; theirs any
        self.formula = found[0] if self.solution == "fixed" else self.rng.choice(found)

    def picture(self):
        return cards.draw_hand(self.hand, self.resolution, self.card_dir)

    def list_cards(self):
        return f"[{', '.join(fill(self.prompts['gp_card'], card=card) for card in self.cards)}]"

    def prompt(self):
        task = fill(self.prompts["gp_task"], target=self.target, **dict(zip("JQK", self.jqk)))
        shown = fill(self.prompts["gp_input_picture" if self.vision else "gp_input_text"], cards=self.list_cards())
        return task + shown + fill(self.prompts["gp_output"], target=self.target)

    def judge(self, reply):
        return judge_general_points(reply, self.cards, self.numbers, self.target, self.vision, self.feedback,
                                    self.phrases)

    def details(self, verdict):
        return {"numbers_right": verdict.numbers_right, "cards_read": verdict.cards_read,
                "ranks_right": verdict.ranks_right}

    def format_reply(self, answer, numbers=None):
        return fill(self.prompts["gp_reply"], cards=self.list_cards(), numbers=json.dumps(numbers or self.numbers),
                    formula=within_quotes(f"{answer}={self.target}"))

    def expert_reply(self):
        return self.format_reply(self.formula)

    def flawed_reply(self):
        while True:
            reply = self.format_reply(demonstrator.flawed_formula(self.rng, self.numbers))
            if self.judge(reply).status != "correct":
                return reply

    def atoms(self):
        values = [*range(1, 14), *(self.rule_jqk or ()), self.target]
        return list(dict.fromkeys([*RANKS, *map(str, values), *"+-*/()="]))


# ---- V-IRL -------------------------------------------------------------------------------------------------

COMPASS = streets.COMPASS
RELATIVE = ("left", "right", "slightly left", "slightly right")
ACTION_SPACES = {"absolute": COMPASS, "relative": RELATIVE}
FOLDERS = {"train": ("train", "nyc_1k_routes"), "unseen": ("unseen",), "mini": ("mini", "VLN_mini")}
VIEW_HEADINGS = {"prompt": (0, 90, 180, 270), "official": (-135, -45, 45, 135)}    # differs 18: theirs has the second
DROP_RATE = 0.5                              # a place between two points is left out with this probability


def relative_word(angle, wrapped=True):
    """The word for a turn by so many degrees, taken modulo 360; straight on counts as slightly left."""
    angle = (angle + 180) % 360 - 180 if wrapped else angle         # differs 17: theirs leaves this out
    if abs(angle) > 45:
        return "left" if angle < 0 else "right"
    return "slightly left" if angle <= 0 else "slightly right"


class Navigation(Environment):
    """Walk a route, on rails: only the expert's action moves the agent (paper Section 4.2, appendix B).

    A new dialogue begins at every position; its prompt tells what was seen and done before, failed tries left out.

    root          a folder with the data sets; allowed names: FOLDERS
    data          which of them: "train", "unseen" or "mini"
    in_order      play route `episode` of the file, not one drawn by the seed
    action_space  what turn_direction(x) takes: "absolute" compass words or "relative" ones
    turn_words    relative words from angles "wrapped" at 180 degrees or "unwrapped" (official: a quarter on the wrong side)
    view_headings where the four views look, relative to the agent: "prompt" (front, right, back, left, as the prompt
                  says) or "official" (what the official code crops)
    resolution    pixels of a view; the grid of four is 2 * resolution + 5 wide
    verify_iter   judged replies per position (2 in the paper)
    vision, feedback, reward, prompt_file, faulty_tries   as in GeneralPoints
    faults        of an imperfect demonstrator: walk_past (an intersection), other_word (of the other rule), with shares
    """
    kinds = ("turn", "forward", "stop")
    retry_prompt = "nav_retry"
    known_faults, faulty_reply = ("walk_past", "other_word"), demonstrator.faulty_step

    def __init__(self, root="", data="train", in_order=False, action_space="absolute", turn_words="wrapped",
                 view_headings="prompt", resolution=448, verify_iter=2, **common):
        settings.check_choice("data", data, FOLDERS)
        settings.check_choice("action_space", action_space, ACTION_SPACES)
        settings.check_choice("turn_words", turn_words, ("wrapped", "unwrapped"))
        settings.check_choice("view_headings", view_headings, VIEW_HEADINGS)
        settings.check_whole("resolution", resolution, 1, cards.MAX_SIZE)
        self.rule_name, self.wrapped = action_space, turn_words == "wrapped"
        super().__init__(verify_iter=verify_iter, **common)
        folders = [Path(root) / name for name in FOLDERS[data]]
        self.folder = next((folder for folder in folders if folder.is_dir()), None)
        if not root or self.folder is None:
            raise ValueError(f"root {str(root)!r}: V-IRL needs a folder that holds {' or '.join(FOLDERS[data])}; "
                             "data/synthetic_city.py makes one")
        self.routes = streets.load_routes(self.folder, self.vision)
        self.in_order, self.action_space = in_order, action_space
        self.view_headings, self.resolution = VIEW_HEADINGS[view_headings], resolution
        self.actions = ["forward()", *(f"turn_direction({word})" for word in ACTION_SPACES[action_space]), "stop()"]

    def lay_out(self, episode):
        """Draw a route and its rail.

        The draws come in the order of the official code, though not from its seeds: route, heading, then one for each
        place of each leg.
        """
        self.number = episode % len(self.routes) if self.in_order else None
        route = self.routes[self.number] if self.in_order else self.rng.choice(self.routes)
        heading = route.init_heading or self.rng.randint(0, 359)        # 0 in a file means: any
        words = [relative_word(new - old, self.wrapped) for old, new in zip((heading, *route.headings), route.headings)]
        self.sentences = self.instruct(route, words)
        self.rail = list(self.lay_rail(route, heading, words))
        self.at = 0

    def instruct(self, route, words):
        """Two sentences for every milestone: turn, then go on; the turn is named in both vocabularies."""
        sentences, last = [], len(words) - 1
        for i, (word, direction, landmark) in enumerate(zip(words, route.directions, route.landmarks)):
            turning = "nav_first_turn" if i == 0 < last else "nav_turn"
            sentences.append(fill(self.prompts[turning], rel=word, dir=direction))
            move = "nav_last_move" if i == last else "nav_move_landmark" if landmark else "nav_move"
            sentences.append(fill(self.prompts[move], landmarks=landmark))
        return sentences

    def lay_rail(self, route, heading, words):
        """The positions from start to destination: at each point a turn or the stop, between them a few forwards.

        Of a route's k legs it has headings, directions and `between` (panoramas on the way), of its k + 1 points `panos`
        and, but for the start, landmarks.
        """
        for i, pano in enumerate(route.panos):
            heading = route.headings[i - 1] if i else heading       # of arrival: a turn is taken on leaving
            landmark = route.landmarks[i - 1] if i else ""
            # differs 20: a sentence belongs to its leg; theirs counts on, and a leg without places shifts the later ones
            for between in route.between[i - 1] if i else ():
                if self.rng.random() >= DROP_RATE and between is not None:
                    yield streets.Position("forward", *2 * ["forward()"], between, heading, "", False, self.sentences[2 * i - 1])
            if i == len(words):
                yield streets.Position("stop", *2 * ["stop()"], pano, heading, landmark, False, self.sentences[-1])
            else:
                actions = [f"turn_direction({word})" for word in (route.directions[i], words[i])]
                yield streets.Position("turn", *actions[::-1 if self.action_space == "relative" else 1], pano, heading, landmark,
                               i > 0, self.sentences[2 * i])

    position = property(lambda self: self.rail[self.at])
    kind = property(lambda self: self.position.kind)
    at_end = property(lambda self: self.at == len(self.rail) - 1)

    def move_on(self):
        self.at += 1
        self.begin_dialogue()

    def skip_ahead(self, rng, balance):
        kind = rng.choice(sorted({position.kind for position in self.rail})) if balance else ""
        self.at = rng.choice([at for at, position in enumerate(self.rail) if kind in ("", position.kind)])
        self.begin_dialogue()
        return self.messages

    def picture(self):
        """The four views from here as one picture."""
        path = self.folder / "street_views" / f"{self.position.pano}.jpg"
        return streets.view_grid(path, self.position.heading, self.view_headings, self.resolution)

    def observe(self, landmark, intersection):
        return fill(self.prompts["nav_at_intersection" if intersection else "nav_between"], landmark=landmark)

    def observation(self, position):
        nothing = self.prompts["nav_no_landmark_at_intersection" if position.intersection else "nav_no_landmark"]
        return self.observe(position.landmark or nothing, position.intersection)

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

    def details(self, verdict):
        return {"route": self.number, "position": self.at}

    def format_reply(self, answer, position=None, sentence=None):
        """`position`: where the observation is of, if not here; `sentence`: another instruction than the current one."""
        return fill(self.prompts["nav_reply"], observation=within_quotes(self.observation(position or self.position)),
                    instruction=within_quotes(sentence or self.position.sentence), action=within_quotes(answer))

    def expert_reply(self):
        return self.format_reply(self.position.action)

    def flawed_reply(self):
        """A wrong action; one in three is about another place."""
        action = self.rng.choice([action for action in self.actions if action != self.position.action])
        return self.format_reply(action, self.rng.choice(self.rail) if self.rng.random() < 1 / 3 else None)

    def atoms(self):
        """Directions, actions, and what may border on a name."""
        return [*COMPASS, *RELATIVE, "front", "behind", "turn_direction(", "forward()", "stop()", "\n", ", where ",
                "The destination ", " is on your ", "; ", '{"current observation": "', '", "current instruction": "']


# ---- The tasks, and the one syntax of settings -------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """All that the scripts know of a task."""
    environment: type
    fixed: dict             # settings that make it this task, and cannot be changed
    splits: dict            # name -> settings
    metrics: tuple          # what tables show, by the names of evaluate.summarise, the paper's own measure first
    paper_lambda: float     # paper C.3: tokens of the rollout buffer per token trained
    paper_episodes: dict    # test episodes of the paper by split; "" stands for all others


GP_SPLITS = {
    "id": dict(rule="face_cards_as_10"),
    "rule_ood": dict(rule="face_cards_as_11_12_13", face_card=True),
    "unseen": dict(rule="face_cards_as_10", fold="test"),
    "rule_family": dict(rule="random"),
}
BLACK, RED = "SC", "HD"
GP_PICTURE_SPLITS = {**{name: settings | {"suits": BLACK} for name, settings in GP_SPLITS.items()},
                     "visual_ood": dict(rule="face_cards_as_10", suits=RED)}
NAVIGATION_SPLITS = {
    "id": dict(data="train"),
    "rule_ood": dict(data="train", action_space="relative"),
    "unseen": dict(data="unseen"),
}
NAVIGATION_PICTURE_SPLITS = NAVIGATION_SPLITS | {"visual_ood": dict(data="mini", in_order=True)}
PICTURE_SETTINGS = ("resolution", "card_dir", "view_headings")
NAVIGATION_METRICS = ("paper_step_accuracy", "step_accuracy_turn", "step_accuracy", "success")
TASKS = {
    "gp-l": Task(GeneralPoints, {"vision": False}, GP_SPLITS, ("success",), 6.0, {"": 234}),
    "gp-vl": Task(GeneralPoints, {"vision": True}, GP_PICTURE_SPLITS,
                  ("solved_and_read", "recognition", "success", "rank_accuracy"), 6.0, {"": 234}),
    "virl-l": Task(Navigation, {"vision": False}, NAVIGATION_SPLITS, NAVIGATION_METRICS, 5.1, {"": 48}),
    "virl-vl": Task(Navigation, {"vision": True}, NAVIGATION_PICTURE_SPLITS, NAVIGATION_METRICS, 5.1,
                    {"": 48, "visual_ood": 18}),
}


def make_env(task, split="id", common=(), /, **own):
    """The environment of a task (TASKS) and split (the tables at the top), its settings in `env.settings`.

    `own` are keyword arguments of the environment, or texts of them, and change what the split says; `common` likewise,
    but for what the split leaves open. ValueError names what is not allowed.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: allowed are {', '.join(TASKS)}")
    row, common = TASKS[task], dict(common)
    if split not in row.splits:
        raise ValueError(f"split {split!r}: {task} has {', '.join(row.splits)}")
    known = {name: parameter.default for kind in (Environment, row.environment)        # its own default counts
             for name, parameter in inspect.signature(kind).parameters.items() if name != "common"}
    for name, value in {**common, **own}.items():
        if name not in known or name in row.fixed:
            raise ValueError(f"{name} {value!r}: {task} has no such setting; it has "
                             f"{', '.join(setting for setting in known if setting not in row.fixed)}")
        if name in PICTURE_SETTINGS and not row.fixed["vision"]:
            raise ValueError(f"{name} {value!r}: {task} has no pictures")
        if name in common and name in row.splits[split] and name not in own:
            raise ValueError(f"{name} {value!r}: split {split} has a {name} of its own ({row.splits[split][name]}); to "
                             f"change it, write {split} {name}={value}")
    chosen = {**known, **row.splits[split], **common, **own, **row.fixed}
    chosen = {name: settings.read_value(name, value, known[name]) for name, value in chosen.items()}
    env = row.environment(**chosen)
    env.settings = chosen
    return env


def main():
    play.command_line(TASKS, make_env, __doc__)


if __name__ == "__main__":
    main()
