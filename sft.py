"""Supervised fine-tuning: cross-entropy on expert replies (paper Section 5, appendix C.1).

The paper's SFT data are optimal single-turn pairs (prompt, expert reply) of the training rule; the loss sees the
reply and its end-of-turn, never the prompt.

    python sft.py --model PATH --out runs/sft                      # the paper's settings, pairs made on the fly
    python sft.py --model PATH --out runs/sft --data data.json     # from a file in the released shape
    python sft.py --model tiny --out runs/base --mix rule_family:1 --failed-tries 4       # see recipes/base.sh
    torchrun --nproc-per-node 8 sft.py --model PATH --out runs/sft            # the same steps on eight GPUs
    python sft.py --task gp-vl --dump data.json --num 1000     # write such a file, with its pictures; train nothing

The same command continues a run that was stopped, from its newest checkpoint. Sample i of a run is made from the seed
"SEED/sft/i", so nothing but the number of the next sample has to be remembered. A V-IRL sample is one position of a
route, any of them or, with `--balance`, any kind first. `--mix` weighs the splits of envs.py; `--failed-tries` puts up
to that many wrong replies, each with its verdict, before the expert's (paper Fig. 15).

Left out: packing (samples of like length share a micro-batch instead), LoRA.
"""
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import envs
from model import (FREEZABLE, IMAGE_TOKEN, WORLD, StopSignal, check_run, clip_gradients, collate, cut_together,
                   dump_batch, encode, encode_reply, fail, in_step, knob, learning_rate, leave, load_resume,
                   load_sharded, log_jsonl, memory_advice, memory_estimate, mine, open_run, parse_config, picture_of,
                   progress, save_checkpoint, say, start_processes, total, write_whole)


@dataclass
class Config:
    """Defaults are the published settings for GP-L (official sft/sft_scripts/gp_l.sh); the batch is the global one."""
    out: str = knob("", "run folder, new or stopped half-way")
    model: str = knob("", "a model folder, or tiny or tiny-vl, either with :WIDTHxLAYERS")
    task: str = knob("gp-l", "which environment", choices=tuple(envs.TASKS))
    root: str = knob("", "V-IRL: the folder with its data sets")
    card_dir: str = knob("", "gp-vl: a folder with the official card pictures, instead of ours")
    resolution: int = knob(0, "pixels of a picture's side (V-IRL: of a view); 0: 1200 and 448", low=0)
    # data
    mix: str = knob("id:1", "splits and their weights, such as id:0.7,rule_ood:0.3")
    fold: str = knob("", "hands to train on: all, train or test; empty: as the split says", choices=("", *envs.FOLDS))
    solution: str = knob("", "the expert's formula: fixed (the shortest; the default) or random",
                         choices=("", "fixed", "random"))
    balance: bool = knob(False, "V-IRL: turns, forwards and stops equally often")
    failed_tries: int = knob(0, "up to this many failed tries before the expert reply (Fig. 15)", low=0, high=9)
    prompt_file: str = knob("", "JSON object of templates that replace ours")
    data: str = knob("", "train on this file of conversations instead (of the knobs above, task and root still count)")
    dump: str = knob("", "write samples to this file in the shape that --data reads, and train nothing")
    num: int = knob(1000, "with --dump: so many samples", low=1)
    # optimisation
    steps: int = knob(400, "optimizer steps (the paper's RL starts from step 400)", low=1)
    batch_size: int = knob(128, "samples per optimizer step: 16 x 8 GPUs in the paper", low=1)
    lr: float = knob(1e-6, "peak learning rate (5e-7 for the vision tasks)", low=0)
    warmup_ratio: float = knob(0.03, "share of the steps with linear warm-up, then cosine to 0", low=0, high=1)
    freeze: str = knob("", f"parts of a vision model that stay as they are: {', '.join(FREEZABLE)} (Fig. 16)")
    weight_decay: float = knob(0.0, "AdamW weight decay", low=0)
    beta2: float = knob(0.98, "AdamW beta 2; beta 1 is 0.9, eps 1e-7", low=0, high=0.999999)
    max_grad_norm: float = knob(1.0, "gradient norm is clipped to this", low=1e-12)
    # running
    micro_batch_tokens: int = knob(16384, "padded tokens per forward", low=1)
    gradient_checkpointing: bool = knob(False, "compute activations twice to save memory")
    dtype: str = knob("float32", "compute in this type", choices=("float32", "bfloat16"))
    param_dtype: str = knob("float32", "master weights; bfloat16 takes half the memory and loses small updates",
                            choices=("float32", "bfloat16"))
    device: str = knob("auto", "cpu, cuda, or auto")
    seed: int = knob(0, "fixes weights of a tiny model and every sample", low=0)
    save_every: int = knob(100, "optimizer steps between checkpoints", low=1)
    keep_resume: int = knob(2, "checkpoints that keep their optimizer state", low=1)


def parse_mix(text):
    """"id:0.7,rule_ood:0.3" -> (("id", "rule_ood"), (0.7, 0.3)); ValueError says what is wrong with it."""
    pairs = []
    for part in text.split(","):
        split, _, weight = part.partition(":")
        try:
            pairs.append((split.strip(), float(weight or 1)))
        except ValueError:
            raise ValueError(f"mix {text!r}: {weight!r} is not a weight; expected e.g. id:0.7,rule_ood:0.3") from None
        if not 0 < pairs[-1][1] < float("inf"):
            raise ValueError(f"mix {text!r}: weight {weight} must be above 0")
    return tuple(zip(*pairs))


def read_conversations(path, vision):
    """(messages, reply) pairs from a file in the released data.json shape, one for every reply in it.

    Shape: [{"image": file, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}, ...]. With `vision`
    every record has one picture, its path relative to the data file's folder, and one <image> in its first text;
    without, none has. In the messages stands the path. ValueError names file, record and key.
    """
    try:
        records = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"data file {path}: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"data file {path}: expected a non-empty list of records, got {type(records).__name__}")
    pairs, roles = [], ("human", "gpt")
    for index, record in enumerate(progress(records, desc="pictures", leave=False) if vision else records):
        where = f"data file {path}, record {index}"
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not turns or len(turns) % 2:
            raise ValueError(f"{where}: key 'conversations' must be a list of human and gpt turns in pairs")
        image = record.get("image")
        if not (isinstance(image, str) and image if vision else image in (None, "")):
            raise ValueError(f"{where}: key 'image': a task with pictures needs one file per record, another none; "
                             f"got {image!r}")
        if vision:
            image = Path(path).parent / image
            try:
                envs.open_picture(image)
            except ValueError as error:
                raise ValueError(f"{where}: key 'image': {error}") from None
        messages = []
        for at, turn in enumerate(turns):
            if not isinstance(turn, dict) or turn.get("from") != roles[at % 2]:
                raise ValueError(f"{where}: key 'from' of turn {at} must be {roles[at % 2]!r}")
            if not isinstance(turn.get("value"), str):
                raise ValueError(f"{where}: key 'value' of turn {at} must be text")
            text, slots = turn["value"], int(vision and at == 0)
            if text.count("<image>") != slots or IMAGE_TOKEN in text:
                raise ValueError(f"{where}: key 'value' of turn {at} must hold <image> {slots} times and no "
                                 f"{IMAGE_TOKEN}; it has {text.count('<image>')} and {text.count(IMAGE_TOKEN)}")
            if at % 2:
                pairs.append((messages, text))
                messages = messages + [{"role": "assistant", "content": text}]
            else:
                text = text.replace("<image>\n", "").replace("<image>", "")
                messages = messages + [envs.user_message(text, image if slots else None)]
    return pairs


class Samples:
    """Sample i of the run as (messages, expert reply): made by an environment, or read from a file in seeded order."""

    def __init__(self, config):
        splits, self.weights = parse_mix(config.mix)
        if config.balance and not config.task.startswith("virl"):
            raise ValueError(f"--balance: {config.task} has one kind of position only")
        self.envs = [envs.make_env(config.task, split, root=config.root, fold=config.fold, solution=config.solution,
                                   prompt_file=config.prompt_file, card_dir=config.card_dir,
                                   resolution=config.resolution or None,
                                   verify_iter=config.failed_tries + 1)   # so that no failed try ends the episode
                     for split in splits]
        self.pairs = read_conversations(config.data, config.task.endswith("-vl")) if config.data else None
        self.config, self.epoch = config, None

    def __getitem__(self, i):
        seed, rng = self.config.seed, random.Random(f"{self.config.seed}/mix/{i}")
        if self.pairs:
            epoch, at = divmod(i, len(self.pairs))
            if epoch != self.epoch:
                order = random.Random(f"{seed}/order/{epoch}").sample(range(len(self.pairs)), len(self.pairs))
                self.epoch, self.order = epoch, order
            messages, reply = self.pairs[self.order[at]]
            path = picture_of(messages)
            if path:
                messages = [envs.user_message(envs.read_text(messages[0]), envs.open_picture(path)), *messages[1:]]
            return messages, reply
        env = rng.choices(self.envs, self.weights)[0]
        env.reset(seed=f"{seed}/sft/{i}")
        messages = env.skip_ahead(rng, self.config.balance)
        for _ in range(rng.randint(0, self.config.failed_tries)):
            messages, *_ = env.step(env.flawed_reply())
        return messages, env.expert_reply()


def dump(samples, config):
    """Write the first `num` samples in the released shape, pictures in a folder beside the file."""
    path, folder = Path(config.dump), Path(config.dump).with_suffix("")
    if config.failed_tries:
        raise ValueError(f"--dump with --failed-tries {config.failed_tries}: in the released shape every reply is a "
                         "target, failed ones would be learnt; make such dialogues on the fly")
    if path.exists() or folder.exists() or path == folder:
        raise ValueError(f"--dump {config.dump}: must be a new file with a suffix, such as data.json, and no folder "
                         f"{folder} may be there yet")
    if not path.parent.is_dir():
        raise ValueError(f"--dump {config.dump}: there is no folder {path.parent}")
    records = []
    for i in progress(range(config.num), desc="dump"):
        messages, reply = samples[i]
        record, turns = {}, []
        for message in [*messages, {"role": "assistant", "content": reply}]:
            text, slots = envs.read_text(message), ""
            if "<image>" in text:
                raise ValueError("--dump: a text holds <image>, which marks the picture in the released shape")
            if not isinstance(message["content"], str):
                record["image"], slots = f"{folder.name}/{i:06d}.png", "<image>\n"
                folder.mkdir(exist_ok=True)
                message["content"][0]["image"].save(folder / f"{i:06d}.png")
            turns.append({"from": "gpt" if message["role"] == "assistant" else "human", "value": slots + text})
        records.append({**record, "conversations": turns})
    write_whole(path, json.dumps(records, indent=1) + "\n")


def train_step(policy, optimizer, samples, config):
    """One optimizer step on (prompt_ids, response_ids, picture) samples; returns (loss, grad_norm).

    The loss is the mean over all response tokens of the step, those of other processes included: the denominator is
    counted before the micro-batches, so how they are cut changes nothing. FloatingPointError, before the step, if
    either is not finite.
    """
    num_tokens, loss = total(sum(len(response) for _, response, _ in samples)), 0.0
    batches = cut_together([policy.num_tokens(*sample) for sample in samples], config.micro_batch_tokens)
    for rows, weight in in_step(batches):
        logprobs, _ = policy(collate([[samples[row][:2]] for row in rows], policy.device,
                                     [samples[row][2] for row in rows]))
        micro_loss = -weight * logprobs.sum() / num_tokens
        (micro_loss * WORLD).backward()                            # gradients are averaged over processes
        loss += float(micro_loss.detach())
    loss, grad_norm = total(loss), clip_gradients(policy.backbone.parameters(), config.max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(f"loss {loss}, grad_norm {grad_norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def main(config):
    try:
        if config.dump:
            return dump(Samples(config), config)
        if not config.out or not config.model:
            raise ValueError("--out and --model are required; --model is a folder, or tiny or tiny-vl, either with "
                             ":WIDTHxLAYERS")
        if config.batch_size < WORLD:
            raise ValueError(f"--batch-size {config.batch_size}: must be at least the number of processes, {WORLD}")
        device, samples = start_processes(config.device), Samples(config)
        newest = check_run(config)
        torch.manual_seed(config.seed)
        texts = envs.sample_texts(config.task, root=config.root, prompt_file=config.prompt_file)
        policy, processor = load_sharded(str(newest or config.model), config.dtype, device, texts,
                                         samples.envs[0].atoms(), config.task.endswith("-vl"), config.freeze,
                                         config.gradient_checkpointing, config.param_dtype)
        encode(processor, samples[0][0])                           # a text that does not fit the model fails here
        open_run(config, newest)
    except ValueError as error:
        fail(error)
    optimizer = torch.optim.AdamW(policy.backbone.parameters(), lr=config.lr, betas=(0.9, config.beta2), eps=1e-7,
                                  weight_decay=config.weight_decay)
    state = load_resume(newest, policy, optimizer) if newest else {"step": 0, "tokens": 0, "seconds": 0.0}
    say(memory_estimate(policy, config))
    stop, out, started, earlier = StopSignal(), Path(config.out), time.time(), state["seconds"]
    bar = progress(range(state["step"], config.steps), initial=state["step"], total=config.steps, desc="sft")
    for step in bar:
        lr = learning_rate(step, config.steps, config.lr, config.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        numbers = mine(range(step * config.batch_size, (step + 1) * config.batch_size))
        try:
            batch = [(encode(processor, messages), encode_reply(processor, reply), picture_of(messages))
                     for messages, reply in map(samples.__getitem__, numbers)]
            with memory_advice("--micro-batch-tokens or set --gradient-checkpointing"):
                loss, grad_norm = train_step(policy, optimizer, batch, config)
        except ValueError as error:                                # such as a picture that broke meanwhile
            fail(f"step {step + 1}: {error}; the last checkpoint is whole", alone=True)
        except FloatingPointError as error:
            dump_batch(out, [sample[:2] for sample in batch])
            fail(f"step {step + 1}, samples {step * config.batch_size} to {(step + 1) * config.batch_size - 1}, kept "
                 f"as bad_batch_*.json: {error}; the last checkpoint is whole, go on from it with a smaller --lr and "
                 "another --out")
        tokens = state["tokens"] + total(sum(policy.num_tokens(*sample) for sample in batch))
        state = {"step": step + 1, "tokens": tokens, "seconds": earlier + time.time() - started}
        gflops = 6 * policy.num_params * tokens / 1e9                               # paper C.3
        log_jsonl(out / "metrics.jsonl", step=step + 1, loss=loss, grad_norm=grad_norm, lr=lr, tokens_trained=tokens,
                  response_tokens=total(sum(len(response) for _, response, _ in batch)),
                  gflops=gflops, gflops_paper=gflops, seconds=state["seconds"])
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}")
        stopping = stop.requested
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps or stopping:
            save_checkpoint(out, step + 1, policy, processor, optimizer, state, config.keep_resume,
                            with_value_head=False)
        if stopping:
            leave(143)


if __name__ == "__main__":
    main(parse_config(Config))
    leave()
