"""What sft.py and rl.py share around their method: how a run begins, goes on and is saved.

A stopped run goes on from its newest checkpoint step_K/: weights, value head, optimizer and state.
The state holds the tokens spent and a digest of the --data file. In rl.py it also holds where each
environment stood before the rollout: its episode and the replies so far, which are played again.
Log lines after step K are cut when the run goes on.

This file also refuses options that contradict each other, and computes what rl.py logs of an
update. `load_policy` and the optimizer are handed in, since support/ imports none of the six files.
"""
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import torch

from support import demonstrator, digests, run_folder, running, settings
from support.command_line import check_folders
from support.running import flag, print0

TYPES = ("float32", "bfloat16")


@dataclass
class RunConfig:
    """Options of sft.py and rl.py alike: how a run is executed."""
    micro_batch_tokens: int = flag(16384, "padded tokens of one forward pass in training", low=1)
    gradient_checkpointing: bool = flag(False, "compute activations twice to save memory")
    dtype: str = flag("auto", "type to compute in; auto: bfloat16 on processors made for it",
                      choices=("auto", *TYPES))
    param_dtype: str = flag("float32", "type of the master weights; bfloat16 takes half the memory "
                                       "and loses small updates", choices=TYPES)
    device: str = flag("auto", "cpu, cuda, or auto")
    seed: int = flag(0, "fixes every sample, deal and reply, and a new value head", low=0,
                     high=1_000_000_000_000_000_000)     # torch takes no more than 64 bits
    keep_resume: int = flag(2, "number of checkpoints that keep their optimizer state", low=1)


# ---- A run ---------------------------------------------------------------------------------------

class Run:
    """A run, new or from its newest checkpoint. It begins with three calls in this order:

    Run(...)    chooses the numeric type, finds the checkpoint and loads the weights
    resume      puts the optimizer and the state of the checkpoint back
    open        makes the run folder; nothing is written before this

    ValueError says what is wrong with the settings, the run folder, the model or the checkpoint.
    """

    def __init__(self, config, device, load_policy, vision, environments):
        """`vision`: whether the task needs a model that reads pictures. `environments` are those of
        the run, or one of each kind: their settings name files."""
        dtype = running.pick_dtype(config.dtype, device, config.out)
        self.config = replace(config, dtype=dtype)
        self.data = digests.of_file(getattr(config, "data", ""))
        self.told_of_ratios = self.told_of_values = False
        self.newest = run_folder.newest_checkpoint(self.config)
        # A model without a value head gets a new one, drawn from this seed.
        torch.manual_seed(config.seed)
        load = partial(load_policy, str(self.newest or config.model), dtype, vision=vision,
                       freeze=config.freeze, param_dtype=config.param_dtype,
                       gradient_checkpointing=config.gradient_checkpointing)
        self.inputs = {"files": digests.files_of(environments), "data": self.data}
        if self.newest:
            began = running.read_object(os.path.join(config.out, "inputs.json"))
            digests.check_files(config.out, began, self.inputs["files"])
        else:
            self.inputs |= digests.of_start(config.model)
        with run_folder.damage_advice(self.newest):
            self.policy, self.processor = running.load_spread(load, device)

    def resume(self, optimizer, first_state):
        """Set `optimizer` and `state`, filled from the checkpoint if there is one. A new run begins
        with `first_state`. A state holds the number of its step, and tokens and seconds so far."""
        self.optimizer = optimizer
        self.state = first_state
        if self.newest:
            self.state = run_folder.load_resume(self.newest, self.policy, optimizer, first_state)
            if self.state.get("data", self.data) != self.data:
                raise ValueError(f"--data {self.config.data}: is not what it was when {self.newest}"
                                 " was saved: put it back, or choose another --out")

    def open(self):
        """Make the run folder, or cut its logs back to the checkpoint. ValueError if a GPU is too
        small."""
        running.check_memory(self.policy, self.config)
        run_folder.open_run(self.config, self.newest, self.inputs)

    def steps(self, last_step, name):
        """A progress bar over the steps that are left, counted from 0."""
        first = self.state["step"]
        self.bar = running.progress(range(first, last_step), initial=first, total=last_step,
                                    desc=name)
        return self.bar

    def show(self, **figures):
        """Show figures after the progress bar."""
        self.bar.set_postfix(refresh=False, **figures)

    def check_update(self, update, stats):
        """Print a line, once each, if an update's PPO ratios were not 1 before its first step, or
        if its values were worse than none. In the first update the value head is untrained."""
        low, high = stats["ratio_min_first"], stats["ratio_max_first"]
        if (low, high) != (1.0, 1.0) and not self.told_of_ratios:
            self.told_of_ratios = True
            print0(f"before the first optimizer step PPO ratios go from {low:.4f} to {high:.4f}, "
                   "though nothing has changed: on this device a log-prob is rounded differently "
                   "with a gradient than without one")
        if update and stats["value_error"] > 1 and not self.told_of_values:
            self.told_of_values = True
            print0(f"update {update + 1}: the values are worse than none (value_error "
                   f"{stats['value_error']:.2f}), so a right reply may count as worse than "
                   "expected: a smaller --value-lr may help")

    def save(self, state, with_value_head=True):
        """Write the checkpoint of this state unless it is there; returns its folder."""
        if self.data:
            state = {**state, "data": self.data}
        return run_folder.ensure_checkpoint(
            self.config.out, state["step"], self.policy, self.processor, self.optimizer, state,
            self.config.keep_resume, with_value_head)

    def save_if_due(self, state, last_step, stop, with_value_head=True):
        """Save every --save-every steps, after the last step, and before a stop. A stop that was
        asked for ends the program here."""
        stopping = stop.requested
        due = state["step"] % self.config.save_every == 0 or state["step"] == last_step
        if due or stopping:
            saved = self.save(state, with_value_head)
        if stopping:
            stop.leave(saved)


# ---- Options that contradict each other ----------------------------------------------------------

def check_sft(config):
    """ValueError unless both folders are named and every process has a sample of each step."""
    check_folders(config)
    if config.num != type(config)().num:
        raise ValueError(f"--num {config.num}: is for --dump; --steps and --batch-size say how "
                         "much is trained")
    if config.batch_size < running.WORLD:
        raise ValueError(f"--batch-size {config.batch_size}: must be at least the number of "
                         f"processes, {running.WORLD}")


def check_samples(config, splits, environments):
    """sft.py: ValueError if --data, --pictures, --mix, --failed-tries and --balance do not fit each
    other, or if a setting has no effect."""
    common = settings.read_settings(config.env)
    for split in splits:
        given = {**common, **split.settings}
        demonstrator.refuse_without_effect(given, ["reward"], "SFT gets no reward")
        if config.data:
            demonstrator.refuse_without_effect(given, demonstrator.NOT_OF_OWN_REPLIES,
                                               "replies are learnt as they stand in --data")
        else:
            demonstrator.check_taught(given)
    for split, env in zip(splits, environments):
        if env.verify_iter <= config.failed_tries:
            raise ValueError(f"--mix {split.label}: verify_iter {env.verify_iter} must be above "
                             f"--failed-tries {config.failed_tries}")
    mixed = tuple(config.mix) != ("id",)             # the default
    if config.data and (config.failed_tries or config.balance or mixed):
        raise ValueError("--data: --mix, --failed-tries and --balance are for samples that are "
                         "made on the fly")
    if config.pictures and not config.data:
        raise ValueError(f"--pictures {config.pictures}: is the folder of the pictures that --data "
                         "names, so it needs --data")
    if config.balance and len(environments[0].kinds) == 1:
        raise ValueError(f"--balance: {config.task} has one kind of position only")


def check_rl(config):
    """The one split to train on.

    ValueError unless both folders are named, the minibatches divide an update, the processes
    divide the environments, and there is one split. ValueError if a setting has no effect; only
    `solution` is let pass, with a remark.
    """
    check_folders(config)
    num_turns = config.num_envs * config.turns_per_env
    if num_turns == 1:
        raise ValueError("--num-envs 1, --turns-per-env 1: the advantage of a turn is measured "
                         "against those of the others, so with one the policy would not learn")
    if num_turns % config.minibatch_turns:
        raise ValueError(f"--minibatch-turns {config.minibatch_turns}: must divide the "
                         f"{num_turns} turns of an update ({config.num_envs} environments x "
                         f"{config.turns_per_env})")
    if config.num_envs % running.WORLD:
        raise ValueError(f"--num-envs {config.num_envs}: must be a multiple of the number of "
                         f"processes, {running.WORLD}")
    split, *more = settings.read_splits(config.split)
    if more:
        raise ValueError(f"--split {' '.join(config.split)}: one split only, not {more[0].name} "
                         "as well")
    given = {**settings.read_settings(config.env), **split.settings}
    demonstrator.refuse_without_effect(given, ["faults", "faulty_tries"], "RL reads no expert")
    if config.updates > config.lr_horizon and config.lr_final < config.lr:
        print0(f"updates after --lr-horizon {config.lr_horizon} have the learning rate --lr-final "
               f"{config.lr_final:g}")
    if "solution" in given:              # SFT and RL may be given the same settings
        print0(f"solution {given['solution']!r}: has no effect here, since RL reads no expert")
    return split


def check_minibatch(config, verify_iter):
    """rl.py: ValueError if a dialogue of `verify_iter` turns is longer than a minibatch."""
    if config.minibatch_turns < verify_iter:
        raise ValueError(f"--minibatch-turns {config.minibatch_turns}: must be at least "
                         f"verify_iter, {verify_iter}, since a dialogue is never cut")


# ---- What rl.py logs and saves -------------------------------------------------------------------

def rollout_stats(turns, eos_id):
    """Counts and means over one rollout.

    `success` is over the episodes that ended in this rollout. In the first rollouts of a run only
    short episodes have had time to end, so it is biased. In GeneralPoints most of these are solved
    hands, so it is too high: 1 until a hand has used up its tries. In V-IRL they are failed routes,
    so it is too low. `step_accuracy`, which is over all replies, has no such bias.
    """
    own_rows = []
    for turn in turns:
        own_rows.append(turn.info | {"reward": turn.reward, "done": turn.done,
                                     "length": len(turn.response_ids),
                                     "cut": turn.response_ids[-1] != eos_id})
    rows = [row for part in running.gather(own_rows) for row in part]
    ended = [row for row in rows if row["done"]]
    statuses = Counter(row["status"] for row in rows)
    kinds = Counter(row["kind"] for row in rows)
    correct = Counter(row["kind"] for row in rows if row["status"] == "correct")
    stats = {"turns": len(rows), "episodes": len(ended),
             "success": sum(row["success"] for row in ended) / max(1, len(ended)),
             "step_accuracy": statuses["correct"] / len(rows),
             "reward": math.fsum(row["reward"] for row in rows) / len(rows)}
    if "cards_read" in rows[0]:
        stats["cards_read"] = sum(row["cards_read"] for row in rows) / len(rows)
    for kind in sorted(kinds):
        stats[f"step_accuracy_{kind}"] = correct[kind] / kinds[kind]
    for status in sorted(statuses):
        stats[f"status_{status}"] = statuses[status]
    stats["replies_cut"] = sum(row["cut"] for row in rows)
    stats["response_length"] = sum(row["length"] for row in rows) / len(rows)
    return stats


def update_stats(sums, first_ratios, grad_norms, gaps, residuals, returns, epochs):
    """What is logged of an update. `sums` are over this process's turns in all epochs; means are
    over the turns of all processes.

    gaps (N,) are log-probs as scored minus as sampled, residuals (N,) are returns minus values.
    """
    num_seen = epochs * running.total(len(returns))
    stats = {name: running.total(value) / num_seen for name, value in sorted(sums.items())}
    ratios = []
    for part in running.gather(first_ratios):
        ratios += part
    residual_mean, residual_variance = running.mean_and_variance(residuals)
    return_mean, return_variance = running.mean_and_variance(returns)
    _, gap_variance = running.mean_and_variance(gaps)
    unexplained = residual_variance / (return_variance + 1e-8)
    squares = residual_mean ** 2 + residual_variance, return_mean ** 2 + return_variance
    return {**stats, "ratio_max_first": max(ratios), "ratio_min_first": min(ratios),
            "scored_sampled_std": math.sqrt(gap_variance),
            "scored_sampled_max": max(running.gather(float(gaps.abs().max()))),
            "grad_norm": sum(grad_norms) / len(grad_norms), "optimizer_steps": len(grad_norms),
            "explained_variance": 1 - unexplained, "value_error": squares[0] / (squares[1] + 1e-8)}


def count_read_and_sampled(policy, turns, dialogues):
    """The tokens that this process read and sampled in a rollout.

    Each prompt is compared with the prompt and reply of its environment's turn before. The tokens
    that begin both are known and do not count, unless the picture is another. A picture counts once
    in a dialogue. What is read again because --kept-gib had no room for it does not count, either.
    """
    with_picture = sum(turns[dialogue[-1]].picture is not None for dialogue in dialogues)
    tokens = policy.picture_tokens * with_picture
    before = {}        # environment -> the ids of its turn before, and the picture
    for turn in turns:
        env = turn.dialogue_key[0]
        ids_before, picture = before.get(env, ([], None))
        num_known = 0
        if picture is turn.picture:
            num_known = len(os.path.commonprefix([ids_before, turn.prompt_ids]))   # of two lists
        tokens += len(turn.prompt_ids) - num_known + len(turn.response_ids)
        before[env] = turn.prompt_ids + turn.response_ids, turn.picture
    return tokens


def where_they_stand(conversations):
    """[episode, replies so far] of every environment, those of other processes included."""
    states = [[conversation.index, conversation.episode, conversation.replies]
              for conversation in conversations]
    rows = [row for part in running.gather(states) for row in part]
    return [[episode, replies] for _, episode, replies in sorted(rows)]
