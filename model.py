"""The policy: a Hugging Face (vision-)language model with the paper's value head.

The paper trains one model by SFT and by RL. This file has what both share; no game is named in it.

    messages  -- encode -->  prompt_ids  -- generate -->  response_ids  -- decode_reply -->  text
    dialogues of (prompt_ids, response_ids)  -- collate -->  batch  -- forward -->  logprobs, values

    B  replies of a batch   P  prompt tokens   R  response tokens   T = P + R
    V  vocabulary           D  hidden size     n  tokens of all replies together

    prompt_ids (P,)     everything before the reply, the dialogue so far included
    response_ids (R,)   the reply, with its end-of-turn token unless it was cut at the limit
    picture             the PIL image of a dialogue, or None; the prompt holds its image tokens
    row                 in training, a dialogue with all its replies; in sampling, one prompt

A model is a folder that any Hugging Face tool opens. Text models are causal LMs shaped like Llama.
Vision models are Mllama (the paper's Llama-3.2-Vision), Qwen2.5-VL and Qwen3-VL.

Left out: other architectures, several pictures in a dialogue, and videos. In support/: loading.py
checks a folder, vision.py has the kinds of vision models, decoder.py keeps keys and values while
sampling, running.py spreads weights over processes. `# differs N`: see docs/differences.md.
"""
import contextlib
import math
from itertools import zip_longest

import numpy as np
import torch
import torch.nn as nn

from support import loading, running
from support.chat import read_text
from support.decoder import CacheDecoder, LlamaDecoder, RolloutMemory, is_plain_llama, wide_product
from support.loading import as_shown, check_text, render, tokenizer_of
from support.vision import FAMILIES, picture_of, repeat_image_tokens

IMAGE_TOKEN = "<|image|>"

# ---- Messages <-> tokens -------------------------------------------------------------------------

def text_after_last_reply(processor, messages):
    """What the chat template writes after the last reply, its end-of-turn included.

    `encode` keeps the ids of all that comes before it. To find it, the dialogue is rendered with
    a placeholder for the last reply, and only what follows the placeholder is returned:

        <user>Make 24<end><assistant>(the last reply)<end><user>Wrong, again<end><assistant>
                                                     ^----------- returned -----------------
    """
    placeholder = "(the last reply)"
    while placeholder in str(messages):        # it must not stand in the dialogue
        placeholder = f"({placeholder})"
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    marked = list(messages)
    marked[last] = messages[last] | {"content": placeholder}
    text = render(processor, marked, add_generation_prompt=True)
    _, found, after = text.partition(placeholder)
    after = after.lstrip()             # a template may write "reply </s>", with a blank between
    end_of_turn = tokenizer_of(processor).eos_token
    if not found or not after.startswith(end_of_turn):
        raise ValueError(f"the chat template must show the last reply and end it with "
                         f"{end_of_turn!r}, the \"eos_token\" of tokenizer_config.json: "
                         "that must be the token which ends a turn")
    return after


def encode(processor, messages, prior_ids=None):
    """The prompt ids (P,) for the next reply to `messages`, which end with a user message.

    `prior_ids` are the ids of the dialogue up to and including the last reply, as it was sampled.
    With them only what follows that reply is tokenized, even if the template would now write
    earlier turns differently. A reply that was cut at the limit gets an end-of-turn here. That
    token belongs to the prompt, and so to no loss.
    """
    tokenizer = tokenizer_of(processor)
    if prior_ids:    # differs 12: sampled ids are kept, never decoded and encoded again
        text = text_after_last_reply(processor, messages)
        # `text` begins with the reply's end-of-turn, so that token is dropped from the ids kept.
        # `text` has it because some tokenizers, such as Llama 2's, put a blank before a text that
        # does not begin with a special token.
        kept = prior_ids[:-1] if prior_ids[-1] == tokenizer.eos_token_id else prior_ids
    else:
        text, kept = render(processor, messages, add_generation_prompt=True), []
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if processor is not tokenizer:       # a vision model: one image token becomes many
        ids = repeat_image_tokens(processor, kept, ids, picture_of(messages))
    # A text that is tokenized must not hold a control token, such as an end-of-turn: it would end
    # the turn. A reply that is kept as ids may hold one.
    for message in messages:
        kept_as_ids = prior_ids and message["role"] == "assistant"
        if not kept_as_ids:
            check_text(tokenizer, read_text(message))
    return kept + ids


def encode_reply(processor, reply):
    """The response ids (R,) that SFT learns: the reply and its end-of-turn."""
    tokenizer = tokenizer_of(processor)
    check_text(tokenizer, reply)
    shown = as_shown(processor, reply)         # without blanks that the template cuts off
    return tokenizer(shown, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def decode_reply(processor, response_ids):
    """The text of a sampled reply, without its end-of-turn."""
    tokenizer = tokenizer_of(processor)
    return tokenizer.decode([i for i in response_ids if i != tokenizer.eos_token_id])


# ---- Batches -------------------------------------------------------------------------------------

def collate(dialogues: list[list[tuple[list[int], list[int]]]], device, pictures=()):
    """One row of tokens for each dialogue, padded on the right, and where the replies stand in it.

    A dialogue is a list of turns (prompt_ids, response_ids). Each prompt begins with the turn
    before, so the last turn holds the whole dialogue. One pass over it serves all turns: five tries
    cost no more tokens than the fifth alone. Here one dialogue has two tries, the other has one:

        [[([1, 5], [7, 2]), ([1, 5, 7, 2, 6], [8, 2])],      input_ids   1 5 7 2 6 8 2
         [([1, 4], [9, 2])]]                                             1 4 9 2 0 0 0
                                                             row              0 0 1
                                                             prompt_length    2 5 2
                                                             response_length  2 2 2

    Returns a dict: input_ids (rows, T); row, prompt_length and response_length (B,), of the replies
    in order; pictures, one for each row or none at all. ValueError if only some rows have a
    picture: the layers that look at pictures would run for all rows or for none. There is no
    attention mask: under causal attention no token sees the padding that follows it.
    """
    pictures = [picture for picture in pictures if picture is not None]
    if len(pictures) not in (0, len(dialogues)):
        raise ValueError(f"{len(pictures)} pictures for {len(dialogues)} dialogues: "
                         "a batch has one for each or none")
    whole = [dialogue[-1][0] + dialogue[-1][1] for dialogue in dialogues]
    input_ids = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.long)
    replies = []
    for i, ids in enumerate(whole):
        input_ids[i, :len(ids)] = torch.tensor(ids)
        for prompt, response in dialogues[i]:
            turn = prompt + response
            assert ids[:len(turn)] == turn, "a prompt does not begin with the turn before"
            replies.append((i, len(prompt), len(response)))
    row, prompt_length, response_length = torch.tensor(replies, device=device).T       # (B,) each
    return {"input_ids": input_ids.to(device), "row": row, "prompt_length": prompt_length,
            "response_length": response_length, "pictures": pictures}


def longest_first(lengths):      # indices of rows; among equally long ones the first stays first
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def micro_batches(lengths: list[int], token_budget, group_cost=None) -> list[list[int]]:
    """Row indices in groups of like length, each of at most `token_budget` tokens with padding.

    The rows are sorted, longest first, and cut into groups so that the total cost is least. A group
    costs its tokens, rows x length of the longest, plus `group_cost` for its pass (if not given, a
    sixteenth of the budget). A row above the budget is a group by itself.

        lengths [9, 8, 2, 2], budget 20, group_cost 3    ->    [[0, 1], [2, 3]], cost 18+3 + 4+3

    This is dynamic programming: best[end] has the least cost of the first `end` sorted rows. If
    their last group begins at `start`, the rows before it cost best[start], which is known by then.
    """
    order = longest_first(lengths)
    group_cost = token_budget / 16 if group_cost is None else group_cost
    best = [(0, 0)]      # for each end: (the least cost, where the last group of that way starts)
    for end in range(1, len(order) + 1):
        ways = []
        for start in reversed(range(end)):
            tokens = (end - start) * lengths[order[start]]
            if ways and tokens > token_budget:         # but a single row may be longer
                break
            cost_before, _ = best[start]
            ways.append((cost_before + tokens + group_cost, start))
        best.append(min(ways))
    # Read the groups off from behind.
    groups, end = [], len(order)
    while end > 0:
        _, start = best[end]
        groups.insert(0, order[start:end])
        end = start
    return groups


def aligned_micro_batches(lengths: list[int], token_budget) -> list[list[int]]:
    """`micro_batches` of this process's rows, cut at the same places in all processes.

    All processes make their passes together, and a pass takes as long as its longest row. So each
    process sorts its rows, and cuts are made for the longest of all processes at each place:

        sorted lengths [9, 5] here, [7, 6, 3] in the other process    ->    cuts made for [9, 6, 3]

    A process with fewer rows may have fewer groups.
    """
    order = longest_first(lengths)
    sorted_lengths = running.gather([lengths[i] for i in order])       # a list from each process
    by_place = zip_longest(*sorted_lengths, fillvalue=0)
    longest = [max(lengths_there) for lengths_there in by_place]
    groups = []
    for places in micro_batches(longest, token_budget):
        rows = [order[place] for place in places if place < len(order)]
        if rows:
            groups.append(rows)
    return groups


# ---- The policy ----------------------------------------------------------------------------------

class TokenLogprobs(torch.autograd.Function):
    """Log-probs (n,) of targets (n,) from hidden states (n, D) and the weight (V, D) of lm_head.

        logits = hidden @ weight.T / temperature, with -inf at the ids in `ban`          (n, V)
        logprob = log_softmax(logits)[target]                                            (n,)

    For these two lines autograd would hold four (n, V) tensors. Here there is only one, a buffer
    that is overwritten twice. It is the logits, then their softmax, then the slope, which is
    softmax(logits) - onehot(target) = -d logprob / d logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ban, targets, temperature):
        # differs 8: float32 from here on; the official code rounds each log-prob to bfloat16
        logits = wide_product(hidden, weight)                              # (n, V), the one buffer
        logits.div_(temperature).index_fill_(1, ban, -math.inf)
        picked = logits.gather(1, targets[:, None])                        # (n, 1)
        peak = logits.amax(1, keepdim=True)                                # (n, 1)
        # The buffer becomes the softmax; `logits` is gone.
        probs = torch.softmax(logits, 1, out=logits)
        # logprob = picked - log(Z), where Z = sum(exp(logits)). The largest prob is exp(peak) / Z,
        # so log(Z) = peak - log(max(probs)). probs[target] is not used: it may have become 0.
        logprobs = picked - peak + probs.amax(1, keepdim=True).log()       # (n, 1)
        # The buffer becomes the slope; `probs` is gone.
        ctx.slope = probs.scatter_add_(1, targets[:, None], -torch.ones_like(picked))
        ctx.temperature = temperature
        ctx.save_for_backward(hidden, weight)
        return logprobs[:, 0]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        slope = ctx.slope.to(hidden.dtype)                                 # (n, V)
        ctx.slope = None                       # used up: there is no second backward
        scale = -grad[:, None] / ctx.temperature       # (n, 1); the slope is -d logprob / d logits
        grad_hidden = (scale * (slope @ weight)).to(hidden.dtype)          # (n, D)
        grad_weight = slope.T @ (scale * hidden).to(hidden.dtype)          # (V, D)
        return grad_hidden, grad_weight, None, None, None


class Policy(nn.Module):
    """A causal LM with a value head: one value for each reply, read at the last prompt token.

    The paper's value head (D -> 1024 -> 512 -> 1, ReLU) guesses rewards from hidden states. Passes
    compute in `dtype`, log-softmax in float32. `load_policy` stores the weights in `param_dtype`.
    """

    def __init__(self, backbone, processor, dtype="float32"):
        super().__init__()
        self.backbone = backbone.eval()        # no dropout: sampling and update must agree
        config, tokenizer = backbone.config.get_text_config(), tokenizer_of(processor)
        self.value_head = nn.Sequential(nn.Linear(config.hidden_size, 1024), nn.ReLU(),
                                        nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 1))
        self.eos_id = tokenizer.eos_token_id
        num_ids = backbone.lm_head.weight.shape[0]                                         # V
        banned = loading.never_sampled(tokenizer, backbone.config, num_ids)    # (V,) of bool
        self.register_buffer("banned", banned, persistent=False)
        # Granite models divide logits by this: in token_logprobs; while sampling, in the decoder.
        self.logits_scaling = getattr(config, "logits_scaling", 1.0)
        self.dtype, self.context = getattr(torch, dtype), loading.context_of(config)
        self.vision = None
        if processor is not tokenizer:         # the model reads pictures
            self.vision = FAMILIES[backbone.config.model_type](backbone, processor)
        self.picture_tokens = self.vision.picture_tokens if self.vision else 0

    @property
    def device(self):
        return self.banned.device

    def gflops(self, tokens_trained, tokens_rollout=0):
        """GFLOPs, the figures' x-axis (paper C.3): 6 N per trained token, 2 N per rollout token.

        N is `num_params`. Rollout tokens are read or sampled (`rl.count_compute`); SFT has none.
        """
        return 2 * self.num_params * (3 * tokens_trained + tokens_rollout) / 1e9

    @property
    def num_params(self):
        """The N of `gflops`: all weights but the value head and an untied input embedding."""
        num = sum(p.numel() for p in self.backbone.parameters())
        embedding = self.backbone.get_input_embeddings().weight
        tied = embedding is self.backbone.lm_head.weight
        return num if tied else num - embedding.numel()    # a tied one is the output matrix, too

    def num_tokens(self, prompt_ids, response_ids, picture):
        """Tokens of one pass over a turn, those of its picture included: what `gflops` counts."""
        num = len(prompt_ids) + len(response_ids)
        return num if picture is None else num + self.picture_tokens

    def check_length(self, num_tokens, remark=""):
        if num_tokens > self.context:
            raise ValueError(f"a dialogue of {num_tokens} tokens{remark} does not fit the model's "
                             f"context of {self.context} (or its sliding window, or the original "
                             "length of longrope)")

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def forward(self, batch, temperature=None):
        """Log-probs (B, R), zero after each reply's end, and values (B,).

        With a temperature the log-probs are those of sampling, where `banned` ids are shut out.
        Without one they are those of the plain model, for SFT.
        """
        row, first = batch["row"], batch["prompt_length"]      # (B,); first: a reply's first column
        self.check_length(batch["input_ids"].shape[1])

        # Find the n response tokens: their rows, and their columns in the rows.
        # differs 6: all of them count, end-of-turn included; the official code omits the first two
        offsets = torch.arange(int(batch["response_length"].max()), device=self.device)    # (R,)
        is_token = offsets < batch["response_length"][:, None]             # (B, R)
        rows = row[:, None].expand_as(is_token)[is_token]                  # (n,)
        columns = (first[:, None] + offsets)[is_token]                     # (n,)

        # One pass over the dialogues. Each value is read at the last token of its prompt.
        vision = {}
        if batch["pictures"]:
            vision = self.vision.inputs(batch["input_ids"], batch["pictures"])
        with self.autocast():
            hidden = self.backbone.model(input_ids=batch["input_ids"], use_cache=False,
                                         **vision).last_hidden_state       # (rows, T, D)
            values = self.value_head(hidden[row, first - 1])               # (B, 1)

        # The hidden state before a token predicts it. This shift is made here and nowhere else.
        # lm_head is applied to the n response tokens alone, so no (B, T, V) tensor exists.
        targets = batch["input_ids"][rows, columns]                        # (n,)
        flat = self.token_logprobs(hidden[rows, columns - 1], targets, temperature)        # (n,)
        logprobs = flat.new_zeros(is_token.shape)                          # (B, R)
        logprobs[is_token] = flat
        return logprobs, values[:, 0].float()

    def token_logprobs(self, hidden, targets, temperature):
        """Log-probs (n,) of target ids (n,), each predicted from its hidden state (n, D)."""
        if temperature is None:
            ban = self.banned.new_zeros(0, dtype=torch.long)
        else:
            ban = self.banned.nonzero()[:, 0]
        weight = self.backbone.lm_head.weight.to(self.dtype)
        divisor = (temperature or 1.0) * self.logits_scaling
        return TokenLogprobs.apply(hidden.to(self.dtype), weight, ban, targets, divisor)

    @torch.no_grad()
    def see(self, pictures):
        """What the picture encoder makes of each picture, a list of tensors, for `generate`."""
        with self.autocast():
            return self.vision.see(pictures)

    @torch.no_grad()
    def generate(self, prompts, uniforms, max_new_tokens, temperature, token_budget=65536,
                 pictures=None, memory=None, owners=None, top_p=1.0):
        """Sample one reply to each prompt. For each: (response_ids, their log-probs), lists (R,).

        uniforms      (number of prompts, max_new_tokens) in [0, 1). Each row decides the tokens of
                      one reply. Apart from rounding, a reply does not depend on the others
        temperature   0 takes the likeliest token
        token_budget  at most so many tokens, with padding, are decoded together
        pictures      one for each prompt, or None in all places
        memory        a RolloutMemory, which keeps what was read and seen for the next call
        owners        a key for each prompt, by default its index. Under it `memory` keeps a
                      dialogue. The tokens that begin both dialogue and prompt are not read again
        top_p         sample from the likeliest tokens that make up this share; for evaluation alone

        The log-probs returned serve only to check those that `forward` computes later.
        """
        pictures = pictures or [None] * len(prompts)
        owners = owners or range(len(prompts))
        memory = memory or RolloutMemory(self, token_budget)
        replies = [None] * len(prompts)
        # Weights are gathered and cast once for the whole call, not for each token.
        with running.unsharded(self), self.autocast():
            memory.forget_all_but(owners)
            # Encode all pictures first, each once.
            seen = memory.see(pictures)
            uniforms = torch.as_tensor(uniforms, device=self.device)
            plain_llama = is_plain_llama(self.backbone.config)
            decoder = (LlamaDecoder if plain_llama else CacheDecoder)(self, memory)
            lengths = [self.num_tokens(prompt, (), picture) + max_new_tokens
                       for prompt, picture in zip(prompts, pictures)]
            # Groups are decoded one after another, so there should be as few as possible. With this
            # group_cost one more group costs more than all the padding it could save.
            group_cost = len(prompts) * token_budget
            for rows in micro_batches(lengths, token_budget, group_cost):
                longest = max(len(prompts[row]) for row in rows) + max_new_tokens
                self.check_length(longest, f" (with --max-new-tokens {max_new_tokens})")
                seen_here = [seen[row] for row in rows] if seen else None  # None without pictures
                logits = decoder.prefill(                                  # (B, V)
                    [prompts[row] for row in rows], [owners[row] for row in rows],
                    [pictures[row] for row in rows], max_new_tokens, seen_here)
                sampled = self.sample(decoder, logits, uniforms[rows], max_new_tokens,
                                      temperature, top_p)
                for row, reply in zip(rows, sampled):
                    replies[row] = reply
        return replies

    def sample(self, decoder, logits, uniforms, max_new_tokens, temperature, top_p):
        """Replies to the prompts that a decoder has read, from its first logits (B, V)."""
        # All draws are noted here. Those that a row makes after its reply's end are cut off below.
        drawn_logprobs = torch.zeros(len(logits), max_new_tokens, device=self.device)      # (B, R)
        drawn_ids = torch.zeros_like(drawn_logprobs, dtype=torch.long)                     # (B, R)
        # Rows are dropped as replies end. Of each row left: its reply's index, and if it goes on.
        reply_of_row = torch.arange(len(logits), device=self.device)
        going = torch.ones_like(reply_of_row, dtype=torch.bool)
        for t in range(max_new_tokens):
            # Draw a token for each row, and note it.
            ids, logprobs = self.pick(logits, uniforms[reply_of_row, t], temperature, top_p)
            drawn_ids[reply_of_row, t], drawn_logprobs[reply_of_row, t] = ids, logprobs
            going &= ids != self.eos_id
            num_going = int(going.sum())
            if num_going == 0 or t == max_new_tokens - 1:
                break
            # Each drop copies the cache, so rows wait until more than a tenth have ended. With CUDA
            # graphs, which each drop captures anew, they wait until more than half have.
            if num_going < (0.5 if decoder.graphs else 0.9) * len(ids):
                kept = going.nonzero()[:, 0]
                decoder.keep(kept)
                reply_of_row, ids, going = reply_of_row[kept], ids[kept], going[kept]
            logits = decoder.append(ids)
        # Keep no row: the RolloutMemory gets the keys and values of each row that is dropped.
        decoder.keep(reply_of_row.new_empty(0))
        loading.check_drawn(drawn_logprobs)
        replies = []
        for ids, logprobs in zip(drawn_ids.tolist(), drawn_logprobs.tolist()):
            length = ids.index(self.eos_id) + 1 if self.eos_id in ids else max_new_tokens
            replies.append((ids[:length], logprobs[:length]))
        return replies

    def pick(self, logits, uniforms, temperature, top_p=1.0):
        """One token for each row of logits (B, V): ids (B,) and log-probs (B,).

        By inverse CDF at the row's uniform u: the first id with p_0 + ... + p_id > u * (sum of p).
        """
        # differs 9: training samples from the softmax that the update uses, with a top_p of 1. The
        # official code samples with top-p and top-k, and its log-probs ignore them.
        logits = logits.masked_fill(self.banned, -math.inf)
        logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)                # (B, V)
        if temperature == 0:
            ids = logits.argmax(-1)
        else:
            probs = logprobs.exp()
            if top_p < 1:    # shut out a token if the likelier ones together already reach top_p
                sorted_probs, order = probs.sort(-1, descending=True)      # likeliest token first
                sum_of_likelier = sorted_probs.cumsum(-1) - sorted_probs
                beyond = sum_of_likelier >= top_p
                shut_out = torch.zeros_like(beyond).scatter(-1, order, beyond)             # by id
                probs = probs.masked_fill(shut_out, 0.0)
            # Probs may sum to less than 1, so uniforms are scaled by their sum. NaN: the last id.
            sums = probs.cumsum(-1, dtype=torch.float64)
            points = (uniforms * sums[:, -1])[:, None]                     # (B, 1)
            ids = torch.searchsorted(sums, points, right=True)[:, 0].clamp(max=len(self.banned) - 1)
        return ids, logprobs.gather(1, ids[:, None])[:, 0]


SAMPLES, SHUFFLES, EVALUATION = 0, 1, 2        # a random stream's key begins with its purpose


def sampling_uniforms(keys, max_new_tokens):
    """Uniforms (len(keys), max_new_tokens) for `generate`. A key, some ints, seeds each row."""
    return np.stack([np.random.default_rng(key).random(max_new_tokens) for key in keys])


def load_policy(path, dtype="float32", device="cpu", vision=False, freeze="",
                gradient_checkpointing=False, param_dtype="float32", on_meta=False):
    """(policy, processor) from a folder that any Hugging Face tool opens, or ValueError.

    If the folder has no value head, a new one is drawn from torch's seed. `vision` demands a model
    that reads pictures; without `vision` such a model may play in words, as in the paper. `freeze`
    names parts that are not trained, comma-separated (loading.FREEZABLE). `on_meta` leaves the
    weights out, for a process that gets them from another.
    """
    if param_dtype == "bfloat16" and dtype != "bfloat16":
        raise ValueError(f"param_dtype {param_dtype} needs dtype bfloat16, not {dtype}")
    backbone, processor = loading.load_folder(path, vision, getattr(torch, param_dtype), on_meta)
    if not on_meta:
        loading.check_model(path, backbone, processor, vision, encode, encode_reply)
    loading.freeze_parts(backbone, freeze)
    policy = Policy(backbone, processor, dtype)
    for p in policy.parameters():              # no buffers: rotary frequencies stay in float32
        p.data = p.data.to(getattr(torch, param_dtype))
    if gradient_checkpointing:
        running.enable_checkpointing(policy)
    loading.load_value_head(path, policy.value_head)
    return policy if on_meta else policy.to(device), processor
