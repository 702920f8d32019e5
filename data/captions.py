"""Write pictures of a V-IRL city with what is seen in them, for `sft.py --data`.

    python data/captions.py --root city --out captions.json --num 5000 --resolution 110

The city is one of data/synthetic_city.py with --signs. Each picture is taken between two points of
a route, where the mapping of the city tells what is seen: "Bank is on your left", or no landmark. A
model that names what is in a picture learns more from each of them than one that picks an action.
recipes/base.sh uses this: it stands for what a pretrained vision model has read.
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":
    from support import startup
    startup.begin(__file__)     # Ctrl-C and a mistyped flag are answered before torch is imported

import envs
from support import running
from support.chat import user_message
from support.conversations import write_conversations
from support.running import flag


@dataclass
class Config:
    """What is written."""
    out: str = flag("", "a new file such as captions.json")
    root: str = flag("", "the city, as in --env root=")
    num: int = flag(5000, "number of routes; a few have no picture between points", low=1)
    resolution: int = flag(110, "pixels of a view's side; a picture has four views", low=1)
    seed: int = flag(0, "fixes the pictures", low=0)


def captions(env, config):
    """Dialogues of two messages, from `num` routes: a picture, and what is seen in it."""
    for i in running.progress(range(config.num), desc="pictures"):
        rng = random.Random(f"{config.seed}/captions/{i}")
        env.reset(f"{config.seed}/captions/{i}", begin=False)
        between = [at for at, position in enumerate(env.rail) if position.kind == "forward"]
        if not between:
            continue
        env.at = rng.choice(between)
        yield [user_message(env.prompts["nav_see_views"].strip(), env.picture()),
               {"role": "assistant", "content": env.observation(env.position)}]


def main(config):
    with running.one_line_errors():
        if not config.out or not config.root:
            raise ValueError("--out and --root are required: a new file such as captions.json, and "
                             "a city")
        env = envs.make_env("virl-vl", root=config.root, resolution=config.resolution)
        if not any(route.passed for route in env.routes):
            raise ValueError(f"--root {config.root}: nothing is seen between the points of its "
                             "routes, so all captions would be alike; data/synthetic_city.py makes "
                             "a city with --signs")
        write_conversations(config.out, "--out", captions(env, config))


if __name__ == "__main__":
    running.run(main, Config)
