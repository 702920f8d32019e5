"""The policy: encoding, log-probs, sampling, loading."""
import contextlib
import itertools
import copy
import json
import logging
import math
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig,
                          LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen2ForCausalLM)

import envs
import model
import support.decoder
from conftest import tiny_folder
from support import loading, running
from support.decoder import CacheDecoder, LlamaDecoder
from support.tiny import atoms_of, train_tokenizer


def some_prompts(processor, num=6):
    """Prompts of different lengths: some are second turns."""
    prompts = []
    for seed in range(num):
        env = envs.make_env("gp-l", "id")
        messages, _ = env.reset(seed)
        prompts.append(model.encode(processor, messages))
        if seed % 2:
            reply = model.encode_reply(processor, env.flawed_reply())
            messages, *_ = env.step(model.decode_reply(processor, reply))
            prompts[-1] = model.encode(processor, messages, prompts[-1] + reply)
    return prompts


def test_any_text_comes_back_from_the_tokenizer(tiny):
    _, processor = tiny
    for text in ["", "{\"formula\": \"(10-6)*4=24\"}", "ünïcode ♠ \n\t 中文", "  two  blanks ",
                 "24242424 1J2Q"]:
        ids = processor(text, add_special_tokens=False).input_ids
        assert processor.decode(ids) == text


def test_every_atom_is_one_token_and_wording_between_atoms_is_cheap(tiny):
    _, processor = tiny
    env = envs.make_env("gp-l", "rule_ood")
    for atom in atoms_of("gp-l", env):
        assert len(processor(atom, add_special_tokens=False).input_ids) == 1, atom
    messages, _ = env.reset(0)
    assert len(model.encode(processor, messages)) < 45
    assert len(model.encode_reply(processor, env.expert_reply())) < 40


def test_special_ids_are_distinct_and_the_prompt_has_one_bos(tiny):
    _, processor = tiny
    assert len({processor.pad_token_id, processor.eos_token_id, processor.bos_token_id}) == 3
    for prompt in some_prompts(processor):
        assert prompt.count(processor.bos_token_id) == 1 and prompt[0] == processor.bos_token_id


def test_prompt_ids_grow_only_at_the_end_over_five_turns(tiny):
    policy, processor = tiny
    env = envs.make_env("gp-l", "id", verify_iter=6)
    messages, _ = env.reset(1)
    prompt = model.encode(processor, messages)
    for turn in range(5):
        response, _ = policy.generate([prompt], model.sampling_uniforms([(0, turn)], 7 + turn),
                                      7 + turn, 1.0)[0]
        messages, _, terminated, truncated, _ = env.step(model.decode_reply(processor, response))
        following = model.encode(processor, messages, prompt + response)
        assert following[:len(prompt) + len(response)] == prompt + response
        assert following[-1] == processor.convert_tokens_to_ids("<|assistant|>")
        prompt = following


def test_a_reply_cut_at_the_limit_is_closed_in_the_next_prompt_only(tiny):
    _, processor = tiny
    env = envs.make_env("gp-l", "id")
    prompt = model.encode(processor, env.reset(0)[0])
    cut = processor("{\"cards\": [", add_special_tokens=False).input_ids
    whole = cut + [processor.eos_token_id]
    messages, *_ = env.step(model.decode_reply(processor, cut))
    of_cut = model.encode(processor, messages, prompt + cut)
    assert of_cut == model.encode(processor, messages, prompt + whole)


def test_encoding_with_prior_ids_equals_encoding_afresh_when_the_ids_are_canonical(tiny):
    _, processor = tiny
    env = envs.make_env("gp-l", "id")
    prompt = model.encode(processor, env.reset(3)[0])
    reply = env.flawed_reply()
    messages, *_ = env.step(reply)
    going_on = model.encode(processor, messages, prompt + model.encode_reply(processor, reply))
    assert going_on == model.encode(processor, messages)


def test_logprobs_are_those_of_the_plain_model_at_the_response_tokens(tiny):
    policy, processor = tiny
    prompts = some_prompts(processor)
    samples = [(p, model.encode_reply(processor, "[1] (2" * (i + 1)))
               for i, p in enumerate(prompts)]
    before = [(list(p), list(r)) for p, r in samples]
    logprobs, values = policy(model.collate([[s] for s in samples], policy.device))
    assert samples == before
    assert logprobs.shape == (len(samples), max(len(r) for _, r in samples))
    assert values.shape == (len(samples),)
    for (prompt, response), row, value in zip(samples, logprobs, values):
        ids = torch.tensor([prompt + response], device=policy.device)
        out = policy.backbone(ids, output_hidden_states=True)
        plain = torch.log_softmax(out.logits[0].float(), -1)[len(prompt) - 1:-1]
        expected = plain.gather(1, ids[0, len(prompt):, None])[:, 0]
        torch.testing.assert_close(row[:len(response)], expected, atol=1e-5, rtol=0)
        assert (row[len(response):] == 0).all()
        expected_value = policy.value_head(out.hidden_states[-1][0, len(prompt) - 1])[0]
        torch.testing.assert_close(value, expected_value, atol=1e-5, rtol=0)


def test_padding_and_neighbours_change_nothing(tiny):
    policy, processor = tiny
    samples = [(p, model.encode_reply(processor, "12+" * (i + 1)))
               for i, p in enumerate(some_prompts(processor))]
    together, values = policy(model.collate([[s] for s in samples], policy.device), 0.7)
    for sample, row, value in zip(samples, together, values):
        alone, alone_value = policy(model.collate([[sample]], policy.device), 0.7)
        torch.testing.assert_close(alone[0], row[:len(sample[1])], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone_value[0], value, atol=1e-5, rtol=0)


def test_turns_that_share_a_row_have_the_logprobs_and_values_of_turns_alone(tiny):
    policy, processor = tiny
    env = envs.make_env("gp-l", "id")
    messages, _ = env.reset(4)
    dialogue, prompt = [], model.encode(processor, messages)
    for length in (9, 5, 7):   # cut replies: the next prompt closes them
        response = model.encode_reply(processor, env.flawed_reply())[:length]
        dialogue.append((prompt, response))
        messages, *_ = env.step(model.decode_reply(processor, response))
        prompt = model.encode(processor, messages, prompt + response)
    dialogues = [dialogue, [(some_prompts(processor)[0], [5, 6])]]
    batch = model.collate(dialogues, policy.device)
    assert batch["input_ids"].shape[0] == 2 and len(batch["row"]) == 4
    together, values = policy(batch, 1.0)
    rows = [[turn] for turns in dialogues for turn in turns]
    alone, alone_values = policy(model.collate(rows, policy.device), 1.0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(values, alone_values, atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match="does not begin with the turn before"):
        model.collate([[dialogue[2], dialogue[0]]], policy.device)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_logprobs_seen_while_sampling_equal_those_of_the_update(tiny, temperature):
    policy, processor = tiny
    prompts = some_prompts(processor)
    uniforms = model.sampling_uniforms([(5, i) for i in range(len(prompts))], 24)
    replies = policy.generate(prompts, uniforms, 24, temperature)
    rows = [[(p, r)] for p, (r, _) in zip(prompts, replies)]
    logprobs, _ = policy(model.collate(rows, policy.device), temperature)
    for row, (response, seen) in zip(logprobs.tolist(), replies):
        assert row[:len(response)] == pytest.approx(seen, abs=1e-5)


def test_a_reply_does_not_depend_on_the_rows_beside_it(tiny):
    policy, processor = tiny
    prompts = some_prompts(processor)
    uniforms = model.sampling_uniforms([(9, i) for i in range(len(prompts))], 24)
    together = [ids for ids, _ in policy.generate(prompts, uniforms, 24, 1.0)]
    alone = [policy.generate([p], u[None], 24, 1.0)[0][0] for p, u in zip(prompts, uniforms)]
    small = [ids for ids, _ in policy.generate(prompts, uniforms, 24, 1.0, token_budget=200)]
    assert together == alone == small


def test_replies_end_with_end_of_turn_or_at_the_limit_and_hold_no_special_id(tiny):
    policy, processor = tiny
    prompts = some_prompts(processor) * 20
    weight = policy.backbone.lm_head.weight
    before = weight.detach().clone()
    uniforms = model.sampling_uniforms([(i,) for i in range(120)], 60)
    try:
        with torch.no_grad():   # make end-of-turn likely, so that rows leave at different times
            weight[policy.eos_id] += 0.02 * weight.sum(0).sign()
        replies = [ids for ids, _ in policy.generate(prompts, uniforms, 60, 3.0)]
    finally:
        with torch.no_grad():
            weight.copy_(before)
    special = set(processor.all_special_ids)
    assert len({len(ids) for ids in replies}) > 1
    for ids in replies:
        assert len(ids) == 60 or ids[-1] == policy.eos_id
        assert not special & set(ids[:-1]) and ids[-1] not in special - {policy.eos_id}


def test_samples_follow_the_softmax_at_the_temperature(tiny):
    policy, _ = tiny
    rows = len(policy.banned)
    logits = torch.full((1, rows), -9.0, device=policy.device)
    allowed = (~policy.banned).nonzero()[:3, 0]
    logits[0, allowed] = torch.tensor([1.0, 0.5, -0.5], device=policy.device)
    logits[0, policy.banned] = 50.0
    uniforms = torch.tensor(np.random.default_rng(0).random(20_000), device=policy.device)
    ids, _ = policy.pick(logits.expand(20_000, -1), uniforms, 0.5)
    expected = torch.softmax(torch.tensor([2.0, 1.0, -1.0]), 0)
    for token, p in zip(allowed.tolist(), expected.tolist()):
        four_errors = 4 * (p * (1 - p) / 20_000) ** 0.5
        assert abs(float((ids == token).float().mean()) - p) < four_errors


def test_the_fast_llama_decoder_and_the_cache_decoder_agree_with_grouped_heads(device):
    torch.manual_seed(1)
    tokenizer = train_tokenizer(["a b c d 1 2 3"] * 3, ["1", "2", "3"])
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2,
                         num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=96, tie_word_embeddings=False)
    policy = model.Policy(LlamaForCausalLM(config), tokenizer).to(device)
    prompts = [[5, 6, 7, 8], [9], list(range(20, 31))]
    uniforms = model.sampling_uniforms([(i,) for i in range(3)], 16)
    fast = policy.generate(prompts, uniforms, 16, 1.0)
    policy.backbone.config.model_type = "other"
    slow = policy.generate(prompts, uniforms, 16, 1.0)
    assert [ids for ids, _ in fast] == [ids for ids, _ in slow]
    for (_, a), (_, b) in zip(fast, slow):
        assert a == pytest.approx(b, abs=1e-5)


class TapedGraph(TorchDispatchMode):
    """What a CUDA graph does, on any device.

    Capture notes operations and leaves no trace of them. Replay does just those to the same memory,
    whatever Python has changed meanwhile. What would wait for the device is an error.
    """

    captured = replayed = 0

    def __init__(self):
        super().__init__()
        self.tape = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in (torch.ops.aten._local_scalar_dense.default,
                                 torch.ops.aten.nonzero.default)
        written = [(tensor, tensor.clone())
                   for tensor, argument in zip(args, operation._schema.arguments)
                   if argument.alias_info and argument.alias_info.is_write]
        result = operation(*args, **(kwargs or {}))
        self.tape.append((operation, args, kwargs or {}, result, written))
        return result

    @classmethod
    @contextlib.contextmanager
    def capture(cls, graph, capture_error_mode):
        with graph:
            yield
        for *_, written in reversed(graph.tape):
            for tensor, before in written:
                tensor.copy_(before)
        cls.captured += 1

    def replay(self):
        for operation, args, kwargs, result, _ in self.tape:
            for old, new in zip(tree_leaves(result), tree_leaves(operation(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        TapedGraph.replayed += 1


def test_a_decoder_under_cuda_graphs_samples_the_same(tiny, monkeypatch):
    policy, processor = tiny
    prompts, limit = some_prompts(processor) * 4, 90
    alike = [prompts[0], prompts[0][::-1]]
    uniforms = model.sampling_uniforms([(i,) for i in range(len(prompts))], limit).clip(0.001)
    uniforms[range(len(prompts)), [10 + 3 * i for i in range(len(prompts))]] = 0
    first_id = int((~policy.banned).nonzero()[0])                 # what a uniform of 0 draws
    monkeypatch.setattr(policy, "eos_id", first_id)
    memory = model.RolloutMemory(policy, 1)
    assert model.LlamaDecoder(policy, memory).graphs == (policy.device.type == "cuda")
    monkeypatch.setattr(model.LlamaDecoder, "graphs", False)
    expected = policy.generate(prompts, uniforms, limit, 1.0)
    one_by_one = policy.generate(alike, uniforms[-2:, :5], 5, 1.0, token_budget=1)
    assert len({len(ids) for ids, _ in expected}) > 10
    if policy.device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", TapedGraph)
        monkeypatch.setattr(torch.cuda, "graph", TapedGraph.capture)
    monkeypatch.setattr(model.LlamaDecoder, "graphs", True)
    found = policy.generate(prompts, uniforms, limit, 1.0)
    found += policy.generate(alike, uniforms[-2:, :5], 5, 1.0, token_budget=1)
    expected += one_by_one
    for (ids, logprobs), (expected_ids, others) in zip(found, expected, strict=True):
        assert ids == expected_ids and logprobs == pytest.approx(others, abs=1e-5)
    if policy.device.type == "cpu":
        assert 4 <= TapedGraph.captured < 10 and TapedGraph.replayed > 60
    for rope_type in ("dynamic", "longrope"):                     # these look at the positions
        monkeypatch.setattr(policy.backbone.model.rotary_emb, "rope_type", rope_type)
        assert model.LlamaDecoder.graphs and not model.LlamaDecoder(policy, memory).graphs


def test_greedy_decoding_equals_generate_of_hugging_face_also_for_another_architecture(
        tiny, device):
    _, processor = tiny
    torch.manual_seed(2)
    config = Qwen2Config(vocab_size=len(processor), hidden_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, intermediate_size=64)
    policy = model.Policy(Qwen2ForCausalLM(config), processor).to(device)
    policy.banned.fill_(False)
    for prompt in some_prompts(processor, 3):
        ids = torch.tensor([prompt], device=device)
        expected = policy.backbone.generate(ids, attention_mask=torch.ones_like(ids),
                                            max_new_tokens=12, do_sample=False,
                                            eos_token_id=policy.eos_id,
                                            pad_token_id=processor.pad_token_id)[0, len(prompt):]
        assert policy.generate([prompt], np.zeros((1, 12)), 12, 0.0)[0][0] == expected.tolist()


def test_bfloat16_computes_close_to_float32_and_keeps_float32_weights(tiny, device):
    policy, processor = tiny
    samples = [(p, model.encode_reply(processor, "1+2")) for p in some_prompts(processor)]
    exact, _ = policy(model.collate([[s] for s in samples], policy.device))
    policy.dtype = torch.bfloat16
    try:
        rough, values = policy(model.collate([[s] for s in samples], policy.device))
        replies = policy.generate([p for p, _ in samples],
                                  model.sampling_uniforms([(i,) for i in range(6)], 8), 8, 1.0)
    finally:
        policy.dtype = torch.float32
    assert rough.dtype == values.dtype == torch.float32 and len(replies) == 6
    torch.testing.assert_close(exact, rough, atol=0.1, rtol=0)
    assert not torch.equal(exact, rough)
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 100, 7, 7, 50, 3, 99, 1]
    groups = model.micro_batches(lengths, 110)
    assert sorted(row for group in groups for row in group) == list(range(8))
    assert all(len(group) * max(lengths[row] for row in group) <= 110 for group in groups)
    # a row longer than the budget still runs
    assert model.micro_batches([500, 1], 10) == [[0], [1]]


@pytest.mark.parametrize("group_cost", [1, 6, 40, 10_000])
def test_micro_batches_have_the_least_padding(group_cost):
    rng = random.Random(group_cost)
    for budget in (20, 60, 200):
        lengths = sorted((rng.randint(1, 30) for _ in range(8)), reverse=True)
        costs = []
        for cuts in itertools.product((False, True), repeat=7):   # every way to cut the sorted rows
            groups = [[lengths[0]]]
            for length, cut in zip(lengths[1:], cuts):
                groups.append([length]) if cut else groups[-1].append(length)
            if all(len(group) == 1 or len(group) * group[0] <= budget for group in groups):
                costs.append(sum(len(group) * group[0] + group_cost for group in groups))
        found = model.micro_batches(lengths, budget, group_cost)
        assert sum(len(group) * lengths[group[0]] + group_cost for group in found) == min(costs)


def test_processes_cut_their_micro_batches_at_the_same_places(monkeypatch):
    rng = random.Random(0)
    parts = [[rng.choice((60, 110, 200)) + rng.randint(0, 9) for _ in range(num)]
             for num in (16, 13, 0)]
    monkeypatch.setattr(running, "gather",
                        lambda own: [sorted(part, reverse=True) for part in parts])
    cut = [model.aligned_micro_batches(part, 1000) for part in parts]
    assert cut[2] == [] and len(cut[0]) > 3
    for part, groups in zip(parts, cut):
        assert sorted(row for group in groups for row in group) == list(range(len(part)))
        assert all(len(group) * max(part[row] for row in group) <= 1000 for group in groups)
    for first, second in zip(cut[0], cut[1][:-1]):
        assert len(first) == len(second)
    monkeypatch.setattr(running, "gather", lambda own: [own])
    assert model.aligned_micro_batches(parts[0], 1000) == model.micro_batches(parts[0], 1000)


def test_num_params_counts_what_multiplies():
    tokenizer = train_tokenizer(["abc"] * 3, ["1"])
    shape = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
                 num_key_value_heads=1, intermediate_size=64)
    sizes = {}
    for tied in (True, False):
        policy = model.Policy(LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied)),
                              tokenizer)
        sizes[tied] = policy.num_params
    assert sizes[True] == sizes[False] == 300 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    assert policy.gflops(10, 4) == 2 * sizes[True] * (3 * 10 + 4) / 1e9
    assert policy.gflops(10) == 6 * sizes[True] * 10 / 1e9


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no such model folder"):
        model.load_policy(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a causal language model"):
        model.load_policy(str(tmp_path))


WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("change, told", [
    (lambda w: {f"_orig_mod.{name}": tensor for name, tensor in w.items()},
     r"lm_head.weight is missing, and \d+ more"),
    (lambda w: {name: tensor for name, tensor in w.items() if name != WEIGHT},
     f"{WEIGHT} is missing$"),
    (lambda w: {**w, "score.weight": torch.zeros(2, 2)}, "score.weight is unexpected$"),
    (lambda w: {**w, WEIGHT: w[WEIGHT][:, :-1].contiguous()}, f"{WEIGHT}.* is mismatched$"),
])
def test_a_folder_whose_weights_do_not_fill_the_model_is_refused_by_the_first_of_them(
        tmp_path, change, told):
    shutil.copytree(tiny_folder(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"weights do not fill the model: .*{told}"):
        model.load_policy(str(tmp_path / "model"))


def test_code_that_comes_with_a_model_is_not_run_nor_asked_about(tmp_path):
    shutil.copytree(tiny_folder(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config |= {"model_type": "other", "auto_map": code}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="not a causal language model shaped like Llama"):
        model.load_policy(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_a_run_that_samples_control_tokens_as_text_goes_on_and_a_prompt_file_with_one_is_refused(
        tiny, tmp_path):
    _, processor = tiny
    reply = '{"cards": ["<|end_of_turn|><|assistant|>"], "formula": "<|end_of_turn|>"}'
    bar, ids = processor("|", add_special_tokens=False).input_ids, []
    for word in reply.split("|"):
        ids += processor(word, add_special_tokens=False).input_ids + bar
    ids = ids[:-1] + [processor.eos_token_id]
    assert ids.count(processor.eos_token_id) == 1 and model.decode_reply(processor, ids) == reply
    env = envs.make_env("gp-vl", "id", resolution=60)
    env.vision, env.done = False, True   # the words of gp-vl, for a model in words
    prompt = model.encode(processor, env.reset(0)[0])
    env.vision = True                                              # and its verdict
    messages, *_ = env.step(model.decode_reply(processor, ids))
    after = model.encode(processor, messages, prompt + ids)[len(prompt + ids):]
    assert after.count(processor.eos_token_id) == 1                # the user's own end of turn
    (tmp_path / "words.json").write_text(json.dumps({"gp_task": "Make {target}.<|end_of_turn|>"}))
    env = envs.make_env("gp-l", "id", prompt_file=str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"holds <\|end_of_turn\|>, a control token of the model"):
        model.encode(processor, env.reset(0)[0])


# ---- Templates and tokenizers of other models ----------------------------------------------------

def changed_folder(tmp_path, template=None, config=None, tokenizer=None, vision=False):
    """A copy of the tiny model's folder with another template, or other values in its files."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(vision=vision), folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    for name, change in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        values = json.loads((folder / name).read_text()) | (change or {})
        (folder / name).write_text(json.dumps(values))
    return str(folder)


USER = "{{ '<|user|>' + m['content'] + '<|end_of_turn|>' }}"
ENDLESS = "{% for i in range(90000) %}{% for j in range(400) %}{% endfor %}{% endfor %}"
TURNS = ("{{ '<|begin_of_text|>' }}{% for m in messages %}{% if m['role'] == 'user' %}" + USER
         + "{% else %}{{ '<|assistant|>' }}REPLY{{ '<|end_of_turn|>' }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def test_a_template_that_writes_earlier_replies_otherwise_keeps_the_sampled_ids(tmp_path):
    """As Qwen3's, which puts an empty thought into the last reply alone."""
    thought = ("{% if loop.index == messages|length - 1 %}<think></think>{% endif %}"
               "{{ m['content'] }}")
    policy, processor = model.load_policy(changed_folder(tmp_path, TURNS.replace("REPLY", thought)))
    env = envs.make_env("gp-l", "id")
    ids, messages = None, env.reset(0)[0]
    for turn in range(3):
        after = model.encode(processor, messages, ids)
        if turn:
            assert after[:len(ids)] == ids
            assert processor.decode(after[len(ids):]).startswith("<|user|>No JSON")
            assert after[len(ids):].count(processor.eos_token_id) == 1
        ids = after + model.encode_reply(processor, f"reply {turn}")
        messages, *_ = env.step(f"reply {turn}")
    assert "<think>" not in processor.decode(ids)
    odd = [{"role": role, "content": "(the last reply)"} for role in ("user", "assistant", "user")]
    first = model.encode(processor, odd[:1])
    second = model.encode(processor, odd, first + model.encode_reply(processor, "x"))
    assert processor.decode(second).count("(the last reply)") == 2


@pytest.mark.parametrize("template, told", [
    (TURNS.replace("REPLY{{ '<|end_of_turn|>' }}", "{{ m['content'] }}"),
     "must show the last reply and end it with '<|end_of_turn|>'"),
    (TURNS.replace("REPLY", "{{ raise_exception('no replies') }}"), "no replies"),
    (TURNS.replace("REPLY", "{{ m['content'] + 1 }}"), "cannot be used: "),
    (TURNS.replace("REPLY", "{{ ''.__class__.__mro__ }}"), "cannot be used: .*unsafe"),
    ("{% for m in messages %}", "cannot be used: "),
    ("{{ '<|begin_of_text|>' }}" + TURNS.replace("REPLY", "{{ m['content'] }}"),
     "must write <|begin_of_text|> once, not twice"),
    (TURNS.replace("REPLY", ENDLESS), "does not come to an end within 0.5 s"),
    (TURNS.replace("REPLY", "{% if messages|length > 9 %}" + ENDLESS + "{% endif %}"
                   "{{ m['content'] }}"), "does not come to an end within 0.5 s"),
    (TURNS.replace("REPLY", "{% set x = 7**(messages|length*300000000) %}{{ m['content'] }}"),
     "computes a power"),
    (TURNS.replace("REPLY", "{{ 9 ** 9**9 }}{{ m['content'] }}"), "computes a power"),
])
def test_a_template_that_cannot_be_used_is_refused_when_the_model_is_loaded(
        tmp_path, monkeypatch, template, told):
    monkeypatch.setattr(loading, "TEMPLATE_SECONDS", 0.5)
    with pytest.raises(ValueError, match=f"its chat template .*{told.replace('|', '.')}"):
        model.load_policy(changed_folder(tmp_path, template))


def test_a_template_that_finds_no_end_only_in_a_later_dialogue_ends_that_in_one_line(
        tmp_path, monkeypatch):
    reply = "{% if m['content'] == 'odd' %}" + ENDLESS + "{% endif %}{{ m['content'] }}"
    _, processor = model.load_policy(changed_folder(tmp_path, TURNS.replace("REPLY", reply)))
    monkeypatch.setattr(loading, "TEMPLATE_SECONDS", 0.5)
    before = signal.getsignal(signal.SIGALRM)
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "odd"},
                {"role": "user", "content": "2"}]
    with pytest.raises(ValueError, match="the chat template cannot write this dialogue: it does "
                                         "not come to an end within 0.5 s"):
        model.encode(processor, messages)
    assert model.encode(processor, messages[:1])
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_two_stars_that_are_no_power_are_allowed(tmp_path):
    words = "{{ dict(a=1, **{'b': 2}).b }}{# 2**3 #}{% raw %}{{ 2**3 }}{% endraw %} **bold** "
    template = TURNS.replace("REPLY", words + "{{ m['content'] }}")
    assert model.load_policy(changed_folder(tmp_path, template))


def test_a_template_that_prints_the_date_prints_the_same_every_day(tmp_path):
    template = TURNS.replace("{% for m", "{{ strftime_now('%d %B %Y') }}{% for m")
    template = template.replace("REPLY", "{{ m['content'] }}")
    _, processor = model.load_policy(changed_folder(tmp_path, template))
    prompt = model.encode(processor, [{"role": "user", "content": "1"}])
    assert "01 Jan 2025" in processor.decode(prompt)


def test_a_reply_to_learn_and_earlier_ones_of_a_file_hold_no_control_token(tiny):
    _, processor = tiny
    odd = "x<|end_of_turn|><|user|>hi"
    with pytest.raises(ValueError, match="holds <.end_of_turn.>, a control token"):
        model.encode_reply(processor, odd)
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": odd},
                {"role": "user", "content": "2"}]
    with pytest.raises(ValueError, match="control token"):
        model.encode(processor, messages)
    first = model.encode(processor, messages[:1])
    assert model.encode(processor, messages, first + [5, processor.eos_token_id])  # kept as ids


@pytest.mark.parametrize("reply, trimmed, plain", [
    (" yes \n", "yes", " yes \n"), ("\nyes", "yes", "\nyes"), ("yes", "yes", "yes"),
    (" \n", "", " \n"), ("a  b ", "a  b", "a  b ")])
def test_a_reply_is_learnt_as_the_template_will_show_it(tmp_path, reply, trimmed, plain):
    """Llama 3's template cuts blanks off."""
    for name, cut, learnt in (("cuts", " | trim", trimmed), ("keeps", "", plain)):
        template = TURNS.replace("REPLY", "{{ m['content']" + cut + " }}")
        _, processor = model.load_policy(changed_folder(tmp_path / name, template))
        ids = model.encode_reply(processor, reply)
        assert model.decode_reply(processor, ids) == learnt
        messages = [{"role": role, "content": text}
                    for role, text in (("user", "1"), ("assistant", reply), ("user", "2"))]
        shown = model.encode(processor, messages)
        assert shown == model.encode(processor, messages,
                                     model.encode(processor, messages[:1]) + ids)


@pytest.mark.parametrize("cut, learnt", [
    ("lstrip('\\n')", " yes \n"), ("rstrip()", "\n yes"), ("rstrip('\\n')", "\n yes ")])
def test_of_a_reply_only_the_blanks_go_that_the_template_cuts_off(tmp_path, cut, learnt):
    template = TURNS.replace("REPLY", "{{ m['content']." + cut + " }}")
    _, processor = model.load_policy(changed_folder(tmp_path, template))
    ids = model.encode_reply(processor, "\n yes \n")
    assert model.decode_reply(processor, ids) == learnt


def test_a_tokenizer_that_would_cut_control_tokens_into_letters_is_told_not_to(tmp_path, capsys):
    folder = changed_folder(tmp_path, tokenizer={"split_special_tokens": True})
    policy, processor = model.load_policy(folder)
    assert "split_special_tokens of its tokenizer is turned off" in capsys.readouterr().out
    _, plain = model.load_policy(tiny_folder())
    assert some_prompts(processor) == some_prompts(plain)
    processor.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").split_special_tokens is False


def test_a_tokenizer_that_draws_other_tokens_each_time_is_told_not_to(tmp_path, capsys):
    folder = changed_folder(tmp_path)
    path = tmp_path / "model" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["dropout"] = 0.5
    path.write_text(json.dumps(values))
    _, processor = model.load_policy(folder)
    assert "dropout 0.5 of its tokenizer is turned off" in capsys.readouterr().out
    _, plain = model.load_policy(tiny_folder())
    for _ in range(5):
        assert some_prompts(processor) == some_prompts(plain)
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert saved["model"]["dropout"] is None


def test_what_transformers_warns_of_while_a_folder_is_read_is_printed_in_one_line(
        tmp_path, capsys, monkeypatch):
    read = AutoTokenizer.from_pretrained

    def warn(*args, **kwargs):
        logger = logging.getLogger("transformers.tokenization_utils_tokenizers")
        logger.warning("an incorrect regex\npattern. Set the `fix_mistral_regex=True` flag.")
        return read(*args, **kwargs)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", warn)
    folder = changed_folder(tmp_path)
    model.load_policy(folder)
    told = capsys.readouterr()
    assert told.out == (
        f"model '{folder}': transformers warns: an incorrect regex pattern. Set the "
        "`fix_mistral_regex=True` flag. For that, write \"fix_mistral_regex\": true into its "
        "tokenizer_config.json.\n")
    assert "regex" not in told.err
    logging.getLogger("transformers").warning("and nothing later")
    assert capsys.readouterr() == ("", "")


def test_a_model_whose_cache_has_no_rows_to_drop_is_refused(monkeypatch):
    monkeypatch.delattr(loading.DynamicCache.__mro__[1], "reorder_cache")
    with pytest.raises(ValueError, match="rows of its cache cannot be dropped .llama."):
        model.load_policy(tiny_folder())


def test_chunks_of_attention_bound_the_context():
    config = LlamaConfig(max_position_embeddings=512)
    config.layer_types, config.attention_chunk_size = ["chunked_attention", "full_attention"], 16
    assert loading.context_of(config) == 16
    assert loading.context_of(LlamaConfig(max_position_embeddings=512)) == 512


def test_longrope_bounds_the_context_where_one_long_row_would_change_the_rows_beside_it(tmp_path):
    """Phi-3-128k, Phi-3.5 and Phi-4-mini."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
            "long_factor": [9.0] * 4, "original_max_position_embeddings": 64}
    folder = changed_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=64, max_position_embeddings=256,
        original_max_position_embeddings=64, rope_parameters=rope, pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    policy, processor = model.load_policy(folder)
    assert policy.context == 64
    rows = [([5] * 9, [7] * 9), ([5] * 40, [7] * 24)]
    alone, _ = policy(model.collate([[rows[0]]], policy.device))
    beside, _ = policy(model.collate([[row] for row in rows], policy.device))
    torch.testing.assert_close(beside[0, :9], alone[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="a dialogue of 65 tokens.* context of 64 .*longrope"):
        policy(model.collate([[([5] * 40, [7] * 25)]], policy.device))
    nested = LlamaConfig(max_position_embeddings=512)
    nested.rope_parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    assert loading.context_of(nested) == 64


def test_the_first_token_of_a_prompt_may_mark_every_turn(tmp_path):
    """As SmolLM2's, whose beginning-of-sequence token is that of a turn."""
    template = TURNS.replace("{{ '<|begin_of_text|>' }}", "").replace("REPLY", "{{ m['content'] }}")
    for role in ("<|user|>", "<|assistant|>"):
        template = template.replace(role, "<|begin_of_text|>")
    policy, processor = model.load_policy(changed_folder(tmp_path, template))
    messages = [{"role": role, "content": "1"} for role in ("user", "assistant", "user")]
    assert model.encode(processor, messages).count(processor.bos_token_id) == 4


def test_of_several_named_templates_the_default_counts(tmp_path):
    folder = changed_folder(tmp_path)
    other = TURNS.replace("<|user|>", "<|assistant|>").replace("REPLY", "{{ m['content'] }}")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "other.jinja").write_text(other)
    _, processor = model.load_policy(folder)
    assert set(processor.chat_template) == {"default", "other"}
    messages = [{"role": "user", "content": "1"}]
    assert "<|user|>" in processor.decode(model.encode(processor, messages))
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template .or none called default."):
        model.load_policy(folder)


def test_a_tokenizer_that_marks_the_beginning_of_a_text_marks_none_in_a_later_turn():
    """As Llama 2's, which writes a blank before a text, and not behind a control token."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.train_from_iterator(["a question", "an answer"] * 9,
                            trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    template = ("{% for m in messages %}{{ m['content'] }}"
                "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}")
    processor = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>",
                                        chat_template=template)
    question, answer = ({"role": role, "content": text}
                        for role, text in (("user", "a question"), ("assistant", "an answer")))
    messages = [question, answer, question]
    whole = model.encode(processor, messages)
    first = whole[:whole.index(processor.eos_token_id) + 1]
    assert model.encode(processor, messages, first) == whole


# ---- What cannot be computed here ----------------------------------------------------------------

def broken_weights(folder, change):
    path = Path(folder) / "model.safetensors"
    weights = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def untied_with(folder, value):
    """Embeddings of their own, with this value at one token."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_overflow_says_so_and_replies_nothing(tiny, temperature):
    """Its weights are finite numbers, and so may be the logits of the text that is tried first. The
    likeliest of tokens whose logits are none is the first one of all."""
    policy, processor = copy.deepcopy(tiny[0]), tiny[1]
    with torch.no_grad():
        policy.backbone.model.norm.weight.mul_(1e30)
        untied = torch.nn.Parameter(policy.backbone.lm_head.weight * 1e30)
        policy.backbone.lm_head.weight = untied
    with pytest.raises(ValueError, match="logits are no finite numbers, so no reply can be sampl"):
        policy.generate(some_prompts(processor, 2), torch.zeros(2, 4), 4, temperature)


def broken_value_head(folder, value):
    weights = model.load_policy(folder)[0].value_head.state_dict()
    weights["0.bias"].fill_(value)
    save_file(weights, folder / "value_head.safetensors")


def template_in_config(folder, template):
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


@pytest.mark.parametrize("prepare, told", [
    (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
     "an adapter .PEFT. without its model: merge it"),
    (lambda folder: (folder / "value_head.safetensors").write_bytes(b"\x00" * 40),
     "value_head.safetensors: not this model's value head"),
    (lambda folder: save_file({"0.weight": torch.zeros(2)}, folder / "value_head.safetensors"),
     "value_head.safetensors: not this"),
    (lambda folder: broken_value_head(folder, float("nan")),
     "value_head.safetensors: its weights 0.bias hold values that are no finite numbers"),
    (lambda folder: broken_weights(folder, lambda _, w: w * float("nan")), "no finite numbers"),
    # Only a rare token leads to it.
    (lambda folder: untied_with(folder, float("inf")),
     "its weights model.embed_tokens.weight hold values that are no finite numbers"),
    (lambda folder: (folder / "tokenizer.json").write_text("[" * 9999),
     "not a causal language model shaped like Llama"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""),
     "not a causal language model shaped like Llama"),
    (lambda folder: template_in_config(folder, 5),
     "\"chat_template\" of its tokenizer_config.json is 5, not a text"),
])
def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path, prepare, told):
    folder = changed_folder(tmp_path)
    prepare(tmp_path / "model")
    with pytest.raises(ValueError, match=told) as error:
        model.load_policy(folder)
    assert "\n" not in str(error.value)


def test_a_config_that_asks_for_tuples_changes_nothing(tmp_path, tiny):
    policy, processor = model.load_policy(changed_folder(tmp_path, config={"return_dict": False}))
    prompts = some_prompts(processor)
    assert policy.generate(prompts, torch.zeros(len(prompts), 4), 4, 0.0)
    assert policy(model.collate([[(prompts[0], [5])]], policy.device))


def test_a_quantized_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="weights are quantized"):
        quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        model.load_policy(changed_folder(tmp_path, config=quantized))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    folder = changed_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|new_end|>"})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end_of_turn|>", "<|new_end|>")
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"more tokens \(\d+\) than the model \(\d+\): resize"):
        model.load_policy(folder)


def test_a_processor_that_cuts_more_tiles_than_the_model_takes_is_refused(tmp_path):
    folder = changed_folder(tmp_path, vision=True)
    path = tmp_path / "model" / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["max_image_tiles"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="up to 4 tiles, the model takes 1"):
        model.load_policy(folder, vision=True)


@pytest.mark.parametrize("change", [
    {"max_position_embeddings": 60},
    {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 60}])
def test_a_dialogue_longer_than_the_context_or_the_sliding_window_is_refused(tmp_path, change):
    policy, processor = model.load_policy(changed_folder(tmp_path, config=change))
    prompt = some_prompts(processor, 1)[0]
    room = 60 - len(prompt)
    assert len(policy.generate([prompt], model.sampling_uniforms([0], room), room, 1.0)) == 1
    told = ("a dialogue of 61 tokens.* does not fit the model's context of 60 "
            ".or its sliding window, or the original length of longrope.")
    with pytest.raises(ValueError, match=told):
        policy.generate([prompt], model.sampling_uniforms([0], room + 1), room + 1, 1.0)
    with pytest.raises(ValueError, match="a dialogue of 61 tokens"):
        policy(model.collate([[(prompt, [5] * (room + 1))]], policy.device))


# ---- bfloat16 ------------------------------------------------------------------------------------

def test_logprobs_in_bfloat16_are_those_of_the_exact_product_of_its_factors(tmp_path):
    policy, processor = model.load_policy(tiny_folder(), dtype="bfloat16")
    prompts, temperature = some_prompts(processor, 6), 0.2
    weight = policy.backbone.lm_head.weight
    weight.data /= weight.std()                        # logits as large as those of a trained model
    reply = model.encode_reply(processor, '{"cards": ["A"], "formula": "1+2"}')
    replies = [reply[:12 + i] for i in range(6)]
    batch = model.collate([[pair] for pair in zip(prompts, replies)], policy.device)
    with torch.no_grad():
        logprobs, _ = policy(batch, temperature)
        with policy.autocast():
            out = policy.backbone.model(input_ids=batch["input_ids"], use_cache=False)
    hidden = out.last_hidden_state.bfloat16().double()
    logits = hidden @ weight.bfloat16().double().T / temperature
    exact = torch.log_softmax(logits.masked_fill(policy.banned, -math.inf), -1)
    for row, (prompt, reply) in enumerate(zip(prompts, replies)):
        own = exact[row, len(prompt) - 1:len(prompt) + len(reply) - 1]
        expected = own.gather(1, torch.tensor(reply)[:, None]).sum()
        assert abs(float(logprobs[row].sum() - expected)) < 1e-3 and expected < -5


@pytest.mark.parametrize("decoder", [CacheDecoder, LlamaDecoder])
def test_sampling_in_bfloat16_sees_logits_that_are_not_rounded(decoder, monkeypatch):
    policy, processor = model.load_policy(tiny_folder(), dtype="bfloat16")
    product, seen = support.decoder.wide_product, []

    def watched(hidden, weight):
        seen.append((hidden, product(hidden, weight)))
        return seen[-1][1]
    monkeypatch.setattr(support.decoder, "wide_product", watched)
    monkeypatch.setattr(model, "LlamaDecoder", decoder)
    policy.generate(some_prompts(processor, 3), model.sampling_uniforms(range(3), 5), 5, 0.2)
    assert len(seen) == 5
    for hidden, logits in seen:
        exact = hidden.double() @ policy.backbone.lm_head.weight.bfloat16().double().T
        assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
        assert (logits - exact).abs().max() < 1e-5


def test_top_p_samples_from_the_likeliest_tokens_that_have_this_share(tiny):
    policy, _ = tiny
    probs = torch.full(policy.banned.shape, 1e-12, device=policy.device)
    free = (~policy.banned).nonzero()[:4, 0]
    probs[free] = probs.new_tensor([0.1, 0.5, 0.3, 0.1])
    uniforms = (torch.arange(1000, dtype=torch.float64, device=policy.device) + 0.5) / 1000
    for top_p, shares in ((1.0, [0.1, 0.5, 0.3, 0.1]), (0.75, [0, 0.625, 0.375, 0]),
                          (0.4, [0, 1, 0, 0]), (0.01, [0, 1, 0, 0])):
        ids, logprobs = policy.pick(probs.log().expand(1000, -1), uniforms, 1.0, top_p)
        found = [round(float((ids == i).float().mean()), 2) for i in free]
        assert found == [round(share, 2) for share in shares]


# ---- What a rollout keeps ------------------------------------------------------------------------

def talk(policy, processor, memory, limit=6, turns=4, num=5):
    """Sampled dialogues as in a rollout, of which some go on and some begin anew.

    Returns their (prompt, response, log-probs) by turn.
    """
    prompts, played = [prompt[:len(prompt) // 2] for prompt in some_prompts(processor, num)], []
    for turn in range(turns):
        uniforms = model.sampling_uniforms([(turn, i) for i in range(num)], limit)
        replies = policy.generate(prompts, uniforms, limit, 1.0, token_budget=200, memory=memory)
        played.append([(prompt, *reply) for prompt, reply in zip(prompts, replies)])
        prompts = [prompt + ids + [7, 8, 9 + i] if (turn + i) % 3
                   else prompt[:len(prompt) - i] + [11, 12]
                   for i, (prompt, (ids, _)) in enumerate(zip(prompts, replies))]
    return played


def other_policies(processor, device):
    """Random models of other classes: grouped heads, a sliding window beside whole attention."""
    shape = dict(vocab_size=len(processor), hidden_size=32, num_hidden_layers=2,
                 num_attention_heads=4, intermediate_size=64, num_key_value_heads=2)
    torch.manual_seed(0)
    for config, kind in ((Qwen2Config(**shape), Qwen2ForCausalLM),
                         (Gemma3TextConfig(**shape, head_dim=8,
                                           layer_types=["sliding_attention", "full_attention"],
                                           sliding_window=900), Gemma3ForCausalLM)):
        yield model.Policy(kind(config), processor).to(device)


def test_what_was_read_is_not_read_again_and_every_reply_is_the_same(tiny, device, monkeypatch):
    policy, processor = tiny
    for policy in (policy, *other_policies(processor, device)):
        read, forward = [], CacheDecoder.forward
        monkeypatch.setattr(CacheDecoder, "forward",
                            lambda self, ids, *more, **vision: read.append(ids.numel())
                            or forward(self, ids, *more, **vision))
        expected = talk(policy, processor, None)
        anew, memory = sum(read), model.RolloutMemory(policy, 200, 2 ** 30)
        read.clear()
        found = talk(policy, processor, memory)
        monkeypatch.setattr(CacheDecoder, "forward", forward)
        assert sum(read) < 0.7 * anew
        for one, other in zip(sum(found, []), sum(expected, []), strict=True):
            assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], abs=1e-5)
        assert memory.num_bytes == sum(kept.nbytes for _, _, kept in memory.dialogues.values()) > 0
        assert all(len(ids) == len(kept) for ids, _, kept in memory.dialogues.values())


def test_a_memory_holds_no_more_than_its_limit_and_forgets_who_is_gone(tiny):
    policy, processor = tiny
    whole = model.RolloutMemory(policy, 200, 2 ** 30)
    expected = talk(policy, processor, whole)
    small = model.RolloutMemory(policy, 200, whole.num_bytes // 2)
    put, most = small.put, []
    small.put = lambda *args: (put(*args), most.append(small.num_bytes))
    found = talk(policy, processor, small)
    assert 0 < max(most) <= small.limit and len(small.dialogues) < len(whole.dialogues) == 5
    replies, others = ([[ids for _, ids, _ in turn] for turn in played]
                       for played in (found, expected))
    assert replies == others
    policy.generate([[1, 2]], np.zeros((1, 2)), 2, 1.0, memory=whole, owners=["somebody new"])
    assert list(whole.dialogues) == ["somebody new"]


def test_behind_another_picture_nothing_is_the_same(tiny):
    policy, _ = tiny
    memory, kept = model.RolloutMemory(policy, 200, 10 ** 6), torch.zeros(3, 4)
    for picture, expected in ((None, None), ("a picture", 2)):
        memory.put(0, [1, 2, 3], "a picture", kept)
        found = memory.take(0, [1, 2, 5, 6], picture)
        assert (None if found is None else len(found)) == expected and memory.num_bytes == 0
    memory.put(0, [1, 2, 3], None, kept)
    assert len(memory.take(0, [1, 2, 3], None)) == 2   # the last token's logits are wanted
