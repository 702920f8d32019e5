"""PPO: advantages, loss, rollouts, update."""
import copy
import functools
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import envs
import model
import rl
from conftest import tiny_folder
from support import running, training

CONFIG = rl.Config(out="", model="", num_envs=4, turns_per_env=3, minibatch_turns=12,
                   max_new_tokens=12, temperature=1.0,
                   micro_batch_tokens=4096, epochs=1, lr=1e-3)


def config(**changes):
    return rl.Config(**{**vars(CONFIG), **changes})


def rollout(tiny, config, tmp_path, update=0, conversations=None):
    policy, processor = tiny
    config.out = str(tmp_path)
    conversations = conversations or [rl.Conversation(i, envs.make_env("gp-l", "id", verify_iter=2),
                                                      processor, config)
                                      for i in range(config.num_envs)]
    return conversations, rl.collect_turns(policy, processor, conversations, update, config,
                                           SimpleNamespace(requested=False))


# ---- compute_gae

def gae_by_definition(rewards, values, dones, next_value, gamma, lam):
    """O(n^2): for every turn the discounted sum of deltas up to the end of its episode or of the
    rollout."""
    n, advantages = len(rewards), []
    for t in range(n):
        total, weight = 0.0, 1.0
        for k in range(t, n):
            following = 0.0 if dones[k] else (values[k + 1] if k + 1 < n else next_value)
            total += weight * (rewards[k] + gamma * following - values[k])
            weight *= gamma * lam
            if dones[k]:
                break
        advantages.append(total)
    return advantages


def test_gae_equals_its_definition_on_random_rollouts():
    rng = random.Random(0)
    for _ in range(30):
        S, E = rng.randint(1, 9), rng.randint(1, 4)
        rewards, values = ([[rng.uniform(-3, 5) for _ in range(E)] for _ in range(S)]
                           for _ in range(2))
        dones = [[float(rng.random() < 0.3) for _ in range(E)] for _ in range(S)]
        next_values, gamma, lam = [rng.uniform(-1, 1) for _ in range(E)], rng.random(), rng.random()
        advantages, returns = rl.compute_gae(
            *map(torch.tensor, (rewards, values, dones, next_values)), gamma, lam)
        for e in range(E):
            expected = gae_by_definition(*([row[e] for row in m] for m in (rewards, values, dones)),
                                         next_values[e], gamma, lam)
            assert advantages[:, e].tolist() == pytest.approx(expected, abs=1e-4)
        torch.testing.assert_close(returns, advantages + torch.tensor(values))


def test_gae_of_three_turns_worked_by_hand():
    # one environment: a failed turn, a correct one (done), then an unfinished episode that
    # bootstraps from 2.0
    rewards, values = torch.tensor([[-1.0], [5.0], [-1.0]]), torch.tensor([[1.0], [2.0], [0.5]])
    dones, next_values = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([2.0])
    advantages, _ = rl.compute_gae(rewards, values, dones, next_values, 0.5, 0.5)
    # third: -1 + .5*2 - .5 = -.5; second: 5 - 2 = 3; first: -1 + .5*2 - 1 + .25*3 = -.25
    assert advantages[:, 0].tolist() == [-0.25, 3.0, -0.5]


def test_nothing_crosses_the_end_of_an_episode():
    values, dones = torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])
    a, _ = rl.compute_gae(torch.tensor([[1.0], [0.0]]), values, dones, torch.tensor([0.0]),
                          0.9, 0.95)
    b, _ = rl.compute_gae(torch.tensor([[1.0], [99.0]]), values, dones, torch.tensor([99.0]),
                          0.9, 0.95)
    assert a[0] == b[0] == 1.0


# ---- ppo_loss

def test_no_gradient_outside_the_clip_and_the_policy_gradient_at_ratio_one():
    old = torch.zeros(5)
    logprobs = torch.tensor([0.3, -0.3, 0.3, -0.3, 0.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 2.0])
    policy_loss, _, watched = rl.ppo_loss(logprobs, old, old, old, advantages, old, clip=0.1)
    policy_loss.sum().backward()
    gone, kept = logprobs.grad[:2], logprobs.grad[2:]
    assert (gone == 0).all()                   # moved past the clip in the wanted direction: enough
    torch.testing.assert_close(kept, -torch.tensor([0.3, -0.3, 0.0]).exp() * advantages[2:])
    assert watched["clip_fraction"].tolist() == [1, 1, 1, 1, 0]


def test_a_huge_ratio_gives_neither_infinity_nor_gradient():
    logprobs = torch.tensor([500.0, 500.0], requires_grad=True)
    policy_loss, _, _ = rl.ppo_loss(logprobs, *[torch.zeros(2)] * 3, torch.tensor([1.0, -1.0]),
                                    torch.zeros(2), CONFIG.clip)
    policy_loss.sum().backward()
    assert torch.isfinite(policy_loss).all() and logprobs.grad.tolist() == [0, 0]


def test_the_value_clip_is_off_unless_asked_for():
    value = torch.tensor([3.0], requires_grad=True)
    zero, returns = torch.zeros(1), torch.tensor([5.0])
    arguments = zero, zero, value, zero, zero, returns
    assert float(rl.ppo_loss(*arguments, CONFIG.clip, CONFIG.value_clip)[1]) == 0.5 * 4
    clipped_loss = float(rl.ppo_loss(*arguments, CONFIG.clip, value_clip=0.1)[1])
    assert clipped_loss == pytest.approx(0.5 * 4.9 ** 2)


# ---- rollout

def test_a_rollout_has_the_asked_number_of_turns_and_the_second_prompt_begins_with_the_first_turn(
        tiny, tmp_path):
    _, turns = rollout(tiny, config(), tmp_path)
    assert len(turns) == 12
    for e in range(4):
        first, second = turns[e], turns[4 + e]
        # verify_iter is 2 and a random model never solves a hand
        assert not first.done and second.done
        first_ids = first.prompt_ids + first.response_ids
        assert second.prompt_ids[:len(first_ids)] == first_ids
        assert second.reward == first.reward - 1 == -4.0   # illegal, and the step limit on the last
        assert turns[8 + e].prompt_ids[:len(first.prompt_ids)] != first.prompt_ids   # another hand


def test_a_conversation_rebuilt_from_its_state_goes_on_alike(tiny, tmp_path):
    policy, processor = tiny
    conversations, _ = rollout(tiny, config(), tmp_path)
    again = [rl.Conversation(c.index, envs.make_env("gp-l", "id", verify_iter=2), processor,
                             config(), c.episode, c.replies)
             for c in conversations]
    assert any(c.replies for c in conversations)
    assert [c.prompt_ids for c in again] == [c.prompt_ids for c in conversations]
    _, a = rollout(tiny, config(), tmp_path, 1, conversations)
    _, b = rollout(tiny, config(), tmp_path, 1, again)
    assert a == b


def test_a_route_half_walked_goes_on_and_its_turns_fall_into_dialogues_of_positions(tiny, city):
    """The first try at every other position is wrong. A correct action begins a new dialogue, a
    wrong one stays in its dialogue."""
    processor = tiny[1]
    first = rl.Conversation(0, envs.make_env("virl-l", "id", root=city), processor, CONFIG)
    dialogues, positions = [], []
    for i in range(12):
        env = first.env
        wrong = env.at % 2 and not env.tries
        dialogues.append((first.episode, first.dialogue_number))
        positions.append((first.episode, env.at))
        reply = env.flawed_reply() if wrong else env.expert_reply()
        first.play(model.encode_reply(processor, reply))
    same_dialogue = [a == b for a, b in zip(dialogues, dialogues[1:])]
    assert same_dialogue == [a == b for a, b in zip(positions, positions[1:])]
    assert len(set(dialogues)) < 12 and first.replies
    again = rl.Conversation(0, envs.make_env("virl-l", "id", root=city), processor, CONFIG,
                            first.episode, first.replies)
    assert again.prompt_ids == first.prompt_ids and again.env.at == first.env.at
    assert again.env.rail == first.env.rail
    assert again.dialogue_number == first.dialogue_number


def test_routes_that_are_played_in_order_are_shared_out_over_the_environments(tiny, city):
    env = envs.make_env("virl-l", root=city, in_order=True, verify_iter=1)
    played = {}
    for index in range(CONFIG.num_envs):
        conversation = rl.Conversation(index, env, tiny[1], CONFIG)
        for episode in range(3):
            played[episode, index] = env.number
            conversation.play([5])
    assert played == {(episode, index): 4 * episode + index for episode in range(3)
                      for index in range(4)}


def test_a_stop_drops_the_rollout(tiny, tmp_path):
    policy, processor = tiny
    assert rl.collect_turns(policy, processor, [], 0, config(),
                            SimpleNamespace(requested=True)) is None


@pytest.mark.parametrize("reply, thought", [
    ('{"cards": ["A"], "number": [1], "formula": "1=24"}', '{"cards": ["A"], "number": [1], '),
    ('well, "formula": 3', "well, "), ("no answer", "no answer"), ('"formula"', ""),
])
def test_the_answer_begins_with_the_token_that_holds_the_start_of_its_key(tiny, reply, thought):
    _, processor = tiny
    ids = model.encode_reply(processor, reply)
    start = rl.find_answer(processor, ids, len(thought))
    if '"formula"' not in reply:
        assert start == len(ids)
    else:
        before, through = (processor.decode(ids[:k]) for k in (start, start + 1))
        assert len(before) <= len(thought) < len(through)


def test_the_answer_is_found_behind_characters_of_several_tokens(tiny):
    _, processor = tiny
    text = "\u00dcn\u00ef \u2192 \U0001f600 \"formula\": 1"
    ids = model.encode_reply(processor, text)

    def length_through(token):
        return len(model.decode_reply(processor, ids[:token + 1]).rstrip("\ufffd"))
    for answer_at in range(len(text) + 1):
        passed = [token for token in range(len(ids)) if length_through(token) > answer_at]
        assert rl.find_answer(processor, ids, answer_at) == min(passed, default=len(ids))


def test_thought_coef_weighs_the_tokens_before_the_answer(tiny):
    policy, processor = tiny
    prompt = model.encode(processor, envs.make_env("gp-l", "id").reset(0)[0])
    ids = model.encode_reply(processor, '{"cards": [], "formula": "1"}')
    start = rl.find_answer(processor, ids, len('{"cards": [], '))
    assert 0 < start < len(ids) - 1
    turn = rl.Turn(prompt, ids, start, 0.0, False, (0, 0), {})
    tokens, _ = policy(model.collate([[(prompt, ids)]], policy.device), 1.0)
    weighted, _ = rl.turn_logprobs(policy, [turn], [[0]], config(thought_coef=0.25))
    torch.testing.assert_close(weighted[0],
                               0.25 * tokens[0, :start].sum() + tokens[0, start:].sum())


# ---- from turns to batches

def test_dialogues_are_grouped_as_the_docstring_says():
    keys = [(0, 0, 1), (1, 0, 1), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 0, 1)]
    turns = [rl.Turn([1], [2], 0, 0.0, False, key, {}) for key in keys]
    assert rl.group_dialogues(turns) == [[0, 2], [1, 3, 5], [4]]


@pytest.mark.parametrize("update", range(5))
def test_every_dialogue_falls_into_the_minibatch_that_has_its_last_turn(tiny, update):
    lengths = (2, 1, 3, 2)
    keys = [(i, 0, 1) for i, length in enumerate(lengths) for _ in range(length)]
    turns = [rl.Turn([1], [2], 0, 0.0, False, key, {}, number=n) for n, key in enumerate(keys)]
    first, second = rl.draw_minibatches(tiny[0], turns, update, config(minibatch_turns=4))
    assert [first.name, second.name] == ["minibatch from turn 0", "minibatch from turn 4"]
    drawn = []
    for minibatch in (first, second):
        dialogues = [dialogue for group, _ in minibatch.groups for dialogue in group]
        assert minibatch.num_turns == sum(map(len, dialogues))
        drawn += dialogues
    assert first.num_turns <= 4 and first.num_turns + second.num_turns == 8
    assert sorted(drawn) == rl.group_dialogues(turns)


def test_an_epoch_shuffles_the_minibatches_and_leaves_them_whole():
    minibatches = [rl.Minibatch(f"minibatch {i}", 1, [([[i]], 1.0)]) for i in range(6)]
    steps = rl.epoch_steps(minibatches, 3, config(epochs=3))
    epochs = [[minibatch for _, minibatch in steps[start:start + 6]] for start in (0, 6, 12)]
    assert epochs[0] == minibatches and epochs[1] != minibatches and epochs[2] != epochs[1]
    assert all(sorted(epoch) == minibatches for epoch in epochs)
    assert steps[6][0] == f"epoch 1, {steps[6][1].name}"


# ---- update

def draw_and_score(policy, turns, config):
    """The minibatches of an update; log-probs and values as rl.py's main has them."""
    minibatches = rl.draw_minibatches(policy, turns, 0, config)
    groups = [group for minibatch in minibatches for group in minibatch.groups]
    return minibatches, rl.score_turns(policy, turns, groups, config)


@functools.cache
def deep_policy(dtype, family, checkpointing):
    """A model of 16 layers with large weights. In bfloat16 a log-prob that it scores moves with
    the rows beside it, as that of a pretrained model does."""
    policy, processor = model.load_policy(tiny_folder(size="32x16", family=family), dtype,
                                          vision=family != "llama",
                                          gradient_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.backbone.parameters():
            if p.ndim == 2:
                p.copy_(0.08 * torch.randn(p.shape, generator=generator))
    return policy, processor


def two_tries(processor, family, num, seed=0):
    """Turns of `num` dialogues of two tries each: expert replies, and none of them sampled."""
    rng, turns = random.Random(seed), []
    settings = {"resolution": 48} if family != "llama" else {}
    for i in range(num):
        env = envs.make_env("gp-l" if family == "llama" else "gp-vl", "id", **settings)
        messages, _ = env.reset(i)
        ids = model.encode(processor, messages)
        for _ in range(2):
            reply = model.encode_reply(processor, env.flawed_reply() + " so" * rng.randint(0, 9))
            turns.append(rl.Turn(ids, reply, rng.randint(0, 9), 0.0, False, (i, 0, 1), {},
                                 picture=model.picture_of(messages), number=len(turns)))
            messages, *_ = env.step(model.decode_reply(processor, reply))
            ids = model.encode(processor, messages, ids + reply)
    return turns


@pytest.mark.parametrize("dtype, family, checkpointing", [
    ("float32", "llama", False), ("bfloat16", "llama", False), ("bfloat16", "llama", True),
    ("bfloat16", "mllama", False), ("bfloat16", "qwen2_5_vl", True)])
def test_before_the_first_step_every_ratio_is_one(dtype, family, checkpointing):
    policy, processor = deep_policy(dtype, family, checkpointing)
    policy = copy.deepcopy(policy)
    turns = two_tries(processor, family, 12)
    settings = config(dtype=dtype, temperature=0.2, micro_batch_tokens=1500, minibatch_turns=12,
                      epochs=2)
    minibatches, (logprobs, values) = draw_and_score(policy, turns, settings)
    assert len(minibatches) == 2 and max(len(minibatch.groups) for minibatch in minibatches) > 1
    alone = [([dialogue], 1.0) for dialogue in rl.group_dialogues(turns)]
    moved = (rl.score_turns(policy, turns, alone, settings)[0] - logprobs).abs().max()
    stats = rl.ppo_update(policy, torch.optim.Adam(policy.parameters(), lr=1e-5), turns,
                          minibatches, logprobs, values, torch.linspace(-1, 1, 24),
                          torch.linspace(1, -1, 24), 0, settings)
    assert stats["ratio_max_first"] == stats["ratio_min_first"] == 1.0
    if dtype == "bfloat16" and running.has_bfloat16_units():
        assert moved > 1e-3

def one_update(tiny, turns, advantages, **changes):
    policy = copy.deepcopy(tiny[0])
    minibatches, (logprobs, values) = draw_and_score(policy, turns, config(**changes))
    stats = rl.ppo_update(policy, torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-7), turns,
                          minibatches, logprobs, values, advantages, advantages, 0,
                          config(**changes))
    _, (after, _) = draw_and_score(policy, turns, config(**changes))
    return policy, after - logprobs, stats


def test_a_rewarded_reply_gets_likelier_and_a_punished_one_less_likely(tiny, tmp_path):
    _, turns = rollout(tiny, CONFIG, tmp_path)
    advantages = torch.tensor([1.0, -1.0] * 6)
    _, change, _ = one_update(tiny, turns, advantages, value_coef=0.0)
    assert (change[::2].mean() > 0) and (change[1::2].mean() < 0)


def test_micro_batches_do_not_change_the_update(tiny, tmp_path):
    _, turns = rollout(tiny, CONFIG, tmp_path)
    advantages = torch.linspace(-1, 1, 12)
    whole, _, stats = one_update(tiny, turns, advantages)
    cut, _, cut_stats = one_update(tiny, turns, advantages, micro_batch_tokens=1)
    assert cut_stats["grad_norm"] == pytest.approx(stats["grad_norm"], rel=1e-3)
    assert cut_stats["value_loss"] == pytest.approx(stats["value_loss"], rel=1e-4)


def test_equal_rewards_everywhere_give_no_nan(tiny, tmp_path):
    _, turns = rollout(tiny, CONFIG, tmp_path)
    policy, _, stats = one_update(tiny, turns, torch.zeros(12))
    assert all(torch.isfinite(p).all() for p in policy.parameters())


def test_a_loss_that_is_not_finite_names_the_minibatch_and_the_turns(tiny, tmp_path):
    policy = copy.deepcopy(tiny[0])
    _, turns = rollout(tiny, CONFIG, tmp_path)
    advantages = torch.zeros(12)
    advantages[5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^epoch 0, minibatch from turn 0, turns \["):
        rl.ppo_update(policy, torch.optim.Adam(policy.parameters()), turns,
                      rl.draw_minibatches(policy, turns, 7, CONFIG), torch.zeros(12),
                      torch.zeros(12), advantages, advantages, 7, CONFIG)


def test_an_update_that_minibatches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="--minibatch-turns 5: must divide the 12 turns"):
        training.check_rl(config(out="a", model="b", minibatch_turns=5))


def test_an_update_of_one_turn_from_which_nothing_is_learnt_is_refused():
    with pytest.raises(ValueError, match="with one the policy would not learn"):
        training.check_rl(config(out="a", model="b", num_envs=1, turns_per_env=1,
                                 minibatch_turns=1))


def test_a_setting_of_the_expert_is_refused_or_said_to_have_no_effect(capsys):
    for knobs in (dict(env=("faults=ten:0.5",)), dict(split=("id", "faulty_tries=2"))):
        with pytest.raises(ValueError, match="fault.*: has no effect here, since RL reads no exp"):
            training.check_rl(config(out="a", model="b", **knobs))
    assert capsys.readouterr().out == ""
    # recipes/paper.sh gives SFT and RL the same settings.
    training.check_rl(config(out="a", model="b", env=("solution=random",)))
    assert capsys.readouterr().out == (
        "solution 'random': has no effect here, since RL reads no expert\n")


def test_updates_after_the_learning_rate_has_reached_its_end_are_told_of(capsys):
    training.check_rl(config(out="a", model="b", updates=30, lr_horizon=20, lr_final=1e-9))
    told = capsys.readouterr().out
    assert "after --lr-horizon 20 have the learning rate --lr-final 1e-09" in told
    for knobs in (dict(updates=20), dict(updates=30, lr_final=1e-5, lr=1e-5)):
        training.check_rl(config(out="a", model="b", lr_horizon=20, **knobs))
    assert capsys.readouterr().out == ""


def test_a_prompt_counts_from_where_it_leaves_what_was_said_before(tiny):
    policy, _ = tiny

    def turn(prompt, response, key):
        return rl.Turn(prompt, response, 0, 0.0, False, key, {})
    first, other = turn([1, 2, 3], [4, 5], (0, 0, 1)), turn([1, 2], [9], (1, 0, 1))
    retry = turn([1, 2, 3, 4, 5, 6], [7], (0, 0, 1))
    next_dialogue = turn([1, 2, 8, 8], [9], (1, 0, 2))
    upcoming = [turn([1, 2, 3, 5], [], (0,)), turn([1], [], (1,))]
    turns = [first, other, retry, next_dialogue]
    trained, played = rl.count_compute(policy, turns, upcoming, config(epochs=3))
    dialogues = 7 + 3 + 5                                 # three rows, of which one holds two turns
    read_and_sampled = (3 + 2) + (2 + 1) + (1 + 1) + (2 + 1)
    assert trained == 3 * dialogues and played == read_and_sampled + dialogues + 4 + 1


def test_values_that_are_worse_than_none_are_told_once(capsys):
    """Such values make right replies count as worse than expected."""
    returns = torch.tensor([1.0, 2.0, -1.0, 2.0])

    def stats(values):
        return training.update_stats(Counter(), [1.0], [1.0], torch.zeros(4),
                                     returns - torch.tensor(values), returns, 1)
    none, good, high = stats([0.0] * 4), stats([1.0] * 4), stats([3.0] * 4)
    assert none["value_error"] == pytest.approx(1) and good["value_error"] == pytest.approx(0.6)
    assert high["value_error"] == pytest.approx(2.2)
    run = SimpleNamespace(told_of_ratios=False, told_of_values=False)
    for update, found in enumerate((high, good, high, high)):
        training.Run.check_update(run, update, found)
    # Before the first update the head is untrained.
    assert capsys.readouterr().out == (
        "update 3: the values are worse than none (value_error 2.20), so a right reply may count "
        "as worse than expected: a smaller --value-lr may help\n")
