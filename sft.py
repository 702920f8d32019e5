"""Supervised fine-tuning: cross-entropy on expert replies (paper Section 5, appendix C.1).

The paper's SFT data are optimal single-turn pairs (prompt, expert reply) of the training rule; the loss sees the
reply and its end-of-turn, never the prompt.

    python sft.py --model PATH --out runs/sft                      # the paper's settings, pairs made on the fly
    python sft.py --task gp-vl --model PATH --out runs/sft --mix id suits=HD       # on red cards (settings: envs.py)
    python sft.py --model PATH --out runs/sft --data data.json     # from a file (shapes: support/conversations.py)
    python sft.py --model PATH --out runs/base --mix rule_family --failed-tries 4         # see recipes/base.sh
    torchrun --nproc-per-node 8 sft.py --model PATH --out runs/sft            # the same steps on eight GPUs
    python sft.py --task gp-vl --dump data.json --num 1000     # write such a file, with its pictures; train nothing

The same command continues a run that was stopped, from its newest checkpoint; Ctrl-C or SIGTERM saves one. Sample i of
a run is made from the seed "SEED/sft/i", so nothing but the number of the next sample has to be remembered. A V-IRL
sample is one position of a route, any of them or, with `--balance`, any kind first. `--failed-tries` puts up to that
many wrong replies, each with its verdict, before the expert's (paper Fig. 15).

Left out: packing (samples of like length share a micro-batch instead), LoRA.
"""
import math
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import envs
from model import FREEZABLE, IMAGE_TOKEN, aligned_micro_batches, collate, encode, encode_reply, load_policy, picture_of
from support import conversations, run_folder, running, settings
from support.running import knob


@running.memory_advice("--micro-batch-tokens or set --gradient-checkpointing")
def train_step(policy, optimizer, samples, config):
    """One optimizer step on (prompt_ids, response_ids, picture) samples; returns (loss, grad_norm).

    The loss is the mean over all response tokens of the step, those of other processes included: the denominator is
    counted before the micro-batches, so how they are cut changes nothing. FloatingPointError, before the step, if
    either is not finite.
    """
    num_targets, loss = running.total(sum(len(response) for _, response, _ in samples)), 0.0
    groups = aligned_micro_batches([policy.num_tokens(*sample) for sample in samples], config.micro_batch_tokens)
    for rows, weight in running.even_out(groups):                  # weight 0: only so that all make as many passes
        logprobs, _ = policy(collate([[samples[row][:2]] for row in rows], policy.device,
                                     [samples[row][2] for row in rows]))                           # (B, R)
        if config.dft:                                             # a token that the model holds unlikely pulls less
            logprobs = logprobs.detach().exp() * logprobs
        micro_loss = -weight * logprobs.sum() / num_targets
        (micro_loss * running.WORLD).backward()                    # gradients are averaged over processes
        loss += float(micro_loss.detach())
    loss, grad_norm = running.total(loss), running.clip_gradients(policy.backbone.parameters(), config.max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(f"loss {loss}, grad_norm {grad_norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


# ---- Settings ----------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Defaults are the published settings for GP-L (official sft/sft_scripts/gp_l.sh); the batch is the global one."""
    out: str = knob("", "run folder, new or stopped half-way")
    model: str = knob("", "a model folder; support/tiny.py writes a tiny one")
    task: str = knob("gp-l", "which environment", choices=tuple(envs.TASKS))
    env: tuple = knob((), "settings of the environment, such as: root=city0 solution=random (envs.py lists them)")
    # data
    mix: tuple = knob(("id",), "splits, their weights, settings of their own, such as: id:0.7 fold=train rule_ood:0.3")
    balance: bool = knob(False, "V-IRL: turns, forwards and stops equally often")
    failed_tries: int = knob(0, "up to this many failed tries before the expert reply (Fig. 15)", low=0, high=9)
    data: str = knob("", "train on this file of conversations instead (task and env still count)")
    dump: str = knob("", "write samples to this file in the shape that --data reads, and train nothing")
    num: int = knob(1000, "with --dump: so many samples", low=1)
    # optimisation
    steps: int = knob(400, "optimizer steps (the paper's RL starts from step 400)", low=1)
    batch_size: int = knob(128, "samples per optimizer step: 16 x 8 GPUs in the paper", low=1)
    lr: float = knob(1e-6, "peak learning rate (5e-7 for the vision tasks)", low=1e-12)
    warmup_ratio: float = knob(0.03, "share of the steps with linear warm-up", low=0, high=1)
    # differs 24: the default is what their script asks for, not what ran
    schedule: str = knob("cosine", "after the warm-up: cosine to 0, as the official script says, or constant, as it ran",
                         choices=("cosine", "constant"))
    dft: bool = knob(False, "weigh each token by its probability (dynamic fine-tuning, arXiv 2508.05629; not in the paper)")
    freeze: str = knob("", f"parts of a vision model that stay as they are: {', '.join(FREEZABLE)} (Fig. 16)")
    weight_decay: float = knob(0.0, "AdamW weight decay", low=0)
    beta2: float = knob(0.98, "AdamW beta 2; beta 1 is 0.9, eps 1e-7", low=0, high=0.999999)
    max_grad_norm: float = knob(1.0, "gradient norm is clipped to this", low=1e-12)
    # running
    micro_batch_tokens: int = knob(16384, "padded tokens per forward", low=1)
    gradient_checkpointing: bool = knob(False, "compute activations twice to save memory")
    dtype: str = knob("auto", "compute in this type; auto: the faster one", choices=("auto", "float32", "bfloat16"))
    param_dtype: str = knob("float32", "master weights; bfloat16 takes half the memory and loses small updates",
                            choices=("float32", "bfloat16"))
    device: str = knob("auto", "cpu, cuda, or auto")
    seed: int = knob(0, "fixes every sample", low=0)
    save_every: int = knob(100, "optimizer steps between checkpoints", low=1)
    keep_resume: int = knob(2, "checkpoints that keep their optimizer state", low=1)


# ---- Samples -----------------------------------------------------------------------------------------------

class Samples:
    """Sample i of the run as (messages, expert reply): made by an environment, or read from a file in seeded order."""

    def __init__(self, config):
        splits, common = settings.read_splits(config.mix, weighted=True), settings.read_settings(config.env)
        common.setdefault("verify_iter", config.failed_tries + 1)  # so that no failed try ends the episode
        made = not config.data or config.env or tuple(config.mix) != ("id",)      # with --data only to check what is given
        self.envs = [envs.make_env(config.task, split.name, common, **split.settings) for split in splits] if made else []
        self.weights = [split.weight for split in splits]
        for split, env in zip(splits, self.envs):
            if env.verify_iter <= config.failed_tries:
                raise ValueError(f"--mix {split.label}: verify_iter {env.verify_iter} must be above --failed-tries "
                                 f"{config.failed_tries}")
        if config.data and (config.failed_tries or config.balance or len(splits) > 1 or splits[0].settings):
            raise ValueError("--data: --mix, --failed-tries and --balance are for samples that are made on the fly")
        if config.balance and len(self.envs[0].kinds) == 1:
            raise ValueError(f"--balance: {config.task} has one kind of position only")
        self.pairs = config.data and conversations.read_conversations(config.data, envs.TASKS[config.task].fixed["vision"],
                                                                             IMAGE_TOKEN)
        self.config, self.epoch = config, None

    def __getitem__(self, i):
        seed, rng = self.config.seed, random.Random(f"{self.config.seed}/mix/{i}")
        if self.pairs:
            epoch, at = divmod(i, len(self.pairs))
            if epoch != self.epoch:
                order = random.Random(f"{seed}/order/{epoch}").sample(range(len(self.pairs)), len(self.pairs))
                self.epoch, self.order = epoch, order
            messages, reply = self.pairs[self.order[at]]
            return conversations.open_pictures(messages), reply
        env = rng.choices(self.envs, self.weights)[0]
        env.reset(f"{seed}/sft/{i}", episode=i)
        messages = env.skip_ahead(rng, self.config.balance)
        for _ in range(rng.randint(0, self.config.failed_tries)):
            messages, *_ = env.step(env.flawed_reply())
        return messages, env.demonstrate()


# ---- The run -----------------------------------------------------------------------------------------------

def set_up(config):
    """All that a run needs, new or from its newest checkpoint; ValueError says what is wrong, before anything is
    written."""
    if not config.out or not config.model:
        raise ValueError("--out and --model are required; --model is a folder, support/tiny.py writes a tiny one")
    if config.batch_size < running.WORLD:
        raise ValueError(f"--batch-size {config.batch_size}: must be at least the number of processes, {running.WORLD}")
    device, samples = running.start_processes(config.device), Samples(config)
    config = replace(config, dtype=running.pick_dtype(config.dtype, device, config.out))
    newest = run_folder.newest_checkpoint(config)
    torch.manual_seed(config.seed)
    load = partial(load_policy, str(newest or config.model), config.dtype, vision=envs.TASKS[config.task].fixed["vision"],
                   freeze=config.freeze, gradient_checkpointing=config.gradient_checkpointing,
                   param_dtype=config.param_dtype)
    with run_folder.damage_advice(newest):
        policy, processor = running.load_spread(load, device)
    encode(processor, samples[0][0])                               # a text that does not fit the model fails here
    optimizer = torch.optim.AdamW(policy.backbone.parameters(), lr=config.lr, betas=(0.9, config.beta2), eps=1e-7,
                                  weight_decay=config.weight_decay)
    state = {"step": 0, "tokens": 0, "seconds": 0.0}
    state = run_folder.load_resume(newest, policy, optimizer, state) if newest else state
    run_folder.open_run(config, newest)
    return config, samples, policy, processor, optimizer, state


def main(config):
    with running.one_line_errors():
        if config.dump:
            return conversations.dump(Samples(config), config)
        config, samples, policy, processor, optimizer, state = set_up(config)
    running.say_memory(policy, config)
    stop, out, started, earlier = running.StopSignal(), Path(config.out), time.time(), state["seconds"]
    bar = running.progress(range(state["step"], config.steps), initial=state["step"], total=config.steps, desc="sft")
    for step in bar:
        first, end = step * config.batch_size, (step + 1) * config.batch_size       # samples of this step
        with running.one_line_errors(f"step {step + 1}, samples {first} to {end - 1}"):
            lr = running.learning_rate(step, config.steps, config.lr, config.warmup_ratio,
                                       final=config.lr if config.schedule == "constant" else 0.0)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = [(encode(processor, messages), encode_reply(processor, reply), picture_of(messages))
                     for messages, reply in map(samples.__getitem__, running.own_part(range(first, end)))]
            loss, grad_norm = train_step(policy, optimizer, batch, config)
        tokens = state["tokens"] + running.total(sum(policy.num_tokens(*sample) for sample in batch))
        state = {"step": step + 1, "tokens": tokens, "seconds": earlier + time.time() - started}
        gflops = policy.gflops(tokens)
        running.log_jsonl(out / "metrics.jsonl", step=step + 1, loss=loss, grad_norm=grad_norm, lr=lr,
                          tokens_trained=tokens,
                          response_tokens=running.total(sum(len(response) for _, response, _ in batch)),
                          gflops=gflops, gflops_paper=gflops, seconds=state["seconds"])
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
        stopping = stop.requested
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps or stopping:
            saved = run_folder.ensure_checkpoint(out, step + 1, policy, processor, optimizer, state, config.keep_resume,
                                              with_value_head=False)
        if stopping:
            stop.leave(saved)
    running.say_finished(out)


if __name__ == "__main__":
    running.run(main, Config)
