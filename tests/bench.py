"""Time and memory of this project, beside baselines in the shape of the paper's official code.

    OMP_NUM_THREADS=1 python tests/bench.py          # a Markdown table; the machine must be idle
    python tests/bench.py --only rollout,logprob --device cuda
    python tests/bench.py --only rollout,turns,sft,trl --model models/smollm2 --dtype bfloat16
    python tests/bench.py --only limits,decode --model models/smollm2 --profile

A baseline does the same job as ours and is written here, in our words. Both sides run in one
process with the same seed, weights and threads. They take turns (A, B, A, B, ...), and the median
of the rounds counts. A ratio above 1 is in our favour. Where both sides compute the same thing,
their results are compared first; a difference ends the program.

    section    baseline
    rollout    Hugging Face `generate`, one prompt at a time, every hidden state and score kept,
               then one more forward with a log-softmax over all positions. For sampling alone:
               `generate` on a left-padded batch
    logprob    the vocabulary at every position: temperature, log-softmax, bfloat16, gather, mask,
               sum, backward
    vision     both of the above with a picture: batch 1, the vision tower in every `generate` and
               forward, a row for each turn
    turns      `rollout` for five turns of a dialogue; and ours that keeps nothing between turns
    sft        Hugging Face's loss over `labels`, the whole batch padded to its longest
    trl        TRL's SFTTrainer (`pip install trl`), on one micro-batch
    verifier   fields by regular expressions, checks on the characters, `eval`, a search in the list
               of solutions
    envs       random cards, until some permutation with operators and brackets gives 24 by `eval`
    growth     none: rates of ours as batch, prompt, common head or dialogue grow
    limits     none: the share of the machine's matrix rate that ours reaches. On a GPU the models
               have 1.2 and 2.1 billion random weights in bfloat16; on a CPU they are small, float32
    decode     none: the share of its memory bandwidth, with the smaller of those models
    ranks      one process instead of two, a thread each
    virl       every point of a rail is looked up among all panoramas at every reset; every view
               computes its rays anew

With --model a real model stands in these six sections for the random one in words: it has its
vocabulary, depth and weights, and the tokens are random as before. With --dtype bfloat16 both sides
compute in bfloat16. Then Hugging Face samples from weights in bfloat16, and trains under torch's
autocast.

A percentage says how fast the FLOPs of the job were done. It is a share of the float32 matrix
rate, measured in the same run. The job needs 2 FLOPs for each weight and token, 6 with backward.
The output projection counts only where a token is predicted; attention and padding count nowhere.
Both sides are given the same FLOPs, so work that a side does in excess lowers its percentage.
"""
import argparse
import copy
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import (LlamaConfig, LlamaForCausalLM, MllamaForConditionalGeneration,
                          MllamaVisionConfig)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import model
import rl
import verify
from model import (LlamaDecoder, Policy, RolloutMemory, collate, load_policy,
                   sampling_uniforms)
from sft import Config as SFTConfig
from sft import train_step
from support import solver, streets, tiny
from support.cards import draw_hand
from support.running import OneLineParser, enable_checkpointing, fail, memory_estimate, pick_device

MAX_LOAD = 0.5
# The shape of Llama-3.2-1B.
LARGE = dict(hidden_size=2048, num_attention_heads=32, num_key_value_heads=8,
             intermediate_size=8192)
MIB = 2 ** 20


# ---- Measuring -----------------------------------------------------------------------------------

def medians(args, *functions):
    """Median seconds of each function over the rounds.

    The functions take turns, and the first round only warms up.
    """
    synchronise = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    times = [[] for _ in functions]
    for _ in range(args.rounds + 1):
        for function, column in zip(functions, times):
            synchronise()
            started = time.perf_counter()
            function()
            synchronise()
            column.append(time.perf_counter() - started)
    return [statistics.median(column[1:]) for column in times]


def machine_rates(args):
    """What the machine can do: matrix products in FLOP/s by type, and copying in bytes/s.

    A copied byte counts twice, as read and as written.
    """
    n, functions = 8192 if args.device.type == "cuda" else 2048, []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(2))
        functions.append(partial(torch.mm, a, b, out=torch.empty_like(a)))
    source = torch.ones(256 * MIB // 4, device=args.device)
    fp32, bf16, copying = medians(args, *functions, partial(torch.empty_like(source).copy_, source))
    return {"float32": 2 * n ** 3 / fp32, "bfloat16": 2 * n ** 3 / bf16,
            "copy": 2 * 256 * MIB / copying}


def row(what, seconds, unit="", amounts=(1, 1), flops=None, rates=None):
    """A row of the table from (ours, baseline) seconds and amounts.

    It has amounts per second, or seconds if there is no unit. `flops` are those of one unit of the
    amount.
    """
    texts = [f"{amount / s:,.0f} {unit}/s" if unit else f"{s:.3f} s"
             for s, amount in zip(seconds, amounts)]
    if flops:
        shares = [amount * flops / s / rates["float32"] for s, amount in zip(seconds, amounts)]
        texts = [f"{text} ({share:.1%})" for text, share in zip(texts, shares)]
    return what, *texts, amounts[0] / seconds[0] * seconds[1] / amounts[1]


def rows_with_caches(args, caches, what, functions, unit, amounts):
    """Two rows for (ours, baseline) functions: caches emptied before every round, and full ones."""
    def cold():
        for cached in caches:
            cached.cache_clear()
        functions[0]()

    t_cold, t_warm, t_baseline = medians(args, cold, *functions)
    yield row(f"{what}; caches empty at the start", (t_cold, t_baseline), unit, amounts)
    yield row(f"{what}; caches full", (t_warm, t_baseline), unit, amounts)


def expect_close(what, ours, baseline, dtype=torch.float32):
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2       # bfloat16 rounds
    if not math.isclose(ours, baseline, rel_tol=tolerance):
        fail(f"{what}: ours is {ours}, the baseline's {baseline}")


# ---- Models --------------------------------------------------------------------------------------

def make_tokenizer():
    return tiny.train_tokenizer(tiny.sample_texts("gp-l", num=20),
                                tiny.atoms_of("gp-l", envs.make_env("gp-l")))


def make_policy(args, vocab_size, layers, dtype="float32", **shape):
    """A random-init Llama, 256 wide unless `shape` says otherwise.

    With --model it is that one. It may sample every token, and none of them ends a reply.
    """
    if args.model:
        policy, _ = load_policy(args.model, args.dtype, args.device)
        policy.banned.fill_(False)
        policy.eos_id = -1
        return policy
    shape = dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=8,
                 intermediate_size=672) | shape
    torch.manual_seed(args.seed)
    with args.device:
        backbone = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_hidden_layers=layers,
                                                bos_token_id=None, eos_token_id=None,
                                                pad_token_id=0, **shape))
        policy = Policy(backbone, make_tokenizer(), dtype)
    policy.banned.fill_(False)
    policy.eos_id = -1
    return policy


def vocabulary_of(policy):
    return policy.backbone.lm_head.weight.shape[0]


def for_sampling(policy):
    """What Hugging Face samples from: the weights in the type that ours computes in."""
    return SimpleNamespace(backbone=copy.deepcopy(policy.backbone).to(policy.dtype),
                           device=policy.device)


def flops_needed(policy, flops_per_weight, tokens, predicted):
    """FLOPs of the body on `tokens` and of the output projection on the `predicted` among them."""
    head = policy.backbone.lm_head.weight.numel()
    return flops_per_weight * ((policy.num_params - head) * tokens + head * predicted)


def random_samples(args, vocab_size, lengths):
    """A (prompt_ids, response_ids) pair of random tokens for every pair of lengths."""
    rng = random.Random(args.seed)
    return [[[rng.randrange(1, vocab_size) for _ in range(length)] for length in pair]
            for pair in lengths]


def baseline_batch(samples, device):
    """(input_ids padded on the right, where they are no padding, where a response): (B, T) each."""
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + r) for p, r in samples],
                                                batch_first=True)
    starts, ends = torch.tensor([(len(p), len(p) + len(r))
                                 for p, r in samples]).T[..., None]            # (B, 1) each
    columns = torch.arange(input_ids.shape[1])
    return [t.to(device)
            for t in (input_ids, (columns < ends).long(), (columns >= starts) & (columns < ends))]


# ---- Rollout -------------------------------------------------------------------------------------

def baseline_generate(policy, prompts, new_tokens, **kwargs):
    """Sample exactly `new_tokens` for every prompt: no id ends a reply."""
    P = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=policy.device)
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=policy.device)
    return policy.backbone.generate(input_ids, attention_mask=mask, do_sample=True, temperature=1.0,
                                    top_k=0, top_p=1.0, max_new_tokens=new_tokens, pad_token_id=0,
                                    **kwargs)


def baseline_logprobs(policy, samples, temperature=1.0, **vision):
    """Summed log-prob (B,) of the response of every (prompt_ids, response_ids).

    The steps are those of the official code (rl/trainer/model_tz_llama.py): every hidden state is
    kept, every position scaled, normalised and rounded.
    """
    input_ids, mask, is_response = baseline_batch(samples, policy.device)
    logits = policy.backbone(input_ids=input_ids, attention_mask=mask, output_hidden_states=True,
                             use_cache=False, **vision).logits
    logprobs = torch.log_softmax((logits * (1 / temperature)).float(),
                                 dim=-1).bfloat16()                            # (B, T, V)
    return (logprobs[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]
            * is_response[:, 1:]).float().sum(1)


@torch.no_grad()
def rollout(args, rates):
    B, R, few = 32, 60, 4
    policy = make_policy(args, 4096, layers=4)
    theirs = for_sampling(policy)
    prompts = [prompt for prompt, _ in random_samples(
        args, vocabulary_of(policy), [(150 - 20 * (i % 2), 0) for i in range(B)])]
    uniforms = sampling_uniforms([(args.seed, i) for i in range(B)], R)

    def sample():
        return [response_ids
                for response_ids, _ in policy.generate(prompts, uniforms, R, temperature=1.0)]

    def ours():
        return policy(collate([[turn] for turn in zip(prompts, sample())], args.device),
                      temperature=1.0)[0].sum(1)

    def official():
        for prompt in prompts[:few]:
            made = baseline_generate(theirs, [prompt], R, return_dict_in_generate=True,
                                     output_scores=True, output_hidden_states=True)
            baseline_logprobs(theirs, [(prompt, made.sequences[0, len(prompt):].tolist())])

    scored = baseline_logprobs(theirs, [(prompts[0], sample()[0])])
    expect_close("rollout log-prob", float(ours()[0]), float(scored), policy.dtype)
    t_ours, t_official, t_sampling, t_batched = medians(
        args, ours, official, sample, lambda: baseline_generate(theirs, prompts, R))
    tokens = (B * R, B * R)
    # FLOPs of one pass, for each new token.
    flops = flops_needed(policy, 2, sum(map(len, prompts)) + B * R, B * R) / (B * R)
    yield row(f"sample {R} tokens and score them, {B} prompts of 130 or 150 tokens; baseline: "
              f"batch 1, extrapolated from {few} prompts", (t_ours, t_official * B / few), "tok",
              tokens, 2 * flops, rates)
    yield row(f"sample {R} tokens; baseline: HF generate, left-padded batch",
              (t_sampling, t_batched), "tok", tokens, flops, rates)

    # Ragged replies. A uniform of 0 draws token 0. Token 0 is made the end of a reply, so that
    # lengths can be fixed here. `generate` computes every row until the longest has ended, so it
    # may ignore ends.
    lengths = [min(R, 1 + int(random.Random(i).expovariate(1 / 20))) for i in range(B)]
    uniforms[:] = uniforms.clip(min=0.01)
    uniforms[range(B), [length - 1 for length in lengths]] = 0
    policy.eos_id = 0
    assert [len(reply) for reply in sample()] == lengths
    seconds = medians(args, sample, lambda: baseline_generate(theirs, prompts, max(lengths)))
    yield row(f"the same, ragged: {sum(lengths) / B:.0f} tokens to a reply, {max(lengths)} at most",
              seconds, "tok", (sum(lengths), sum(lengths)))


def turns_of(policy, args, E, first, going_on, R, vocab_size):
    """(prompts, uniforms, replies) of each of five turns of E dialogues, with ragged replies.

    With `going_on` that many new tokens follow each reply. Without it a prompt is the one before
    but for its last quarter.
    """
    rng = random.Random(args.seed)
    def new(num):
        return [rng.randrange(1, vocab_size) for _ in range(num)]

    # A uniform of 0 draws token 0, the end.
    policy.eos_id, prompts, turns = 0, [new(first) for _ in range(E)], []
    for turn in range(5):
        uniforms = sampling_uniforms([(args.seed, turn, i) for i in range(E)], R).clip(min=0.01)
        uniforms[range(E), [min(R, 1 + int(rng.expovariate(2 / R))) - 1 for _ in range(E)]] = 0
        replies = [ids for ids, _ in policy.generate(prompts, uniforms, R, 1.0)]
        turns.append((prompts, uniforms, replies))
        prompts = [prompt + reply + new(going_on) if going_on
                   else prompt[:3 * first // 4] + new(first // 4 + 10)
                   for prompt, reply in zip(prompts, replies)]
    return turns


@torch.no_grad()
def rollout_in_turns(args, rates):
    # A real model takes minutes for eight dialogues.
    E, R, few, large = 8 if args.model else 32, 60, 2, args.device.type == "cuda"
    policy = (make_policy(args, 4096, 16, "bfloat16", **LARGE) if large
              else make_policy(args, 4096, layers=4))
    theirs, vocab_size = for_sampling(policy), vocabulary_of(policy)
    for what, first, going_on in (("GeneralPoints: 256 tokens, then 48 behind each reply", 256, 48),
                                  ("V-IRL: five prompts of 256 tokens, alike but for the last "
                                   "quarter", 256, 0)):
        turns = turns_of(policy, args, E, first, going_on, R, vocab_size)

        def sample(limit=2 ** 32):
            memory = RolloutMemory(policy, 65536, limit)
            return [[ids for ids, _ in policy.generate(prompts, uniforms, R, 1.0, memory=memory)]
                    for prompts, uniforms, _ in turns]

        def ours():
            sample()
            if going_on:
                dialogues = [[(prompts[i], replies[i]) for prompts, _, replies in turns]
                             for i in range(E)]
            else:
                dialogues = [[pair] for prompts, _, replies in turns
                             for pair in zip(prompts, replies)]
            for start in range(0, len(dialogues), E):
                policy(collate(dialogues[start:start + E], args.device), temperature=1.0)

        def official():
            for prompts, _, replies in turns:
                for prompt, reply in list(zip(prompts, replies))[:few]:
                    baseline_generate(theirs, [prompt], len(reply), return_dict_in_generate=True,
                                      output_scores=True, output_hidden_states=True)
                    baseline_logprobs(theirs, [(prompt, reply)])

        def batched():
            for prompts, _, replies in turns:
                baseline_generate(theirs, prompts, max(map(len, replies)))

        # Rounding changes a token in some replies of a random model in bfloat16, where only first
        # tokens are compared, and of a real one in float32. In bfloat16 it changes most of these.
        rounded = policy.dtype == torch.bfloat16
        compared = 1 if rounded else R
        same = [ids[:compared] == other[:compared]
                for ids, other in zip(itertools.chain(*sample()), itertools.chain(*sample(0)))]
        if not rounded and not args.model:
            assert all(same)
        elif not rounded or not args.model:
            assert sum(same) > len(same) / 2
        t_ours, t_official, t_kept, t_batched, t_anew = medians(args, ours, official, sample,
                                                                batched, lambda: sample(0))
        num, num_few = (sum(len(reply) for _, _, replies in turns for reply in replies[:rows])
                        for rows in (E, few))
        yield row(f"{what}; {E} dialogues of five turns, {num / 5 / E:.0f} tokens to a reply, "
                  f"sampled and scored; baseline: batch 1, extrapolated from {few}",
                  (t_ours, t_official * num / num_few), "tok", (num, num))
        yield row("sampled; baseline: HF generate, left-padded batch", (t_kept, t_batched), "tok",
                  (num, num))
        yield row("sampled; baseline: ours, every prompt read anew", (t_kept, t_anew), "tok",
                  (num, num))


# ---- Log-probs with gradient ---------------------------------------------------------------------

def backward(policy, logprobs):
    """The sum of some scalars. Their gradients are computed one by one, and dropped."""
    total = 0.0
    for logprob in logprobs:
        logprob.backward()
        total += float(logprob.detach())
    policy.zero_grad(set_to_none=True)
    return total


def logprob_functions(args, dtype="float32"):
    """(policy, ours, baseline); both functions return the summed log-probs, after a backward."""
    vocab_size = 128256
    policy = make_policy(args, vocab_size, layers=2, dtype=dtype)
    samples = random_samples(args, vocab_size, [(384, 128)] * 2)

    def ours():
        batch = collate([[sample] for sample in samples], args.device)
        return backward(policy, [policy(batch, temperature=1.0)[0].sum()])

    return policy, ours, lambda: backward(policy, [baseline_logprobs(policy, samples).sum()])


def print_peak(args):
    """Print the MiB that one step needs beside what was in use; for a fresh process (--peak)."""
    functions = {"logprob": logprob_functions, "vision": update_functions}[args.only[0]](args)[1:]
    function = dict(zip(("ours", "official"), functions))[args.peak]

    def resident(name):    # not getrusage: the ru_maxrss of a child begins at its parent's peak
        return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    if args.device.type == "cuda":
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
        torch.cuda.reset_peak_memory_stats()
    else:
        before, peak = resident("VmRSS"), partial(resident, "VmHWM")
        # VmHWM, the peak, begins again at what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    function()
    print((peak() - before) / MIB)


def peak_row(args, section):
    command = [sys.executable, __file__, "--device", str(args.device), "--seed", str(args.seed),
               "--only", section]
    peaks = [float(subprocess.check_output([*command, "--peak", side], text=True).split()[-1])
             for side in ("ours", "official")]
    return ("the same, peak memory above start",
            *(f"{peak:,.0f} MiB" for peak in peaks), peaks[1] / peaks[0])


def logprob(args, rates):
    policy, ours, baseline = logprob_functions(args)
    expect_close("summed log-prob", ours(), baseline())
    yield row("log-probs and backward, 2 x (384 prompt + 128 response), vocabulary 128256",
              medians(args, ours, baseline), flops=flops_needed(policy, 6, 2 * 512, 2 * 128),
              rates=rates)
    yield peak_row(args, "logprob")
    _, ours, _ = logprob_functions(args, "bfloat16")

    def rounded():
        with mock.patch.object(model, "wide_product",
                               lambda hidden, weight: F.linear(hidden, weight).float()):
            ours()

    yield row("the same in bfloat16; baseline: ours with the product rounded to bfloat16",
              medians(args, ours, rounded))


# ---- Pictures ------------------------------------------------------------------------------------

def make_vision_policy(args, vocab_size, dtype="float32", text=(), vision=()):
    """A random-init vision model, 256 wide.

    It may sample every token but <|image|>, and none of them ends a reply. Its tower has more
    layers than that of support/tiny.py, and more patches, 256. So a picture costs about as much as
    the prompt it stands in. That is as in Llama-3.2-11B-Vision: four tiles of 1601 positions
    beside some 500 tokens.
    `text` and `vision` change fields of the two configs.
    """
    texts = tiny.sample_texts("gp-vl", num=20, resolution=224)
    backbone, processor = tiny.make_tiny("256x4", "mllama", texts,
                                         tiny.atoms_of("gp-vl", envs.make_env("gp-vl")))
    config = backbone.config
    for part, changed in ((config.text_config, {"vocab_size": vocab_size, **dict(text)}),
                          (config.vision_config,
                           {"patch_size": 14, "num_hidden_layers": 4, **dict(vision)})):
        for name, value in changed.items():
            setattr(part, name, value)
    torch.manual_seed(args.seed)
    with args.device:
        policy = Policy(MllamaForConditionalGeneration(config), processor, dtype).eval()
    for name, parameter in policy.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.5)           # a new Mllama is blind
    policy.backbone.generation_config.eos_token_id, policy.eos_id = None, -1
    policy.banned.fill_(False)[policy.vision.image_id] = True
    return policy, processor


def baseline_vision(policy, ids, tensors):
    """The picture, and which tokens look at it, as Hugging Face's model takes them."""
    mask = policy.vision.cross_attention_mask(torch.tensor([ids], device=policy.device),
                                              tensors["aspect_ratio_mask"])
    return {**tensors, "cross_attention_mask": mask}


def baseline_turn_logprob(policy, prompt_ids, response_ids, tensors):
    vision = baseline_vision(policy, prompt_ids + response_ids, tensors)
    return baseline_logprobs(policy, [(prompt_ids, response_ids)], **vision).sum()


def update_functions(args):
    """`logprob_functions` for the five turns of a dialogue about a picture.

    Ours puts them in one row; the baseline takes one after another.
    """
    vocab_size = 128256
    policy, _ = make_vision_policy(args, vocab_size)
    picture = draw_hand([(rank, "S") for rank in envs.RANKS[:4]], 224)
    rng, turns, ids = random.Random(args.seed), [], [policy.vision.image_id]
    for new in (320, 64, 64, 64, 64):
        prompt, response = ([rng.randrange(policy.vision.image_id + 1, vocab_size)
                             for _ in range(n)] for n in (new, 64))
        turns.append(rl.Turn(ids + prompt, response, 0, 0.0, False, (), {}, picture))
        ids = ids + prompt + response
    config = rl.Config(temperature=1.0)

    def official():
        return backward(policy, (baseline_turn_logprob(policy, turn.prompt_ids, turn.response_ids,
                                                       policy.vision.tensors([picture]))
                                 for turn in turns))

    return (policy,
            lambda: backward(policy,
                             [rl.turn_logprobs(policy, turns, [range(5)], config)[0].sum()]),
            official)


@torch.no_grad()
def rollout_vision(args):
    S, E, R, few = 5, 16, 32, 2
    policy, processor = make_vision_policy(args, 4096)
    # Both sides get the prompts of one rollout, which is played here.
    with tempfile.TemporaryDirectory() as folder:
        config = rl.Config(out=folder, num_envs=E, turns_per_env=S, max_new_tokens=R,
                           temperature=1.0, thought_coef=1.0, seed=args.seed)
        conversations = [rl.Conversation(i, envs.make_env("gp-vl", "id", resolution=224), processor,
                                         config) for i in range(E)]
        turns = rl.collect_turns(policy, processor, conversations, 0, config,
                                 SimpleNamespace(requested=False))
    assert {len(turn.response_ids) for turn in turns} == {R} and len(rl.group_dialogues(turns)) == E
    uniforms = sampling_uniforms([(args.seed, i) for i in range(S * E)], R)
    chosen = [i for i, turn in enumerate(turns) if turn.dialogue_key[0] < few]

    def ours(memory):
        for s in range(0, S * E, E):
            prompts, pictures = zip(*[(turn.prompt_ids, turn.picture) for turn in turns[s:s + E]])
            policy.generate(prompts, uniforms[s:s + E], R, 1.0, config.generate_tokens, pictures,
                            memory)
        groups = rl.turn_batches(policy, turns, rl.group_dialogues(turns), config)
        return rl.score_turns(policy, turns, groups, config)[0]

    def official():
        total = 0.0
        for turn in (turns[i] for i in chosen):
            prompt, tensors = turn.prompt_ids, policy.vision.tensors([turn.picture])
            made = baseline_generate(policy, [prompt], R, return_dict_in_generate=True,
                                     output_scores=True, output_hidden_states=True,
                                     **baseline_vision(policy, prompt, tensors))
            assert made.sequences.shape[1] == len(prompt) + R
            total += float(baseline_turn_logprob(policy, prompt, turn.response_ids, tensors))
        return total

    def reused():
        return ours(RolloutMemory(policy, config.generate_tokens))

    expect_close("log-prob of a rollout in pictures", float(reused()[chosen].sum()), official())
    t_ours, t_official, t_anew = medians(args, reused, official, lambda: ours(None))
    model, tokens = policy.backbone.model, (S * E * R, S * E * R)
    tower, language = (sum(p.numel() for part in parts for p in part.parameters()) for parts in (
        (model.vision_model.transformer, model.vision_model.global_transformer),
        model.language_model.layers))
    mean = sum(len(turn.prompt_ids) for turn in turns) / len(turns)
    share = tower * policy.picture_tokens / (language * mean)
    yield row(f"GP-VL rollout, {E} dialogues of {S} turns, sample {R} tokens and score them; a "
              f"prompt is {mean:.0f} tokens, the tower {share:.1f} times its FLOPs; baseline: "
              f"batch 1, extrapolated from {few} dialogues", (t_ours, t_official * E / few), "tok",
              tokens)
    yield row("the same; baseline: ours with the tower in every turn", (t_ours, t_anew), "tok",
              tokens)


def vision(args, rates):
    yield from rollout_vision(args)
    policy, ours, baseline = update_functions(args)
    expect_close("summed log-prob with a picture", ours(), baseline())
    yield row("log-probs and backward, a dialogue of 5 turns, 384 to 896 tokens and a picture, "
              "vocabulary 128256; ours: all turns in one row, baseline: one by one",
              medians(args, ours, baseline))
    yield peak_row(args, "vision")


# ---- Supervised fine-tuning ----------------------------------------------------------------------

def baseline_train_step(model, optimizer, samples, autocast):
    input_ids, mask, is_response = baseline_batch(samples, model.device)
    with autocast():
        loss = model(input_ids=input_ids, attention_mask=mask,
                     labels=input_ids.masked_fill(~is_response, -100)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def sft(args, rates):
    rng = random.Random(args.seed)
    policy = make_policy(args, 32000, layers=4)
    model, vocab_size = copy.deepcopy(policy.backbone), vocabulary_of(policy)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5) for m in (policy.backbone, model)]
    mixed = [rng.randint(64, 256) for _ in range(16)]
    for what, budget, lengths in [
            (f"training step, 16 x (192 prompt + 64 response), vocabulary {vocab_size}", 4096,
             [(192, 64)] * 16),
            (f"the same, 64 to 256 tokens each, a quarter response; ours: micro-batches of 2048, "
             f"baseline: padded to {max(mixed)}", 2048,
             [(total - total // 4, total // 4) for total in mixed])]:
        samples = random_samples(args, vocab_size, lengths)
        config = SFTConfig(micro_batch_tokens=budget)
        ours = partial(train_step, policy, optimizers[0], [(*sample, None) for sample in samples],
                       config)
        baseline = partial(baseline_train_step, model, optimizers[1], samples, policy.autocast)
        expect_close("training loss", ours()[0], baseline(), policy.dtype)
        flops = flops_needed(policy, 6, sum(map(sum, lengths)),
                             sum(response for _, response in lengths))
        yield row(what, medians(args, ours, baseline), flops=flops, rates=rates)


def trl(args, rates):
    """A step of ours, and then one of TRL's SFTTrainer without its data loading, on the same batch.

    Every loss must be the same.
    """
    try:
        import datasets
        import trl
    except ImportError as error:
        yield f"not measured: {error}", "", "", None
        return
    rng = random.Random(args.seed)
    policy = make_policy(args, 32000, layers=4)
    vocab_size = vocabulary_of(policy)
    optimizer = torch.optim.AdamW(policy.backbone.parameters(), lr=1e-5, weight_decay=0.0)
    lengths = [(total - total // 4, total // 4)
               for total in (rng.randint(64, 256) for _ in range(16))]
    samples = random_samples(args, vocab_size, lengths)
    config = SFTConfig(micro_batch_tokens=2048)
    ours = partial(train_step, policy, optimizer, [(*sample, None) for sample in samples], config)
    clocks, losses = {"ours": [], "theirs": []}, []

    class OursBefore(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            started = time.perf_counter()
            losses.append(ours()[0])
            clocks["ours"].append(time.perf_counter() - started)
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            clocks["theirs"].append(time.perf_counter() - self.began)

    rows = [{"input_ids": p + r, "completion_mask": [0] * len(p) + [1] * len(r)}
            for p, r in samples]
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as out:
        trainer = trl.SFTTrainer(
            copy.deepcopy(policy.backbone), processing_class=make_tokenizer(),
            callbacks=[OursBefore()],
            train_dataset=datasets.Dataset.from_list(rows * (args.rounds + 1)),
            args=trl.SFTConfig(out, max_steps=args.rounds + 1,
                               per_device_train_batch_size=len(rows), learning_rate=1e-5,
                               lr_scheduler_type="constant", completion_only_loss=True,
                               activation_checkpointing=False, bf16=policy.dtype == torch.bfloat16,
                               train_sampling_strategy="sequential",
                               use_cpu=args.device.type == "cpu", logging_steps=1,
                               disable_tqdm=True, report_to="none", save_strategy="no",
                               dataloader_pin_memory=False, seed=args.seed))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    for ours_loss, logged in zip(
            losses, [step["loss"] for step in trainer.state.log_history if "loss" in step],
            strict=True):
        expect_close("training loss", ours_loss, logged, policy.dtype)
    yield row(f"the mixed lengths of `sft`; baseline: SFTTrainer of TRL {trl.__version__}, its "
              f"data loading left out",
              [statistics.median(column[1:]) for column in clocks.values()],
              flops=flops_needed(policy, 6, sum(map(sum, lengths)),
                                 sum(response for _, response in lengths)), rates=rates)


# ---- Verifier ------------------------------------------------------------------------------------

FIELDS = {name: re.compile(rf'"{name}"\s*:\s*(\[[^\]]*\]|"[^"]*")')
          for name in ("cards", "number", "formula")}
SUSPECT = re.compile(r"[^-+*/()\d]|[-+*/(][-+*/)]|\d\(|\)[\d(]|^[-+*/)]|[-+*/(]$")


def baseline_judge(reply, cards, numbers, target, known):
    """The baseline's verdict on a reply in valid JSON.

    Returns (status, are the lists right, does the formula begin one of the `known` solutions).
    """
    found = {name: pattern.search(reply) for name, pattern in FIELDS.items()}
    if None in found.values():
        return "illegal_formula", None, False
    lists_right = [sorted(re.findall(r"\w+", found[name][1])) == sorted(map(str, truth))
                   for name, truth in (("cards", cards), ("number", numbers))]
    formula = found["formula"][1].strip('"').split("=")[0].replace(" ", "")
    try:
        value = None if SUSPECT.search(formula) else eval(formula)
    except (SyntaxError, ZeroDivisionError):
        value = None
    if value is None:
        return "illegal_formula", lists_right, False
    used = [int(number) for number in re.findall(r"\d+", formula)]
    if len(used) != len(numbers) or any(
            used.count(number) != numbers.count(number) for number in numbers):
        return "wrong_numbers", lists_right, False
    is_prefix = any(solution.startswith(formula) for solution in known)
    return "correct" if abs(value - target) < 1e-6 else "wrong_value", lists_right, is_prefix


def make_cases(args, count):
    """(reply, cards, numbers, solutions) of distinct replies.

    Some are right, others wrong in value or in numbers, others illegal.
    """
    env, rng, cases = envs.make_env("gp-l", "id"), random.Random(args.seed), {}
    for i in itertools.count():
        env.reset(seed=f"{args.seed}/bench/{i}")
        known = solver.solutions(env.numbers)
        formula = rng.choice(known)
        extra, slip = (f"{formula}+{rng.randint(1, 13)}",
                       rng.choice((f"({formula}", f"{formula}*", f"{formula}!")))
        for reply in (env.flawed_reply(), *map(env.format_reply, (formula, extra, slip))):
            cases[reply] = reply, env.cards, env.numbers, known
        if len(cases) >= count:
            return list(cases.values())[:count]


def verifier(args, rates):
    cases = make_cases(args, 2000)

    def ours():
        return [verify.judge_general_points(reply, cards, numbers)
                for reply, cards, numbers, _ in cases]

    def baseline():
        return [baseline_judge(reply, cards, numbers, 24, known)
                for reply, cards, numbers, known in cases]

    for (reply, *_), verdict, (status, *_) in zip(cases, ours(), baseline()):
        if verdict.status != status:
            fail(f"verifier: {reply} is {verdict.status}, the baseline says {status}")
    yield from rows_with_caches(args, [verify.parse_formula], f"{len(cases)} different replies",
                                (ours, baseline), "check", (len(cases), len(cases)))


# ---- Environments --------------------------------------------------------------------------------

BRACKETS = ("(({}{}{}){}{}){}{}", "({}{}({}{}{})){}{}", "({}{}{}){}({}{}{})", "{}{}(({}{}{}){}{})",
            "{}{}({}{}({}{}{}))")


def baseline_solutions(numbers):
    orders, operators, found = (itertools.permutations(numbers),
                                itertools.product("+-*/", repeat=3), [])
    for (a, b, c, d), (o, p, q), pattern in itertools.product(orders, operators, BRACKETS):
        formula = pattern.format(a, o, b, p, c, q, d)
        try:
            if abs(eval(formula) - 24) < 1e-6:
                found.append(formula)
        except ZeroDivisionError:
            pass
    return found


def baseline_reset(seed):
    rng, found = random.Random(seed), []
    while not found:
        found = baseline_solutions([min(rng.randint(1, 13), 10) for _ in range(4)])
    return found


def environment(args, rates):
    env, few, many = envs.make_env("gp-l", "id"), 3, 10_000
    for numbers in ([3, 3, 8, 8], [1, 5, 5, 5], [1, 1, 1, 1]):
        expect_close(f"{numbers} can be solved", bool(solver.solutions(numbers)),
                     bool(baseline_solutions(numbers)))
    functions = ((lambda: [env.reset(seed=seed) for seed in range(many)]),
                 lambda: list(map(baseline_reset, range(few))))
    yield from rows_with_caches(args, [solver.solve_sorted, solver.expressions],
                                f"{many} resets, baseline {few}", functions, "reset", (many, few))

    flawed = [[env.flawed_reply() for _ in range(env.verify_iter)]
              for seed in range(1000) if env.reset(seed=seed)]

    def episodes():
        for seed, replies in enumerate(flawed):
            env.reset(seed=seed)
            for reply in replies:
                env.step(reply)

    rate = len(flawed) * env.verify_iter / medians(args, episodes)[0]
    yield (f"steps, {env.verify_iter} failed tries to an episode, resets included",
           f"{rate:,.0f} step/s", "", None)


# ---- V-IRL ---------------------------------------------------------------------------------------

def baseline_nearest(point, keys):
    """The key (a row of degrees) nearest to a point by haversine to all; None beyond 20 m."""
    lat, lon = np.radians(point)
    lats, lons = np.radians(keys).T
    half = (np.sin((lats - lat) / 2) ** 2
            + np.cos(lat) * np.cos(lats) * np.sin((lons - lon) / 2) ** 2)
    metres = 2 * 6371e3 * np.arcsin(np.sqrt(half))
    best = int(np.argmin(metres))
    return tuple(keys[best]) if metres[best] < streets.REACH else None


def baseline_rail(record, mapping, keys, rng):
    """The panoramas along a route, as at an official reset.

    Each leg is cut in five, and half of the points are left out.
    """
    previous, panos = tuple(record["start_place"]["relocated_geocode"]), []
    for i, point in enumerate([previous, *map(tuple, record["route_results"]["geocode_list"])]):
        length = streets.geodesic(previous, point)
        point = point if point in mapping else baseline_nearest(point, keys)
        for step in range(1, 6) if length > 5 else ():
            if rng.random() < 0.5:
                continue
            wanted = tuple(p + (q - p) * step / 5 for p, q in zip(previous, point))
            found = wanted if wanted in mapping else baseline_nearest(wanted, keys)
            if found and min(streets.geodesic(previous, found), streets.geodesic(point, found)) > 8:
                panos.append(mapping[found])
        panos.append(mapping[point])
        previous = point
    return panos


def baseline_view(panorama, rotation, heading, size):
    """A view by turning the ray of every pixel, its longitude and latitude, and four neighbours."""
    height, width, _ = panorama.shape
    offset = (np.arange(size) - (size - 1) / 2) / (size / 2)
    rays = np.stack([*np.meshgrid(offset, offset), np.ones((size, size))], -1)
    turn = math.radians((heading - 180) % 360 + rotation)
    rays = rays @ np.array([[math.cos(turn), 0, -math.sin(turn)], [0, 1, 0],
                            [math.sin(turn), 0, math.cos(turn)]])
    x = (np.arctan2(rays[..., 0], rays[..., 2]) / (2 * np.pi) + 0.5) * (width - 1)
    y = (np.arcsin(rays[..., 1] / np.linalg.norm(rays, axis=-1)) / np.pi + 0.5) * (height - 1)
    left, top = np.floor(x).astype(int) % (width - 1), np.floor(y).astype(int)
    right, below = (x - np.floor(x))[..., None], (y - top)[..., None]
    upper = panorama[top, left] * (1 - right) + panorama[top, left + 1] * right
    lower = panorama[top + 1, left] * (1 - right) + panorama[top + 1, left + 1] * right
    return (upper * (1 - below) + lower * below).astype(np.uint8)


def virl(args, rates):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "city"
        generator = Path(__file__).resolve().parent.parent / "data" / "synthetic_city.py"
        command = [sys.executable, generator, "--out", root, "--routes", "1000", "--no-pictures"]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        yield ("make a city of 1,000 routes, words only",
               f"{time.perf_counter() - started:.2f} s", "", None)

        def load():
            streets.load_routes.cache_clear()
            envs.make_env("virl-l", "id", root=root)

        yield "load 1,000 routes", f"{medians(args, load)[0]:.2f} s", "", None
        env = envs.make_env("virl-l", "id", root=root)
        records = json.loads((root / "train" / "route_infos.json").read_text())[0]
        mapping = streets.Panoramas(root / "train" / "gps_pano_mapping.pkl").ids
    keys, many, few = np.array(list(mapping)), 1000, 20
    env.reset(seed=0)
    at = env.routes.index(next(route for route in env.routes if route.panos[0] == env.rail[0].pano))
    rng = random.Random("0")
    rng.choice(env.routes), rng.randint(0, 359)
    if baseline_rail(records[at], mapping, keys, rng) != [position.pano for position in env.rail]:
        fail("virl: the rails differ")

    def resets():
        for seed in range(many):
            env.reset(seed=seed)

    def episodes():
        steps = 0
        for seed in range(many // 10):
            env.reset(seed=seed)
            while not env.done:
                env.step(env.expert_reply())
                steps += 1
        return steps

    def rails():
        for record in records[:few]:
            baseline_rail(record, mapping, keys, rng)

    yield row(f"{many} resets in words, prompt included; baseline {few}, the rail alone",
              medians(args, resets, rails), "reset", (many, few))
    yield ("steps in words, resets included",
           f"{episodes() / medians(args, episodes)[0]:,.0f} step/s", "", None)
    panorama = np.random.default_rng(args.seed).integers(0, 256, (768, 1536, 3), dtype=np.uint8)
    smooth = np.repeat(np.repeat(panorama[::16, ::16], 16, 0), 16, 1)
    packed = np.asarray(Image.fromarray(smooth).convert("RGBX")).view(np.uint32)[..., 0]
    for size in (224, 448):
        ours, baseline = (lambda crop=crop, p=p: [crop(p, 180, 30 + turn, size)
                                                  for turn in (0, 90, 180, 270)]
                          for crop, p in ((streets.crop_view, packed), (baseline_view, smooth)))
        difference = max(np.abs(a.astype(int) - b).mean() for a, b in zip(ours(), baseline()))
        if difference > 1:
            fail(f"virl: views differ by {difference}")
        seconds = medians(args, ours, baseline)
        yield row(f"four views of {size} x {size} pixels from a panorama 1536 wide", seconds,
                  "grid", (1, 1))


# ---- How cost grows ------------------------------------------------------------------------------

def growth(args, rates):
    """Rates of ours alone, side by side, as one quantity grows."""
    policy, R = make_policy(args, 4096, layers=4), 32

    def sample(B, P, head):
        prompts = [prompt for prompt, _ in random_samples(args, 4096, [(P, 0)] * B)]
        prompts = [prompts[0][:head] + prompt[head:] for prompt in prompts]
        uniforms = sampling_uniforms([(args.seed, i) for i in range(B)], R)
        return lambda: policy.generate(prompts, uniforms, R, 1.0)

    def update(turns):
        whole = random_samples(args, 4096, [(150, 60 * turns)] * 8)
        dialogues = [[(prompt + reply[:60 * t], reply[60 * t:60 * (t + 1)]) for t in range(turns)]
                     for prompt, reply in whole]
        return lambda: backward(policy, [policy(collate(dialogues, args.device), 1.0)[0].sum()])

    for what, cases, amounts in (
            ("sample 32 tokens of prompts of 128: 8, 32, 128 prompts",
             [sample(B, 128, 0) for B in (8, 32, 128)], [B * R for B in (8, 32, 128)]),
            ("the same, 32 prompts of 64, 256, 1024", [sample(32, P, 0) for P in (64, 256, 1024)],
             [32 * R] * 3),
            ("the same, 32 prompts of 256 that share their first 0, 128, 224",
             [sample(32, 256, head) for head in (0, 128, 224)], [32 * R] * 3),
            ("log-probs and backward of 8 dialogues of 1, 3, 5 turns",
             [update(n) for n in (1, 3, 5)], [480, 1440, 2400])):
        rates_seen = [amount / s for amount, s in zip(amounts, medians(args, *cases))]
        yield what, ", ".join(f"{rate:,.0f}" for rate in rates_seen) + " reply tok/s", "", None


# ---- How close to the machine --------------------------------------------------------------------

def share_row(args, what, function, tokens, flops, rate, estimate):
    """Tokens per second of ours, and its FLOPs as a share of the rate of a matrix product.

    On CUDA the peak memory, too, beside what training prints as its estimate.
    """
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, memory = medians(args, function)[0], ""
    if args.device.type == "cuda":
        expected = sum(map(float, re.findall(r"([\d.]+) GB", estimate)))
        memory = (f"; peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, "
                  f"estimated {expected:.1f}")
    return what, f"{tokens / seconds:,.0f} tok/s ({flops / seconds / rate:.1%}){memory}", "", None


def profile_rows(args, what, function):
    """With --profile: the ten operations that take most of the time of one call."""
    if not args.profile:
        return
    cuda = args.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profiled:
        function()
        if cuda:
            torch.cuda.synchronize()
    spent = Counter()                          # microseconds
    for event in profiled.key_averages():
        spent[event.key] += event.self_device_time_total if cuda else event.self_cpu_time_total
    for name, time_of_it in spent.most_common(10):
        name = name.replace("|", "/")[:60]
        yield (f"{what}: {name}", f"{time_of_it / 1e3:,.1f} ms ({time_of_it / spent.total():.1%})",
               "", None)


def random_dialogues(args, num, vocab_size, picture=None, image=()):
    """The turns of `num` dialogues: a prompt, and three replies with text between them."""
    turns = []
    for number, (ids, _) in enumerate(random_samples(
            args, vocab_size, [(256 + 2 * 32 + 3 * 64, 0)] * num)):
        ids = [*image] + [i + (i in image) for i in ids[len(image):]]
        turns += [rl.Turn(ids[:start], ids[start:start + 64], 0, 0.0, turn == 2, (number,), {},
                          picture, 3 * number + turn)
                  for turn, start in enumerate((256, 352, 448))]
    return turns


def update_rows(args, rates, name, policy, turns, budget, checkpointing=False):
    """An SFT step on the last turns and a PPO update on all, by sft.py and rl.py."""
    dialogues, adam = rl.group_dialogues(turns), torch.optim.AdamW(policy.parameters(), lr=1e-6)
    last = [turns[dialogue[-1]] for dialogue in dialogues]
    samples = [(turn.prompt_ids, turn.response_ids, turn.picture) for turn in last]
    common = dict(micro_batch_tokens=budget, gradient_checkpointing=checkpointing)
    if checkpointing:
        enable_checkpointing(policy)
    config, sft_config = (rl.Config(epochs=1, minibatch_turns=len(turns), **common),
                          SFTConfig(**common))
    minibatches = rl.draw_minibatches(policy, turns, 0, config)
    groups = [group for minibatch in minibatches for group in minibatch.groups]
    old_logprobs, old_values = rl.score_turns(policy, turns, groups, config)
    gains = torch.randn(len(turns), generator=torch.Generator().manual_seed(args.seed))
    tower = (sum(p.numel() for p in policy.backbone.model.vision_model.parameters())
             if policy.picture_tokens else 0)
    head, rate = (policy.backbone.lm_head.weight.numel(),
                  rates[str(policy.dtype).removeprefix("torch.")])
    for what, predicted, settings, function in (
            ("SFT step", 64, sft_config, partial(train_step, policy, adam, samples, sft_config)),
            ("PPO update, 3 turns in one row", 3 * 64, config,
             partial(rl.ppo_update, policy, adam, turns, minibatches, old_logprobs, old_values,
                     gains, gains, 0, config))):
        tokens = len(dialogues) * 512
        flops = 6 * ((policy.num_params - head - tower) * tokens + head * predicted * len(dialogues)
                     + tower * policy.picture_tokens * len(dialogues))
        yield share_row(args,
                        f"{name}: {what}, {len(dialogues)} x 512 text tokens, micro-batches of "
                        f"{budget}", function, tokens, flops, rate,
                        memory_estimate(policy, settings))
        yield from profile_rows(args, f"{name}: {what}", function)


def largest_llama(args):
    """(policy, its name): 1.2 billion weights, bfloat16, on a GPU; small, float32, on a CPU.

    With --model it is that one.
    """
    if args.device.type == "cuda":
        policy = make_policy(args, 128256, 16, "bfloat16", tie_word_embeddings=True, **LARGE)
    else:
        policy = make_policy(args, 4096, 6, tie_word_embeddings=True, hidden_size=512,
                             num_attention_heads=8, num_key_value_heads=4, intermediate_size=1344)
    kind = Path(args.model).name if args.model else "Llama"
    return policy, (f"{kind} of {policy.num_params / 1e6:,.0f} M, "
                    f"{str(policy.dtype).removeprefix('torch.')}")


def decode(args, rates, R=128):
    """Time of one more token for B rows, against reading all weights and all keys and values once.

    It is the difference between replies of R tokens and of 1.
    """
    (policy, name), B = largest_llama(args), 64 if args.device.type == "cuda" else 8
    prompts = [prompt for prompt, _ in random_samples(args, vocabulary_of(policy),
                                                      [(256, 0)] * B)]
    uniforms, config = (sampling_uniforms([(args.seed, i) for i in range(B)], R),
                        policy.backbone.config)
    cache = (B * (256 + R / 2) * 2 * config.num_hidden_layers * config.num_key_value_heads
             * config.head_dim)
    size = 4 if policy.dtype == torch.float32 else 2
    for graphs in (True, False) if args.device.type == "cuda" else (None,):
        with mock.patch.object(LlamaDecoder, "graphs", graphs):
            long, short = medians(args, *(partial(policy.generate, prompts, uniforms, n, 1.0)
                                          for n in (R, 1)))
        step = (long - short) / (R - 1)
        yield (f"{name}: one more token for {B} rows after "
               f"256{', no CUDA graphs' * (graphs is False)}; share of the copy bandwidth",
               f"{B / step:,.0f} tok/s "
               f"({(policy.num_params + cache) * size / step / rates['copy']:.1%})", "", None)


def limits(args, rates):
    large = args.device.type == "cuda"
    num, budget = (64, 16384) if large else (8, 2048)
    policy, name = largest_llama(args)
    vocab_size = vocabulary_of(policy)
    yield from update_rows(args, rates, name, policy, random_dialogues(args, num, vocab_size),
                           budget)
    if args.model:
        return
    dtype, text, vision = str(policy.dtype).removeprefix("torch."), {}, {}
    del policy
    if large:
        # The tower of Llama-3.2-11B-Vision, 4 tiles of 560 pixels, under the language model above.
        text = dict(LARGE, num_hidden_layers=16, cross_attention_layers=[3, 8, 13])
        vision = dict(hidden_size=1280, attention_heads=16, intermediate_size=5120, image_size=560,
                      num_hidden_layers=32, num_global_layers=8,
                      intermediate_layers_indices=[3, 7, 15, 23, 30], vision_output_dim=7680,
                      max_num_tiles=4,
                      supported_aspect_ratios=MllamaVisionConfig().supported_aspect_ratios)
    policy, _ = make_vision_policy(args, vocab_size, dtype, text, vision)
    if large:
        policy.vision.image_processor = type(policy.vision.image_processor)(
            size={"height": 560, "width": 560}, max_image_tiles=4)
    picture = draw_hand([(rank, "S") for rank in envs.RANKS[:4]], 1120 if large else 224)
    turns = random_dialogues(args, num // 4, vocab_size, picture, [policy.vision.image_id])
    yield from update_rows(args, rates,
                           f"Mllama of {policy.num_params / 1e6:,.0f} M, {dtype}, checkpointing",
                           policy, turns, budget * 2, checkpointing=True)


# ---- Several processes ---------------------------------------------------------------------------

def ranks(args, rates):
    """Seconds of an SFT step times processes, from the log of sft.py.

    Two cases: the defaults of sft.py, and replies of all lengths.
    """
    cases = (("--batch-size 128", "--batch-size 64 --failed-tries 3")
             if args.device.type == "cpu" else ())
    return (ranks_row(args, options) for options in cases)


def ranks_row(args, options, steps=4):
    seconds, repository = {1: [], 2: []}, Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        subprocess.run([sys.executable, "support/tiny.py", "--out", start, "--size", "512x6",
                        "--seed", str(args.seed)], check=True,
                       capture_output=True, cwd=repository)
        for name, processes in itertools.product(range(args.rounds), seconds):
            out = Path(folder) / f"{name}_{processes}"
            launcher = ("-m torch.distributed.run --standalone --nproc-per-node 2".split()
                        if processes == 2 else [])
            command = (f"sft.py --model {start} --out {out} --steps {steps} --save-every {steps} "
                       f"--lr 1e-4 --device cpu --dtype float32 --seed {args.seed} {options}")
            subprocess.run([sys.executable, *launcher, *command.split()], check=True,
                           capture_output=True, cwd=repository,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
            clock = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            seconds[processes].append(
                (clock[-1]["seconds"] - clock[1]["seconds"]) / (steps - 2) * processes)
            tokens = (clock[-1]["tokens_trained"] - clock[1]["tokens_trained"]) / (steps - 2)
    one, two = map(statistics.median, seconds.values())
    size = clock[-1]["gflops"] * 1e9 / 6 / clock[-1]["tokens_trained"]
    return row(f"SFT step of {tokens:.0f} tokens (`{options}`), {size / 1e6:.0f} M parameters: "
               f"tokens per second and core, two processes; baseline: one", (two, one), "tok",
               (tokens, tokens))


# ---- Running -------------------------------------------------------------------------------------

SECTIONS = {"rollout": rollout, "turns": rollout_in_turns, "logprob": logprob, "vision": vision,
            "sft": sft, "trl": trl, "verifier": verifier, "envs": environment, "virl": virl,
            "growth": growth, "limits": limits, "decode": decode, "ranks": ranks}
TAKE_A_MODEL = ("rollout", "turns", "sft", "trl", "limits", "decode")


def parse_args():
    parser = OneLineParser(description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS),
                        help="sections, comma-separated [all]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--rounds", type=int, default=5,
                        help="measured rounds, after one to warm up [5]")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and hands [0]")
    parser.add_argument("--model", help=f"a real model folder, for {', '.join(TAKE_A_MODEL)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="with --model: both sides compute in this type [float32]")
    parser.add_argument("--profile", action="store_true",
                        help="in limits: also the operations that take most of the time")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine, too")
    parser.add_argument("--peak", choices=("ours", "official"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only.split(",")
    if set(args.only) - set(SECTIONS):
        parser.error(f"--only {','.join(args.only)}: allowed are {', '.join(SECTIONS)}")
    others = set(args.only) - set(TAKE_A_MODEL)
    if args.model and others:
        parser.error(f"--model: --only {sorted(others)[0]} has models of its own")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def main():
    args, load = parse_args(), os.getloadavg()[0]
    transformers.logging.set_verbosity_error()
    if args.peak:
        return print_peak(args)
    if load > MAX_LOAD and not args.force:
        fail(f"load average {load:.2f} is above {MAX_LOAD}: wait until the machine is idle, or add "
             f"--force")
    processor = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    name = (torch.cuda.get_device_name() if args.device.type == "cuda"
            else processor[1] if processor else "CPU")
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, load average "
          f"{load:.2f}, seed {args.seed}, median of {args.rounds} rounds  ")
    rates = machine_rates(args)
    gemms = ", ".join(f"{dtype} {rates[dtype] / 1e9:,.0f} GFLOP/s"
                      for dtype in ("float32", "bfloat16"))
    print(f"GEMM {8192 if args.device.type == 'cuda' else 2048}^3: {gemms}; copy of 256 MiB: "
          f"{rates['copy'] / 1e9:,.1f} GB/s\n")
    print("| section | what | ours | baseline | ratio |\n| --- | --- | --- | --- | --- |",
          flush=True)
    for section in args.only:
        for what, ours, baseline, ratio in SECTIONS[section](args, rates):
            times = f"{ratio:,.2f}x" if ratio else ""
            print(f"| {section} | {what} | {ours} | {baseline} | {times} |", flush=True)


if __name__ == "__main__":
    main()
