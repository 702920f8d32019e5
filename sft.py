"""Supervised fine-tuning: cross-entropy on expert replies (paper Section 5, appendix C.1).

The paper's SFT data are pairs by the training rule: a prompt, and the expert's reply, which is
right at the first try. The loss sees the reply and its end-of-turn token, never the prompt.

    python sft.py --model PATH --out runs/sft         # the paper's settings, pairs made on the fly
    python sft.py --task gp-vl --model PATH --out runs/sft --mix id suits=HD    # on red cards
    python sft.py --model PATH --out runs/sft --data data.json    # see support/conversations.py
    python sft.py --model PATH --out runs/base --mix rule_family --failed-tries 4    # pre-training
    torchrun --nproc-per-node 8 sft.py --model PATH --out runs/sft    # as the first, on 8 GPUs
    python sft.py --task gp-vl --dump data.json --num 1000    # write a data file, train nothing

The same command continues a stopped run from its newest checkpoint; Ctrl-C or SIGTERM saves one.
Sample i is made from the seed "SEED/sft/i", so a run only has to remember which sample is next. A
V-IRL sample is one position of a route; with `--balance` the kind of position is drawn first.
`--failed-tries` puts wrong replies and their verdicts before the expert's reply (paper Fig. 15).

Left out: packing (samples of like length share a micro-batch instead), LoRA.
"""
if __name__ == "__main__":
    from support import startup
    startup.begin(__file__)     # Ctrl-C and a mistyped flag are answered before torch is imported

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import envs
from model import (IMAGE_TOKEN, aligned_micro_batches, collate, encode, encode_reply, load_policy,
                   picture_of)
from support import conversations, running, settings, training
from support.running import flag


@running.memory_advice("--micro-batch-tokens or set --gradient-checkpointing")
def train_step(policy, optimizer, samples, config):
    """One optimizer step on samples (prompt_ids, response_ids, picture): (loss, grad_norm).

        loss = - sum of the log-probs of all reply tokens / number of reply tokens of the step

    Sum and number include the samples of other processes. The number is known before the first
    micro-batch, so how the step is cut into micro-batches changes nothing. A loss or gradient norm
    that is not finite raises FloatingPointError before the weights change.
    """
    # differs 30: a mean over all reply tokens; the official code averages on each device first
    reply_tokens = running.total(sum(len(response_ids) for _, response_ids, _ in samples))
    lengths = [policy.num_tokens(*sample) for sample in samples]
    groups = aligned_micro_batches(lengths, config.micro_batch_tokens)
    loss = 0.0
    # All processes must make equally many passes: those with fewer add groups of weight 0.
    for rows, weight in running.pad_batches(groups):
        dialogues = [[samples[row][:2]] for row in rows]   # each of one turn: prompt and reply ids
        pictures = [samples[row][2] for row in rows]
        logprobs, _ = policy(collate(dialogues, policy.device, pictures))   # (B, R), 0 at padding
        micro_loss = -weight * logprobs.sum() / reply_tokens
        # Gradients are averaged over processes. Times WORLD, their number, makes that a sum.
        (micro_loss * running.WORLD).backward()
        loss += float(micro_loss.detach())
    loss = running.total(loss)
    grad_norm = running.clip_gradients(policy.backbone.parameters(), config.max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(f"loss {loss}, grad_norm {grad_norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


# ---- Settings ------------------------------------------------------------------------------------

@dataclass
class Config(training.RunConfig):
    """The defaults are the published settings for GP-L (official sft/sft_scripts/gp_l.sh)."""
    out: str = flag("", "run folder, new or stopped half-way")
    model: str = flag("", "a model folder; support/tiny.py writes a tiny one")
    task: str = flag("gp-l", "which environment", choices=tuple(envs.TASKS))
    env: tuple = flag((), "settings of the environment, such as: root=city0 (envs.py lists them)")
    # data
    mix: tuple = flag(("id",), "splits, their weights and settings: id:0.7 fold=train rule_ood:0.3")
    balance: bool = flag(False, "V-IRL: draw every kind of position equally often")
    failed_tries: int = flag(0, "up to so many wrong replies before the expert's", low=0, high=9)
    data: str = flag("", "train on the conversations in this file, which should fit --task, --env")
    pictures: str = flag("", "folder that picture paths in --data start from; else the file's own")
    dump: str = flag("", "write samples to this file, which --data can read, and train nothing")
    num: int = flag(1000, "number of samples that --dump writes", low=1)
    # optimisation
    steps: int = flag(400, "optimizer steps (the paper's RL starts from step 400)", low=1)
    batch_size: int = flag(128, "samples of one optimizer step: 16 x 8 GPUs in the paper", low=1)
    lr: float = flag(1e-6, "peak learning rate (5e-7 for the vision tasks)", low=1e-12)
    warmup_ratio: float = flag(0.03, "share of the steps with linear warm-up", low=0, high=1)
    # differs 24: the default is what the official script asks for, not what ran
    schedule: str = flag("cosine", "after the warm-up: cosine to 0, as the official script says, "
                                   "or constant, as it ran", choices=("cosine", "constant"))
    freeze: str = flag("", "parts of a vision model that are not trained: vision, projector")
    weight_decay: float = flag(0.0, "AdamW weight decay", low=0)
    beta2: float = flag(0.98, "AdamW beta 2; beta 1 is 0.9, eps 1e-7", low=0, high=0.999999)
    max_grad_norm: float = flag(1.0, "the gradient's norm is clipped to this", low=1e-12)
    save_every: int = flag(100, "optimizer steps between checkpoints", low=1)


# ---- Samples -------------------------------------------------------------------------------------

class Samples:
    """samples[i] is (messages, expert's reply), by an environment or from a file that is shuffled.
    ValueError says which settings contradict each other."""

    def __init__(self, config):
        self.config = config
        self.epoch = None          # the pass over the file for which `self.order` was drawn
        splits = settings.read_splits(config.mix, weighted=True)
        common = settings.read_settings(config.env)
        # Unless the user sets verify_iter, it allows the failed tries and one more: the expert's.
        common.setdefault("verify_iter", config.failed_tries + 1)
        self.envs = []
        # With --data they only check --env and --mix. None is made if both are the defaults.
        if not config.data or config.env or tuple(config.mix) != ("id",):
            self.envs = [envs.make_env(config.task, split.name, common, **split.settings)
                         for split in splits]
        self.weights = [split.weight for split in splits]
        training.check_samples(config, splits, self.envs)
        self.pairs = []
        self.vision = envs.TASKS[config.task].fixed["vision"]
        if config.data:
            self.pairs = conversations.read_conversations(config.data, self.vision, IMAGE_TOKEN,
                                                          config.pictures)

    def __getitem__(self, i):
        if self.pairs:
            return self.read(i)
        rng = random.Random(f"{self.config.seed}/mix/{i}")
        env = rng.choices(self.envs, self.weights)[0]
        env.reset(f"{self.config.seed}/sft/{i}", episode=i, begin=False)
        messages = env.skip_ahead(rng, self.config.balance)      # begins at a drawn position
        for _ in range(rng.randint(0, self.config.failed_tries)):
            messages, *_ = env.step(env.flawed_reply())
        return messages, env.demonstrate()     # the expert's reply; with `faults` it may be wrong

    def read(self, i):
        """Sample i of a file. Each pass over it has an order of its own, drawn from the seed."""
        epoch, at = divmod(i, len(self.pairs))
        if epoch != self.epoch:
            rng = random.Random(f"{self.config.seed}/order/{epoch}")
            self.epoch, self.order = epoch, rng.sample(range(len(self.pairs)), len(self.pairs))
        pair = self.pairs[self.order[at]]
        return conversations.open_pictures(pair.messages), pair.reply


# ---- The run -------------------------------------------------------------------------------------

def encode_pair(processor, messages, reply):
    """The ids of a sample: (prompt_ids, response_ids)."""
    return encode(processor, messages), encode_reply(processor, reply)


def set_up(config):
    """(run, samples); ValueError says what is wrong, before anything is written."""
    training.check_sft(config)
    device = running.start_processes(config.device)
    samples = Samples(config)
    run = training.Run(config, device, load_policy, samples.vision, samples.envs)
    # A text that does not fit the model fails here, not in the middle of the run.
    conversations.check_pairs(config.data, samples.pairs, run.policy, run.processor, encode_pair)
    encode_pair(run.processor, *samples[0])
    optimizer = torch.optim.AdamW(run.policy.backbone.parameters(), lr=config.lr, eps=1e-7,
                                  betas=(0.9, config.beta2), weight_decay=config.weight_decay)
    run.resume(optimizer, {"step": 0, "tokens": 0, "seconds": 0.0})
    run.open()
    return run, samples


def main(config):
    with running.one_line_errors():
        if config.dump:
            return conversations.dump(Samples(config), config)
        run, samples = set_up(config)
    policy, processor, state = run.policy, run.processor, run.state
    running.print_memory(policy, run.config)
    stop, started, seconds_before = running.StopSignal(), time.monotonic(), state["seconds"]
    final_lr = config.lr if config.schedule == "constant" else 0.0
    for step in run.steps(config.steps, "sft"):
        first, end = step * config.batch_size, (step + 1) * config.batch_size
        with running.one_line_errors(f"step {step + 1}, samples {first} to {end - 1}", config.out):
            # The learning rate rises to its peak, then stays there or falls to 0.
            lr = running.learning_rate(step, config.steps, config.lr, config.warmup_ratio, final_lr)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            # This process makes and tokenizes its part of the samples.
            batch = []
            for i in running.local_part(range(first, end)):
                messages, reply = samples[i]
                batch.append((*encode_pair(processor, messages, reply), picture_of(messages)))
            loss, grad_norm = train_step(policy, run.optimizer, batch, config)
        # All processes' tokens count as compute. SFT samples none, so both figures are the same.
        tokens = state["tokens"] + running.total(sum(policy.num_tokens(*row) for row in batch))
        reply_tokens = running.total(sum(len(response_ids) for _, response_ids, _ in batch))
        gflops = policy.gflops(tokens)
        seconds = seconds_before + time.monotonic() - started
        state = {"step": step + 1, "tokens": tokens, "seconds": seconds}
        running.log_jsonl(Path(config.out) / "metrics.jsonl", step=step + 1, loss=loss,
                          grad_norm=grad_norm, lr=lr, tokens_trained=tokens,
                          response_tokens=reply_tokens, gflops=gflops, gflops_paper=gflops,
                          seconds=seconds)
        run.show(loss=f"{loss:.3f}", lr=f"{lr:.1e}")
        run.save_if_due(state, config.steps, stop, with_value_head=False)
    running.print_finished(config.out)


if __name__ == "__main__":
    running.run(main, Config)
