"""Time and memory of this project beside a baseline that does the same job in the shape of the paper's official code.

Both sides run in one process with the same seed, weights and threads. They take turns (A, B, A, B, ...) and the median
of the rounds counts. A ratio above 1 is in our favour. Where both sides compute the same thing, their results are
compared first, and a difference ends the program. The baselines are written here, in our own words:

    section    baseline
    rollout    Hugging Face `generate`, one prompt at a time, every hidden state and score kept, then one more forward
               with a log-softmax over all positions; and `generate` on a left-padded batch, for sampling alone
    logprob    the vocabulary at every position, log-softmax, gather, mask, sum, backward
    sft        Hugging Face's own loss over `labels`, the whole batch padded to its longest
    verifier   fields by regular expressions, checks on the characters, `eval`, search in the list of solutions
    envs       random cards until some permutation, operators and brackets `eval` to 24

    OMP_NUM_THREADS=1 python tests/bench.py                            # a Markdown table; the machine must be idle
    python tests/bench.py --only rollout,logprob --device cuda

Percentages are of the machine's float32 matrix rate, measured in the same run: the work that the job needs (2 FLOPs per
weight and token, 6 with backward; the output projection only where a token is predicted; no attention, no padding) over
the time taken. It is the same work for both sides, so whatever the baseline does in excess lowers its percentage.
"""
import argparse
import copy
import functools
import itertools
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import verify
from model import OneLineParser, Policy, collate, fail, pick_device, sampling_uniforms, train_tokenizer
from sft import train_step

MAX_LOAD = 0.5
MIB = 2 ** 20


# ---- Timing -------------------------------------------------------------------------------------------------------

def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(args, *functions):
    """Median seconds of each function over the rounds; they take turns, and the first round only warms up."""
    times = [[] for _ in functions]
    for _ in range(args.rounds + 1):
        for function, column in zip(functions, times):
            synchronise(args.device)
            started = time.perf_counter()
            function()
            synchronise(args.device)
            column.append(time.perf_counter() - started)
    return [statistics.median(column[1:]) for column in times]


def machine_rates(args):
    """GEMM rates in FLOP/s for float32 and bfloat16, and copy bandwidth in bytes/s, read and write both counted."""
    n, functions = 2048, []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(2))
        functions.append(functools.partial(torch.mm, a, b, out=torch.empty_like(a)))
    source = torch.ones(256 * MIB // 4, device=args.device)
    fp32, bf16, copying = medians(args, *functions, functools.partial(torch.empty_like(source).copy_, source))
    return {"float32": 2 * n ** 3 / fp32, "bfloat16": 2 * n ** 3 / bf16, "copy": 2 * 256 * MIB / copying}


def expect_close(what, ours, baseline, tolerance=1e-3):
    if not math.isclose(ours, baseline, rel_tol=tolerance):
        fail(f"{what}: ours is {ours}, the baseline's {baseline}")


# ---- Models -------------------------------------------------------------------------------------------------------

def make_policy(args, vocab_size, layers):
    """A random-init Llama, 256 wide, whose tokens may all be sampled and none of which ends a reply."""
    env = envs.make_env("gp-l", "id")
    processor = train_tokenizer(envs.sample_texts("gp-l", num=20), env.atoms())
    torch.manual_seed(args.seed)
    backbone = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=256, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=672, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    policy = Policy(backbone, processor).to(args.device)
    policy.banned.fill_(False)
    policy.eos_id = -1
    return policy


def make_ends_likely(policy, eos_id, chance):
    """Edit the weights so that any token ends the reply with about this chance."""
    with torch.no_grad():
        embedding, head = policy.backbone.model.embed_tokens.weight, policy.backbone.lm_head.weight
        embedding[:, 0], head[:, 0] = 1.0, 0.0       # one coordinate that is the same, and large, in every hidden state,
        final = policy.backbone.model(torch.zeros(1, 1, dtype=torch.long, device=policy.device)).last_hidden_state
        head[eos_id, 0] = math.log(chance / (1 - chance) * len(head)) / final[0, 0, 0]      # and only this row reads it
    policy.eos_id = eos_id


def work(policy, tokens, predicted, flops_per_weight):
    """FLOPs of the body on `tokens` and of the output projection on the `predicted` among them."""
    head = policy.backbone.lm_head.weight.numel()
    return flops_per_weight * ((policy.num_params - head) * tokens + head * predicted)


def random_samples(args, vocab_size, lengths):
    """(prompt_ids, response_ids) pairs of random tokens for pairs of lengths."""
    rng = random.Random(args.seed)
    return [([rng.randrange(vocab_size) for _ in range(p)], [rng.randrange(vocab_size) for _ in range(r)])
            for p, r in lengths]


def row(what, unit, amounts, seconds, flops=None, rates=None):
    """A row of the table from (ours, baseline) amounts and seconds: amount per second in `unit`, or bare seconds."""
    texts = [f"{amount / s:,.0f} {unit}/s" if unit else f"{s:.3f} s" for amount, s in zip(amounts, seconds)]
    if flops:
        texts = [f"{text} ({amount * flops / s / rates['float32']:.1%})"
                 for text, amount, s in zip(texts, amounts, seconds)]
    return what, *texts, amounts[0] / seconds[0] * seconds[1] / amounts[1]


# ---- Rollout ------------------------------------------------------------------------------------------------------

def baseline_generate(policy, prompts, new_tokens, **kwargs):
    P, eos_id = max(map(len, prompts)), None if policy.eos_id < 0 else policy.eos_id
    input_ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=policy.device)
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=policy.device)
    return policy.backbone.generate(input_ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                    max_new_tokens=new_tokens, eos_token_id=eos_id, pad_token_id=0, **kwargs)


def baseline_logprobs(policy, input_ids, response_mask):
    """Summed log-prob (B,) of the responses in sequences (B, T) without padding."""
    logits = policy.backbone(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)                          # (B, T - 1, V)
    chosen = logprobs.gather(-1, input_ids[:, 1:, None])[..., 0]
    return (chosen * response_mask[:, 1:]).sum(1)


@torch.no_grad()
def rollout(args, rates):
    B, R, baseline_rows, vocab_size = 32, 60, 4, 4096
    policy = make_policy(args, vocab_size, layers=4)
    prompts = [p for p, _ in random_samples(args, vocab_size, [(150 - 20 * (i % 2), 0) for i in range(B)])]
    uniforms = sampling_uniforms([(args.seed, i) for i in range(B)], R)

    def ours(score=True):
        replies = [ids for ids, _ in policy.generate(prompts, uniforms, R, 1.0)]
        return policy(collate(list(zip(prompts, replies)), args.device), 1.0)[0].sum(1) if score else replies

    def official():
        for prompt in prompts[:baseline_rows]:
            made = baseline_generate(policy, [prompt], R, return_dict_in_generate=True, output_scores=True,
                                     output_hidden_states=True)
            is_response = torch.arange(len(prompt) + R, device=args.device)[None] >= len(prompt)
            baseline_logprobs(policy, made.sequences, is_response)

    ids = torch.tensor([prompts[0] + ours(score=False)[0]], device=args.device)
    is_response = torch.arange(ids.shape[1], device=args.device)[None] >= len(prompts[0])
    expect_close("rollout log-prob", float(ours()[0]), float(baseline_logprobs(policy, ids, is_response)))
    t_ours, t_official, t_sampling, t_batched = medians(
        args, ours, official, lambda: ours(score=False), lambda: baseline_generate(policy, prompts, R))
    flops = work(policy, sum(map(len, prompts)) + B * R, B * R, 2) / B / R        # per new token, once
    yield row(f"sample {R} tokens and their log-probs, {B} prompts of 130 and 150 tokens; baseline: batch 1, "
              f"{B} prompts from {baseline_rows}", "tok", (B * R, B * R), (t_ours, t_official * B / baseline_rows),
              2 * flops, rates)
    yield row("the same, sampling alone; baseline: HF generate, left-padded batch", "tok", (B * R, B * R),
              (t_sampling, t_batched), flops, rates)

    make_ends_likely(policy, eos_id=1, chance=0.04)
    ours_tokens = sum(map(len, ours(score=False)))
    baseline_tokens = []

    def batched():
        torch.manual_seed(args.seed)
        ended = baseline_generate(policy, prompts, R)[:, max(map(len, prompts)):].eq(policy.eos_id)
        baseline_tokens[:] = [int((ended.cumsum(1) - ended.long() == 0).sum())]   # up to the first end, that included

    t_sampling, t_batched = medians(args, lambda: ours(score=False), batched)
    yield row(f"the same with ragged replies, {ours_tokens / B:.0f} (baseline {baseline_tokens[0] / B:.0f}) tokens in "
              f"the mean, at most {R}", "tok", (ours_tokens, *baseline_tokens), (t_sampling, t_batched))


# ---- Log-probs with gradient --------------------------------------------------------------------------------------

def logprob_functions(args):
    """(policy, ours, baseline): each function adds the gradient of the summed log-probs and returns the sum."""
    B, P, R, vocab_size = 2, 384, 128, 128256
    policy = make_policy(args, vocab_size, layers=2)
    batch = collate(random_samples(args, vocab_size, [(P, R)] * B), args.device)

    def finish(logprob):
        logprob.backward()
        policy.zero_grad(set_to_none=True)
        return float(logprob.detach())

    return (policy, lambda: finish(policy(batch, temperature=1.0)[0].sum()),
            lambda: finish(baseline_logprobs(policy, batch["input_ids"], batch["response_mask"]).sum()))


def resident(field):
    """A memory field of this process in bytes. Not getrusage: a child's ru_maxrss starts at its parent's peak."""
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def print_peak(args):
    """Print the MiB that one step takes above what was in use before it; runs in a fresh process (--peak)."""
    function = dict(zip(("ours", "official"), logprob_functions(args)[1:]))[args.peak]
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")      # the peak starts again from what is resident now
    before = torch.cuda.memory_allocated(args.device) if on_gpu else resident("VmRSS")
    function()
    print(((torch.cuda.max_memory_allocated(args.device) if on_gpu else resident("VmHWM")) - before) / MIB)


def peak_mib(args, side):
    command = [sys.executable, __file__, "--peak", side, "--device", str(args.device), "--seed", str(args.seed)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def logprob(args, rates):
    policy, ours, baseline = logprob_functions(args)
    expect_close("summed log-prob", ours(), baseline())
    yield row("log-probs and backward, 2 x (384 prompt + 128 response), vocabulary 128256", "", (1, 1),
              medians(args, ours, baseline), work(policy, 2 * 512, 2 * 128, 6), rates)
    peaks = [peak_mib(args, side) for side in ("ours", "official")]
    yield "the same, peak memory above start", *(f"{peak:,.0f} MiB" for peak in peaks), peaks[1] / peaks[0]


# ---- Supervised fine-tuning ---------------------------------------------------------------------------------------

def baseline_train_step(model, optimizer, samples, device):
    T = max(len(prompt) + len(response) for prompt, response in samples)
    input_ids, labels = torch.zeros(len(samples), T, dtype=torch.long), torch.full((len(samples), T), -100)
    mask = torch.zeros(len(samples), T, dtype=torch.long)
    for i, (prompt, response) in enumerate(samples):
        end = len(prompt) + len(response)
        input_ids[i, :end], mask[i, :end] = torch.tensor(prompt + response), 1
        labels[i, len(prompt):end] = torch.tensor(response)
    loss = model(input_ids=input_ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def sft(args, rates):
    vocab_size, rng = 32000, random.Random(args.seed)
    policy = make_policy(args, vocab_size, layers=4)
    model = copy.deepcopy(policy.backbone)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5) for m in (policy.backbone, model)]
    mixed = [rng.randint(64, 256) for _ in range(16)]
    for what, budget, lengths in [
            ("training step, 16 x (192 prompt + 64 response), vocabulary 32000", 4096, [(192, 64)] * 16),
            (f"the same, 64 to 256 tokens each, a quarter of them response; ours: micro-batches of 2048 tokens, "
             f"baseline: padded to {max(mixed)}", 2048, [(total - total // 4, total // 4) for total in mixed])]:
        samples = random_samples(args, vocab_size, lengths)
        config = SimpleNamespace(micro_batch_tokens=budget, max_grad_norm=1.0)
        ours = functools.partial(train_step, policy, optimizers[0], samples, config)
        baseline = functools.partial(baseline_train_step, model, optimizers[1], samples, args.device)
        expect_close("training loss", ours()[0], baseline())
        flops = work(policy, sum(map(sum, lengths)), sum(r for _, r in lengths), 6)
        yield row(what, "", (1, 1), medians(args, ours, baseline), flops, rates)


# ---- Verifier -----------------------------------------------------------------------------------------------------

def baseline_judge(reply, cards, numbers, target, known):
    """The status of a reply, and whether its formula begins like one of the `known` solutions."""
    fields = {name: re.search(rf'"{name}"\s*:\s*(\[[^\]]*\]|"[^"]*")', reply) for name in ("cards", "number", "formula")}
    if fields["formula"] is None:
        return "illegal_formula", False
    formula = fields["formula"][1].strip('"').split("=")[0].replace(" ", "")
    is_right = {name: field is not None and sorted(re.findall(r"\w+", field[1])) == sorted(map(str, truth))
                for name, field, truth in [("cards", fields["cards"], cards), ("number", fields["number"], numbers)]}
    if re.search(r"[^-+*/()\d]", formula) or re.search(r"[-+*/(][+*/)]|[-+*/(]-|\d\(|\)[\d(]|^[-+*/)]|[-+*/(]$", formula):
        return "illegal_formula", is_right
    used = [int(number) for number in re.findall(r"\d+", formula)]
    try:
        value = eval(formula)
    except (SyntaxError, ZeroDivisionError):
        return "illegal_formula", is_right
    if len(used) != len(numbers) or any(used.count(number) != numbers.count(number) for number in numbers):
        return "wrong_numbers", is_right
    is_prefix = any(solution.startswith(formula) for solution in known)
    return "correct" if abs(value - target) < 1e-6 else "wrong_value", is_right, is_prefix


def make_replies(args, count):
    """(reply, cards, numbers, solutions) with distinct replies: correct, wrong value, wrong numbers, illegal in turn."""
    env, rng, found = envs.make_env("gp-l", "id"), random.Random(args.seed), {}
    for i in itertools.count():
        env.reset(seed=f"{args.seed}/bench/{i}")
        known = verify.solutions(env.numbers)
        formula = rng.choice(known)
        for reply in (env.format_reply(formula), env.flawed_reply(), env.format_reply(f"{formula}+{rng.randint(1, 13)}"),
                      env.format_reply(rng.choice((f"({formula}", f"{formula}*", formula + "!")))):
            found.setdefault(reply, (reply, env.cards, env.numbers, known))
        if len(found) >= count:
            return list(found.values())[:count]


def verifier(args, rates):
    cases = make_replies(args, 2000)
    statuses = set()
    for reply, cards, numbers, known in cases:
        status = verify.judge_general_points(reply, cards, numbers).status
        statuses.add(status)
        if baseline_judge(reply, cards, numbers, 24, known)[0] != status:
            fail(f"verifier: the baseline does not find {reply} {status}")
    assert statuses == set(verify.REWARDS)

    def warm():
        for reply, cards, numbers, _ in cases:
            verify.judge_general_points(reply, cards, numbers)

    def cold():
        verify.parse_formula.cache_clear()
        warm()

    def baseline():
        for reply, cards, numbers, known in cases:
            baseline_judge(reply, cards, numbers, 24, known)

    t_cold, t_warm, t_baseline = medians(args, cold, warm, baseline)
    n = len(cases)
    yield row(f"{n} different replies, formulas not seen before", "check", (n, n), (t_cold, t_baseline))
    yield row(f"{n} different replies, formulas seen before", "check", (n, n), (t_warm, t_baseline))


# ---- Environments -------------------------------------------------------------------------------------------------

BRACKETS = ("(({}{}{}){}{}){}{}", "({}{}({}{}{})){}{}", "({}{}{}){}({}{}{})", "{}{}(({}{}{}){}{})", "{}{}({}{}({}{}{}))")


def baseline_solutions(numbers, target=24):
    found = []
    for (a, b, c, d), (o, p, q) in itertools.product(itertools.permutations(numbers), itertools.product("+-*/", repeat=3)):
        for pattern in BRACKETS:
            formula = pattern.format(a, o, b, p, c, q, d)
            try:
                if abs(eval(formula) - target) < 1e-6:
                    found.append(formula)
            except ZeroDivisionError:
                pass
    return found


def baseline_reset(seed):
    rng = random.Random(seed)
    while True:
        numbers = [min(rng.randint(1, 13), 10) for _ in range(4)]
        found = baseline_solutions(numbers)
        if found:
            return numbers, found


def environment(args, rates):
    env, few, many = envs.make_env("gp-l", "id"), 3, 10_000
    for hand in ((3, 3, 8, 8), (1, 1, 1, 1), (1, 5, 5, 5)):
        assert bool(baseline_solutions(hand)) == bool(verify.solutions(hand))

    def warm():
        for seed in range(many):
            env.reset(seed=seed)

    def cold():
        verify.solve_sorted.cache_clear()
        verify.expressions.cache_clear()
        warm()

    t_cold, t_warm, t_baseline = medians(args, cold, warm, lambda: [baseline_reset(seed) for seed in range(few)])
    baseline = f"baseline: the first {few}"
    yield row(f"{many} resets, no hand solved before; {baseline}", "reset", (many, few), (t_cold, t_baseline))
    yield row(f"{many} resets, hands solved before; {baseline}", "reset", (many, few), (t_warm, t_baseline))

    players = [envs.make_env("gp-l", "id") for _ in range(1000)]

    def begin():
        for seed, player in enumerate(players):
            player.reset(seed=seed)

    begin()
    tries = [[player.flawed_reply() for player in players] for _ in range(players[0].verify_iter)]

    def play():
        begin()
        for replies in tries:
            for player, reply in zip(players, replies):
                player.step(reply)

    t_begin, t_play = medians(args, begin, play)
    steps = len(players) * len(tries)
    yield "steps, five failed tries an episode", f"{steps / (t_play - t_begin):,.0f} step/s", "", None


# ---- Running ------------------------------------------------------------------------------------------------------

SECTIONS = {"rollout": rollout, "logprob": logprob, "sft": sft, "verifier": verifier, "envs": environment}


def parse_args():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated [all]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is not [5]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine, too")
    parser.add_argument("--peak", choices=("ours", "official"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only.split(",")
    for name in set(args.only) - set(SECTIONS):
        parser.error(f"--only {name!r}: allowed are {', '.join(SECTIONS)}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def processor_name():
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def main():
    args, load = parse_args(), os.getloadavg()[0]
    transformers.logging.set_verbosity_error()
    if args.peak:
        return print_peak(args)
    if load > MAX_LOAD and not args.force:
        fail(f"load average {load:.2f} is above {MAX_LOAD}: wait until the machine is idle, or add --force")
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else processor_name()
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, load average {load:.2f}, "
          f"seed {args.seed}, median of {args.rounds} rounds  ")
    rates = machine_rates(args)
    print(f"GEMM 2048^3: float32 {rates['float32'] / 1e9:,.0f} GFLOP/s, bfloat16 {rates['bfloat16'] / 1e9:,.0f} GFLOP/s; "
          f"copy of 256 MiB: {rates['copy'] / 1e9:,.1f} GB/s\n")
    print("| section | what | ours | baseline | ratio |\n| --- | --- | --- | --- | --- |", flush=True)
    for section in args.only:
        for what, ours, baseline, ratio in SECTIONS[section](args, rates):
            print(f"| {section} | {what} | {ours} | {baseline} | {'' if ratio is None else f'{ratio:.3g}x'} |", flush=True)


if __name__ == "__main__":
    main()
