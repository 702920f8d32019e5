"""Write a model's own right replies as dialogues, for `sft.py --data`: rejection sampling.

    python data/own_successes.py --task gp-l --model data/base/gp-l --split id fold=train \\
        --out own.json --episodes 512
    python data/own_successes.py --task gp-l --model PATH --out first.json --first-tries

The model plays whole episodes at a temperature. A reply that the verifier finds right is kept with
its dialogue; all others are forgotten. In a kept dialogue the failed tries before the right one are
marked "loss": false, so only the right reply is learnt. With `--first-tries` a dialogue with a
failed try is not kept. A right reply that names other cards than there are is not kept either. PPO
pays less for it with pictures, and in full without them. The last printed line says in JSON how
much was sampled; `--log` appends it to a file.

recipes/rft.py goes round: it samples, trains by SFT, and samples from the new model. The paper has
no such arm. It has PPO's own fresh and verified replies, without its advantages, ratios and values.
"""
import json
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":
    from support import startup
    startup.begin(__file__)     # Ctrl-C and a mistyped flag are answered before torch is imported

import envs
from model import (SAMPLES, RolloutMemory, decode_reply, encode, load_policy, picture_of,
                   sampling_uniforms)
from support import conversations, demonstrator, running, settings, training
from support.running import flag


@dataclass
class Config:
    """What is written."""
    out: str = flag("", "a new file such as own.json")
    model: str = flag("", "a model folder")
    log: str = flag("", "append what was sampled to this file, as a line of JSON")
    task: str = flag("gp-l", "which environment", choices=tuple(envs.TASKS))
    split: tuple = flag(("id",), "the split to play, with settings, such as: id fold=train")
    env: tuple = flag((), "settings of the environment, as in rl.py")
    first_tries: bool = flag(False, "keep only replies that are right at the first try")
    episodes: int = flag(512, "hands or routes to play", low=1)
    side_by_side: int = flag(512, "episodes played at the same time", low=1)
    temperature: float = flag(0.7, "temperature of the replies", low=0)
    max_new_tokens: int = flag(48, "a reply is cut after so many tokens", low=1)
    dtype: str = flag("auto", "type to compute in; auto: bfloat16 on processors made for it",
                      choices=("auto", "float32", "bfloat16"))
    device: str = flag("auto", "cpu, cuda, or auto")
    seed: int = flag(0, "fixes every deal and reply", low=0)


class Turn(NamedTuple):
    """One prompt and one reply, as `training.count_read_and_sampled` counts them."""
    prompt_ids: list       # (P,)
    response_ids: list     # (R,)
    picture: object
    dialogue_key: tuple    # (episode, number of the dialogue in it)


class Episode:
    """One environment that is played to its end."""

    def __init__(self, number, env, processor, seed):
        self.number, self.env, self.processor = number, env, processor
        self.dialogue, self.solved = 0, False
        self.messages, _ = env.reset(f"{seed}/own/{number}", number)
        self.prompt_ids = encode(processor, self.messages)

    def play(self, response_ids):
        """Judge a reply: (its Turn, what the environment says of it, its dialogue with it)."""
        turn = Turn(self.prompt_ids, response_ids, picture_of(self.messages),
                    (self.number, self.dialogue))
        reply = decode_reply(self.processor, response_ids)
        said = conversations.dialogue_of(self.messages, reply)
        self.messages, *_, info = self.env.step(reply)
        self.solved = info["success"]
        if info["new_dialogue"]:
            self.dialogue += 1
            self.prompt_ids = encode(self.processor, self.messages)
        elif not self.env.done:
            self.prompt_ids = encode(self.processor, self.messages, self.prompt_ids + response_ids)
        return turn, info, said


def is_right(info):
    """Whether the verifier finds nothing wrong with a reply."""
    return info["status"] == "correct" and info.get("cards_read", True)


def play(policy, processor, episodes, config):
    """Play these episodes to their ends, side by side: (all Turns, the dialogues that are kept)."""
    memory = RolloutMemory(policy, 65536, 2 ** 32)
    unwritable = conversations.unwritable_texts(processor)
    turns, kept, number = [], {}, 0
    while going := [episode for episode in episodes if not episode.env.done]:
        keys = [(SAMPLES, config.seed, episode.number, number) for episode in going]
        uniforms = sampling_uniforms(keys, config.max_new_tokens)
        replies = policy.generate([episode.prompt_ids for episode in going], uniforms,
                                  config.max_new_tokens, config.temperature,
                                  pictures=[picture_of(episode.messages) for episode in going],
                                  memory=memory, owners=[episode.number for episode in going])
        for episode, (response_ids, _) in zip(going, replies):
            turn, info, said = episode.play(response_ids)
            turns.append(turn)
            late = config.first_tries and info["try"] > 1
            if is_right(info) and not late:
                texts = [message["content"] for message in said if message["role"] == "assistant"]
                if not any(text in reply for text in unwritable for reply in texts):
                    earlier = map(conversations.without_loss, said[:-1])
                    kept[turn.dialogue_key] = [*earlier, said[-1]]
        number += 1
    return turns, [kept[key] for key in sorted(kept)]


def sample(policy, processor, make_env, config):
    """(the dialogues that are kept, what was sampled as a dict), over all episodes."""
    began, kept, num_turns, tokens, solved = time.monotonic(), [], 0, 0, 0
    for first in running.progress(range(0, config.episodes, config.side_by_side), desc="own"):
        episodes = []
        for number in range(first, min(first + config.side_by_side, config.episodes)):
            episodes.append(Episode(number, make_env(), processor, config.seed))
        turns, right = play(policy, processor, episodes, config)
        kept += right
        # In the order of play the turns of a dialogue follow each other.
        dialogues = {}
        for index, turn in enumerate(turns):
            dialogues.setdefault(turn.dialogue_key, []).append(index)
        tokens += training.count_read_and_sampled(policy, turns, list(dialogues.values()))
        num_turns += len(turns)
        solved += sum(episode.solved for episode in episodes)
    return kept, {"episodes": config.episodes, "success": solved / config.episodes,
                  "turns": num_turns, "kept": len(kept), "tokens_rollout": tokens,
                  "gflops": policy.gflops(0, tokens), "seconds": time.monotonic() - began,
                  "dtype": config.dtype}


def main(config):
    with running.one_line_errors():
        if not config.out or not config.model:
            raise ValueError("--out and --model are required: a new file such as own.json, and a "
                             "model folder")
        if Path(config.out).exists():
            raise ValueError(f"--out {config.out}: must be a new file")
        settings.check_temperature(config.temperature)
        split, *more = settings.read_splits(config.split)
        if more:
            raise ValueError(f"--split {' '.join(config.split)}: one split only, not "
                             f"{more[0].name} as well")
        given = settings.read_settings(config.env)
        demonstrator.check_own_replies({**given, **split.settings})
        make_env = partial(envs.make_env, config.task, split.name, given, **split.settings)
        device = running.pick_device(config.device)
        config = replace(config, dtype=running.pick_dtype(config.dtype, device))
        policy, processor = load_policy(config.model, config.dtype, device,
                                        vision=make_env().vision)
        kept, counts = sample(policy, processor, make_env, config)
        if not kept:
            raise ValueError(f"none of {counts['turns']} replies is right: there is nothing to "
                             "learn from; a model that knows the format is needed")
        conversations.write_conversations(config.out, "--out", kept)
    print(json.dumps(counts))
    if config.log:
        running.append_line(config.log, counts)


if __name__ == "__main__":
    running.run(main, Config)
