"""Reinforcement learning: PPO with a value head over several turns with the verifier (paper Sections 3 and 5).

    collect_turns -> score_turns -> estimate_advantages -> ppo_update

The unit is the turn: one whole reply has one reward, one value (read at the last prompt token), one advantage and one
log-prob, the weighted sum over its tokens (`thought_coef` before the answer key, 1 from it on). So there is one PPO
ratio per reply. A second try sees the first one and the verifier's text in its prompt (sequential revision).

    python rl.py --task gp-l --model runs/sft/step_000400 --out runs/rl
    python rl.py --task gp-vl --model PATH --out runs/red --split id suits=HD --env verify_iter=10     # red cards

The same command continues a run that was stopped, half-played episodes included; Ctrl-C or SIGTERM drops a rollout or
finishes an update, saves, and exits with 130 or 143. After a stop in mid-rollout the run folder holds the newest
checkpoint, step_K/, with weights, value head and optimizer, and in its state how many tokens were spent and where each
environment stood before the rollout (episode, replies so far, which are played again); lines that the logs have after
step K are cut when the run goes on. What differs from the official code, and why, is listed in the README and marked
here; the hyper-parameters are theirs, since the paper prints none.

Left out: a KL penalty and an entropy bonus (the paper has neither), token-level advantages.

    S turns of each environment   E environments   N = S x E turns of an update   B turns of a micro-batch   R tokens

Under torchrun every process plays its part of the environments and trains on its own turns; whatever their number, the
deals, the samples, the minibatches and, but for rounding, the weights are the same.
"""
import math
import os
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import envs
from model import (FREEZABLE, SAMPLES, SHUFFLES, RolloutMemory, aligned_micro_batches, collate, decode_reply, encode,
                   load_policy, picture_of, sampling_uniforms)
from support import run_folder, running, settings
from support.chat import read_text
from support.running import knob

# ---- The maths ---------------------------------------------------------------------------------------------


def compute_gae(rewards, values, dones, next_values, gamma, gae_lambda):
    """Generalised advantage estimates and returns, both (S, E), over turns.

    rewards, values, dones are (S, E); next_values (E,) belong to the prompts after the last turn, and stand in for
    what is still to come of an episode that goes on in the next update. An episode that ends, terminated or truncated,
    passes nothing back: neither value nor advantage crosses `done`.
    """
    advantages, next_advantages = torch.zeros_like(rewards), torch.zeros_like(next_values)
    for s in reversed(range(len(rewards))):
        going = 1.0 - dones[s]                # differs 5: done also where truncated; theirs bootstraps on
        delta = rewards[s] + gamma * next_values * going - values[s]
        next_advantages = delta + gamma * gae_lambda * going * next_advantages
        advantages[s], next_values = next_advantages, values[s]
    return advantages, advantages + values


def ppo_loss(logprobs, old_logprobs, values, old_values, advantages, returns, clip, value_clip=0.0):
    """Policy loss, value loss, and what to watch, each (B,); the caller averages. Tensors are (B,)."""
    log_ratio = (logprobs - old_logprobs).clamp(max=math.log(10))   # beyond 10 no gradient, as in the official code
    ratio = log_ratio.exp()
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    value_loss = 0.5 * (values - returns) ** 2
    if value_clip:                            # differs 11: off by default; theirs is 0.1, as far as a critic may move
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        value_loss = torch.max(value_loss, 0.5 * (clipped - returns) ** 2)
    watched = {"ratio": ratio, "approx_kl": ratio - 1 - log_ratio, "clip_fraction": ((ratio - 1).abs() > clip).float()}
    return policy_loss, value_loss, {name: value.detach() for name, value in watched.items()}


def mean_and_variance(values):
    """Of the values (n,) of all processes."""
    values = values.double()
    num = running.total(len(values))
    mean = running.total(float(values.sum())) / num
    return mean, running.total(float(((values - mean) ** 2).sum())) / num


# ---- Settings ----------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Defaults are the official code's (scripts/gp_training, rl/configs), but for max_grad_norm and the value clip."""
    out: str = knob("", "run folder, new or stopped half-way")
    model: str = knob("", "a model folder, usually one that sft.py wrote")
    task: str = knob("gp-l", "which environment", choices=tuple(envs.TASKS))
    split: tuple = knob(("id",), "the rule to train on, and settings of its own, such as: id rule=11,11,11 fold=train")
    env: tuple = knob((), "settings of the environment, such as: root=city0 verify_iter=3 (envs.py lists them)")
    # rollout
    # differs 26: many environments, few turns; theirs 8 x 256
    num_envs: int = knob(256, "environments played side by side", low=1)
    turns_per_env: int = knob(8, "turns of each per update; 256 x 8 = 2048 as on the paper's 8 GPUs", low=1)
    max_new_tokens: int = knob(512, "a reply is cut here", low=1)
    temperature: float = knob(0.2, "of sampling and of the log-probs", low=0.01)
    # PPO
    updates: int = knob(20, "rollouts in all", low=1)
    epochs: int = knob(4, "passes over a rollout", low=1)
    minibatch_turns: int = knob(1024, "about so many turns per optimizer step; 128 x 8 GPUs", low=1)
    lr: float = knob(1e-6, "Adam learning rate", low=1e-12)
    value_lr: float = knob(0.0, "learning rate of the value head; 0: the same as --lr", low=0)
    lr_warmup: int = knob(0, "updates over which --lr rises to its full height; the value head's does not wait", low=0)
    lr_final: float = knob(1e-9, "the cosine ends here", low=0)
    lr_horizon: int = knob(100, "updates until it does (longer than the run, as in the official code)", low=1)
    gamma: float = knob(0.9, "discount per turn", low=0, high=1)
    gae_lambda: float = knob(0.95, "GAE lambda", low=0, high=1)
    clip: float = knob(0.1, "PPO ratio clip", low=0)
    value_clip: float = knob(0.0, "clip of the value's change; 0: none (official: 0.1)", low=0)
    value_coef: float = knob(0.5, "weight of the value loss", low=0)
    thought_coef: float = knob(0.5, "weight of the log-probs before the answer key", low=0)
    freeze: str = knob("", f"parts of a vision model that stay as they are: {', '.join(FREEZABLE)}")
    max_grad_norm: float = knob(1.0, "gradient norm is clipped to this (official: 0.01, without effect)", low=1e-12)
    # running
    micro_batch_tokens: int = knob(16384, "padded tokens per forward of the update", low=1)
    generate_tokens: int = knob(65536, "padded tokens, replies included, that are sampled side by side", low=1)
    kept_gib: float = knob(4.0, "keys and values that stay from turn to turn of a rollout, in GiB", low=0)
    gradient_checkpointing: bool = knob(False, "compute activations twice to save memory")
    dtype: str = knob("auto", "compute in this type; auto: the faster one", choices=("auto", "float32", "bfloat16"))
    param_dtype: str = knob("float32", "master weights; bfloat16 takes half the memory and loses small updates",
                            choices=("float32", "bfloat16"))
    device: str = knob("auto", "cpu, cuda, or auto")
    seed: int = knob(0, "fixes deals, samples and a new value head", low=0)
    save_every: int = knob(1, "updates between checkpoints", low=1)
    keep_resume: int = knob(2, "checkpoints that keep their optimizer state", low=1)


# ---- Rollout -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Turn:
    """One prompt, one reply, what it earned."""
    prompt_ids: list[int]     # (P,)
    response_ids: list[int]   # (R,)
    answer_start: int         # tokens before this one are thought
    reward: float
    done: bool                # terminated or truncated: GAE stops here
    dialogue_key: tuple       # turns of one dialogue share this: (environment, episode, number in it)
    info: dict
    picture: object = None    # PIL; the one of the dialogue
    number: int = 0           # of N, in the rollouts of all processes


class Conversation:
    """One environment and the dialogue in it as ids; its state is (episode, replies so far), replayed on resume."""

    def __init__(self, index, env, processor, config, episode=0, replies=()):
        self.index, self.env, self.processor = index, env, processor
        self.seed, self.num_envs = config.seed, config.num_envs
        self.begin(episode)
        for response_ids in replies:
            self.play(response_ids)

    def begin(self, episode):
        self.episode, self.replies, self.dialogue_number = episode, [], 0
        # a list of routes that is played in order is shared out over the environments
        messages, _ = self.env.reset(f"{self.seed}/rl/{self.index}/{episode}", episode * self.num_envs + self.index)
        self.continue_with(messages, None)

    def continue_with(self, messages, prior_ids):
        if prior_ids is None:
            self.dialogue_number, self.verdicts = self.dialogue_number + 1, []
        self.prompt_ids, self.picture = encode(self.processor, messages, prior_ids), picture_of(messages)

    def play(self, response_ids):
        """Step the environment with a reply and move on to the next prompt: (reward, done, info, what there is to read
        of the dialogue so far)."""
        before, reply = self.env.messages, decode_reply(self.processor, response_ids)
        messages, reward, terminated, truncated, info = self.env.step(reply)
        self.verdicts = [*self.verdicts, [info["status"], reward]]
        dialogue = [*before, {"role": "assistant", "content": reply}] if info["new_dialogue"] else messages
        readable = {"env": self.index, "episode": self.episode, "verdicts": self.verdicts,
                    "messages": [message | {"content": read_text(message)} for message in dialogue]}
        if terminated or truncated:
            self.begin(self.episode + 1)
        else:
            self.replies = self.replies + [response_ids]   # a new list: the state that is saved holds the old one
            self.continue_with(messages, None if info["new_dialogue"] else self.prompt_ids + response_ids)
        return reward, terminated or truncated, info, readable


def find_answer(processor, response_ids, answer_at):
    """The index of the token in which the text of a reply passes `answer_at` characters; len(response_ids) if none does."""
    # differs 7: where the verifier read the answer; theirs by fixed token ids
    return bisect_right(range(len(response_ids)), answer_at,
                        # (half a character is no character yet)
                        key=lambda token: len(decode_reply(processor, response_ids[:token + 1]).rstrip("\ufffd")))


@running.memory_advice("--generate-tokens or --kept-gib")
def collect_turns(policy, processor, conversations, update, config, stop) -> list[Turn] | None:
    """S turns of every conversation, sampled from the policy: turns ordered (S, E); None if a stop was asked for."""
    turns, last = [], config.turns_per_env - 1
    memory = RolloutMemory(policy, config.generate_tokens, config.kept_gib * 2 ** 30)
    for s in running.progress(range(config.turns_per_env), nested=True, desc="rollout"):
        if stop.requested:
            return None
        prompts, pictures = zip(*[(conversation.prompt_ids, conversation.picture) for conversation in conversations])
        keys = [(SAMPLES, config.seed, update, conversation.index, s) for conversation in conversations]
        uniforms = sampling_uniforms(keys, config.max_new_tokens)
        replies = policy.generate(prompts, uniforms, config.max_new_tokens, config.temperature,
                                  config.generate_tokens, pictures, memory)
        for conversation, prompt_ids, picture, (response_ids, _) in zip(conversations, prompts, pictures, replies):
            key = conversation.index, conversation.episode, conversation.dialogue_number
            reward, done, info, readable = conversation.play(response_ids)
            answer_start = find_answer(processor, response_ids, info["answer_at"])
            turns.append(Turn(prompt_ids, response_ids, answer_start, reward, done, key, info, picture,
                              s * config.num_envs + conversation.index))
            # The dialogues of two environments are kept to be read: the way to see reward hacking.
            if conversation in conversations[:2] and (done or info["new_dialogue"] or s == last):
                running.log_jsonl(Path(config.out) / "turns.jsonl", **{**info, **readable, "step": update + 1, "done": done})
    return turns


# ---- From turns to batches ---------------------------------------------------------------------------------

def group_dialogues(turns: list[Turn]) -> list[list[int]]:
    """The turns' indices by dialogue, each in the order they were played.

    With E = 2 environments and S = 3, of which the first needs two tries and then one for its next hand, while the
    second fails three times: [[0, 2], [4], [1, 3, 5]], by first turn: [[0, 2], [1, 3, 5], [4]].
    """
    dialogues = {}
    for index, turn in enumerate(turns):
        dialogues.setdefault(turn.dialogue_key, []).append(index)
    return list(dialogues.values())


def dialogue_length(policy, turns, dialogue):
    """Tokens of one pass over a dialogue: its last turn holds the earlier ones."""
    last = turns[dialogue[-1]]
    return policy.num_tokens(last.prompt_ids, last.response_ids, last.picture)


def turn_batches(policy, turns, dialogues, config, filler=None) -> list[tuple[list[list[int]], float]]:
    """Micro-batches of whole dialogues as (dialogues, weight): the turns of a dialogue share one row.

    In the example above, if two rows fit: [([[1, 3, 5], [0, 2]], 1.0), ([[4]], 1.0)]. All processes must make as many
    passes: one that has fewer repeats its last, or `filler`, with weight 0.
    """
    lengths = [dialogue_length(policy, turns, dialogue) for dialogue in dialogues]
    groups = aligned_micro_batches(lengths, config.micro_batch_tokens)
    return running.even_out([[dialogues[i] for i in group] for group in groups], filler)


def minibatches(turns, update, config):
    """For every optimizer step of an update (epoch, first turn, number of turns, the dialogues that are ours).

    Whole dialogues are shuffled; one belongs to the minibatch in which its last turn falls, so that a minibatch has
    about `minibatch_turns` turns. All processes draw the same minibatches from the dialogues of all.
    """
    own = {turns[dialogue[0]].number: dialogue for dialogue in group_dialogues(turns)}     # by their first turn's number
    everyones = running.gather([[number, len(dialogue)] for number, dialogue in own.items()])
    numbers, lengths = np.array(sorted(pair for part in everyones for pair in part)).T
    for epoch in running.progress(range(config.epochs), nested=True, desc="update"):
        order = np.random.default_rng((SHUFFLES, config.seed, update, epoch)).permutation(len(numbers))
        ends = np.cumsum(lengths[order])                                            # turns up to the end of each
        for start in range(0, lengths.sum(), config.minibatch_turns):
            chosen = order[(start < ends) & (ends <= start + config.minibatch_turns)]
            yield epoch, start, int(lengths[chosen].sum()), [own[number] for number in numbers[chosen] if number in own]


# ---- Scores and update -------------------------------------------------------------------------------------

def turn_logprobs(policy, turns, dialogues: list[list[int]], config):
    """Weighted log-prob of each reply (B,) and value of each prompt (B,): the one function of rollout and update.

    `dialogues` are lists of turn indices; B runs over them in that order.
    """
    flat = [turns[i] for dialogue in dialogues for i in dialogue]
    samples = [[(turns[i].prompt_ids, turns[i].response_ids) for i in dialogue] for dialogue in dialogues]
    batch = collate(samples, policy.device, [turns[dialogue[-1]].picture for dialogue in dialogues])
    logprobs, values = policy(batch, config.temperature)                            # (B, R), (B,)
    starts = torch.tensor([turn.answer_start for turn in flat], device=policy.device)
    is_thought = torch.arange(logprobs.shape[1], device=policy.device) < starts[:, None]
    return (logprobs * torch.where(is_thought, config.thought_coef, 1.0)).sum(1), values


@running.memory_advice("--micro-batch-tokens or set --gradient-checkpointing")
@torch.no_grad()
def score_turns(policy, turns, config):
    """`turn_logprobs` of all turns without a gradient: old_logprobs (N,) and values (N,)."""
    logprobs, values = torch.zeros(len(turns)), torch.zeros(len(turns))
    for group, _ in turn_batches(policy, turns, group_dialogues(turns), config):
        rows = [i for dialogue in group for i in dialogue]
        micro_logprobs, micro_values = turn_logprobs(policy, turns, group, config)
        logprobs[rows], values[rows] = micro_logprobs.cpu(), micro_values.cpu()
    return logprobs, values


def estimate_advantages(turns, values, next_values, config):
    """`compute_gae` on a rollout's turns: advantages and returns, one for each."""
    shape = config.turns_per_env, -1
    rewards = torch.tensor([turn.reward for turn in turns]).view(shape)             # (S, E)
    dones = torch.tensor([float(turn.done) for turn in turns]).view(shape)          # (S, E)
    advantages, returns = compute_gae(rewards, values.view(shape), dones, next_values, config.gamma, config.gae_lambda)
    return advantages.flatten(), returns.flatten()


@running.memory_advice("--micro-batch-tokens or set --gradient-checkpointing")
def ppo_update(policy, optimizer, turns, old_logprobs, old_values, advantages, returns, update, config):
    """`epochs` passes over the N turns in shuffled minibatches, one optimizer step each; returns the stats to log.

    The loss of a minibatch is the mean over its turns, those of other processes included: how many there are changes
    nothing. Policy loss and value loss both train the trunk that they share.
    """
    mean, variance = mean_and_variance(advantages)
    normalised = (advantages - mean) / (math.sqrt(variance) + 1e-8)
    columns = torch.stack([old_logprobs, old_values, normalised, returns]).to(policy.device)   # (4, own turns)
    filler, sums, grad_norms, first_ratios = [group_dialogues(turns)[0]], Counter(), [], []
    for epoch, start, num_turns, dialogues in minibatches(turns, update, config):
        fault = None
        for group, weight in turn_batches(policy, turns, dialogues, config, filler):
            rows = [i for dialogue in group for i in dialogue]
            logprobs, values = turn_logprobs(policy, turns, group, config)
            old_logprob, old_value, advantage, target = columns[:, rows]            # (B,) each
            policy_loss, value_loss, watched = ppo_loss(logprobs, old_logprob, values, old_value, advantage, target,
                                                        config.clip, config.value_clip)
            loss = weight * (policy_loss + config.value_coef * value_loss).sum() / num_turns
            if not torch.isfinite(loss):                                            # all stop at the norm they share
                fault = f"turns {[turns[i].number for i in rows[:8]]}...: loss {loss}"
            (loss * running.WORLD).backward()                                       # averaged over processes
            if weight:
                first_ratios += [] if grad_norms else watched["ratio"].tolist()
                for name, value in {"policy_loss": policy_loss, "value_loss": value_loss, **watched}.items():
                    sums[name] += float(value.detach().sum())
        grad_norms.append(running.clip_gradients(policy.parameters(), config.max_grad_norm))
        if not math.isfinite(grad_norms[-1]):                                       # then it is so in every process
            faults = [text for text in running.gather(fault) if text] or [f"grad_norm {grad_norms[-1]}"]
            raise FloatingPointError(f"epoch {epoch}, minibatch from turn {start}, {faults[0]}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    num_seen = config.epochs * running.total(len(turns))
    stats = {name: running.total(value) / num_seen for name, value in sorted(sums.items())}
    first_ratios = [ratio for part in running.gather(first_ratios) for ratio in part]
    residual = mean_and_variance(returns - old_values)[1] / (mean_and_variance(returns)[1] + 1e-8)
    return {**stats, "ratio_max_first": max(first_ratios), "ratio_min_first": min(first_ratios),
            "grad_norm": sum(grad_norms) / len(grad_norms), "optimizer_steps": len(grad_norms),
            "explained_variance": 1 - residual}


# ---- What is logged ----------------------------------------------------------------------------------------

def rollout_stats(turns, eos_id):
    """Counts and means over one rollout.

    `success` is over the episodes that ended in it. Short ones end first, so it is biased while a rollout is shorter
    than an episode (GeneralPoints: too high, at first 1; V-IRL: too low): `step_accuracy`, over all replies, is not.
    """
    own = [turn.info | {"reward": turn.reward, "done": turn.done, "length": len(turn.response_ids),
                        "cut": turn.response_ids[-1] != eos_id} for turn in turns]
    rows = [row for part in running.gather(own) for row in part]
    ended = [row for row in rows if row["done"]]
    statuses = Counter(row["status"] for row in rows)
    kinds = Counter(row["kind"] for row in rows)
    correct = Counter(row["kind"] for row in rows if row["status"] == "correct")
    return {"turns": len(rows), "episodes": len(ended),
            "success": sum(row["success"] for row in ended) / max(1, len(ended)),
            "step_accuracy": statuses["correct"] / len(rows),
            "reward": math.fsum(row["reward"] for row in rows) / len(rows),
            **({"cards_read": sum(row["cards_read"] for row in rows) / len(rows)} if "cards_read" in rows[0] else {}),
            **{f"step_accuracy_{kind}": correct[kind] / kinds[kind] for kind in sorted(kinds)},
            **{f"status_{status}": statuses[status] for status in sorted(statuses)},
            "replies_cut": sum(row["cut"] for row in rows),
            "response_length": sum(row["length"] for row in rows) / len(rows)}


def advance(policy, state, turns, upcoming, conversations, config, seconds):
    """The state after an update: its number, the tokens spent so far, and where each environment stands.

    In sampling a prompt counts from where it leaves what its environment said last (what --kept-gib has no room for is read
    again, and not counted again); a picture is looked at once in its dialogue.
    """
    dialogues = group_dialogues(turns)
    dialogue_tokens = sum(dialogue_length(policy, turns, dialogue) for dialogue in dialogues)
    sampled, last = policy.picture_tokens * sum(turns[dialogue[-1]].picture is not None for dialogue in dialogues), {}
    for turn in turns:
        known, picture = last.get(turn.dialogue_key[0], ([], None))
        same = os.path.commonprefix([known, turn.prompt_ids]) if picture is turn.picture else []
        last[turn.dialogue_key[0]] = turn.prompt_ids + turn.response_ids, turn.picture
        sampled += len(turn.prompt_ids) - len(same) + len(turn.response_ids)
    scored = dialogue_tokens + sum(dialogue_length(policy, upcoming, [i]) for i in range(len(upcoming)))
    standing = running.gather([[conversation.index, conversation.episode, conversation.replies]
                               for conversation in conversations])
    return {"step": state["step"] + 1,
            "tokens_trained": state["tokens_trained"] + config.epochs * running.total(dialogue_tokens),
            "tokens_rollout": state["tokens_rollout"] + running.total(sampled + scored),
            "conversations": [own[1:] for own in sorted(own for part in standing for own in part)],
            "seconds": state["seconds"] + seconds}


# ---- The run -----------------------------------------------------------------------------------------------

def make_environments(config):
    """This process's part of the environments; ValueError names settings that do not fit each other."""
    if not config.out or not config.model:
        raise ValueError("--out and --model are required; --model is a folder, such as a checkpoint of sft.py")
    num_turns = config.num_envs * config.turns_per_env
    if num_turns % config.minibatch_turns:
        raise ValueError(f"--minibatch-turns {config.minibatch_turns}: must divide the {num_turns} turns of an update "
                         f"({config.num_envs} environments x {config.turns_per_env})")
    if config.num_envs % running.WORLD:
        raise ValueError(f"--num-envs {config.num_envs}: must be a multiple of the number of processes, {running.WORLD}")
    split, *more = settings.read_splits(config.split)
    if more:
        raise ValueError(f"--split {' '.join(config.split)}: one split only, not {more[0].name} as well")
    common = settings.read_settings(config.env)
    environments = [envs.make_env(config.task, split.name, common, **split.settings)
                    for _ in running.own_part(range(config.num_envs))]
    if config.minibatch_turns < (tries := environments[0].verify_iter):
        raise ValueError(f"--minibatch-turns {config.minibatch_turns}: must be at least verify_iter, {tries}, since a "
                         "dialogue is never cut")
    return environments


def set_up(config):
    """All that a run needs, new or from its newest checkpoint; ValueError says what is wrong, before anything is
    written."""
    device, environments = running.start_processes(config.device), make_environments(config)
    config = replace(config, dtype=running.pick_dtype(config.dtype, device, config.out))
    newest = run_folder.newest_checkpoint(config)
    torch.manual_seed(config.seed)
    load = partial(load_policy, str(newest or config.model), config.dtype, vision=environments[0].vision,
                   freeze=config.freeze, gradient_checkpointing=config.gradient_checkpointing,
                   param_dtype=config.param_dtype)
    with run_folder.damage_advice(newest):
        policy, processor = running.load_spread(load, device)
    optimizer = torch.optim.Adam([{"params": policy.backbone.parameters()}, {"params": policy.value_head.parameters()}],
                                 lr=config.lr, eps=1e-7)
    state = {"step": 0, "tokens_trained": 0, "tokens_rollout": 0, "seconds": 0.0,
             "conversations": [[0, []]] * config.num_envs}
    state = run_folder.load_resume(newest, policy, optimizer, state) if newest else state
    conversations = [Conversation(i, env, processor, config, *state["conversations"][i])
                     for i, env in zip(running.own_part(range(config.num_envs)), environments)]
    run_folder.open_run(config, newest)
    return config, policy, processor, optimizer, state, conversations


def set_learning_rates(optimizer, update, config):
    """Of the backbone, which warms up, and of the value head, which does not; returns the first. Both follow one cosine
    (the value head's ends as far below its peak as --lr-final is below --lr)."""
    share = running.learning_rate(update, config.lr_horizon, config.lr, final=config.lr_final) / config.lr
    lr = share * config.lr * min(1, (update + 1) / (config.lr_warmup + 1))
    for group, group_lr in zip(optimizer.param_groups, (lr, share * (config.value_lr or config.lr))):
        group["lr"] = group_lr
    return lr


def main(config):
    with running.one_line_errors():
        config, policy, processor, optimizer, state, conversations = set_up(config)
    running.say_memory(policy, config)
    task, stop, out = envs.TASKS[config.task], running.StopSignal(), Path(config.out)
    # differs 14: a folder for any tool, with all that is needed to go on; theirs saves the base model alone
    save = partial(run_folder.ensure_checkpoint, out, policy=policy, processor=processor, optimizer=optimizer,
                   keep_resume=config.keep_resume)
    bar = running.progress(range(state["step"], config.updates), initial=state["step"], total=config.updates, desc="rl")
    for update in bar:
        with running.one_line_errors(f"update {update + 1}"):
            lr, began = set_learning_rates(optimizer, update, config), time.time()
            turns = collect_turns(policy, processor, conversations, update, config, stop)
            if turns is None:                                       # the rollout is dropped, `state` is from before it
                stop.leave(save(update, state=state))
            collected = time.time()
            # the prompts that come next, as turns without a reply: only their values are used
            # differs 10: nothing is generated for the bootstrap
            upcoming = [Turn(conversation.prompt_ids, [], 0, 0.0, False, (conversation.index,), {},
                             conversation.picture) for conversation in conversations]
            old_logprobs, values = score_turns(policy, turns, config)               # one for each turn
            _, next_values = score_turns(policy, upcoming, config)                  # one for each environment
            advantages, returns = estimate_advantages(turns, values, next_values, config)
            stats = ppo_update(policy, optimizer, turns, old_logprobs, values, advantages, returns, update, config)
        updated = time.time()
        state = advance(policy, state, turns, upcoming, conversations, config, updated - began)
        rollout = rollout_stats(turns, policy.eos_id)
        running.log_jsonl(out / "metrics.jsonl", step=update + 1, lr=lr, **rollout, **stats,
                          value=mean_and_variance(values)[0], tokens_trained=state["tokens_trained"],
                          tokens_rollout=state["tokens_rollout"],
                          gflops=policy.gflops(state["tokens_trained"], state["tokens_rollout"]),
                          # the paper's estimate: a rollout of lambda tokens for each that is trained
                          gflops_paper=policy.gflops(state["tokens_trained"],
                                                     task.paper_lambda * state["tokens_trained"]),
                          seconds=state["seconds"], seconds_rollout=collected - began, seconds_update=updated - collected)
        bar.set_postfix(correct=f"{rollout['step_accuracy']:.2f}", reward=f"{rollout['reward']:.2f}", refresh=False)
        stopping = stop.requested
        if (update + 1) % config.save_every == 0 or update + 1 == config.updates or stopping:
            saved = save(update + 1, state=state)
        if stopping:
            stop.leave(saved)
    running.say_finished(out)


if __name__ == "__main__":
    running.run(main, Config)
