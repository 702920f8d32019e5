"""The tasks as conversations: GeneralPoints in words (paper Section 4.1, appendix A).

Four cards, a target (24), one equation that uses each card once. The knobs are the paper's: what J, Q and K are
worth, which hands are dealt, which suits. The paper trains on one setting and tests on another:

    split         J, Q, K        hands                      used for
    id            10, 10, 10     any solvable               training and in-distribution tests
    rule_ood      11, 12, 13     at least one face card     the rule never trained on
    unseen        10, 10, 10     the held-out tenth         hands never trained on, if all training had fold="train"
    rule_family   1..13 each,    any solvable               not in the paper: the stand-in for pre-training; the
                  drawn anew                                two rules above are never drawn

An environment is one conversation with the verifier (sequential revision, Section 3, Fig. 2-3):

    messages, info = env.reset(seed=0)                                  # user: the prompt
    messages, reward, terminated, truncated, info = env.step(reply)     # + assistant: reply, user: the verdict

`messages` is the Hugging Face chat format. In turn two the model sees all of turn one and the verdict:

    user         Make 24 from four cards. ... J counts as 10, Q counts as 10 and K counts as 10. Cards: ["Q", "10", ...
    assistant    {"cards": ["Q", "10", "A", "3"], "number": [10, 10, 1, 3], "formula": "(10-1)*3-10=24"}
    user         Your formula uses the right numbers, but it makes 17, not 24. Try another formula in the same format.

A correct equation terminates the episode; after `verify_iter` judged
replies it is truncated, and that turn is charged STEP_LIMIT on top. `env.expert_reply()` is what SFT learns from.

    python envs.py gp-l                            # play an episode yourself
    python envs.py gp-l --split rule_ood --show    # print a prompt, an expert reply and a verdict

Neither torch nor transformers is imported here. Cards are dealt without replacement from 52, as the paper says.
"""
import argparse
import json
import random
import re
from pathlib import Path
from zlib import crc32

from verify import FEEDBACK, STEP_LIMIT, fill, judge_general_points, solutions

# Our words for the paper's prompt structure (paper A.2): task, input, output. A prompt file may replace each by name.
PROMPTS = {
    "gp_task": "Make {target} from four cards. Combine their values with addition, subtraction, multiplication, "
               "division and parentheses, and use every card exactly once. An ace counts as 1, J counts as {J}, "
               "Q counts as {Q} and K counts as {K}.",
    "gp_input_text": "\nCards: {cards}",
    "gp_output": "\nReply with a JSON object:\n"
                 "{\"cards\": [the ranks you see], \"number\": [their values], "
                 "\"formula\": \"an equation ending in ={target}\"}",
    "gp_retry": "{verdict} Try another formula in the same format.",
    **{f"feedback_{name}": text for name, text in FEEDBACK.items()},
}

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = "SHDC"
RULES = {"face_cards_as_10": (10, 10, 10), "face_cards_as_11_12_13": (11, 12, 13)}
FOLDS = ("all", "train", "test")


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
        allowed = set(re.findall(r"\{(\w+)\}", PROMPTS[name]))
        foreign = set(re.findall(r"\{(\w+)\}", text)) - allowed
        if foreign:
            raise ValueError(f"prompt file {path}: template {name!r} uses {{{min(foreign)}}}; "
                             f"allowed: {', '.join(sorted(allowed)) or 'none'}")
    return {**PROMPTS, **given}


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
    prompt_file   JSON object of templates that replace those of PROMPTS
    """
    answer_key = '"formula"'   # rl.py weighs the reply's tokens from here on fully

    def __init__(self, rule="face_cards_as_10", target=24, face_card=False, suits=SUITS, verify_iter=5,
                 feedback="informative", fold="all", solution="fixed", prompt_file=""):
        self.values = parse_rule(rule)
        for name, value, allowed in [("feedback", feedback, ("informative", "plain")), ("fold", fold, FOLDS),
                                     ("solution", solution, ("fixed", "random"))]:
            if value not in allowed:
                raise ValueError(f"{name} {value!r}: allowed are {', '.join(allowed)}")
        if not isinstance(suits, str) or not suits or set(suits) - set(SUITS) or len(set(suits)) < len(suits):
            raise ValueError(f"suits {suits!r}: allowed are letters of {SUITS}, each once")
        for name, value, least in [("target", target, 0), ("verify_iter", verify_iter, 1)]:
            if type(value) is not int or value < least:
                raise ValueError(f"{name} {value!r}: must be a whole number, {least} or more")
        self.target, self.face_card, self.verify_iter = target, face_card, verify_iter
        self.feedback, self.fold, self.solution = feedback, fold, solution
        self.deck = [(rank, suit) for suit in suits for rank in range(13)]
        self.prompts = load_prompts(prompt_file)
        self.phrases = {name: self.prompts[f"feedback_{name}"] for name in FEEDBACK}
        self.done = True

    def draw_rule(self):
        """Values for J, Q, K that are neither rule of the paper."""
        while (jqk := tuple(self.rng.randint(1, 13) for _ in range(3))) in RULES.values():
            pass
        return jqk

    def deal(self):
        """Draw hands until one fits: a face card if asked for, a solution, the right fold."""
        for _ in range(100_000):
            cards = self.rng.sample(self.deck, 4)
            ranks = [rank for rank, _ in cards]
            numbers = [self.jqk[rank - 10] if rank > 9 else rank + 1 for rank in ranks]
            if self.face_card and max(ranks) < 10 or not solutions(numbers, self.target):
                continue
            if self.fold == "all" or held_out(numbers) == (self.fold == "test"):
                return [RANKS[rank] for rank in ranks], numbers
        raise ValueError(f"no hand makes {self.target} with J,Q,K = {self.jqk}, fold {self.fold}, suits and "
                         f"face_card as given (100,000 deals tried): try another target")

    def reset(self, seed):
        """Deal a hand; the seed (an int or a string) fixes the whole episode. Returns (messages, info)."""
        self.rng = random.Random(str(seed))   # as text: numbers would lose their sign
        self.jqk = self.values or self.draw_rule()
        self.cards, self.numbers = self.deal()
        found = solutions(self.numbers, self.target)
        self.formula = found[0] if self.solution == "fixed" else self.rng.choice(found)
        self.turn, self.done = 0, False
        self.messages = [{"role": "user", "content": self.prompt()}]
        return self.messages, {"status": "", "success": False, "turn": 0, "new_dialogue": True}

    def prompt(self):
        task = fill(self.prompts["gp_task"], target=self.target, **dict(zip("JQK", self.jqk)))
        shown = fill(self.prompts["gp_input_text"], cards=json.dumps(self.cards))
        return task + shown + fill(self.prompts["gp_output"], target=self.target)

    def judge(self, reply):
        return judge_general_points(reply, self.cards, self.numbers, self.target, False, self.feedback, self.phrases)

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
        info = {"status": verdict.status, "success": terminated, "turn": self.turn, "new_dialogue": False,
                "numbers_right": verdict.numbers_right, "cards_read": verdict.cards_read}
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


# ---- Making one --------------------------------------------------------------------------------------------

GP_SPLITS = {
    "id": dict(rule="face_cards_as_10"),
    "rule_ood": dict(rule="face_cards_as_11_12_13", face_card=True),
    "unseen": dict(rule="face_cards_as_10", fold="test"),
    "rule_family": dict(rule="random"),
}
TASKS = {"gp-l": (GeneralPoints, GP_SPLITS)}


def make_env(task, split, **overrides):
    """The environment of a task ("gp-l") and split (table at the top); `overrides` are its keyword arguments.

    fold="" leaves the fold to the split. ValueError names what is not allowed.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: allowed are {', '.join(TASKS)}")
    build, splits = TASKS[task]
    if split not in splits:
        raise ValueError(f"split {split!r}: {task} has {', '.join(splits)}")
    if overrides.get("fold") == "":
        overrides = {name: value for name, value in overrides.items() if name != "fold"}
    if "fold" in splits[split] and "fold" in overrides:
        raise ValueError(f"fold {overrides['fold']!r}: split {split} has a fold of its own ({splits[split]['fold']})")
    return build(**{**splits[split], **overrides})


def sample_texts(task, num=200):
    """Prompts, replies and verdicts of every split, for training a small tokenizer."""
    for split in TASKS[task][1]:
        env = make_env(task, split)
        yield " ".join(env.atoms() * 2)
        for i in range(num):
            messages, _ = env.reset(seed=f"texts/{i}")
            yield messages[-1]["content"]
            for reply in (env.flawed_reply(), env.expert_reply()):
                messages, *_ = env.step(reply)
                yield from (message["content"] for message in messages[-2:])


def main():
    parser = argparse.ArgumentParser(description="Play an episode against the verifier, or --show one.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--split", default="id")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt-file", default="")
    parser.add_argument("--show", action="store_true", help="print one prompt, expert reply and verdict")
    args = parser.parse_args()
    try:
        env = make_env(args.task, args.split, prompt_file=args.prompt_file)
    except ValueError as error:
        parser.error(str(error))
    messages, _ = env.reset(seed=args.seed)
    print(messages[-1]["content"])
    while not env.done:
        if args.show:
            reply = env.expert_reply()
            print("\n>", reply)
        else:
            try:
                reply = input("\n> ")
            except EOFError:
                return
            if re.fullmatch(r"[-+*/()0-9= ]+", reply):   # a bare formula will do for people
                reply = env.format_reply(reply.split("=")[0])
        messages, reward, _, truncated, info = env.step(reply)
        print(f"{messages[-1]['content']}   [{info['status']}, reward {reward:+g}{', last try' * truncated}]")


if __name__ == "__main__":
    main()
