"""The tasks as conversations: GeneralPoints and V-IRL (paper Section 4, appendices A and B).

GeneralPoints deals four cards and asks for an equation that makes a target, 24, from them. A rule
says what J, Q and K are worth. The paper trains on one rule and tests on another. The splits are:

    split         J, Q, K        hands                   used for
    id            10, 10, 10     any solvable            training and in-distribution tests
    rule_ood      11, 12, 13     with a face card        the rule never trained on
    unseen        10, 10, 10     a fixed tenth of all    new hands, if you train with fold=train
    visual_ood    10, 10, 10     red suits               cards that look different (pictures only)
    rule_family   random         any solvable            our stand-in for pre-training

`rule_family` never draws the two rules above. Pictures show black suits, except in `visual_ood`.

V-IRL gives written instructions through a city to a destination. They name each direction twice,
as a compass word and as left or right; the rule says which of the two an action must use. With
`rule_family` an action uses a third vocabulary, which the prompt defines. The data are folders in
the format that the authors released; data/synthetic_city.py makes such folders:

    split         an action uses      routes                   used for
    id            compass words       train/                   training and in-distribution tests
    rule_ood      left, right, ...    train/                   the rule never trained on
    unseen        compass words       unseen/                  new routes in the training city
    visual_ood    compass words       mini/, in file order     new cities (with pictures only)
    rule_family   other words         train/                   our stand-in for pre-training

An environment is a conversation with the verifier (sequential revision, Section 3, Fig. 2-3).
`messages` has the Hugging Face chat format; it grows by each reply and the verdict on it:

    messages, info = env.reset(seed=0)                                  # user: the prompt
    messages, reward, terminated, truncated, info = env.step(reply)     # + the reply, its verdict

    user       Make 24 from four cards. ... J counts as 10, ... Cards: ["Q", "10", "A", "3"] ...
    assistant  {"cards": ["Q", "10", "A", "3"], "number": ..., "formula": "(10-1)*3-10=24"}
    user       Your formula uses the right numbers, but it makes 17, not 24. Try another ...

`GeneralPoints` and `Navigation` list their settings. Scripts take them as words KEY=VALUE: behind
--env for all splits, or behind a split's name for it alone. Only there may they change what the
split itself sets:

    --env root=city0 verify_iter=3         all scripts
    --split id rule=11,11,11               rl.py
    --splits id rule_ood id target=36      evaluate.py: three splits, the last with its own target
    --mix id:0.7 suits=HD rule_ood:0.3     sft.py: two splits; 0.7 and 0.3 are their weights

    python envs.py gp-l                              # play an episode yourself
    python envs.py gp-l rule=11,11,11 target=36      # by a rule of your choice
    python envs.py gp-l rule_ood --show              # print a prompt, expert reply and verdict
    python envs.py virl-l root=city0 --show DIR      # write the views and prompts along a route
    python envs.py --read runs/rl                    # read a run's dialogues; --html FILE: a page
"""
import json
import random
import re
from dataclasses import dataclass, field
from zlib import crc32

from support import cards, demonstrator, play, prompts, settings, streets, vocabularies
from support.chat import user_message, within_quotes
from support.solver import solutions
from verify import (FEEDBACK, LAST_TRY_PENALTY, LISTING, Verdict, fill, judge_general_points,
                    judge_navigation)

# All texts that the model is told. A prompt file is JSON, and replaces the texts that it names.
PROMPTS = {            # differs 15: our words; a prompt file brings the official ones
    **prompts.TEXTS, **{f"feedback_{name}": text for name, text in FEEDBACK.items()}}
MORE_VALUES = {        # {names} that a prompt file's texts may use beside those in ours
    **prompts.MORE_VALUES, **{f"feedback_{name}": {"violations"} for name in LISTING}}


# ---- What an environment must have ---------------------------------------------------------------

class Environment:
    """What all environments share: how an episode is played.

    An episode is a sequence of positions: those of a route, or in GeneralPoints one hand. At each
    position a new dialogue begins, in which the model has `verify_iter` tries. A correct reply
    leads to the next position, or terminates the episode at the last one. A wrong reply is answered
    with its verdict. A wrong last try truncates the episode and costs LAST_TRY_PENALTY, too.

    A new environment is a subclass with these members and a row of TASKS; write both before `main`:

    kinds                   the kinds of its positions ("turn", ...); each kind has metrics, too
    retry_prompt            the key in PROMPTS of the text around a verdict that allows another try
    lay_out(episode)        draws an episode by `self.rng`, and sets `self.rail` if it has several
                            positions; `episode` is its number, for data that have an order
    prompt()                what the model is told at the present position
    picture()               the PIL picture shown there; ValueError if the environment has none
    judge(reply)            the `verify.Verdict` on a reply there; changes no state
    format_reply(answer)    a reply in the right format with this answer and all else right
    expert_reply()          a correct reply, as valid JSON
    flawed_reply()          a wrong reply in the right format (appendix D, Fig. 15)

    An example that runs:

        class Echo(Environment):
            kinds = ("number",)
            retry_prompt = "nav_retry"
            def lay_out(self, episode): self.number = self.rng.randint(1, 9)
            def prompt(self): return f"Say {self.number}."
            def picture(self): raise ValueError("Echo has no pictures")
            def judge(self, reply):
                right = reply == self.expert_reply()
                return Verdict("correct", 1.0, "Yes.") if right else Verdict("wrong", -1.0, "No.")
            def format_reply(self, answer): return json.dumps({"said": str(answer)})
            def expert_reply(self): return self.format_reply(self.number)
            def flawed_reply(self): return self.format_reply(0)
        TASKS["echo"] = Task(Echo, fixed={"vision": False}, splits={"id": {}})

    A subclass takes its settings in `__init__`, as GeneralPoints does; `**common` are those below.
    """
    REQUIRED = ("kinds", "retry_prompt", "lay_out", "prompt", "picture", "judge", "format_reply",
                "expert_reply", "flawed_reply")
    rule_name = ""       # the rule's key in a prompt file; set it before calling super().__init__
    example = ""         # an answer as a player may type it
    rail = (None,)       # an episode's positions: None if there is only one, else each has a `kind`
    at = 0               # the index in `rail` of the present position

    def __init_subclass__(cls):
        for name in cls.REQUIRED:
            if not hasattr(cls, name):
                raise TypeError(f"environment {cls.__name__} has no {name}")

    def __init__(self, vision=False, verify_iter=5, feedback="informative", prompt_file=""):
        settings.check_whole("verify_iter", verify_iter, 1)
        settings.check_choice("feedback", feedback, ("informative", "plain"))
        self.vision = vision
        self.verify_iter = verify_iter
        self.feedback = feedback
        self.prompts = settings.load_templates(prompt_file, PROMPTS, MORE_VALUES, self.rule_name)
        self.phrases = {name: self.prompts[f"feedback_{name}"] for name in FEEDBACK}
        self.rng = random.Random("0")
        self.done = True

    # What a subclass may override.

    def details(self, verdict):
        """Entries of `info` that only this environment has."""
        return {}

    def demonstrate(self):
        """The reply that SFT learns: the expert's. With the setting `faults` it may hold an error:
        `make_env` then returns a wrapper that overrides this method (support/demonstrator.py)."""
        return self.expert_reply()

    def read_answer(self, typed):
        """The answer in what a player typed; ValueError tells the player what to type instead."""
        return typed

    # The conversation.

    def reset(self, seed=None, episode=0, begin=True):
        """Begin an episode: (messages, info). A `seed` (number or text) restarts the draws. With
        `begin=False` there is no dialogue until `skip_ahead` begins one at a drawn position."""
        if seed is not None:
            self.rng = random.Random(str(seed))    # as text, since -1 as a number seeds like 1
        self.lay_out(episode)
        self.at, self.turn, self.done, self.messages = 0, 0, False, []
        if begin:
            self.begin_dialogue()
        return self.messages, {"status": "", "success": False, "turn": 0, "new_dialogue": True}

    @property
    def position(self):
        return self.rail[self.at]

    def begin_dialogue(self):
        """Begin a dialogue at the present position, with its prompt and picture."""
        self.tries = 0
        self.messages = [user_message(self.prompt(), self.picture() if self.vision else None)]

    def step(self, reply):
        """Judge one reply: (messages, reward, terminated, truncated, info).

        `info` has the verdict's "status" and "answer_at", and what `details` adds. "success": does
        the reply solve the episode? "turn" is the reply's number in the episode, "try" that at its
        position, "kind" the position's kind. "new_dialogue": does the next position begin now?
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset() first")
        verdict = self.judge(reply)
        self.turn += 1
        self.tries += 1
        correct = verdict.status == "correct"
        terminated = correct and self.at == len(self.rail) - 1
        truncated = not correct and self.tries == self.verify_iter
        self.done = terminated or truncated
        kind = self.position.kind if len(self.rail) > 1 else self.kinds[0]
        info = {"status": verdict.status, "success": terminated, "turn": self.turn, "kind": kind,
                "try": self.tries, "new_dialogue": correct and not terminated,
                "answer_at": verdict.answer_at, **self.details(verdict)}
        if info["new_dialogue"]:
            self.at += 1
            self.begin_dialogue()
        else:
            told = verdict.message
            if not self.done:
                told = fill(self.prompts[self.retry_prompt], verdict=told)
            self.messages = [*self.messages, {"role": "assistant", "content": reply},
                             {"role": "user", "content": told}]
        # differs 3: the penalty is charged to the last judged reply; the official code samples one
        # more reply, never judges it, and charges the penalty to that one
        reward = verdict.reward + (LAST_TRY_PENALTY if truncated else 0.0)
        return self.messages, reward, terminated, truncated, info

    def skip_ahead(self, rng, balance):
        """For SFT: the messages at a position drawn by `rng`; `balance` draws its kind first."""
        if len(self.rail) > 1:
            kinds = sorted({position.kind for position in self.rail})
            if balance:
                kinds = [rng.choice(kinds)]
            choices = [i for i, position in enumerate(self.rail) if position.kind in kinds]
            self.at = rng.choice(choices)
        self.begin_dialogue()
        return self.messages


# ---- GeneralPoints -------------------------------------------------------------------------------

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = "SHDC"
RULES = {"face_cards_as_10": (10, 10, 10), "face_cards_as_11_12_13": (11, 12, 13)}


def held_out(numbers):
    """Whether a hand is in the test fold: a tenth of all multisets of values, chosen by a hash."""
    return crc32(repr(sorted(numbers)).encode()) % 10 == 0


class GeneralPoints(Environment):
    """Make the target from four cards.

    rule          a name in RULES, "random", or the values of J,Q,K such as "3,12,7"
    target        what the formula must make
    face_card     at least one card is J, Q or K (the paper's OOD sampling)
    suits         the suits of the deck, a subset of "SHDC"
    fold          hands to deal: "all", the held-out tenth ("test"), or all but it ("train")
    solution      the expert's formula: "fixed" (the shortest), or "random" (any, by the seed)
    resolution    pixels of the picture's side (1200 in the paper)
    card_dir      a folder with the official card pictures; "" draws ours
    vision        cards are shown as a picture, and misreading them costs extra; set by the task
    verify_iter   tries at a hand (5 in the paper)
    feedback      "informative" names the fault, "plain" only says that the try failed
    prompt_file   a JSON file with texts that replace those of PROMPTS
    faults, faulty_tries, reward   an imperfect expert, a random reward: support/demonstrator.py
    """
    kinds = ("formula",)
    retry_prompt = "gp_retry"
    example = "(1+2)*8*1"

    def __init__(self, rule="face_cards_as_10", target=24, face_card=False, suits=SUITS, fold="all",
                 solution="fixed", resolution=1200, card_dir="", **common):
        settings.check_choice("fold", fold, ("all", "train", "test"))
        settings.check_choice("solution", solution, ("fixed", "random"))
        settings.check_letters("suits", suits, SUITS)
        settings.check_whole("target", target, 0)
        settings.check_whole("resolution", resolution, cards.MIN_SIZE, cards.MAX_SIZE)
        self.rule_jqk = settings.read_rule(rule, RULES)      # None: drawn for each episode
        self.rule_name = ",".join(map(str, self.rule_jqk)) if self.rule_jqk else "random"
        self.target = target
        self.face_card = face_card
        self.fold = fold
        self.solution = solution
        self.resolution = resolution
        self.card_dir = card_dir
        self.deck = [(index, suit) for suit in suits for index in range(13)]    # index in RANKS
        cards.check_folder(card_dir, RANKS, suits)     # a bad file is an error before training
        super().__init__(**common)

    def draw_rule(self):
        """Values for J, Q, K that are neither rule of the paper."""
        while True:
            jqk = tuple(self.rng.randint(1, 13) for _ in "JQK")
            if jqk not in RULES.values():
                return jqk

    def draw_hand(self):
        """Four cards of the deck, each as (index in RANKS, suit)."""
        if not self.face_card:
            return self.rng.sample(self.deck, 4)       # differs 4: officially with replacement
        face = self.rng.choice([card for card in self.deck if card[0] > 9])    # J, Q or K
        others = self.rng.sample([card for card in self.deck if card != face], 3)
        return self.rng.sample([face, *others], 4)     # shuffled: the face card may stand anywhere

    def deal(self):
        """Draw hands until one is solvable and in the fold; return its cards and numbers."""
        for _ in range(100_000):
            hand = self.draw_hand()
            # J, Q, K have the indices 10, 11, 12 in RANKS; the ace, worth 1, has index 0.
            numbers = [self.jqk[index - 10] if index > 9 else index + 1 for index, _ in hand]
            fold = "test" if held_out(numbers) else "train"
            if self.fold in ("all", fold) and solutions(numbers, self.target):
                return [(RANKS[index], suit) for index, suit in hand], numbers
        raise ValueError(f"no hand makes {self.target} with J,Q,K = {self.jqk}, fold {self.fold}, "
                         "suits and face_card as given (100,000 deals tried): try another target")

    def lay_out(self, episode):
        """Deal a hand."""
        self.jqk = self.rule_jqk or self.draw_rule()
        self.hand, self.numbers = self.deal()
        self.cards = [rank for rank, _ in self.hand]
        found = solutions(self.numbers, self.target)
        # differs 23: the shortest solution by default; in the official code any
        self.formula = found[0] if self.solution == "fixed" else self.rng.choice(found)

    def list_cards(self):
        """The cards as the prompt and a reply list them: '["Q", "10", "A", "3"]'."""
        listed = [fill(self.prompts["gp_card"], card=card) for card in self.cards]
        return f"[{', '.join(listed)}]"

    def prompt(self):
        jack, queen, king = self.jqk
        shown = "gp_input_picture" if self.vision else "gp_input_text"
        return (fill(self.prompts["gp_task"], target=self.target, J=jack, Q=queen, K=king)
                + fill(self.prompts[shown], cards=self.list_cards())
                + fill(self.prompts["gp_output"], target=self.target))

    def picture(self):
        return cards.draw_hand(self.hand, self.resolution, self.card_dir)

    def judge(self, reply) -> Verdict:
        return judge_general_points(reply, self.cards, self.numbers, self.target, self.vision,
                                    self.feedback, self.phrases)

    def details(self, verdict):
        return {"numbers_right": verdict.numbers_right, "cards_read": verdict.cards_read,
                "ranks_right": verdict.ranks_right}

    def format_reply(self, answer, numbers=None):
        """`numbers`, if given, replace the cards' values: a planted fault lists wrong ones."""
        return fill(self.prompts["gp_reply"], cards=self.list_cards(),
                    numbers=json.dumps(numbers or self.numbers),
                    formula=within_quotes(f"{answer}={self.target}"))

    def expert_reply(self):
        return self.format_reply(self.formula)

    def flawed_reply(self):
        while True:
            reply = self.format_reply(demonstrator.flawed_formula(self.rng, self.numbers))
            if self.judge(reply).status != "correct":
                return reply

    def read_answer(self, typed):
        if re.search(r"\b[AJQK]\b", typed):
            raise ValueError("Write the number that a card counts as, not its letter.")
        return typed.split("=")[0].strip()


# ---- V-IRL ---------------------------------------------------------------------------------------

VIEW_HEADINGS = {"prompt": (0, 90, 180, 270),          # degrees, relative to the agent
                 "official": (-135, -45, 45, 135)}     # differs 18: the official code has these
DROP_RATE = 0.5        # the chance that a place between two points of a route is left out


class Navigation(Environment):
    """Walk a route on rails: only the expert's action moves the agent (Section 4.2, appendix B).

    The prompt at a position tells what was seen and done at the earlier ones, but no failed tries.
    Left out: the official mode without rails, in which a wrong action, too, moves the agent.

    root          a folder with the data sets, under the names in streets.FOLDERS
    data          the data set: "train", "unseen" or "mini"
    in_order      play route number `episode` of the file; else the seed draws a route
    action_space  the words of turn_direction(x): "absolute" (compass words), "relative" (left,
                  right, ...), or others, drawn for each route: "random" draws from all kinds in
                  support/vocabularies.py, "letters,clock" from these two, and so on
    turn_words    "wrapped": left or right by the shorter way round; "unwrapped": as officially,
                  where a quarter of these words name the wrong side
    view_headings where the four views look, relative to the agent: "prompt" (front, right, back,
                  left, as the prompt says) or "official" (what the official code crops)
    resolution    pixels of a view's side; the picture of all four is 2 * resolution + 5 wide
    verify_iter   tries at a position (2 in the paper)
    vision, feedback, prompt_file, faults, faulty_tries, reward   as in GeneralPoints
    guided        after a failed last try the expert takes the step: support/demonstrator.py
    """
    kinds = ("turn", "forward", "stop")
    retry_prompt = "nav_retry"
    example = "forward()"

    def __init__(self, root="", data="train", in_order=False, action_space="absolute",
                 turn_words="wrapped", view_headings="prompt", resolution=448, verify_iter=2,
                 **common):
        settings.check_choice("data", data, streets.FOLDERS)
        settings.check_choice("turn_words", turn_words, ("wrapped", "unwrapped"))
        settings.check_choice("view_headings", view_headings, VIEW_HEADINGS)
        settings.check_whole("resolution", resolution, 1, cards.MAX_SIZE)
        self.word_kinds = vocabularies.read_kinds(action_space)
        self.rule_name = action_space
        super().__init__(verify_iter=verify_iter, **common)
        vocabularies.check_told(action_space, self.prompts)    # new words need a prompt
        self.folder = streets.find_folder(root, data)
        self.routes = streets.load_routes(self.folder, self.vision)
        self.in_order = in_order
        self.wrapped = turn_words == "wrapped"
        self.view_headings = VIEW_HEADINGS[view_headings]
        self.resolution = resolution

    def lay_out(self, episode):
        """Draw route and places, as the official code does, then a vocabulary; lay the rail."""
        self.number = episode % len(self.routes) if self.in_order else None
        route = self.routes[self.number] if self.in_order else self.rng.choice(self.routes)
        heading = route.init_heading or self.rng.randint(0, 359)       # 0 in a file means: any
        before = (heading, *route.headings)    # where the agent looks before each turn
        sides = [vocabularies.relative_word(new - old, self.wrapped)   # left, right, ... per leg
                 for old, new in zip(before, route.headings)]
        self.sentences = self.instruct(route, sides)
        kept = []
        for places in route.between:           # a None among them uses up a draw, too
            kept.append([place for place in places if self.rng.random() >= DROP_RATE])
        self.vocabulary = vocabularies.draw(self.word_kinds, self.rng)
        self.rail = list(self.lay_rail(route, heading, sides, kept))

    def instruct(self, route, sides):
        """Two sentences for each leg: face a direction, named in both vocabularies, and go on."""
        sentences = []
        last = len(sides) - 1                  # 0 for a route of one leg, which has no "first" turn
        for leg, landmark in enumerate(route.landmarks):
            turning = "nav_first_turn" if leg == 0 and last > 0 else "nav_turn"
            moving = "nav_move_landmark" if landmark else "nav_move"
            if leg == last:
                moving = "nav_last_move"
            sentences += [fill(self.prompts[turning], rel=sides[leg], dir=route.directions[leg]),
                          fill(self.prompts[moving], landmarks=landmark)]
        return sentences

    def lay_rail(self, route, heading, sides, kept):
        """The positions from the start to the destination, in walking order.

        A route of k legs has k + 1 points. Leg i goes from point i to point i + 1, and landmark i
        is at its end. Sentence 2 i says how to turn at its beginning, the next one how to go on.
        Every place kept on a leg is a "forward", every point a "turn", but the last a "stop".
        """
        for i, pano in enumerate(route.panos):
            walked = i - 1                             # the leg that ends at point i
            if i > 0:
                heading = route.headings[walked]       # the agent still looks along that leg
                # differs 20: this leg's own; officially found by a count, which a short leg shifts
                sentence = self.sentences[2 * walked + 1]
                for place in kept[walked]:
                    if place is not None:
                        yield streets.Position(kind="forward", action="forward()", pano=place,
                                               heading=heading, sentence=sentence,
                                               landmark=route.passed.get(place, ""))
            landmark = route.landmarks[walked] if i > 0 else ""
            here = dict(pano=pano, heading=heading, landmark=landmark)
            if i == len(sides):
                yield streets.Position(kind="stop", action="stop()", sentence=self.sentences[-1],
                                       **here)
            else:
                word, other = vocabularies.words_for(self.vocabulary, route.directions[i], sides[i])
                yield streets.Position(kind="turn", action=f"turn_direction({word})",
                                       other_action=f"turn_direction({other})",
                                       intersection=i > 0, sentence=self.sentences[2 * i], **here)

    def picture(self):
        """The four views from here as one picture."""
        path = self.folder / "street_views" / f"{self.position.pano}.jpg"
        return streets.view_grid(path, self.position.heading, self.view_headings, self.resolution)

    def observation(self, position, seen=None):
        """What is observed at a position, in words; `seen`, if given, replaces its landmark."""
        template, no_landmark = "nav_between", "nav_no_landmark"
        if position.intersection:
            template, no_landmark = "nav_at_intersection", "nav_no_landmark_at_intersection"
        if seen is None:
            seen = position.landmark or self.prompts[no_landmark]
        return fill(self.prompts[template], landmark=seen)

    def history(self):
        """What was seen and done at each position before, then what is seen here."""
        rows = [(self.observation(position), position.action) for position in self.rail[:self.at]]
        views = self.prompts["nav_views"] if self.vision else None
        rows.append((self.observation(self.position, seen=views), ""))
        return "".join(fill(self.prompts["nav_past"], n=n, observation=observation, action=action)
                       for n, (observation, action) in enumerate(rows, 1))

    def prompt(self):
        prompts = self.prompts
        numbered = "".join(fill(prompts["nav_sentence"], n=n, sentence=sentence)
                           for n, sentence in enumerate(self.sentences, 1))
        words = vocabularies.define(self.vocabulary, prompts["nav_word"])
        return (prompts["nav_task"]
                + fill(prompts["nav_instruction"], instruction=numbered)
                + prompts["nav_see_views" if self.vision else "nav_see_words"]
                + fill(prompts["nav_actions"], words=words)
                + fill(prompts["nav_history"], obs_act_seq=self.history())
                + prompts["nav_output"])

    def judge(self, reply) -> Verdict:
        here = self.position
        return judge_navigation(reply, here.action, here.landmark_name, here.intersection,
                                self.feedback, self.phrases)

    def details(self, verdict):
        return {"route": self.number, "position": self.at}

    def format_reply(self, answer, position=None, sentence=None):
        """By default the reply tells the present position's observation and its `sentence`."""
        observation = self.observation(position or self.position)
        return fill(self.prompts["nav_reply"], observation=within_quotes(observation),
                    instruction=within_quotes(sentence or self.position.sentence),
                    action=within_quotes(answer))

    def expert_reply(self):
        return self.format_reply(self.position.action)

    def flawed_reply(self):
        """A wrong action; in one reply of three the observation is that of a random position."""
        right = self.position.action
        turns = [f"turn_direction({word})" for word in self.vocabulary.values()]
        actions = ["forward()", *turns, "stop()"]
        action = self.rng.choice([each for each in actions if each != right])
        seen_at = self.rng.choice(self.rail) if self.rng.random() < 1 / 3 else None
        return self.format_reply(action, seen_at)


# ---- The tasks, and the one syntax of settings ---------------------------------------------------

@dataclass(frozen=True)
class Task:
    """All that the scripts know of a task."""
    environment: type
    fixed: dict             # settings that make it this task, and cannot be changed
    splits: dict            # name -> settings
    metrics: tuple = ("success",)    # measures for tables (evaluate.summarise); the paper's first
    paper_lambda: float = 1.0        # paper C.3: tokens in RL's rollouts for each token trained
    paper_episodes: dict = field(default_factory=lambda: {"": 100})    # of a split; "": of others


GP_SPLITS = {
    "id": dict(rule="face_cards_as_10"),
    "rule_ood": dict(rule="face_cards_as_11_12_13", face_card=True),
    "unseen": dict(rule="face_cards_as_10", fold="test"),
    "rule_family": dict(rule="random"),
}
GP_PICTURE_SPLITS = {
    **{name: {**chosen, "suits": "SC"} for name, chosen in GP_SPLITS.items()},     # black
    "visual_ood": dict(rule="face_cards_as_10", suits="HD")}                       # red
NAVIGATION_SPLITS = {
    "id": dict(data="train"),
    "rule_ood": dict(data="train", action_space="relative"),
    "unseen": dict(data="unseen"),
    "rule_family": dict(data="train", action_space="random"),
}
NAVIGATION_PICTURE_SPLITS = NAVIGATION_SPLITS | {"visual_ood": dict(data="mini", in_order=True)}
PICTURE_SETTINGS = ("resolution", "card_dir", "view_headings")     # refused in tasks in words
GP_PICTURE_METRICS = ("solved_and_read", "recognition", "success", "rank_accuracy")
NAVIGATION_METRICS = ("paper_step_accuracy", "step_accuracy_turn", "step_accuracy", "success")
WORDS, PICTURES = {"vision": False}, {"vision": True}          # what a task fixes
TASKS = {
    "gp-l": Task(GeneralPoints, WORDS, GP_SPLITS, ("success",), 6.0, {"": 234}),
    "gp-vl": Task(GeneralPoints, PICTURES, GP_PICTURE_SPLITS, GP_PICTURE_METRICS, 6.0, {"": 234}),
    "virl-l": Task(Navigation, WORDS, NAVIGATION_SPLITS, NAVIGATION_METRICS, 5.1, {"": 48}),
    "virl-vl": Task(Navigation, PICTURES, NAVIGATION_PICTURE_SPLITS, NAVIGATION_METRICS, 5.1,
                    {"": 48, "visual_ood": 18}),
}


def make_env(task, split="id", common=(), /, **own):
    """The environment of a task (TASKS) and split (the tables at the top).

    Each setting has the value of the last of these layers that gives one:

    1. the default in the constructor, then the split;
    2. `common`: settings for all splits; ValueError if the split sets one, too, and `own` does not;
    3. `own`: keyword arguments, for this split alone;
    4. what the task fixes.

    Values may be texts; `env.settings` holds what was chosen. ValueError names what is not allowed.
    The arguments of `demonstrator.wrap`, which plants errors, are settings, too: `planted` below.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: allowed are {', '.join(TASKS)}")
    row = TASKS[task]
    common = dict(common)
    if split not in row.splits:
        raise ValueError(f"split {split!r}: {task} has {', '.join(row.splits)}")
    defaults = settings.defaults_of(Environment, demonstrator.wrap, row.environment)
    allowed = [name for name in defaults if name not in row.fixed]
    useless = () if row.fixed["vision"] else PICTURE_SETTINGS      # in words
    settings.check_known(task, {**common, **own}, allowed, useless)
    settings.check_open(split, row.splits[split], common, own)
    chosen = {**defaults, **row.splits[split], **common, **own, **row.fixed}
    for name, value in chosen.items():
        chosen[name] = settings.read_value(name, value, defaults[name])
    planted = {name: chosen[name] for name in settings.defaults_of(demonstrator.wrap)}
    env = row.environment(**{name: chosen[name] for name in chosen if name not in planted})
    env.settings = chosen
    demonstrator.check_format(env)      # a prompt file may ask for what the verifier cannot read
    return demonstrator.wrap(env, task, **planted)


def main():
    play.command_line(TASKS, make_env, __doc__)


if __name__ == "__main__":
    main()
