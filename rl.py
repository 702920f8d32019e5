"""Reinforcement learning: PPO with a value head over several turns (paper Sections 3 and 5).

    collect_turns -> draw_minibatches -> score_turns -> estimate_advantages -> ppo_update

The unit of everything here is a turn: one prompt, one reply and one verdict. A turn has one reward,
one advantage and one value, read at the last prompt token. It has one log-prob and so one PPO
ratio. The log-prob is a weighted sum over the reply's tokens: those before the answer weigh
`thought_coef`, the others 1. The prompt of a second try holds the first try and its verdict.

    python rl.py --task gp-l --model runs/sft/step_000400 --out runs/rl
    python rl.py --task gp-vl --model PATH --out runs/red --split id suits=HD --env verify_iter=10

The same command continues a stopped run, half-played episodes included. On Ctrl-C or SIGTERM a run
drops its rollout or finishes its update, saves, and exits with 130 or 143.

Left out: a KL penalty and an entropy bonus (the paper has neither), and token-level advantages.

    E   environments                             B   turns of a micro-batch
    S   turns of an environment in an update     R   tokens of a micro-batch's longest reply
    N   turns of an update, S x E

Under torchrun every process plays a part of the environments and trains on its turns. Deals,
samples and minibatches do not depend on the number of processes; weights differ by rounding alone.
A comment `# differs N` marks a difference from the official code: item N of docs/differences.md.
"""
if __name__ == "__main__":
    from support import startup
    startup.begin(__file__)     # Ctrl-C and a mistyped flag are answered before torch is imported

import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import envs
from model import (SAMPLES, SHUFFLES, RolloutMemory, aligned_micro_batches, collate, decode_reply,
                   encode, load_policy, picture_of, sampling_uniforms)
from support import running, settings, training
from support.chat import read_text
from support.running import flag

# ---- The maths -----------------------------------------------------------------------------------

def compute_gae(rewards, values, dones, next_values, gamma, gae_lambda):
    """Generalised advantage estimates A and returns R over turns, both (S, E).

        delta_s = r_s + gamma V_{s+1} - V_s
        A_s = delta_s + gamma lambda A_{s+1}
        R_s = A_s + V_s

    Where an episode is done after turn s, V and A of turn s+1 count as 0: nothing passes its end.
    After the last turn V is `next_values` (E,), read at the prompts that come next, and A is 0.
    rewards, values and dones are (S, E).
    """
    advantages = torch.zeros_like(rewards)
    next_advantages = torch.zeros_like(next_values)
    for s in reversed(range(len(rewards))):
        going = 1.0 - dones[s]     # differs 5: 0 if truncated, too; the official code has 1 there
        delta = rewards[s] + gamma * next_values * going - values[s]
        next_advantages = delta + gamma * gae_lambda * going * next_advantages
        advantages[s] = next_advantages
        next_values = values[s]
    return advantages, advantages + values


def ppo_loss(logprobs, old_logprobs, values, old_values, advantages, returns, clip, value_clip=0.0):
    """The policy loss, the value loss and a dict to log. All tensors are (B,); the caller averages.

        ratio = exp(logp - old_logp)
        policy loss = -min(ratio A, clip(ratio, 1 - c, 1 + c) A), where c is `clip`
        value loss = 0.5 (V - R)^2

    As in the official code, a ratio above 10 counts as 10 and has no gradient.
    """
    log_ratio = (logprobs - old_logprobs).clamp(max=math.log(10))
    ratio = log_ratio.exp()
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    value_loss = 0.5 * (values - returns) ** 2
    # differs 11: no value clip by default; the official code keeps V within 0.1 of old_values
    if value_clip:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        value_loss = torch.max(value_loss, 0.5 * (clipped - returns) ** 2)
    watched = {"policy_loss": policy_loss, "value_loss": value_loss, "ratio": ratio,
               "approx_kl": ratio - 1 - log_ratio,       # its mean estimates KL(old || new)
               "clip_fraction": ((ratio - 1).abs() > clip).float()}
    return policy_loss, value_loss, {name: value.detach() for name, value in watched.items()}


# ---- Settings ------------------------------------------------------------------------------------

@dataclass
class Config(training.RunConfig):
    """The official defaults (scripts/gp_training, rl/configs), unless a remark says otherwise."""
    out: str = flag("", "run folder, new or stopped half-way")
    model: str = flag("", "a model folder, usually one that sft.py wrote")
    task: str = flag("gp-l", "which environment", choices=tuple(envs.TASKS))
    split: tuple = flag(("id",), "the rule to train on, with settings: id rule=11,11,11 fold=train")
    env: tuple = flag((), "settings of the environment, such as: root=city0 (envs.py lists them)")
    # rollout; differs 26: 256 environments x 8 turns; the official code has 8 x 256
    num_envs: int = flag(256, "environments played side by side", low=1)
    turns_per_env: int = flag(8, "turns of each in an update (2048 in all, as officially)", low=1)
    max_new_tokens: int = flag(512, "a reply is cut after so many tokens", low=1)
    temperature: float = flag(0.2, "temperature of sampling and of the log-probs", low=0.01)
    # PPO; the paper prints no values
    updates: int = flag(20, "rollouts, each with an update after it; more lengthen a run", low=1)
    epochs: int = flag(4, "passes over a rollout", low=1)
    minibatch_turns: int = flag(1024, "turns per optimizer step, roughly (128 x 8 GPUs)", low=1)
    lr: float = flag(1e-6, "Adam learning rate", low=1e-12)
    value_lr: float = flag(0.0, "learning rate of the value head; 0: the same as --lr", low=0)
    lr_warmup: int = flag(0, "updates in which --lr warms up; --value-lr does not", low=0)
    lr_final: float = flag(1e-9, "--lr after its cosine; --value-lr falls in proportion", low=0)
    lr_horizon: int = flag(100, "updates until --lr-final is reached; may exceed --updates", low=1)
    gamma: float = flag(0.9, "discount per turn", low=0, high=1)
    gae_lambda: float = flag(0.95, "GAE lambda", low=0, high=1)
    clip: float = flag(0.1, "PPO ratio clip", low=0)
    value_clip: float = flag(0.0, "clip of a value's change; 0: no clip (official: 0.1)", low=0)
    value_coef: float = flag(0.5, "weight of the value loss", low=0)
    thought_coef: float = flag(0.5, "weight of the log-probs before the answer key", low=0)
    freeze: str = flag("", "parts of a vision model that are not trained: vision, projector")
    max_grad_norm: float = flag(1.0, "gradient norm limit (official: 0.01, no effect)", low=1e-12)
    # running
    generate_tokens: int = flag(65536, "tokens sampled at once, with prompts and padding", low=1)
    kept_gib: float = flag(4.0, "GiB of keys and values kept from turn to turn of a rollout", low=0)
    save_every: int = flag(1, "updates between checkpoints", low=1)


# ---- Rollout -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Turn:
    """One prompt, one reply and its reward."""
    prompt_ids: list[int]     # (P,)
    response_ids: list[int]   # (R,)
    answer_start: int         # the index of the answer's first token; those before are thought
    reward: float
    done: bool                # terminated or truncated: GAE stops here
    dialogue_key: tuple       # (environment, episode, dialogue in it), shared by all its turns
    info: dict
    picture: object = None    # the PIL picture of the dialogue
    number: int = 0           # its place among the turns of all processes
    sampled_logprob: float = 0.0     # the turn's log-prob as computed in sampling; for logs alone


class Conversation:
    """One environment and its dialogue as ids. A checkpoint holds the episode's number and its
    replies, to play them again. `readable` is the last reply's dialogue, for turns.jsonl."""

    def __init__(self, index, env, processor, config, episode=0, replies=()):
        self.index, self.env, self.processor = index, env, processor
        self.seed, self.num_envs = config.seed, config.num_envs
        self.begin(episode)
        for response_ids in replies:
            self.play(response_ids)

    def begin(self, episode):
        self.episode, self.replies, self.dialogue_number = episode, [], 0
        # Routes that are played in order are shared out over the environments by this number.
        number = episode * self.num_envs + self.index
        messages, _ = self.env.reset(f"{self.seed}/rl/{self.index}/{episode}", number)
        self.continue_with(messages, None)

    def continue_with(self, messages, prior_ids):
        """Encode the next prompt, which continues `prior_ids`; None: it begins a new dialogue."""
        if prior_ids is None:
            self.dialogue_number += 1
            self.verdicts = []
        self.prompt_ids = encode(self.processor, messages, prior_ids)
        self.picture = picture_of(messages)

    def play(self, response_ids):
        """Give a reply to the environment and move to the next prompt: (reward, done, info)."""
        reply = decode_reply(self.processor, response_ids)
        answered = [*self.env.messages, {"role": "assistant", "content": reply}]
        messages, reward, terminated, truncated, info = self.env.step(reply)
        done = terminated or truncated
        self.verdicts = [*self.verdicts, [info["status"], reward]]
        # After a correct reply `messages` may already be the next position's dialogue. Then the log
        # shows the old dialogue, with this reply at its end.
        dialogue = answered if info["new_dialogue"] else messages
        texts = [message | {"content": read_text(message)} for message in dialogue]
        self.readable = {"env": self.index, "episode": self.episode, "verdicts": self.verdicts,
                         "messages": texts}
        if done:
            self.begin(self.episode + 1)
        else:
            # Not append(): main's `state` holds the old list, to save it if a rollout is dropped.
            self.replies = self.replies + [response_ids]
            prior_ids = None if info["new_dialogue"] else self.prompt_ids + response_ids
            self.continue_with(messages, prior_ids)
        return reward, done, info

    def next_turn(self) -> Turn:
        """The turn that comes next, still without a reply."""
        key = self.index, self.episode, self.dialogue_number
        return Turn(self.prompt_ids, response_ids=[], answer_start=0, reward=0.0, done=False,
                    dialogue_key=key, info={}, picture=self.picture)


def find_answer(processor, response_ids, answer_at):
    """The index of the first token that makes the reply's text longer than `answer_at` characters,
    or len(response_ids) if none does."""
    # differs 7: where the verifier read the answer; the official code looks for fixed token ids
    low, high = 0, len(response_ids)
    # A binary search. A character that is cut in half ("\ufffd") does not count yet.
    while low < high:
        middle = (low + high) // 2
        text = decode_reply(processor, response_ids[:middle + 1])
        if len(text.rstrip("\ufffd")) > answer_at:
            high = middle
        else:
            low = middle + 1
    return low


@running.memory_advice("--generate-tokens or --kept-gib")
def collect_turns(policy, processor, conversations, update, config, stop) -> list[Turn] | None:
    """Sample turn 1 of every conversation, then turn 2, up to S. None if a stop was asked for."""
    turns = []
    # Keys and values hold only for the present weights, so each rollout has a memory of its own.
    memory = RolloutMemory(policy, config.generate_tokens, config.kept_gib * 2 ** 30)
    for s in running.progress(range(config.turns_per_env), nested=True, desc="rollout"):
        if stop.requested:
            return None
        # One reply to every environment is sampled, each from random numbers of its own.
        unanswered = [conversation.next_turn() for conversation in conversations]
        keys = [(SAMPLES, config.seed, update, each.index, s) for each in conversations]
        uniforms = sampling_uniforms(keys, config.max_new_tokens)
        replies = policy.generate([turn.prompt_ids for turn in unanswered], uniforms,
                                  config.max_new_tokens, config.temperature, config.generate_tokens,
                                  [turn.picture for turn in unanswered], memory)
        # Each environment judges its reply and says what comes next.
        for conversation, turn, (response_ids, logprobs) in zip(conversations, unanswered, replies):
            reward, done, info = conversation.play(response_ids)
            answer_start = find_answer(processor, response_ids, info["answer_at"])
            thought_logprob = config.thought_coef * sum(logprobs[:answer_start])
            answer_logprob = sum(logprobs[answer_start:])
            turns.append(replace(turn, response_ids=response_ids, answer_start=answer_start,
                                 reward=reward, done=done, info=info,
                                 number=s * config.num_envs + conversation.index,
                                 sampled_logprob=thought_logprob + answer_logprob))
            # Two environments log each dialogue at its last turn here: this shows reward hacking.
            is_last = done or info["new_dialogue"] or s == config.turns_per_env - 1
            if conversation in conversations[:2] and is_last:
                row = {**info, **conversation.readable, "step": update + 1, "done": done}
                running.log_jsonl(Path(config.out) / "turns.jsonl", **row)
    return turns


# ---- From turns to batches -----------------------------------------------------------------------

def group_dialogues(turns: list[Turn]) -> list[list[int]]:
    """The indices of the turns, a list for each dialogue. Dialogues that began earlier come first.

    Say E = 2 and S = 3. The first environment, whose turns are 0, 2 and 4, needs two tries for a
    hand and one for the next. The second, with turns 1, 3 and 5, fails three times. This returns
    [[0, 2], [1, 3, 5], [4]].
    """
    dialogues = {}
    for index, turn in enumerate(turns):
        dialogues.setdefault(turn.dialogue_key, []).append(index)
    return list(dialogues.values())


def dialogue_length(policy, turns, dialogue):
    """Tokens of one pass over a dialogue: its last turn holds the earlier ones."""
    last = turns[dialogue[-1]]
    return policy.num_tokens(last.prompt_ids, last.response_ids, last.picture)


def turn_batches(policy, turns, dialogues, config, filler=None):
    """Micro-batches of whole dialogues: a list of (dialogues, weight).

    The turns of a dialogue share a row; long rows come first. If two rows fit, the example of
    `group_dialogues` gives [([[1, 3, 5], [0, 2]], 1.0), ([[4]], 1.0)]. All processes make equally
    many passes. A process with fewer repeats its last, or `filler` if it has none, with weight 0.
    """
    lengths = [dialogue_length(policy, turns, dialogue) for dialogue in dialogues]
    batches = []
    for group in aligned_micro_batches(lengths, config.micro_batch_tokens):
        batches.append([dialogues[i] for i in group])
    return running.pad_batches(batches, filler)


class Minibatch(NamedTuple):
    """The turns of one optimizer step."""
    name: str            # "minibatch from turn 1024", for the message of an error
    num_turns: int       # of all processes together
    groups: list         # this process's micro-batches, as `turn_batches` returns them


def draw_minibatches(policy, turns, update, config) -> list[Minibatch]:
    """The minibatches of an update. They are drawn and cut into micro-batches once.

    How a row's log-prob is rounded depends on the rows beside it; in bfloat16 this may exceed the
    clip. So scoring and all epochs see the same rows together. An epoch only reorders minibatches.

    Whole dialogues are shuffled and laid end to end. A dialogue belongs to the minibatch in which
    its last turn falls. With minibatch_turns = 4 and dialogues a to d of 2, 1, 3 and 2 turns:

        turns        a a b c | c c d d
        ends             2 3       6 8
        minibatches  a, b    | c, d         of 3 and 5 turns

    All processes draw the same minibatches from the dialogues of all.
    """
    # differs 28: whole dialogues of all processes; the official code shuffles turns in each process
    # A dialogue is known by the number of its first turn, which is the same in all processes.
    own = {turns[dialogue[0]].number: dialogue for dialogue in group_dialogues(turns)}
    all_dialogues = []
    for part in running.gather([[number, len(dialogue)] for number, dialogue in own.items()]):
        all_dialogues += part
    numbers, lengths = np.array(sorted(all_dialogues)).T
    order = np.random.default_rng((SHUFFLES, config.seed, update, 0)).permutation(len(numbers))
    ends = np.cumsum(lengths[order])
    # A process without a dialogue in a minibatch computes this one in its place, with weight 0.
    filler = [group_dialogues(turns)[0]]
    minibatches = []
    for start in range(0, lengths.sum(), config.minibatch_turns):
        chosen = order[(start < ends) & (ends <= start + config.minibatch_turns)]
        dialogues = [own[number] for number in numbers[chosen] if number in own]
        groups = turn_batches(policy, turns, dialogues, config, filler)
        num_turns = int(lengths[chosen].sum())
        minibatches.append(Minibatch(f"minibatch from turn {start}", num_turns, groups))
    return minibatches


# ---- Scores and update ---------------------------------------------------------------------------

def turn_logprobs(policy, turns, dialogues: list[list[int]], config):
    """The weighted log-prob of each reply (B,) and the value of each prompt (B,).

    Scores and updates both use this. `dialogues` are lists of turn indices; B is in their order.
    """
    samples, pictures, starts = [], [], []
    for dialogue in dialogues:
        samples.append([(turns[i].prompt_ids, turns[i].response_ids) for i in dialogue])
        pictures.append(turns[dialogue[-1]].picture)
        starts += [turns[i].answer_start for i in dialogue]
    batch = collate(samples, policy.device, pictures)
    logprobs, values = policy(batch, config.temperature)                       # (B, R), (B,)
    starts = torch.tensor(starts, device=policy.device)                        # (B,)
    is_thought = torch.arange(logprobs.shape[1], device=policy.device) < starts[:, None]   # (B, R)
    weights = torch.where(is_thought, config.thought_coef, 1.0)                # (B, R)
    return (logprobs * weights).sum(1), values


@running.memory_advice("--micro-batch-tokens or set --gradient-checkpointing")
@torch.no_grad()
def score_turns(policy, turns, groups, config):
    """`turn_logprobs` of all turns without a gradient: old_logprobs (N,) and values (N,). `groups`
    are micro-batches from `turn_batches`."""
    logprobs, values = torch.zeros(len(turns)), torch.zeros(len(turns))
    for group, weight in groups:
        micro_logprobs, micro_values = turn_logprobs(policy, turns, group, config)
        if weight:         # a pass of weight 0 is made for the other processes' sake
            indices = [i for dialogue in group for i in dialogue]
            logprobs[indices], values[indices] = micro_logprobs.cpu(), micro_values.cpu()
    return logprobs, values


def estimate_advantages(turns, values, next_values, config):
    """`compute_gae` on the turns of a rollout: advantages (N,) and returns (N,).

    `next_values` (E,) are the values of the prompts that come next.
    """
    shape = config.turns_per_env, -1     # turns come round by round, so a view gives (S, E)
    rewards = torch.tensor([turn.reward for turn in turns]).view(shape)        # (S, E)
    dones = torch.tensor([float(turn.done) for turn in turns]).view(shape)     # (S, E)
    advantages, returns = compute_gae(rewards, values.view(shape), dones, next_values,
                                      config.gamma, config.gae_lambda)
    return advantages.flatten(), returns.flatten()


def epoch_steps(minibatches, update, config):
    """A pair for every optimizer step of an update: a name for error messages, the minibatch."""
    steps = []
    for epoch in range(config.epochs):
        rng = np.random.default_rng((SHUFFLES, config.seed, update, epoch))
        # The first epoch keeps the order of the minibatches: they were drawn at random.
        order = rng.permutation(len(minibatches)) if epoch else range(len(minibatches))
        steps += [(f"epoch {epoch}, {minibatches[i].name}", minibatches[i]) for i in order]
    return steps


@running.memory_advice("--micro-batch-tokens or set --gradient-checkpointing")
def ppo_update(policy, optimizer, turns, minibatches, old_logprobs, old_values, advantages, returns,
               update, config):
    """`epochs` passes over the N turns, one optimizer step per minibatch; returns stats to log.

    The loss of a minibatch is the mean over its turns, those of other processes included. Policy
    loss and value loss both train the trunk that they share.
    """
    # Advantages get mean 0 and variance 1 over the turns of all processes.
    # differs 27: the official code does so in each process for itself
    mean, variance = running.mean_and_variance(advantages)
    normalised = (advantages - mean) / (math.sqrt(variance) + 1e-8)
    table = torch.stack([old_logprobs, old_values, normalised, returns]).to(policy.device)  # (4, N)
    sums, grad_norms, first_ratios = Counter(), [], []
    steps = epoch_steps(minibatches, update, config)
    for where, minibatch in running.progress(steps, nested=True, desc="update"):
        # The gradient of a minibatch is summed over micro-batches.
        fault = None
        for group, weight in minibatch.groups:
            indices = [i for dialogue in group for i in dialogue]
            logprobs, values = turn_logprobs(policy, turns, group, config)
            old_logprob, old_value, advantage, return_ = table[:, indices]     # (B,) each
            policy_loss, value_loss, watched = ppo_loss(
                logprobs, old_logprob, values, old_value, advantage, return_, config.clip,
                config.value_clip)
            loss = weight * (policy_loss + config.value_coef * value_loss).sum()
            loss = loss / minibatch.num_turns
            # A loss that is not finite is noted, not raised: other processes wait for this one. The
            # norm below is over all processes. So it is not finite, either, and all stop there.
            if not torch.isfinite(loss):
                fault = f"turns {[turns[i].number for i in indices[:8]]}...: loss {loss}"
            # `num_turns` is of all processes, so gradients should be summed over processes. FSDP2
            # averages them. The factor WORLD, the number of processes, makes that the sum.
            (loss * running.WORLD).backward()
            # Before the first optimizer step nothing has changed, so these ratios should be 1.
            if weight and not grad_norms:
                first_ratios += watched["ratio"].tolist()
            if weight:
                for name, value in watched.items():
                    sums[name] += float(value.sum())
        # One optimizer step, unless the gradients' norm is not finite.
        grad_norms.append(running.clip_gradients(policy.parameters(), config.max_grad_norm))
        if not math.isfinite(grad_norms[-1]):
            faults = [text for text in running.gather(fault) if text]
            faults.append(f"grad_norm {grad_norms[-1]}")
            raise FloatingPointError(f"{where}, {faults[0]}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    sampled_logprobs = torch.tensor([turn.sampled_logprob for turn in turns])              # (N,)
    return training.update_stats(sums, first_ratios, grad_norms, old_logprobs - sampled_logprobs,
                                 returns - old_values, returns, config.epochs)


def count_compute(policy, turns, upcoming, config):
    """(tokens_trained, tokens_rollout) of an update, all processes together.

        tokens_trained = epochs x tokens of the dialogues
        tokens_rollout = new prompt tokens read + reply tokens sampled + tokens scored

    A prompt token is new if it did not stand in the environment's turn before. `upcoming` are the
    turns after the rollout, prompts without replies. Scoring reads each dialogue and each of these
    prompts once. `model.Policy.gflops` turns both counts into GFLOPs.
    """
    dialogues = group_dialogues(turns)
    trained = sum(dialogue_length(policy, turns, dialogue) for dialogue in dialogues)
    scored = trained + sum(dialogue_length(policy, upcoming, [i]) for i in range(len(upcoming)))
    rollout = training.count_read_and_sampled(policy, turns, dialogues) + scored
    return config.epochs * running.total(trained), running.total(rollout)


# ---- The run -------------------------------------------------------------------------------------

def set_up(config):
    """(run, conversations); ValueError says what is wrong, before anything is written."""
    device = running.start_processes(config.device)
    split = training.check_rl(config)
    common = settings.read_settings(config.env)
    # This process plays its part of the environments.
    numbers = running.local_part(range(config.num_envs))
    environments = [envs.make_env(config.task, split.name, common, **split.settings)
                    for _ in numbers]
    training.check_minibatch(config, environments[0].verify_iter)   # holds a dialogue
    run = training.Run(config, device, load_policy, environments[0].vision, environments[:1])
    # Two groups, since `set_learning_rates` gives trunk and value head rates of their own.
    groups = [{"params": run.policy.backbone.parameters()},
              {"params": run.policy.value_head.parameters()}]
    run.resume(torch.optim.Adam(groups, lr=config.lr, eps=1e-7),
               {"step": 0, "tokens_trained": 0, "tokens_rollout": 0, "seconds": 0.0,
                "conversations": [[0, []]] * config.num_envs})
    # Each environment goes on where the state says that it stood.
    conversations = []
    for i, env in zip(numbers, environments):
        episode, replies = run.state["conversations"][i]
        conversations.append(Conversation(i, env, run.processor, run.config, episode, replies))
    run.open()
    return run, conversations


def set_learning_rates(optimizer, update, config):
    """Set the rates of trunk and value head for an update (from 0); returns the trunk's.

        share = a cosine from 1 to lr_final / lr over lr_horizon updates
        trunk: share x lr x min(1, (update + 1) / (lr_warmup + 1))      value head: share x value_lr
    """
    # differs 29: one step of the cosine an update; the official code takes one for each process
    rate = running.learning_rate(update, config.lr_horizon, config.lr, final=config.lr_final)
    share = rate / config.lr
    lr = share * config.lr * min(1, (update + 1) / (config.lr_warmup + 1))
    trunk, value_head = optimizer.param_groups
    trunk["lr"] = lr
    value_head["lr"] = share * (config.value_lr or config.lr)
    return lr


def main(config):
    with running.one_line_errors():
        run, conversations = set_up(config)
    config, policy, state = run.config, run.policy, run.state
    running.print_memory(policy, config)
    stop = running.StopSignal()
    for update in run.steps(config.updates, "rl"):
        began = time.monotonic()
        with running.one_line_errors(f"update {update + 1}", config.out):
            lr = set_learning_rates(run.optimizer, update, config)
            # Play. If a stop comes, the rollout is dropped: `state` is from before it.
            turns = collect_turns(policy, run.processor, conversations, update, config, stop)
            if turns is None:
                stop.leave(run.save(state))
            collected = time.monotonic()
            # Score all replies and prompts with the weights that sampled the replies.
            minibatches = draw_minibatches(policy, turns, update, config)
            groups = [group for minibatch in minibatches for group in minibatch.groups]
            old_logprobs, values = score_turns(policy, turns, groups, config)  # (N,), (N,)
            # differs 10: next values are read at prompts alone; the official code adds a reply
            upcoming = [conversation.next_turn() for conversation in conversations]
            groups = turn_batches(policy, upcoming, group_dialogues(upcoming), config)
            _, next_values = score_turns(policy, upcoming, groups, config)     # (E,)
            # Estimate how much better each reply was than expected, and train on that.
            advantages, returns = estimate_advantages(turns, values, next_values, config)
            stats = ppo_update(policy, run.optimizer, turns, minibatches, old_logprobs, values,
                               advantages, returns, update, config)
            run.check_update(update, stats)
        updated = time.monotonic()
        # Count tokens, which give the compute, and log the update.
        trained, rollout = count_compute(policy, turns, upcoming, config)
        state = {"step": update + 1, "tokens_trained": state["tokens_trained"] + trained,
                 "tokens_rollout": state["tokens_rollout"] + rollout,
                 "conversations": training.where_they_stand(conversations),
                 "seconds": state["seconds"] + (updated - began)}
        tokens = state["tokens_trained"]
        played = training.rollout_stats(turns, policy.eos_id)
        # The paper does not count rollout tokens: it takes lambda (not GAE's) times trained tokens.
        gflops_paper = policy.gflops(tokens, envs.TASKS[config.task].paper_lambda * tokens)
        running.log_jsonl(
            Path(config.out) / "metrics.jsonl", step=update + 1, lr=lr, **played, **stats,
            value=running.mean_and_variance(values)[0], tokens_trained=tokens,
            tokens_rollout=state["tokens_rollout"],
            gflops=policy.gflops(tokens, state["tokens_rollout"]), gflops_paper=gflops_paper,
            seconds=state["seconds"], seconds_rollout=collected - began,
            seconds_update=updated - collected)
        run.show(correct=f"{played['step_accuracy']:.2f}", reward=f"{played['reward']:.2f}")
        # differs 14: value head and optimizer are saved, too; the official code saves neither
        run.save_if_due(state, config.updates, stop)
    running.print_finished(config.out)


if __name__ == "__main__":
    running.run(main, Config)
