"""Write dialogues in which a model's own failed replies stand before the expert's, to learn from by `sft.py --data`.

    python data/own_failures.py --task gp-l --model runs/base-gp-l/2/step_000200 --out own.json --mix rule_family fold=train

    python data/own_failures.py --task gp-vl --model PATH --out own.json                  # pictures in a folder own/

Random failed tries (`sft.py --failed-tries`) are not those that a model makes: one that has seen only them repeats its own.
Each dialogue has up to `--failed-tries` failed replies, as the model samples them; one that succeeds earlier, or writes a control
token as text, is kept up to the reply before. The failed ones are marked "loss": false; only the last reply is learnt, the
expert's (with `--env faults=...` an imperfect demonstrator's). Used by recipes/base.sh.
"""
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import envs
from model import SAMPLES, RolloutMemory, decode_reply, encode, load_policy, picture_of, sampling_uniforms
from support import running, settings
from support.conversations import write_conversations
from support.running import knob


@dataclass
class Config:
    """What is written."""
    out: str = knob("", "a new file such as own.json")
    model: str = knob("", "a model folder")
    task: str = knob("gp-l", "which environment", choices=tuple(envs.TASKS))
    mix: tuple = knob(("id",), "splits and their weights, as in sft.py")
    env: tuple = knob((), "settings of the environment, as in sft.py")
    balance: bool = knob(False, "V-IRL: turns, forwards and stops equally often")
    failed_tries: int = knob(4, "up to this many failed replies in a dialogue", low=0)
    num: int = knob(10000, "dialogues", low=1)
    side_by_side: int = knob(512, "dialogues played at the same time", low=1)
    temperature: float = knob(0.7, "of the model's replies", low=0)
    max_new_tokens: int = knob(48, "a reply is cut here", low=1)
    dtype: str = knob("auto", "compute in this type; auto: the faster one", choices=("auto", "float32", "bfloat16"))
    device: str = knob("auto", "cpu, cuda, or auto")
    seed: int = knob(0, "fixes every dialogue", low=0)


def play(policy, processor, environments, numbers, config):
    """Let the model fail up to as often as is drawn for each dialogue; the messages before the expert's reply, of each."""
    going, prompts, found, memory = {}, {}, {}, RolloutMemory(policy, 65536, 2 ** 32)
    for number, env in zip(numbers, environments):
        rng = random.Random(f"{config.seed}/own/{number}")
        env.reset(f"{config.seed}/own/{number}", episode=number)
        messages = env.skip_ahead(rng, config.balance)
        going[number], found[number] = (env, rng.randint(0, config.failed_tries)), messages
        prompts[number] = encode(processor, messages)
    tokenizer = getattr(processor, "tokenizer", processor)
    never = ["<image>", *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)]
    for turn in range(config.failed_tries):
        going = {number: (env, tries) for number, (env, tries) in going.items() if tries > turn}
        if not going:
            break
        uniforms = sampling_uniforms([(SAMPLES, config.seed, number, turn) for number in going], config.max_new_tokens)
        replies = policy.generate([prompts[number] for number in going], uniforms, config.max_new_tokens, config.temperature,
                                  pictures=[picture_of(found[number]) for number in going], memory=memory, owners=list(going))
        for (number, (env, _)), (ids, _) in zip(list(going.items()), replies):
            reply = decode_reply(processor, ids)
            if env.judge(reply).status == "correct" or any(token in reply for token in never):
                del going[number]
                continue
            found[number], *_ = env.step(reply)
            prompts[number] = encode(processor, found[number], prompts[number] + ids)
    return [found[number] for number in numbers]


def dialogues(policy, processor, kinds, weights, config):
    """All dialogues, in order: messages with the expert's reply last, and only that one to be learnt."""
    for first in running.progress(range(0, config.num, config.side_by_side), desc="dialogues"):
        numbers = range(first, min(first + config.side_by_side, config.num))
        environments = [random.Random(f"{config.seed}/mix/{number}").choices(kinds, weights)[0]() for number in numbers]
        for env, messages in zip(environments, play(policy, processor, environments, numbers, config)):
            messages = [message | ({"loss": False} if message["role"] == "assistant" else {}) for message in messages]
            yield [*messages, {"role": "assistant", "content": env.demonstrate()}]


def main(config):
    with running.one_line_errors():
        if not config.out or not config.model:
            raise ValueError("--out and --model are required: a new file such as own.json, and a model folder")
        splits, common = settings.read_splits(config.mix, weighted=True), settings.read_settings(config.env)
        common.setdefault("verify_iter", config.failed_tries + 1)   # so that no failed try ends the episode
        kinds = [partial(envs.make_env, config.task, split.name, common, **split.settings) for split in splits]
        made = [make() for make in kinds]
        if any(env.verify_iter <= config.failed_tries for env in made):
            raise ValueError(f"verify_iter must be above --failed-tries {config.failed_tries}")
        device = running.pick_device(config.device)
        policy, processor = load_policy(config.model, running.pick_dtype(config.dtype, device), device, vision=made[0].vision)
        write_conversations(config.out, "--out", dialogues(policy, processor, kinds, [split.weight for split in splits], config))
    print(f"{config.out}: {config.num} dialogues")


if __name__ == "__main__":
    running.run(main, Config)
