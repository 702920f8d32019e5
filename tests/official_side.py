"""Plays episodes with the official evaluation code; tests/test_official.py compares ours with them.

    python tests/official_side.py REPO TASK RULE EPISODES ROUTES_FOLDER SEED > played.json

From the evaluator's loop down to the environment the official code runs. What it needs of other
packages is stubbed:

    the model          replies as `reply_cards` and `reply_walk` say
    the processor      notes the dialogue
    the map provider   finds the nearest panorama in the mapping of the folder

For each episode the cards and the dialogues are written. A dialogue has [role, text] of each
message; the last one is a reply.
"""
import contextlib
import json
import math
import os
import pickle
import random
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

STUBS = ("torch torch.optim transformers accelerate accelerate.state yaml box tqdm cv2 requests "
         "shapely shapely.geometry folium folium.plugins polyline geopy geopy.distance geopy.point "
         "termcolor openai gymnasium gymnasium.envs.registration virl.platform "
         "virl.platform.platform virl.utils.pipeline").split()


class Config(dict):
    """A mapping whose keys are attributes as well."""
    __getattr__ = dict.get


# ---- The stubs -----------------------------------------------------------------------------------

class Env:
    def reset(self, seed=None, options=None):
        pass


class Accelerator:
    is_main_process = False

    def prepare(self, *parts):
        return parts


class Platform:
    """The nearest panorama of a mapping within 20 metres; views are black."""

    def __init__(self, config, folder):
        self.places = list(pickle.loads(Path(config["mapping"]).read_bytes()))

    def relocate_geocode_by_source(self, point, source="outdoor", direct_return=False):
        def distance(place):
            (lat, lon), (lat2, lon2) = (map(math.radians, pair) for pair in (point, place))
            half = (math.sin((lat2 - lat) / 2) ** 2
                    + math.cos(lat) * math.cos(lat2) * math.sin((lon2 - lon) / 2) ** 2)
            return 2 * 6371e3 * math.asin(math.sqrt(half))
        point = tuple(point)
        nearest = point if point in self.places else min(self.places, key=distance)
        return (nearest, "pano") if distance(nearest) < 20 else (None, None)

    def get_all_streetview_from_geocode(self, geocode, cur_heading):
        from PIL import Image
        return [SimpleNamespace(image=Image.new("RGB", (8, 8)))] * 4


class Processor:
    """Notes the dialogue that a reply is asked for, and gives the reply for its text."""

    def __init__(self, reply):
        self.reply, self.dialogue = reply, []

    def apply_chat_template(self, payload, add_generation_prompt):
        self.dialogue = [[message["role"],
                          "".join(part.get("text", "") for part in message["content"])]
                         for message in payload]

    def __call__(self, *_, **__):
        found = MagicMock()
        found.to.return_value = {"input_ids": SimpleNamespace(shape=(1, 1))}
        return found

    def decode(self, *_, **__):
        text = self.reply()
        if len(self.dialogue) > 1:                                 # the last one goes on
            self.dialogues.pop()
        self.dialogues.append([*self.dialogue, ["assistant", text]])
        return text


def install_stubs(repo):
    for name in STUBS:
        sys.modules[name] = MagicMock()
    gym = sys.modules["gymnasium"]
    gym.Env, gym.spaces = Env, MagicMock()
    gym.make = lambda id, **settings: gym.kinds[id](**settings)
    sys.modules["tqdm"].tqdm = lambda items, **_: items
    sys.modules["accelerate"].Accelerator = Accelerator
    sys.modules["virl.platform.platform"].Platform = Platform
    sys.modules["virl.utils.pipeline"].position_to_geocode = (
        lambda platform, point: platform.relocate_geocode_by_source(point)[0])
    sys.path.append(str(Path(__file__).parent.parent))
    from support import streets
    sys.modules["geopy.distance"].geodesic = (
        lambda a, b: SimpleNamespace(meters=streets.geodesic(a, b)))
    sys.path[:1] = [str(repo), str(repo / "gym")]
    # Empty packages in place of theirs, which import everything at once.
    for name in ("virl", "virl.utils"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(repo / "gym" / name.replace(".", "/"))]
    sys.modules["virl.utils"].pipeline = sys.modules["virl.utils.pipeline"]


# ---- The model -----------------------------------------------------------------------------------

def make_formula(rng, numbers, solutions, may_solve):
    """A formula (None: none) that is right, or wrong in one of many ways."""
    a, b, c, d = rng.sample(numbers, 4)
    o, p, q = rng.choices("+-*/", k=3)
    exact = [text for text in solutions if eval(text) == 24]
    kind = rng.choice("right value value value foreign repeated unused soup letters none cut zero "
                      "changed".split())
    near = rng.choice(exact or ["1"])
    return {"right": near if may_solve else f"{a}{o}{b}",
            "value": rng.choice((f"{a}{o}{b}{p}{c}{q}{d}", f"({a}{o}{b}){p}({c}{q}{d})",
                                 f"{a}{o}({b}{p}{c}{q}{d})", f"({a}{o}{b}{p}{c}){q}{d}",
                                 f"(({a}{o}{b}){p}{c}){q}{d}")),
            "foreign": f"{a}{o}{rng.randint(14, 40)}{p}{rng.randint(1, 13)}{q}{d}",
            "repeated": f"{a}{o}{a}{p}({c}{q}{a}{o}{b})", "unused": f"{a}{o}{b}{p}{c}",
            "soup": "".join(rng.choices([str(number) for number in numbers] + list("+-*/()"),
                                        k=rng.randint(0, 9))),
            "letters": f"{a}x{b}+{c}", "none": None, "cut": near.removesuffix(")"),
            "zero": f"{c}+{d}/({a}-{b})", "changed": near.replace("+", "-", 1)}[kind]


def is_right(formula):
    try:
        return abs(eval(formula) - 24) < 1e-6
    except (SyntaxError, TypeError, ZeroDivisionError, OverflowError):
        return False


def reply_cards(rng, env):
    """A reply about the hand of an environment.

    From a picture it is never a right formula over misread cards, which would end our episode.
    """
    cards = list(env.cards_without_suit)
    if rng.random() < 0.3:
        cards[rng.randrange(4)] = rng.choice("A23")
    misread = not env.language_only and sorted(cards) != sorted(env.cards_without_suit)
    while True:
        formula = make_formula(rng, env.cards_num, env.solution, not misread)
        right = formula is not None and is_right(formula)
        if not (right and (misread or eval(formula) != 24 or re.search(r"\b0", formula))):
            break
    if formula is None and rng.random() < 0.5:
        return "I cannot tell."
    last = "" if formula is None else f'  "formula": "{formula}{rng.choice(("=24", "", "=25"))}",\n'
    return f'{{\n  "cards": {cards},\n  "number": {env.cards_num},\n{last}}}'


def reply_walk(rng, env):
    """A reply at a position: mostly the expert's action, else another one; any observation."""
    here = env.gt_rail_info[env.step_cnt]
    seen = rng.choice((here["observation"], here["observation"], "a wall",
                       "No landmark, an intersection", f"{here['observation']}; an intersection"))
    if rng.random() < 0.03:
        return f'I would rather not.{rng.choice(("", chr(10)))}'
    others = "forward()", "stop()", "turn_direction(left)", "turn_direction(north)"
    action = here["gt_action"] if rng.random() < 0.8 else rng.choice(others)
    return (f'{{\n  "current observation": "{seen}",\n'
            f'  "current instruction": "{here["instruction"]}",\n'
            f'  "action": "{action}",\n}}')


# ---- The run -------------------------------------------------------------------------------------

def play(repo, task, other_rule, episodes, routes, seed):
    install_stubs(repo)
    sys.modules["gymnasium"].kinds = {}
    from utils_rl import set_str_action_space
    vision, cards = task.endswith("-vl"), task.startswith("gp")
    if cards:
        from gym_cards.envs.general_points_oneline import GeneralPointEnv_oneline as kind
        name, prompt = "gym_cards/GeneralPoint-oneline-v0", "Q_GeneralPoint_EQN"
        settings = dict(target_points=24, treat_face_cards_as_10=not other_rule, resolution=80,
                        verify_iter=5, ood=other_rule)
    else:
        from gym_virl.envs.navigation_environment import NavigationEnvironment as kind
        name, prompt = "gym_virl/Navigation-v0", "Q_VIRL"
        settings = dict(route_info_path=str(routes / "route_infos.json"), resolution=8,
                        verify_iter=2, absolute_action=not other_rule, relocation=True,
                        drop_rate=0.5, straight_line_length=5,
                        platform_save_dir=tempfile.mkdtemp(),
                        platform_cfg={"mapping": str(routes / "gps_pano_mapping.pkl")})
    sys.modules["gymnasium"].kinds[name] = kind
    from evaluation.evaluator import llama_evaluator
    env_config = Config(id=name, **settings)
    prompt = [f"{prompt}_{'VL' if vision else 'L'}"]
    prompts = Config(use_vision=vision, use_language=not vision, enable_verification=True,
                     prompt_vision=prompt, pattern_vision=["formula"], prompt_language=prompt,
                     pattern_language=["formula"])
    rng, played = random.Random(f"replies {seed}"), []
    processor = Processor(lambda: (reply_cards if cards else reply_walk)(rng, player.env))
    llama_evaluator.evaluate_model_config = lambda *_: (processor, MagicMock())
    player = llama_evaluator.LlamaEvaluator(set_str_action_space(env_config), "", env_config,
                                            "llama", "", prompts, {},
                                            f"{tempfile.mkdtemp()}/out.jsonl", seed=seed)
    for episode in range(episodes):
        random.seed(seed + episode)
        processor.dialogues = []
        player.evaluate_one_trajectory()
        played.append({"cards": cards and player.env.cards_without_suit,
                       "dialogues": processor.dialogues})
    return played


if __name__ == "__main__":
    repo, task, rule, episodes, routes, seed = sys.argv[1:]
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        played = play(Path(repo).resolve(), task, rule == "rule_ood", int(episodes), Path(routes),
                      int(seed))
    json.dump(played, sys.stdout)
