"""The policy: a Hugging Face (vision-)language model with the paper's value head.

Messages become token ids (`encode`), ids become log-probs and values (`Policy.forward`), prompts become sampled
replies (`Policy.generate`). Nothing here knows a game. A model is a folder that any Hugging Face tool opens.

    B replies of a batch   P prompt tokens   R response tokens   T = P + R   V vocabulary   D hidden size
    n tokens of all replies together (a row of a batch holds the replies of one dialogue; in sampling one)

    prompt_ids (P,)     everything before the reply, the dialogue so far included
    response_ids (R,)   the reply, with its end-of-turn token unless it was cut at the limit
    picture             a PIL image, the one of a dialogue, or None; the prompt holds its placeholder tokens

Text models are causal LMs shaped like Llama. Vision models are Mllama (Llama-3.2-Vision, the paper's), Qwen2.5-VL and
Qwen3-VL; how each takes a picture is in support/vision.py.

Left out: other architectures, several pictures in a dialogue, and videos. Decoding over a cache is in
support/decoder.py, spreading the weights over several processes in support/running.py.
"""
import contextlib
import itertools
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, DynamicCache
from transformers import logging as transformers_logging

from support import running
from support.chat import read_text, user_message
from support.decoder import CacheDecoder, LlamaDecoder, RolloutMemory, wide_product
from support.vision import FAMILIES, num_placeholders

transformers_logging.set_verbosity_error()         # no bars and no hints of the library among our lines
transformers_logging.disable_progress_bar()

IMAGE_TOKEN = "<|image|>"
TEMPLATE_SECONDS = 20                              # for two prompts at load: a template can loop for ever

# ---- Messages <-> tokens -----------------------------------------------------------------------------------


def tokenizer_of(processor):
    """A text model's processor is its tokenizer; that of a vision model holds one."""
    return getattr(processor, "tokenizer", processor)


def template_of(processor):
    """The chat template; of several named ones "default", and None if there is none."""
    template = processor.chat_template
    return template.get("default") if isinstance(template, dict) else template


def render(processor, messages, **kwargs):
    # The date is fixed because some templates (Llama 3.2, SmolLM3) print today's, and prompts must not change overnight.
    template = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}" + template_of(processor)
    try:
        return tokenizer_of(processor).apply_chat_template(messages, chat_template=template, tokenize=False,
                                                           date_string="01 Jan 2025", **kwargs)
    except Exception as error:                                     # a template is a program, and can raise anything
        raise ValueError(f"the chat template cannot write this dialogue: {str(error).strip() or repr(error)}") from None


def picture_of(messages):
    """The picture in chat messages, or None; ValueError if there are several."""
    pictures = [part["image"] for message in messages if not isinstance(message["content"], str)
                for part in message["content"] if part["type"] == "image"]
    if len(pictures) > 1:
        raise ValueError(f"{len(pictures)} pictures in one dialogue: at most one is allowed")
    return pictures[0] if pictures else None


def check_text(tokenizer, text):
    """ValueError if a text holds what the tokenizer reads as a control token: a landmark's name, a prompt file, a data file.
    (What a verdict repeats of a reply cannot, by `verify.plain`.)"""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in text:
            raise ValueError(f"the text {text[:60]!r}... holds {token.content}, a control token of the model")


def encode(processor, messages, prior_ids=None):
    """The prompt ids (P,) for the next reply to `messages`, which end with a user message.

    `prior_ids` are the ids of the dialogue up to and including the last reply, as it was sampled. With them, only what
    follows that reply is tokenized: sampled ids are never decoded and encoded again, though a template may write earlier
    turns otherwise later on. A reply that was cut at the limit is closed with an end-of-turn, which belongs to the prompt
    and so to no loss. The one image token that a template writes becomes as many as the model has for the picture.
    """
    tokenizer, prior = tokenizer_of(processor), prior_ids or []     # differs 12: sampled ids are kept, never encoded again
    if prior:
        last_reply = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        marker = "(the last reply)"                                # stands for it, to see what follows
        while marker in str(messages):
            marker = f"({marker})"
        marked = [message | {"content": marker} if i == last_reply else message for i, message in enumerate(messages)]
        _, found, rest = render(processor, marked, add_generation_prompt=True).partition(marker)
        if not found or not rest.lstrip().startswith(tokenizer.eos_token):
            raise ValueError(f"the chat template must show the last reply and end it with {tokenizer.eos_token!r}, the "
                             "\"eos_token\" of tokenizer_config.json: that must be the token which ends a turn")
        # behind the end-of-turn, which some tokenizers need to know that no text begins here
        kept, text = prior[:-1] if prior[-1] == tokenizer.eos_token_id else prior, rest.lstrip()
    else:
        kept, text = [], render(processor, messages, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if processor is not tokenizer:
        image_id, picture = processor.image_token_id, picture_of(messages)
        num, expected = num_placeholders(processor, picture), int(picture is not None)
        ids = [i for one in ids for i in [one] * (num if one == image_id else 1)]
        found = (kept + ids).count(image_id) / num
        if found != expected:
            raise ValueError(f"{found:.3g} {processor.image_token} tokens in a dialogue with {expected} pictures: the template "
                             f"must write one for each, and the text of a message must not hold {processor.image_token}")
    for message in messages:                                       # replies that are kept as ids may hold anything
        if not (prior and message["role"] == "assistant"):
            check_text(tokenizer, read_text(message))
    return kept + ids


def encode_reply(processor, reply):
    """The response ids (R,) that SFT learns: the reply and its end-of-turn."""
    tokenizer = tokenizer_of(processor)
    check_text(tokenizer, reply)
    return tokenizer(reply, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def decode_reply(processor, response_ids):
    """The text of a sampled reply, without its end-of-turn."""
    tokenizer = tokenizer_of(processor)
    return tokenizer.decode([i for i in response_ids if i != tokenizer.eos_token_id])


def collate(dialogues: list[list[tuple[list[int], list[int]]]], device, pictures=()):
    """One row of tokens for each dialogue, padded on the right, and where in it the replies stand.

    A dialogue is a list of (prompt_ids, response_ids) in which each prompt begins with the whole turn before it, so
    its last turn holds them all and one pass serves every reply: 5 tries cost the tokens of the longest, not the sum.
    Returns input_ids (rows, T), for each of the B replies in order, row, prompt_length and response_length (B,), and
    the pictures, one for each row or none at all. Two dialogues, one of two tries and one of one:

        [[([1, 5], [7, 2]), ([1, 5, 7, 2, 6], [8, 2])],     input_ids        1 5 7 2 6 8 2    row              0 0 1
         [([1, 4], [9, 2])]]                                                 1 4 9 2 0 0 0    prompt_length    2 5 2
                                                                                              response_length  2 2 2

    ValueError if only some have a picture: the layers that look at pictures would be passed over for all rows or for
    none. No attention mask: under causal attention no token sees what follows it, padding or later turns.
    """
    pictures = [picture for picture in pictures if picture is not None]
    if len(pictures) not in (0, len(dialogues)):
        raise ValueError(f"{len(pictures)} pictures for {len(dialogues)} dialogues: a batch has one for each or none")
    longest = [dialogue[-1][0] + dialogue[-1][1] for dialogue in dialogues]
    input_ids = torch.zeros(len(longest), max(map(len, longest)), dtype=torch.long)
    replies = []
    for row, ids in enumerate(longest):
        input_ids[row, :len(ids)] = torch.tensor(ids)
        for prompt, response in dialogues[row]:
            turn = prompt + response
            assert ids[:len(turn)] == turn, "a prompt does not begin with the turn before"
            replies.append((row, len(prompt), len(response)))
    row, prompt_length, response_length = torch.tensor(replies, device=device).T
    return {"input_ids": input_ids.to(device), "row": row, "prompt_length": prompt_length,
            "response_length": response_length, "pictures": pictures}


def longest_first(lengths):
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def micro_batches(lengths: list[int], token_budget, group_cost=None) -> list[list[int]]:
    """Row indices in groups of like length, at most `token_budget` padded tokens in each (one row always fits).

    Of all ways to cut the sorted rows this has the least padded tokens + `group_cost` per group (if not given, a
    sixteenth of the budget). The longest row comes first.
    """
    order = longest_first(lengths)
    group_cost = token_budget / 16 if group_cost is None else group_cost
    best = [(0, 0)]                                                # cost of the first n rows, start of their last group
    for end in range(1, len(order) + 1):
        cuts = []
        for start in reversed(range(end)):
            tokens = (end - start) * lengths[order[start]]
            if cuts and tokens > token_budget:
                break
            cuts.append((best[start][0] + tokens + group_cost, start))
        best.append(min(cuts))
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups, end = [order[start:end], *groups], start
    return groups


def aligned_micro_batches(lengths, token_budget):
    """`micro_batches` of this process's rows, cut at the same places in all, as they compute in step: it is the longest
    row of any that counts. A process with fewer rows has fewer groups."""
    order = longest_first(lengths)
    everyones = itertools.zip_longest(*running.gather([lengths[i] for i in order]), fillvalue=0)
    groups = micro_batches([max(column) for column in everyones], token_budget)     # they are sorted already
    return [[order[i] for i in group if i < len(order)] for group in groups if group[0] < len(order)]


def context_of(config):
    """How many tokens a row may have: beyond its sliding window or chunk a model would see other tokens in a padded row than
    alone."""
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    limits = [config.max_position_embeddings]
    if window and (layer_types is None or "sliding_attention" in layer_types):
        limits.append(window)
    if "chunked_attention" in (layer_types or ()):
        limits.append(config.attention_chunk_size)
    return min(limits)


# ---- The policy --------------------------------------------------------------------------------------------

class TokenLogprobs(torch.autograd.Function):
    """log_softmax of hidden @ weight.T / temperature, without the ids in `ban`, at the targets:
    (n, D), (V, D), ids, (n,), number -> (n,).

    What autograd makes of the same formula holds four (n, V) tensors. Here one is overwritten: logits become
    probabilities, and these, less 1 at the target, are the gradient but for its sign.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ban, targets, temperature):
        # differs 8: float32 from the product on; theirs round each log-prob to bfloat16 before they sum
        logits = wide_product(hidden, weight).div_(temperature).index_fill_(1, ban, -math.inf)     # (n, V)
        picked, peak = logits.gather(1, targets[:, None]), logits.amax(1, keepdim=True)            # (n, 1)
        probs = torch.softmax(logits, 1, out=logits)
        logprobs = picked - peak + probs.amax(1, keepdim=True).log()    # not log(probs), which may have underflowed
        ctx.save_for_backward(hidden, weight)
        ctx.temperature = temperature
        ctx.slope = probs.scatter_add_(1, targets[:, None], -torch.ones_like(picked))
        return logprobs[:, 0]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        slope, scale = ctx.slope.to(hidden.dtype), -grad[:, None] / ctx.temperature
        ctx.slope = None                                           # used up: no second backward
        grad_hidden, grad_weight = scale * (slope @ weight), slope.T @ (scale * hidden).to(hidden.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


class Policy(nn.Module):
    """A causal LM that also says how much reward it expects: one value per reply, read at the last prompt token.

    The value head is the paper's (D -> 1024 -> 512 -> 1, ReLU) on a trunk shared with the policy. `dtype` bfloat16
    computes in bfloat16 over float32 weights; log-softmax and sums of log-probs are float32 always.
    """

    def __init__(self, backbone, processor, dtype="float32"):
        super().__init__()
        self.backbone = backbone.eval()                            # no dropout: sampling and update must agree
        tokenizer = tokenizer_of(processor)
        hidden = backbone.config.get_text_config().hidden_size
        self.value_head = nn.Sequential(nn.Linear(hidden, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(),
                                        nn.Linear(512, 1))
        self.eos_id = tokenizer.eos_token_id
        # Never sampled: special ids but end-of-turn, and rows of lm_head without a token. (Mllama's <|image|> has no row.)
        rows = backbone.lm_head.weight.shape[0]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < rows}
        banned = torch.zeros(rows, dtype=torch.bool)
        banned[list(special - {self.eos_id})] = True
        banned[len(tokenizer):] = True
        self.register_buffer("banned", banned, persistent=False)
        self.logits_scaling = getattr(backbone.config.get_text_config(), "logits_scaling", 1.0)    # Granite divides by it
        self.dtype, self.context = getattr(torch, dtype), context_of(backbone.config.get_text_config())
        self.vision = FAMILIES[backbone.config.model_type](backbone, processor) if processor is not tokenizer else None
        self.picture_tokens = self.vision.picture_tokens if self.vision else 0      # beside those in the prompt

    @property
    def device(self):
        return self.banned.device

    def gflops(self, tokens_trained, tokens_rollout=0):
        """The x-axis of the figures (paper C.3), with tokens as we count them: 6 N for a token that is trained, 2 N for one
        read or sampled without a gradient (sft.py has none of these; `rl.advance` counts both)."""
        return 2 * self.num_params * (3 * tokens_trained + tokens_rollout) / 1e9

    @property
    def num_params(self):
        """N of that formula: all weights but the input embedding and the value head."""
        embedding = self.backbone.get_input_embeddings().weight
        tied = embedding is self.backbone.lm_head.weight           # then it is the output projection, and counts
        return sum(p.numel() for p in self.backbone.parameters()) - (0 if tied else embedding.numel())

    def check_length(self, num_tokens):
        if num_tokens > self.context:
            raise ValueError(f"a dialogue of {num_tokens} tokens, its reply's limit included, does not fit the model's context "
                             f"of {self.context} (or its sliding window): lower --max-new-tokens, or take another model")

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def forward(self, batch, temperature=None):
        """Log-probs (B, R), zero behind each reply's end, and values (B,).

        With a temperature: of the policy that samples (special ids shut out). Without: of the plain model, for SFT.
        The shift between a position and the token it predicts is made here and nowhere else; the vocabulary is only
        multiplied at the n response tokens, so no (B, T, V) tensor exists.
        """
        row, first, lengths = batch["row"], batch["prompt_length"], batch["response_length"]
        offsets = torch.arange(int(lengths.max()), device=self.device)                             # (R,)
        is_token = offsets < lengths[:, None]                                       # (B, R)
        # differs 6: every token of a reply counts, its end-of-turn too; theirs leaves the first two out
        rows, columns = row[:, None].expand_as(is_token)[is_token], (first[:, None] + offsets)[is_token]   # (n,)
        self.check_length(batch["input_ids"].shape[1])
        vision = self.vision.inputs(batch["input_ids"], batch["pictures"]) if batch["pictures"] else {}
        with self.autocast():
            hidden = self.backbone.model(input_ids=batch["input_ids"], use_cache=False,
                                         **vision).last_hidden_state                               # (rows, T, D)
            values = self.value_head(hidden[row, first - 1])                                       # (B, 1)
        flat = self.token_logprobs(hidden[rows, columns - 1], batch["input_ids"][rows, columns], temperature)   # (n,)
        logprobs = flat.new_zeros(is_token.shape)                                                  # (B, R)
        logprobs[is_token] = flat
        return logprobs, values[:, 0].float()

    def token_logprobs(self, hidden, targets, temperature):
        """Log-probs (n,) of target ids (n,) that follow hidden states (n, D)."""
        ban = self.banned.new_zeros(0, dtype=torch.long) if temperature is None else self.banned.nonzero()[:, 0]
        return TokenLogprobs.apply(hidden.to(self.dtype), self.backbone.lm_head.weight.to(self.dtype), ban, targets,
                                   (temperature or 1.0) * self.logits_scaling)

    def num_tokens(self, prompt_ids, response_ids, picture):
        """The tokens of one pass over a turn, those of its picture included: what `gflops` counts."""
        return len(prompt_ids) + len(response_ids) + (self.picture_tokens if picture is not None else 0)

    @torch.no_grad()
    def see(self, pictures):
        """What the picture encoder makes of each picture, a list of tensors: `generate` reads it, and runs no encoder."""
        with self.autocast():
            return self.vision.see(pictures)

    @torch.no_grad()
    def generate(self, prompts, uniforms, max_new_tokens, temperature, token_budget=65536, pictures=None, memory=None,
                 owners=None, top_p=1.0):
        """Sample one reply to each prompt: (response_ids, the log-probs (R,) seen while sampling) per prompt.

        `uniforms` (number of prompts, max_new_tokens) in [0, 1) decide the tokens, one row a reply, so but for
        rounding a reply does not depend on the rows beside it. Temperature 0 takes the likeliest token; `top_p`
        (evaluation alone) samples from the likeliest ones that have this share together. Rows that end leave the
        batch. `pictures` has one for each prompt, or None for each. `memory`, a RolloutMemory, keeps what was read and
        seen for the next call: what an owner (one for each prompt; if not given, its number) goes on with is not read
        again. The log-probs serve only to check those of `forward`.
        """
        with running.unsharded(self), self.autocast():                # around it all: weights are cast once, not per token
            return self.sample(prompts, uniforms, max_new_tokens, temperature, token_budget,
                               pictures or [None] * len(prompts), memory or RolloutMemory(self, token_budget),
                               owners or range(len(prompts)), top_p)

    def sample(self, prompts, uniforms, max_new_tokens, temperature, token_budget, pictures, memory, owners, top_p):
        """`generate` on whole weights."""
        memory.forget_all_but(owners)
        replies, seen = [None] * len(prompts), memory.see(pictures)
        uniforms = torch.as_tensor(uniforms, device=self.device)
        config = self.backbone.config
        plain_llama = (config.model_type == "llama" and config.hidden_act == "silu"
                       and not config.attention_bias and not config.mlp_bias)
        decoder = (LlamaDecoder if plain_llama else CacheDecoder)(self, memory)
        lengths = [self.num_tokens(prompt, (), picture) + max_new_tokens for prompt, picture in zip(prompts, pictures)]
        # Each group decodes for itself, so as few as can be: one more costs more than any padding.
        for rows in micro_batches(lengths, token_budget, group_cost=len(prompts) * token_budget):
            self.check_length(max(len(prompts[row]) for row in rows) + max_new_tokens)
            logits = decoder.prefill(*([column[row] for row in rows] for column in (prompts, owners, pictures)),
                                     max_new_tokens, seen and [seen[row] for row in rows])
            prompt_of_row = torch.tensor(rows, device=self.device)
            going = torch.ones_like(prompt_of_row, dtype=torch.bool)
            drawn_ids, drawn_logprobs = [], []
            for position in range(max_new_tokens):
                ids, logprobs = self.pick(logits, uniforms[prompt_of_row, position], temperature, top_p)
                for drawn, new, empty in ((drawn_ids, ids, -1), (drawn_logprobs, logprobs, 0.0)):
                    drawn.append(torch.full((len(prompts),), empty, dtype=new.dtype, device=self.device)
                                 .scatter(0, prompt_of_row, torch.where(going, new, empty)))
                going &= ids != self.eos_id
                num_going = int(going.sum())
                if num_going == 0 or position == max_new_tokens - 1:
                    break
                # Dropping rows copies the cache (and begins a new graph): not for each one.
                if num_going < (0.5 if decoder.graphs else 0.9) * len(ids):
                    kept = going.nonzero()[:, 0]
                    decoder.keep(kept)
                    prompt_of_row, ids, going = prompt_of_row[kept], ids[kept], going[kept]
                logits = decoder.append(ids)
            decoder.keep(prompt_of_row[:0])
            all_ids, all_logprobs = torch.stack(drawn_ids, 1).tolist(), torch.stack(drawn_logprobs, 1).tolist()
            for row in rows:
                response = [i for i in all_ids[row] if i >= 0]
                replies[row] = response, all_logprobs[row][:len(response)]
        return replies

    def pick(self, logits, uniforms, temperature, top_p=1.0):
        """One token for each row of logits (B, V), by inverse CDF at its uniform: ids (B,), log-probs (B,)."""
        # differs 9: the softmax of the update; theirs samples with top-p and top-k, which its log-probs ignore
        logits = logits.masked_fill(self.banned, -math.inf)
        logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        if temperature == 0:
            ids = logits.argmax(-1)
        else:
            probs = logprobs.exp()
            if top_p < 1:
                likeliest, order = probs.sort(-1, descending=True)
                beyond = likeliest.cumsum(-1) - likeliest >= top_p         # the share of those before is there already
                probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
            cumulative = probs.cumsum(-1, dtype=torch.float64)
            ids = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
        return ids, logprobs.gather(1, ids[:, None])[:, 0]


SAMPLES, SHUFFLES, EVALUATION = 0, 1, 2            # the first number of a random stream's key: what it is for


def sampling_uniforms(keys, max_new_tokens):
    """Uniforms (len(keys), max_new_tokens) for `generate`, each row from a generator seeded by its key of integers."""
    return np.stack([np.random.default_rng(key).random(max_new_tokens) for key in keys])


# ---- Loading one -------------------------------------------------------------------------------------------

FREEZABLE = ("vision", "projector")                # the picture encoder, and what makes its states tokens or keys: Fig. 16


def check_template(path, processor, vision):
    """The ids (P,) of a first prompt; ValueError unless `encode` can do with this chat template what it must."""
    tokenizer = tokenizer_of(processor)
    if template_of(processor) is None or tokenizer.eos_token is None:
        raise ValueError(f"model {path!r}: its tokenizer has no chat template (or none called default), or no "
                         "end-of-sequence token")
    reply = {"role": "assistant", "content": "2"}
    messages = [user_message("1", Image.new("RGB", (64, 64)) if vision else None), reply, user_message("3")]
    try:
        first = encode(processor, messages[:1])
        encode(processor, messages, first + encode_reply(processor, "2"))
    except ValueError as error:
        raise ValueError(f"model {path!r}: its chat template cannot be used: {error}") from None
    if tokenizer.bos_token and first[:2] == 2 * [tokenizer.bos_token_id]:
        raise ValueError(f"model {path!r}: its chat template must write {tokenizer.bos_token} once, not twice")
    return first


def check_model(path, backbone, processor, vision):
    """ValueError unless this model and its chat template behave as `encode` and `Policy` take for granted."""
    ids = running.within_seconds(TEMPLATE_SECONDS, partial(check_template, path, processor, vision),
                                 f"model {path!r}: its chat template does not come to an end")
    rows, embeddings = (table.weight.shape[0] for table in (backbone.lm_head, backbone.get_input_embeddings()))
    if max(ids) >= embeddings or tokenizer_of(processor).eos_token_id >= rows:
        raise ValueError(f"model {path!r}: its tokenizer has more tokens ({len(tokenizer_of(processor))}) than the model "
                         f"({rows}): resize the model's embeddings")
    with torch.no_grad():
        text = torch.tensor([[i for i in ids if i < rows]])        # without <|image|>, which has no row
        expected, product = backbone(text).logits, backbone.lm_head(backbone.model(text).last_hidden_state)
        try:
            cache = DynamicCache(config=backbone.config.get_text_config())
            backbone.model(input_ids=text, past_key_values=cache, use_cache=True)
            cache.reorder_cache(torch.tensor([0]))
        except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
            raise ValueError(f"model {path!r}: rows of its cache cannot be dropped ({backbone.config.model_type}), "
                             "which sampling needs") from None
    if not torch.isfinite(expected).all():
        raise ValueError(f"model {path!r}: its weights give logits that are no finite numbers")
    product = product / getattr(backbone.config.get_text_config(), "logits_scaling", 1.0)
    if backbone.lm_head.bias is not None or not torch.allclose(expected, product, atol=1e-4):
        raise ValueError(f"model {path!r}: its logits are not plain products of hidden states and lm_head "
                         f"({backbone.config.model_type}), which is not supported")


def load_folder(path, vision, dtype, hollow):
    """(backbone, processor) from a Hugging Face folder, weights of this type; ValueError says why it cannot be used.

    `hollow`: a model whose weights take no memory and have no values.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise ValueError(f"model {path!r}: " + (
            "an adapter (PEFT) without its model: merge it into the model first" if adapter else
            "no such model folder (it would have a config.json); support/tiny.py writes a tiny one"))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantized (quantization_config); take the model as it was before")
        family = FAMILIES.get(config.model_type)
        model_class = AutoModelForImageTextToText if family else AutoModelForCausalLM
        with torch.device("meta") if hollow else contextlib.nullcontext():
            backbone, faults = ((model_class.from_config(config, dtype=dtype), {}) if hollow else
                                model_class.from_pretrained(folder, dtype=dtype, trust_remote_code=False,
                                                            output_loading_info=True, ignore_mismatched_sizes=True))
        processor = (family.load_processor(folder, config) if family else
                     AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:                                      # the libraries raise anything on files that are odd
        raise ValueError(f"model {path!r}: not a causal language model shaped like Llama with its tokenizer, nor a "
                         "Llama-3.2-Vision with its processor, nor a Qwen2.5-VL or Qwen3-VL: "
                         f"{(str(error).strip() or repr(error)).splitlines()[0]}") from None
    for kind in ("missing", "unexpected", "mismatched"):            # transformers would fill them with random numbers
        if names := sorted(map(str, faults.get(f"{kind}_keys", ()))):
            raise ValueError(f"model {path!r}: its weights do not fill the model: {names[0]} is {kind}"
                             + (f", and {len(names) - 1} more" if names[1:] else ""))
    if vision and not family:
        raise ValueError(f"model {path!r}: {config.model_type} reads no pictures; the task needs a vision model, "
                         f"supported are {', '.join(FAMILIES)}")
    if not hasattr(backbone, "model") or not hasattr(backbone, "lm_head"):
        raise ValueError(f"model {path!r}: architecture {config.model_type} is not supported; "
                         f"supported are {', '.join(FAMILIES)} and causal LMs shaped like Llama (.model and .lm_head)")
    if family:
        family.check(path, backbone, processor)
    if not hollow:
        check_model(path, backbone, processor, vision)
    return backbone, processor


def load_policy(path, dtype="float32", device="cpu", vision=False, freeze="", gradient_checkpointing=False,
                param_dtype="float32", hollow=False):
    """(policy, processor) from a folder that any Hugging Face tool opens; a missing value head is initialised from
    torch's seed.

    `vision` demands a model that reads pictures (one that does may also be used in words, as in the paper). `freeze`
    names parts that are not trained, comma-separated. `hollow` leaves the weights out, for a process that gets them
    from another. ValueError says what does not fit.
    """
    if param_dtype == "bfloat16" and dtype != "bfloat16":
        raise ValueError(f"param_dtype {param_dtype} needs dtype bfloat16, not {dtype}")
    backbone, processor = load_folder(path, vision, getattr(torch, param_dtype), hollow)
    for name in filter(None, freeze.split(",")):
        family = FAMILIES.get(backbone.config.model_type)
        if name not in FREEZABLE or not family:
            raise ValueError(f"freeze {name!r}: allowed are {', '.join(FREEZABLE)}, and only in a vision model")
        for parameter_name, p in backbone.named_parameters():
            p.requires_grad_(p.requires_grad and not re.match(family.parts[name], parameter_name))
    policy = Policy(backbone, processor, dtype)
    for p in policy.parameters():                        # no buffers: rotary frequencies stay in float32
        p.data = p.data.to(getattr(torch, param_dtype))
    if gradient_checkpointing:
        running.enable_checkpointing(policy)
    value_head = Path(path) / "value_head.safetensors"
    if value_head.is_file():
        try:
            policy.value_head.load_state_dict(load_file(value_head))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{value_head}: not this model's value head: {' '.join(str(error).split())}") from None
    return policy if hollow else policy.to(device), processor
