"""Write dialogues in which a model's failed replies stand before the expert's, for `sft.py --data`.

    python data/own_failures.py --task gp-l --model runs/base-gp-l/2/step_000200 --out own.json \\
        --mix rule_family fold=train
    python data/own_failures.py --task gp-vl --model PATH --out own.json     # pictures in own/

A model makes other errors than the random ones of `sft.py --failed-tries`. A model that has seen
only random errors repeats its errors.

Each dialogue has up to `--failed-tries` failed replies, as the model samples them. If a reply
succeeds, or writes a control token as text, the dialogue is kept up to the reply before. The failed
replies are marked "loss": false. Only the last reply is learnt, which is the expert's (with `--env
faults=...` that of an imperfect demonstrator). recipes/base.sh uses this.
"""
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":
    from support import startup
    startup.begin(__file__)     # Ctrl-C and a mistyped flag are answered before torch is imported

import envs
from model import (SAMPLES, RolloutMemory, decode_reply, encode, load_policy, picture_of,
                   sampling_uniforms)
from support import demonstrator, running, settings
from support.conversations import unwritable_texts, without_loss, write_conversations
from support.running import flag


@dataclass
class Config:
    """What is written."""
    out: str = flag("", "a new file such as own.json")
    model: str = flag("", "a model folder")
    task: str = flag("gp-l", "which environment", choices=tuple(envs.TASKS))
    mix: tuple = flag(("id",), "splits and their weights, as in sft.py")
    env: tuple = flag((), "settings of the environment, as in sft.py")
    balance: bool = flag(False, "V-IRL: draw every kind of position equally often")
    failed_tries: int = flag(4, "at most so many failed replies in a dialogue", low=0)
    num: int = flag(10000, "number of dialogues", low=1)
    side_by_side: int = flag(512, "dialogues played at the same time", low=1)
    temperature: float = flag(0.7, "temperature of the model's replies", low=0)
    max_new_tokens: int = flag(48, "a reply is cut after so many tokens", low=1)
    dtype: str = flag("auto", "type to compute in; auto: bfloat16 on processors made for it",
                      choices=("auto", "float32", "bfloat16"))
    device: str = flag("auto", "cpu, cuda, or auto")
    seed: int = flag(0, "fixes every dialogue", low=0)


def play(policy, processor, environments, numbers, config):
    """Let the model fail up to as often as is drawn for each dialogue. Returns the messages before
    the expert's reply, of each dialogue."""
    memory = RolloutMemory(policy, 65536, 2 ** 32)
    # By number of a dialogue: (environment, tries that it may have), its prompt, its messages.
    going, prompts, found = {}, {}, {}
    for number, env in zip(numbers, environments):
        rng = random.Random(f"{config.seed}/own/{number}")
        env.reset(f"{config.seed}/own/{number}", episode=number, begin=False)
        found[number] = env.skip_ahead(rng, config.balance)
        going[number] = env, rng.randint(0, config.failed_tries)
        prompts[number] = encode(processor, found[number])
    texts = unwritable_texts(processor)
    for turn in range(config.failed_tries):
        going = {number: (env, tries) for number, (env, tries) in going.items() if tries > turn}
        if not going:
            break
        uniforms = sampling_uniforms([(SAMPLES, config.seed, number, turn) for number in going],
                                     config.max_new_tokens)
        replies = policy.generate([prompts[number] for number in going], uniforms,
                                  config.max_new_tokens, config.temperature,
                                  pictures=[picture_of(found[number]) for number in going],
                                  memory=memory, owners=list(going))
        for (number, (env, _)), (ids, _) in zip(list(going.items()), replies):
            reply = decode_reply(processor, ids)
            unwritable = any(text in reply for text in texts)
            if env.judge(reply).status == "correct" or unwritable:
                del going[number]
                continue
            found[number], *_ = env.step(reply)
            prompts[number] = encode(processor, found[number], prompts[number] + ids)
    return [found[number] for number in numbers]


def dialogues(policy, processor, kinds, weights, config):
    """All dialogues, in order: messages with the expert's reply last, and only that one learnt."""
    for first in running.progress(range(0, config.num, config.side_by_side), desc="dialogues"):
        numbers = range(first, min(first + config.side_by_side, config.num))
        environments = []
        for number in numbers:
            rng = random.Random(f"{config.seed}/mix/{number}")
            make = rng.choices(kinds, weights)[0]
            environments.append(make())
        played = play(policy, processor, environments, numbers, config)
        for env, messages in zip(environments, played):
            expert = {"role": "assistant", "content": env.demonstrate()}
            yield [*map(without_loss, messages), expert]


def main(config):
    with running.one_line_errors():
        if not config.out or not config.model:
            raise ValueError("--out and --model are required: a new file such as own.json, and a "
                             "model folder")
        settings.check_temperature(config.temperature)
        splits = settings.read_splits(config.mix, weighted=True)
        common = settings.read_settings(config.env)
        for split in splits:
            given = {**common, **split.settings}
            demonstrator.refuse_without_effect(given, ["reward"], "a dialogue holds no rewards")
            demonstrator.check_taught(given)
        # The default leaves a try for the expert after the failed ones.
        common.setdefault("verify_iter", config.failed_tries + 1)
        kinds = [partial(envs.make_env, config.task, split.name, common, **split.settings)
                 for split in splits]
        weights = [split.weight for split in splits]
        made = [make() for make in kinds]
        if any(env.verify_iter <= config.failed_tries for env in made):
            raise ValueError(f"verify_iter must be above --failed-tries {config.failed_tries}")
        device = running.pick_device(config.device)
        dtype = running.pick_dtype(config.dtype, device)
        policy, processor = load_policy(config.model, dtype, device, vision=made[0].vision)
        write_conversations(config.out, "--out",
                            dialogues(policy, processor, kinds, weights, config))
    print(f"{config.out}: {config.num} dialogues")


if __name__ == "__main__":
    running.run(main, Config)
