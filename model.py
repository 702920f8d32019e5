"""The policy: a Hugging Face (vision-)language model with the paper's value head, and what it needs to run.

Messages become token ids (`encode`), ids become log-probs and values (`Policy.forward`), prompts become sampled
replies (`Policy.generate`). Nothing here knows a game. The last sections, "Running", are processes, configs,
checkpoints, the log and the stop signal, so that the scripts show only the method.

    B rows of a batch   P prompt tokens   R response tokens   T = P + R   V vocabulary   D hidden size   L layers

    prompt_ids (P,)     everything before the reply, the dialogue so far included
    response_ids (R,)   the reply, with its end-of-turn token unless it was cut at the limit
    picture             a PIL image, the one of a dialogue, or None; the prompt has one <|image|> token for it

Text models are causal LMs shaped like Llama. The vision model is Mllama (Llama-3.2-Vision, the paper's): a picture is
cut into tiles, the vision tower and a projector make states of them, and some layers of the language model look at
those by cross-attention, so that a picture adds one token to the prompt and none to the keys and values of the text.
In transformers the tokens before <|image|> see a little of the picture, too: we leave that as it is.

With torchrun, weights, gradients and optimizer state are spread over the processes (FSDP2).

Left out: other architectures, and several pictures in a dialogue.
"""
import argparse
import contextlib
import datetime
import difflib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import MISSING, asdict, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer,
                          DynamicCache, LlamaConfig, LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration,
                          MllamaProcessor, PreTrainedTokenizerFast)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil   # needs no torchvision

# On an H100 torch 2.11 and later prefer cuDNN's attention, which prepares itself anew for every shape; we have many.
torch.backends.cuda.enable_cudnn_sdp(False)

# ---- Messages <-> tokens -----------------------------------------------------------------------------------

IMAGE_TOKEN = "<|image|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def train_tokenizer(texts, atoms, vocab_size=4096):
    """A byte-level BPE tokenizer trained on `texts`, with every string of `atoms` kept as a token of its own.

    Whatever stands between two atoms may grow into one token however long it is, so the constant wording of a prompt
    costs next to nothing. Any string can be encoded and comes back unchanged.
    """
    words = sorted({re.escape(a) for a in atoms if a.isalnum()}, key=len, reverse=True)
    marks = sorted({re.escape(a) for a in atoms if not a.isalnum()}, key=len, reverse=True)
    pattern = "|".join([rf"\b(?:{'|'.join(words)})\b"] * bool(words) + marks)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_turn|>", pad_token="<|pad|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"], chat_template=CHAT_TEMPLATE,
        padding_side="left", clean_up_tokenization_spaces=False)


def tokenizer_of(processor):
    """A text model's processor is its tokenizer; that of a vision model holds one."""
    return getattr(processor, "tokenizer", processor)


def render(processor, messages, **kwargs):
    # The date is fixed because some templates (Llama 3.2) print today's, and prompts must not change overnight.
    return tokenizer_of(processor).apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False,
                                                       date_string="01 Jan 2025", **kwargs)


def picture_of(messages):
    """The picture in chat messages, or None; ValueError if there are several."""
    pictures = [part["image"] for message in messages if not isinstance(message["content"], str)
                for part in message["content"] if part["type"] == "image"]
    if len(pictures) > 1:
        raise ValueError(f"{len(pictures)} pictures in one dialogue: at most one is allowed")
    return pictures[0] if pictures else None


def encode(processor, messages, prior_ids=None):
    """The prompt ids (P,) for the next reply to `messages`, which end with a user message.

    `prior_ids` are the ids of the dialogue up to and including the last reply, as it was sampled. With them, only what
    follows that reply is tokenized: sampled ids are never decoded and encoded again. A reply that was cut at the
    limit is closed with an end-of-turn, which belongs to the prompt and so to no loss. A picture is one token here.
    """
    tokenizer, prior = tokenizer_of(processor), prior_ids or []
    text = render(processor, messages, add_generation_prompt=True)
    if prior:
        last_reply = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        head = render(processor, messages[:last_reply + 1])
        cut = head.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
        if text[:cut] != head[:cut]:
            raise ValueError("the chat template rewrites earlier turns, so sampled ids cannot be kept: use another "
                             "model")
        text = text[cut:]
        prior = prior + ([] if prior[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id])
    ids = prior + tokenizer(text, add_special_tokens=False).input_ids
    if processor is not tokenizer:
        found, expected = ids.count(processor.image_token_id), int(picture_of(messages) is not None)
        if found != expected:
            raise ValueError(f"{found} {processor.image_token} tokens in a dialogue with {expected} pictures: the text "
                             f"of a message must not hold {processor.image_token}")
    return ids


def encode_reply(processor, reply):
    """The response ids (R,) that SFT learns: the reply and its end-of-turn."""
    tokenizer = tokenizer_of(processor)
    return tokenizer(reply, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def decode_reply(processor, response_ids):
    """The text of a sampled reply, without its end-of-turn."""
    tokenizer = tokenizer_of(processor)
    return tokenizer.decode([i for i in response_ids if i != tokenizer.eos_token_id])


def collate(dialogues, device, pictures=()):
    """One row of tokens for each dialogue, padded on the right, and where in it the replies stand.

    A dialogue is a list of (prompt_ids, response_ids) in which each prompt begins with the whole turn before it, so
    its last turn holds them all and one pass serves every reply: 5 tries cost the tokens of the longest, not the sum.
    Returns input_ids (rows, T), for each of the B replies in order, row, prompt_length and response_length (B,), and
    the pictures, one for each row or none at all. ValueError if only some have one: the layers that look at pictures
    would be passed over for all rows or for none.
    No attention mask: under causal attention no token sees what follows it, padding or later turns.
    """
    pictures = [picture for picture in pictures if picture is not None]
    if len(pictures) not in (0, len(dialogues)):
        raise ValueError(f"{len(pictures)} pictures for {len(dialogues)} dialogues: a batch has one for each or none")
    whole = [dialogue[-1][0] + dialogue[-1][1] for dialogue in dialogues]
    input_ids = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.long)
    replies = []
    for row, ids in enumerate(whole):
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


def micro_batches(lengths, token_budget, group_cost=None):
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


# ---- Decoding: two ways to hold the keys and values of a batch ---------------------------------------------

class CacheDecoder:
    """Decode any causal LM over the Hugging Face cache, which also keeps the keys and values of pictures."""

    graphs = False

    def __init__(self, policy):
        self.policy, self.model = policy, policy.backbone

    def prefill(self, input_ids, attention_mask, max_new_tokens, head=0, seen=None):
        """Read padded prompts (B, P), and pictures as `see` made them; logits (B, V) of a reply's first token.

        The first `head` columns are the same in all rows, and read once.
        """
        self.mask = attention_mask
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        self.cross_mask, vision = None, {}                         # (B, T, 1, tiles), T growing with every step
        if seen:
            states, tiles = (torch.stack(part).to(input_ids.device) for part in zip(*seen))   # (B, S, D), (B, 1, tiles)
            self.cross_mask = self.policy.cross_attention_mask(input_ids, tiles)
            vision["cross_attention_states"] = states
        if head:
            with self.policy.autocast():
                self.model.model(input_ids=input_ids[:1, :head], past_key_values=self.cache, use_cache=True)
            self.cache.batch_repeat_interleave(len(input_ids))
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.forward(input_ids[:, head:], positions[:, head:], **vision)

    def step(self, ids):
        """Append one token to every row, ids (B,); the logits (B, V) of the next."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        if self.cross_mask is not None:
            self.cross_mask = torch.cat([self.cross_mask, self.cross_mask[:, -1:]], dim=1)
        return self.forward(ids[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def forward(self, input_ids, position_ids, **vision):
        if self.cross_mask is not None:                            # text models do not know the argument
            vision["cross_attention_mask"] = self.cross_mask
        with self.policy.autocast():
            hidden = self.model.model(input_ids=input_ids, attention_mask=self.mask, position_ids=position_ids,
                                      past_key_values=self.cache, use_cache=True, **vision).last_hidden_state
            return self.model.lm_head(hidden[:, -1])

    def keep(self, rows):
        """Drop all rows but these."""
        self.mask = self.mask[rows]
        self.cross_mask = None if self.cross_mask is None else self.cross_mask[rows]
        self.cache.batch_select_indices(rows)


class LlamaDecoder(CacheDecoder):
    """The same for Llama, faster: prompts are read as above, but each token is appended by a `step` of its own.

    Keys and values stand in buffers made once per batch; projections are fused and weights cast once per `generate`.
    With `LlamaDecoder.graphs = True` a token is one launch of a CUDA graph. It is off until somebody has measured it on
    a GPU (tests/bench.py does, with --device cuda): so far a test plays capture and replay on the CPU.
    """

    def __init__(self, policy):
        super().__init__(policy)
        config = self.model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, dtype = config.rms_norm_eps, policy.dtype
        self.layers = [{
            "qkv": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]).to(dtype),
            "out": a.o_proj.weight.to(dtype),
            "gate_up": torch.cat([m.gate_proj.weight, m.up_proj.weight]).to(dtype),
            "down": m.down_proj.weight.to(dtype),
            "norm_1": layer.input_layernorm.weight.float(),
            "norm_2": layer.post_attention_layernorm.weight.float(),
        } for layer in self.model.model.layers for a, m in [(layer.self_attn, layer.mlp)]]
        self.last_norm, self.lm_head = self.model.model.norm.weight.float(), self.model.lm_head.weight.to(dtype)
        if self.model.model.rotary_emb.rope_type in ("dynamic", "longrope"):    # they look at positions: no graph can
            self.graphs = False

    def prefill(self, input_ids, attention_mask, max_new_tokens, head=0, seen=None):
        logits = super().prefill(input_ids, attention_mask, max_new_tokens, head)
        B, P = input_ids.shape
        self.end, self.capacity, self.shape = P, -(-(P + max_new_tokens) // 64) * 64, None
        self.keys, self.values = [], []                            # per layer (B, kv_heads, capacity, head_dim)
        for layer in self.cache.layers:
            for buffers, filled in ((self.keys, layer.keys), (self.values, layer.values)):
                shape = B, self.kv_heads, self.capacity, self.head_dim
                buffers.append(filled.new_zeros(shape, dtype=self.lm_head.dtype))
                buffers[-1][:, :, :P] = filled
        del self.cache
        torch.clear_autocast_cache()                               # `step` has weights of its own
        visible = F.pad(attention_mask, (0, self.capacity - P)).bool()[:, None, None]              # (B, 1, 1, capacity)
        self.bias = torch.zeros_like(visible, dtype=self.lm_head.dtype).masked_fill_(~visible, -math.inf)
        # Padding stands before the end, so all rows write to one column, but each counts positions of its own.
        self.column = attention_mask.new_tensor([P])               # (1,)
        self.position = attention_mask.sum(-1, keepdim=True)       # (B, 1)
        return logits

    def step(self, ids):
        self.end += 1
        self.width = -(-self.end // 64) * 64                       # columns looked at, in few different numbers
        if not self.graphs:
            return self.append(ids)
        # Of each shape the first token runs as it is, to warm up; the second is captured; the rest are replays.
        if self.shape != (len(ids), self.width):
            self.shape, self.graph = (len(ids), self.width), None
            return self.append(ids)
        if self.graph is None:
            self.graph, self.ids = torch.cuda.CUDAGraph(), ids.clone()
            with torch.cuda.graph(self.graph):
                self.logits = self.append(self.ids)
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits

    def append(self, ids):
        """The work of `step`, all of it on the device: shapes and addresses stay, what changes stands in tensors."""
        x = self.model.model.embed_tokens(ids).float()             # (B, D): the residual stream stays in float32
        cos, sin = self.model.model.rotary_emb(x, self.position)   # (B, 1, head_dim)
        self.bias.index_fill_(3, self.column, 0.0)
        bias = self.bias[..., :self.width]
        for weights, keys, values in zip(self.layers, self.keys, self.values):
            qkv = F.linear(self.norm(x, weights["norm_1"]), weights["qkv"])
            q, k, v = qkv.view(len(x), -1, self.head_dim).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            q, k = ((t * cos + torch.cat([-t[..., self.head_dim // 2:], t[..., :self.head_dim // 2]], -1) * sin)
                    .to(v.dtype) for t in (q, k))                  # rotary embedding, (B, heads, head_dim)
            keys.index_copy_(2, self.column, k[:, :, None])
            values.index_copy_(2, self.column, v[:, :, None])
            # Heads that share keys and values stand side by side, as if they were positions of one sequence.
            attended = F.scaled_dot_product_attention(q.view(len(x), self.kv_heads, -1, self.head_dim),
                                                      keys[:, :, :self.width], values[:, :, :self.width], bias)
            x = x + F.linear(attended.flatten(1), weights["out"])
            gate, up = F.linear(self.norm(x, weights["norm_2"]), weights["gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, weights["down"])
        self.column += 1
        self.position += 1
        return F.linear(self.norm(x, self.last_norm), self.lm_head)

    def norm(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, self.eps).to(self.lm_head.dtype)

    def keep(self, rows):
        self.bias, self.position = self.bias[rows], self.position[rows]
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]


# ---- The policy --------------------------------------------------------------------------------------------

class TokenLogprobs(torch.autograd.Function):
    """log_softmax of hidden @ weight.T, without the ids in `ban`, at the targets: (n, D), (V, D), ids, (n,) -> (n,).

    What autograd makes of the same formula holds four (n, V) tensors. Here one is overwritten: logits become
    probabilities, and these, less 1 at the target, are the gradient but for its sign.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ban, targets):
        logits = F.linear(hidden, weight).float().index_fill_(1, ban, -math.inf)                   # (n, V)
        picked, peak = logits.gather(1, targets[:, None]), logits.amax(1, keepdim=True)            # (n, 1)
        probs = torch.softmax(logits, 1, out=logits)
        logprobs = picked - peak + probs.amax(1, keepdim=True).log()    # not log(probs), which may have underflowed
        ctx.save_for_backward(hidden, weight)
        ctx.slope = probs.scatter_add_(1, targets[:, None], -torch.ones_like(picked))
        return logprobs[:, 0]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        slope, scale, ctx.slope = ctx.slope.to(hidden.dtype), -grad[:, None], None   # used up: no second backward
        grad_hidden, grad_weight = scale * (slope @ weight), slope.T @ (scale * hidden).to(hidden.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


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
        # Never sampled: special ids but end-of-turn, and rows without a token. (<|image|> has no row.)
        rows = backbone.lm_head.weight.shape[0]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < rows}
        banned = torch.zeros(rows, dtype=torch.bool)
        banned[list(special - {self.eos_id})] = True
        banned[len(tokenizer):] = True
        self.register_buffer("banned", banned, persistent=False)
        self.dtype = getattr(torch, dtype)
        self.image_processor, self.picture_tokens = None, 0
        if processor is not tokenizer:
            self.image_processor, self.image_id = processor.image_processor, processor.image_token_id
            vision = backbone.config.vision_config                 # a picture counts all tiles, used or not
            self.picture_tokens = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)

    @property
    def layers(self):
        """The layers of the language model and of the vision tower: the units of checkpointing and of sharding."""
        names = self.backbone._no_split_modules or ()
        return [module for module in self.backbone.modules() if type(module).__name__ in names]

    def enable_checkpointing(self):
        """Compute a layer's activations again in the backward pass instead of keeping them."""
        if not self.layers:
            raise ValueError(f"gradient_checkpointing: {self.backbone.config.model_type} does not name its layers")
        for layer in self.layers:                                  # transformers' own switch leaves the tower out
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    @property
    def device(self):
        return self.banned.device

    @property
    def num_params(self):
        """N of the paper's compute formula: all weights but the input embedding and the value head."""
        embedding = self.backbone.get_input_embeddings().weight
        tied = embedding is self.backbone.lm_head.weight           # then it is the output projection, and counts
        return sum(p.numel() for p in self.backbone.parameters()) - (0 if tied else embedding.numel())

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
        is_token = offsets < lengths[:, None]                                                      # (B, R)
        rows, columns = row[:, None].expand_as(is_token)[is_token], (first[:, None] + offsets)[is_token]   # (n,)
        vision = self.picture_tensors(batch["pictures"]) if batch["pictures"] else {}
        if vision:
            vision["cross_attention_mask"] = self.cross_attention_mask(batch["input_ids"], vision["aspect_ratio_mask"])
        with self.autocast():
            hidden = self.backbone.model(input_ids=batch["input_ids"], use_cache=False,
                                         **vision).last_hidden_state                               # (rows, T, D)
            values = self.value_head(hidden[row, first - 1])                                       # (B, 1)
        flat = self.token_logprobs(hidden[rows, columns - 1], batch["input_ids"][rows, columns], temperature)   # (n,)
        logprobs = flat.new_zeros(is_token.shape)                                                  # (B, R)
        logprobs[is_token] = flat
        return logprobs, values[:, 0].float()

    def token_logprobs(self, hidden, targets, temperature):
        """Log-probs (n,) of target ids (n,) that follow hidden states (n, D). The temperature enters before the
        product, where it is free: dividing the logits would pass twice more over (n, V)."""
        ban = self.banned.new_zeros(0, dtype=torch.long)
        if temperature is not None:
            hidden, ban = hidden / temperature, self.banned.nonzero()[:, 0]
        return TokenLogprobs.apply(hidden.to(self.dtype), self.backbone.lm_head.weight.to(self.dtype), ban, targets)

    def num_tokens(self, prompt_ids, response_ids, picture):
        """The tokens of one pass over a turn, those of its picture included."""
        return len(prompt_ids) + len(response_ids) + (self.picture_tokens if picture is not None else 0)

    def picture_tensors(self, pictures):
        """Mllama's inputs for B pictures: pixel_values (B, 1, tiles, 3, size, size), aspect_ratio_ids (B, 1) and
        aspect_ratio_mask (B, 1, tiles), 1 for tiles that hold a part of the picture."""
        tensors = self.image_processor([[picture] for picture in pictures], return_tensors="pt")
        return {name: tensors[name].to(self.device) for name in ("pixel_values", "aspect_ratio_ids",
                                                                 "aspect_ratio_mask")}

    def cross_attention_mask(self, input_ids, tiles):
        """Which tiles a token looks at, from <|image|> on all: (B, T) and (B, 1, tiles) to (B, T, 1, tiles)."""
        sees = (input_ids == self.image_id).cumsum(1) > 0
        return sees[:, :, None, None] * tiles[:, None]

    @contextlib.contextmanager
    def whole_weights(self):
        """Sharded weights are put together on every process, so that sampling waits for nobody, and taken apart after.

        Replies differ in length, so a decode that gathered weights layer by layer would leave processes waiting.
        """
        units = [module for module in self.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        yield
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()

    @torch.no_grad()
    def see(self, pictures):
        """What the cross-attention layers look at, for each picture: states (S, D), S = tiles x patches, and which
        tiles hold something (1, tiles)."""
        tensors, model = self.picture_tensors(pictures), self.backbone.model
        with self.autocast():
            states = model.multi_modal_projector(model.vision_model(**tensors).last_hidden_state)
        return list(zip(states.flatten(1, -2), tensors["aspect_ratio_mask"]))

    @torch.no_grad()
    def generate(self, prompts, uniforms, max_new_tokens, temperature, token_budget=65536, pictures=None, sight=None):
        """Sample one reply to each prompt: (response_ids, the log-probs (R,) seen while sampling) per prompt.

        `uniforms` (number of prompts, max_new_tokens) in [0, 1) decide the tokens, one row a reply, so but for
        rounding a reply does not depend on the rows beside it. Temperature 0 takes the likeliest token. Rows that
        end leave the batch. `pictures` has one for each prompt, or None for each; a `sight` remembers what was seen of
        them in earlier turns. The log-probs serve only to check those of `forward`.
        """
        with self.whole_weights(), self.autocast():                # around it all: weights are cast once, not per token
            seen = (sight or Sight(self, token_budget))(pictures or [None])
            return self.decode(prompts, uniforms, max_new_tokens, temperature, token_budget, seen)

    def decode(self, prompts, uniforms, max_new_tokens, temperature, token_budget, seen):
        """`generate` on whole weights; `seen` is what `see` makes of the pictures, or None."""
        replies, seen_tokens = [None] * len(prompts), self.picture_tokens if seen else 0
        uniforms = torch.as_tensor(uniforms, device=self.device)
        config = self.backbone.config
        plain_llama = (config.model_type == "llama" and config.hidden_act == "silu"
                       and not config.attention_bias and not config.mlp_bias)
        decoder = LlamaDecoder(self) if plain_llama else CacheDecoder(self)
        lengths = [len(prompt) + max_new_tokens + seen_tokens for prompt in prompts]
        # Each group decodes for itself, so as few as can be: one more costs more than any padding.
        for rows in micro_batches(lengths, token_budget, group_cost=len(prompts) * token_budget):
            chosen = [prompts[row] for row in rows]
            P = max(map(len, chosen))
            # What all prompts begin with is read once, and padding follows it; behind a picture nothing is the same.
            head = 0 if seen or len(rows) == 1 else min(len(os.path.commonprefix(chosen)), min(map(len, chosen)) - 1)
            padded = [prompt[:head] + [-1] * (P - len(prompt)) + prompt[head:] for prompt in chosen]
            input_ids = torch.tensor(padded, device=self.device)                                   # (B, P)
            mask = (input_ids >= 0).long()
            logits = decoder.prefill(input_ids.clamp(min=0), mask, max_new_tokens, head,
                                     seen and [seen[row] for row in rows])
            alive = torch.tensor(rows, device=self.device)         # which prompt each row of the batch answers
            going = torch.ones_like(alive, dtype=torch.bool)
            drawn_ids, drawn_logprobs = [], []
            for position in range(max_new_tokens):
                ids, logprobs = self.pick(logits, uniforms[alive, position], temperature)
                for drawn, new, empty in ((drawn_ids, ids, -1), (drawn_logprobs, logprobs, 0.0)):
                    drawn.append(torch.full((len(prompts),), empty, dtype=new.dtype, device=self.device)
                                 .scatter(0, alive, torch.where(going, new, empty)))
                going &= ids != self.eos_id
                num_going = int(going.sum())
                if num_going == 0 or position == max_new_tokens - 1:
                    break
                # Dropping rows copies the cache (and begins a new graph): not for each one.
                if num_going < (0.5 if decoder.graphs else 0.9) * len(ids):
                    kept = going.nonzero()[:, 0]
                    decoder.keep(kept)
                    alive, ids, going = alive[kept], ids[kept], going[kept]
                logits = decoder.step(ids)
            all_ids, all_logprobs = torch.stack(drawn_ids, 1).tolist(), torch.stack(drawn_logprobs, 1).tolist()
            for row in rows:
                response = [i for i in all_ids[row] if i >= 0]
                replies[row] = response, all_logprobs[row][:len(response)]
        return replies

    def pick(self, logits, uniforms, temperature):
        """One token for each row of logits (B, V), by inverse CDF at its uniform: ids (B,), log-probs (B,)."""
        logits = logits.float().masked_fill(self.banned, -math.inf)
        logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        if temperature == 0:
            ids = logits.argmax(-1)
        else:
            cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
            ids = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
        return ids, logprobs.gather(1, ids[:, None])[:, 0]


class Sight:
    """`Policy.see` for a rollout: the weights stand still, so a picture is looked at once, and its states serve every
    turn of the dialogue. They wait in the CPU's memory (52 MB for a picture of the 11B model in bfloat16) until a call
    does without their picture."""

    def __init__(self, policy, token_budget):
        self.policy, self.seen = policy, {}                        # id of a picture -> the picture, its states
        self.at_once = max(1, token_budget // max(1, policy.picture_tokens))

    def __call__(self, pictures):
        """The states of each picture in order; None if there are no pictures."""
        if None in pictures:
            return None
        wanted = {id(picture): picture for picture in pictures}
        self.seen = {key: self.seen[key] for key in wanted if key in self.seen}
        new = [key for key in wanted if key not in self.seen]
        for start in range(0, len(new), self.at_once):
            keys = new[start:start + self.at_once]
            for key, seen in zip(keys, self.policy.see([wanted[key] for key in keys])):
                self.seen[key] = wanted[key], [tensor.cpu() for tensor in seen]
        return [self.seen[id(picture)][1] for picture in pictures]


def sampling_uniforms(keys, max_new_tokens):
    """Uniforms (len(keys), max_new_tokens) for `generate`, each row from a generator seeded by its key of integers."""
    return np.stack([np.random.default_rng(key).random(max_new_tokens) for key in keys])


# ---- Making and loading one --------------------------------------------------------------------------------

TINY = re.compile(r"(tiny|tiny-vl)(?::(\d+)x(\d+))?")
FREEZABLE = {"vision": "model.vision_model", "projector": "model.multi_modal_projector"}   # paper Fig. 16


def make_tiny(name, texts, atoms):
    """A random-init model and a tokenizer or processor, the tokenizer trained on `texts`.

    "tiny" (128x4) or "tiny:WIDTHxLAYERS" is a Llama; "tiny-vl" likewise an Mllama that sees pictures as one tile of
    224 pixels in 64 patches, with a vision tower of the same width and every second layer looking at the picture.
    """
    kind, *size = TINY.fullmatch(name).groups()
    width, layers = (int(number or default) for number, default in zip(size, (128, 4)))
    least = 1 if kind == "tiny" else 2
    if width % 32 or not width or layers < least:
        raise ValueError(f"model {name!r}: WIDTH must be a multiple of 32 and LAYERS at least {least}")
    tokenizer = train_tokenizer(texts, atoms)
    common = dict(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, intermediate_size=width * 8 // 3 // 32 * 32, max_position_embeddings=4096,
        tie_word_embeddings=kind == "tiny", rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if kind == "tiny":
        return LlamaForCausalLM(LlamaConfig(**common)), tokenizer
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)       # its id is V: beyond lm_head, so never sampled
    processor = MllamaProcessor(MllamaImageProcessorPil(size={"height": 224, "width": 224}, max_image_tiles=1),
                                tokenizer, chat_template=CHAT_TEMPLATE)
    backbone = MllamaForConditionalGeneration(MllamaConfig(
        image_token_index=processor.image_token_id,
        text_config=dict(common, cross_attention_layers=list(range(1, layers, 2))),
        vision_config=dict(hidden_size=width, attention_heads=width // 32, intermediate_size=2 * width, patch_size=28,
                           image_size=224, num_hidden_layers=2, num_global_layers=1, intermediate_layers_indices=[0, 1],
                           vision_output_dim=3 * width, max_num_tiles=1, supported_aspect_ratios=[[1, 1]])))
    for name, parameter in backbone.named_parameters():
        if name.endswith("gate"):                                  # 0 in a new Mllama, which is blind therefore
            nn.init.constant_(parameter, 0.5)
    return backbone, processor


def check_model(path, backbone, processor, vision):
    """ValueError unless this model and its chat template behave as `encode` and `Policy` take for granted."""
    tokenizer = tokenizer_of(processor)
    if processor.chat_template is None or tokenizer.eos_token is None:
        raise ValueError(f"model {path!r}: its tokenizer has no chat template or no end-of-sequence token")
    contents = [[{"type": "image", "image": None}, {"type": "text", "text": "1"}] if vision else "1", "2", "3"]
    messages = [{"role": role, "content": content} for role, content in zip(("user", "assistant", "user"), contents)]
    first = render(processor, messages[:1], add_generation_prompt=True)
    whole = render(processor, messages, add_generation_prompt=True)
    if not whole.startswith(f"{first}2{tokenizer.eos_token}"):
        raise ValueError(f"model {path!r}: its chat template must keep earlier turns as they were and end a reply with "
                         f"{tokenizer.eos_token!r}; allowed are models whose template does")
    ids = tokenizer(first, add_special_tokens=False).input_ids
    for token, least in [(tokenizer.bos_token, 0), (IMAGE_TOKEN, 1)][:1 + vision]:
        if token and not least <= ids.count(tokenizer.convert_tokens_to_ids(token)) <= 1:
            raise ValueError(f"model {path!r}: its chat template must write {token} once, not {whole.count(token)} "
                             "times")
    with torch.no_grad():
        text = torch.tensor([[i for i in ids if tokenizer.convert_ids_to_tokens(i) != IMAGE_TOKEN]])
        expected, product = backbone(text).logits, backbone.lm_head(backbone.model(text).last_hidden_state)
        if backbone.lm_head.bias is not None or not torch.allclose(expected, product, atol=1e-4):
            raise ValueError(f"model {path!r}: its logits are not plain products of hidden states and lm_head "
                             f"({backbone.config.model_type}), which is not supported")


def load_folder(path, vision, dtype, hollow):
    """(backbone, processor) from a Hugging Face folder, weights of this type; ValueError says why it cannot be used.

    `hollow`: a model whose weights take no memory and have no values.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {path!r}: no such model folder (it would have a config.json); "
                         "allowed: tiny, tiny-vl, either with :WIDTHxLAYERS, or a folder")
    try:
        config = AutoConfig.from_pretrained(folder)
        is_mllama = config.model_type == "mllama"
        model_class = AutoModelForImageTextToText if is_mllama else AutoModelForCausalLM
        with torch.device("meta") if hollow else contextlib.nullcontext():
            backbone = (model_class.from_config(config, dtype=dtype) if hollow else
                        model_class.from_pretrained(folder, dtype=dtype))
        processor = (AutoProcessor if is_mllama else AutoTokenizer).from_pretrained(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"model {path!r}: not a causal language model shaped like Llama with its tokenizer, nor a "
                         f"Llama-3.2-Vision with its processor: {str(error).splitlines()[0]}") from None
    if vision and not is_mllama:
        raise ValueError(f"model {path!r}: {config.model_type} reads no pictures; the task needs a vision model, "
                         "supported are mllama (Llama-3.2-Vision) and tiny-vl")
    if not hasattr(backbone, "model") or not hasattr(backbone, "lm_head"):
        raise ValueError(f"model {path!r}: architecture {config.model_type} is not supported; "
                         "supported are mllama and causal LMs shaped like Llama (.model and .lm_head)")
    if not hollow:
        check_model(path, backbone, processor, vision)
    return backbone, processor


def load_policy(path, dtype="float32", device="cpu", texts=(), atoms=(), vision=False, freeze="",
                gradient_checkpointing=False, param_dtype="float32", hollow=False):
    """(policy, processor) from a folder that any Hugging Face tool opens, or "tiny" or "tiny-vl" (`make_tiny`).

    `texts` and `atoms` are what the tokenizer of a tiny model is trained on. A missing value head is initialised from
    torch's seed. `vision` demands a model that reads pictures (one that does may also be used in words, as in the
    paper). `freeze` names parts that are not trained, comma-separated. `hollow` leaves the weights of a folder out,
    for a process that gets them from another. ValueError says what does not fit.
    """
    if param_dtype == "bfloat16" != dtype:
        raise ValueError(f"param_dtype {param_dtype} needs dtype bfloat16, not {dtype}")
    if TINY.fullmatch(path):
        if vision and not path.startswith("tiny-vl"):
            raise ValueError(f"model {path!r} reads no pictures; the task needs a vision model such as tiny-vl")
        backbone, processor = make_tiny(path, texts, atoms)
    else:
        backbone, processor = load_folder(path, vision, getattr(torch, param_dtype), hollow)
    for name in filter(None, freeze.split(",")):
        if name not in FREEZABLE or backbone.config.model_type != "mllama":
            raise ValueError(f"freeze {name!r}: allowed are {', '.join(FREEZABLE)}, and only in a vision model")
        backbone.get_submodule(FREEZABLE[name]).requires_grad_(False)
    policy = Policy(backbone, processor, dtype)
    for p in policy.parameters():                        # no buffers: rotary frequencies stay in float32
        p.data = p.data.to(getattr(torch, param_dtype))
    if gradient_checkpointing:
        policy.enable_checkpointing()
    value_head = Path(path) / "value_head.safetensors"
    if value_head.is_file():
        policy.value_head.load_state_dict(load_file(value_head))
    return policy if hollow else policy.to(device), processor


# ---- Running: processes ------------------------------------------------------------------------------------
#
# torchrun starts one process per device. The scripts are written as if there were one: what several have to agree on
# goes through these functions, which every process calls at the same point, and which cost nothing in a single one.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name):
    """"auto" is CUDA where there is one; anything else is torch's name of a device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def start_processes(name):
    """The device of this process, once it has met the others.

    A process that waits for another for half an hour gives up: the first may write 43 GB meanwhile, to a slow disk.
    """
    device = pick_device(name)
    if WORLD > 1 and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    return device


def leave(status=0):
    """End of a script: exit with this status, all processes together."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)   # torch's threads sometimes crash a normal exit
    sys.exit(status)


def gather(value):
    """The values of all processes in order of rank; a value is anything that JSON can hold."""
    if WORLD == 1:
        return [value]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(WORLD)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    rows = [torch.zeros(int(max(sizes)), dtype=torch.uint8, device=device) for _ in range(WORLD)]
    dist.all_gather(rows, F.pad(data, (0, int(max(sizes)) - len(data))))
    return [json.loads(bytes(row[:int(size)].tolist())) for row, size in zip(rows, sizes)]


def total(value):
    """The sum of a number over all processes."""
    return sum(gather(value))


def cut_together(lengths, token_budget):
    """`micro_batches` of this process's rows, cut at the same places in all, as they compute in step: it is the longest
    row of any that counts. A process with fewer rows has fewer groups."""
    order = longest_first(lengths)
    everyones = itertools.zip_longest(*gather([lengths[i] for i in order]), fillvalue=0)
    groups = micro_batches([max(column) for column in everyones], token_budget)     # they are sorted already
    return [[order[i] for i in group if i < len(order)] for group in groups if group[0] < len(order)]


def in_step(batches, spare=None):
    """(batch, weight) pairs, as many in every process: each pass gathers weights from all. A process that has fewer
    batches repeats its last, or `spare` if it has none, with weight 0."""
    missing = max(gather(len(batches))) - len(batches)
    return [(batch, 1.0) for batch in batches] + [((batches or [spare])[-1], 0.0)] * missing


def progress(iterable=None, **kwargs):
    """A progress bar, shown by the first process."""
    return tqdm(iterable, disable=RANK > 0, **kwargs)


def mine(items):
    """The part of a sequence that falls to this process."""
    return items[RANK::WORLD]


def say(text):
    """Print a line, in the first process."""
    if RANK == 0:
        tqdm.write(text)


def hand_round(unit, device):
    """Move a module's parameters and buffers to `device`, on every process with the values of the first."""
    handed = {}                                          # by id: tied weights are one tensor in two places
    for module in unit.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in handed:
                    values = tensor.detach().to(device) if RANK == 0 else torch.empty_like(tensor, device=device)
                    dist.broadcast(values, 0)
                    if isinstance(tensor, nn.Parameter):
                        values = nn.Parameter(values, tensor.requires_grad)
                    handed[id(tensor)] = values, tensor        # the original, too, so that no other gets its id
                tensors[name] = handed[id(tensor)][0]


def load_sharded(path, dtype, device, *args):
    """`load_policy` for training: weights, gradients and optimizer state are spread over the processes (FSDP2).

    Each layer is a unit, the rest another one. Only the first process reads the folder, and no device ever holds more
    than one whole unit beside its shares. Master weights and sums over processes are float32 (or `param_dtype`); if the
    policy computes in bfloat16, that is what is gathered.
    """
    if WORLD == 1:
        return load_policy(path, dtype, device, *args)
    error = None
    try:
        policy, processor = load_policy(path, dtype, "cpu", *args, hollow=RANK > 0)
    except ValueError as problem:
        error = str(problem)
    if told := [problem for problem in gather(error) if problem]:
        raise ValueError(told[0])
    names = gather([name for name, _ in policy.named_parameters()])[0]
    head = policy.backbone.lm_head
    if "backbone.lm_head.weight" in names and head.weight is policy.backbone.get_input_embeddings().weight:
        head.weight = nn.Parameter(torch.empty_like(head.weight))   # tied by the config, but not in the file
    settings = {"mesh": init_device_mesh(device.type, (WORLD,)), "reshard_after_forward": True,
                "mp_policy": MixedPrecisionPolicy(param_dtype=policy.dtype, reduce_dtype=torch.float32)}
    for unit in [*policy.layers, policy]:
        hand_round(unit, device)
        fully_shard(unit, **settings)
    register_fsdp_forward_method(policy, "generate")
    return policy, processor


def clip_gradients(parameters, max_norm):
    """Scale gradients to a norm of at most `max_norm`; their norm before, as a float."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


# ---- Running: configs, memory, learning rate ---------------------------------------------------------------

def knob(default, help, low=None, high=None, choices=None):
    """A field of a script's Config: its default, help text, and what values are allowed."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors of one line, and the nearest known flag for a misspelt one."""

    def error(self, message):
        word = re.search(r"(?<!\S)--[\w-]+", message)
        if "unrecognized" in message and word:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(word[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {' '.join(known)}"
            message = f"unknown option {word[0]}; {hint}"
        fail(message)


def fail(message, alone=False):
    """Say one line and exit with 2: the ending for the user's mistakes. `alone`: this process says it even if it is not
    the first, since the others do not come here."""
    sys.stdout.flush()
    if RANK == 0 or alone:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_config(cls, argv=None):
    """A Config from the command line; a flag, type or value that is not allowed ends the program with one line."""
    parser = OneLineParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(cls):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default,
                            help=f"{f.metadata['help']} [{f.default}]".replace("%", "%%"), **kind)
    config = cls(**vars(parser.parse_args(argv)))
    for f in fields(cls):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        flag, choices = "--" + f.name.replace("_", "-"), f.metadata["choices"]
        if choices and value not in choices:
            parser.error(f"{flag} {value!r}: allowed are {', '.join(map(str, choices))}")
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"{flag} {value}: must be a finite number")
        if low is not None and value < low or high is not None and value > high:
            parser.error(f"{flag} {value}: must be {f'at least {low}' if high is None else f'from {low} to {high}'}")
    return config


@contextlib.contextmanager
def memory_advice(knobs):
    """Where memory may run out: end with one line that says which knobs to turn."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).splitlines()[0]} Lower {knobs}; what is saved is whole, and the same command goes on",
             alone=True)


def memory_estimate(policy, config):
    """A line on the memory that training needs on each device: what stays, and what one micro-batch adds.

    Weights, gradients and Adam's two moments are shared out. Sampling has all weights on every device, in the type that
    the policy computes in, and for a Llama fused projections beside them; a single process has all weights in that type
    if the master weights are of another. What a layer keeps of a token for the backward pass is fitted to Llama's (40
    bytes per hidden unit, four numbers per unit of the MLP); with checkpointing it is the layer's input, and all of
    that for one layer at a time. A quarter of the tokens is taken for replies, which have logits.
    """
    text, tokens = policy.backbone.config.get_text_config(), config.micro_batch_tokens
    size, samples = policy.dtype.itemsize, hasattr(config, "generate_tokens")
    parts = dict(policy.backbone.named_parameters())
    stays = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in parts.values()) / WORLD
    cast = WORLD == 1 and any(p.dtype != policy.dtype for p in parts.values())
    copied = [name for name in parts if cast or samples and WORLD > 1]
    if samples and not cast and not policy.picture_tokens:
        copied += [name for name in parts if re.search(r"\.(q|k|v|gate|up)_proj\.", name)]
    copies = size * sum(parts[name].numel() for name in copied)
    layers, kept = text.num_hidden_layers, 40 * text.hidden_size + 4 * size * text.intermediate_size
    activations = tokens * (kept + 4 * text.hidden_size * layers if config.gradient_checkpointing else kept * layers)
    logits = tokens / 4 * policy.backbone.lm_head.weight.shape[0] * (4 + size)
    return (f"memory on each device: about {stays / 1e9:.1f} GB for weights, gradients and Adam, {copies / 1e9:.1f} GB "
            f"for weights as computed with, {(activations + logits) / 1e9:.1f} GB for a micro-batch of {tokens} "
            "tokens, a picture's counted as if they were text, which takes more")


def learning_rate(step, steps, peak, warmup_ratio=0.0, final=0.0):
    """Linear warm-up over a share of the `steps`, then a cosine from `peak` to `final`."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))


# ---- Running: run folders, checkpoints, log ----------------------------------------------------------------

# Fields that say how a run is executed, not what it computes: they may differ when it is continued.
RUNNING = {"out", "device", "micro_batch_tokens", "generate_tokens", "save_every", "keep_resume",
           "gradient_checkpointing"}


def check_run(config):
    """The newest complete checkpoint of the run folder, or None; writes nothing.

    ValueError names the fields in which the folder's config differs from this one, or says that it holds no run.
    """
    out, path, ours = Path(config.out), Path(config.out) / "config.json", asdict(config)
    if path.is_file():
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        differing = [k for k in {**theirs, **ours}
                     if k not in RUNNING and theirs.get(k, MISSING) != ours.get(k, MISSING)]
        if differing:
            told = ", ".join(f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in differing)
            raise ValueError(f"out folder {config.out} belongs to another config ({told}): choose another --out")
    elif out.exists() and (not out.is_dir() or any(p.suffix != ".tmp" for p in out.iterdir())):
        raise ValueError(f"out folder {config.out} is not empty and holds no run: choose another --out")
    for torn in sorted(out.glob("step_*.tmp")):
        say(f"{torn} was never finished: skipped")
    resumable = [p for p in checkpoints(out) if (p / "resume" / "state.json").is_file()]
    if checkpoints(out) and not resumable:
        raise ValueError(f"out folder {config.out} has checkpoints but none with its resume/ folder: "
                         f"go on with --model {checkpoints(out)[-1]} and another --out")
    return resumable[-1] if resumable else None


def open_run(config, newest):
    """Make the run folder with its config.json, or cut its log back to the checkpoint it goes on from."""
    gather(None)                                         # all have looked at the folder
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    last_step = checkpoint_step(newest) if newest else 0
    for name in ("metrics.jsonl", "turns.jsonl"):
        if (out / name).is_file():
            rows = [row for row in read_jsonl(out / name) if row["step"] <= last_step]
            write_whole(out / name, "".join(json.dumps(row) + "\n" for row in rows))
    gather(None)


def write_whole(path, text):
    """Replace a file's content in one move, so that no reader and no crash ever sees half of it."""
    if RANK > 0:
        return
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_jsonl(path):
    """The rows of a log; a last line that was never finished is left out, and a file that is not there is empty."""
    if not Path(path).is_file():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines(keepends=True) if line.endswith("\n")]


def log_jsonl(path, **row):
    if RANK > 0:
        return
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def dump_batch(out, samples):
    """Keep what made a loss infinite: (prompt_ids, response_ids) pairs of this process, as bad_batch_00000.json."""
    (Path(out) / f"bad_batch_{RANK:05d}.json").write_text(json.dumps(samples))


def checkpoint_step(folder):
    return int(Path(folder).name.removeprefix("step_"))


def checkpoints(out):
    """The complete checkpoints of a run folder, oldest first."""
    return sorted((p for p in Path(out).glob("step_*") if not p.suffix), key=checkpoint_step)


def whole_weights_of(policy):
    """{"backbone": {name: tensor}, "value_head": ...} in the memory of the first process, put together one by one."""
    weights, known = {"backbone": {}, "value_head": {}}, {}
    for name, tensor in policy.state_dict(keep_vars=True).items():
        part, _, rest = name.partition(".")
        if id(tensor) not in known:                      # tied weights are one tensor with two names
            values = tensor.detach()
            if isinstance(values, DTensor):
                values = values.full_tensor()
                values = values.cpu() if RANK == 0 else None
            known[id(tensor)] = values
        weights[part][rest] = known[id(tensor)]
    return weights


def publish(temporary, final):
    """Give a complete folder its final name, once all of it is on the disk."""
    for path in [*temporary.rglob("*"), temporary]:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_checkpoint(folder, policy, processor, optimizer, state, with_value_head):
    """All files of a checkpoint; every process has written its own when this returns."""
    weights = whole_weights_of(policy)
    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "resume").mkdir(parents=True)
        policy.backbone.save_pretrained(folder, state_dict=weights["backbone"])
        processor.save_pretrained(folder)
        if with_value_head:
            save_file(weights["value_head"], folder / "value_head.safetensors")
        (folder / "resume" / "state.json").write_text(json.dumps(state))
    gather(None)                                         # the folder is there
    names = {p: name for name, p in policy.named_parameters()}
    parts = {f"{names[p]}.{key}": value.to_local().contiguous() if isinstance(value, DTensor) else value
             for p, entry in optimizer.state.items() for key, value in entry.items()}
    save_file(parts, folder / "resume" / f"optimizer_{RANK:05d}.safetensors")
    gather(None)


def save_checkpoint(out, step, policy, processor, optimizer, state, keep_resume=2, with_value_head=True):
    """Write step_000400/: a Hugging Face folder, value_head.safetensors, and resume/ (optimizer and `state`).

    It is written as step_000400.tmp/ and renamed when it is complete. Weights stay; resume/ is kept for the newest
    `keep_resume` checkpoints. Every process writes its part of the optimizer state; the first writes all the rest.
    """
    final = Path(out) / f"step_{step:06d}"
    temporary = final.with_suffix(".tmp")
    if any(gather(final.exists())):
        return final
    try:
        write_checkpoint(temporary, policy, processor, optimizer, state, with_value_head)
        if RANK == 0:
            publish(temporary, final)
            for old in checkpoints(out)[:-keep_resume]:
                shutil.rmtree(old / "resume", ignore_errors=True)
    except (OSError, SafetensorError) as error:          # such as a full disk
        fail(f"{temporary}: {error}; the checkpoints before it are whole, and the same command goes on", alone=True)
    gather(None)
    return final


def load_resume(folder, policy, optimizer):
    """Put the optimizer state of a checkpoint back and return its `state`; the weights come with load_policy.

    Each tensor is put together from the parts of the processes that wrote it and cut anew for those that read it.
    """
    files = [safe_open(path, "pt") for path in sorted((folder / "resume").glob("optimizer_*.safetensors"))]
    names = set(files[0].keys())
    for name, p in policy.named_parameters():
        if f"{name}.step" in names:
            optimizer.state[p] = {"step": files[0].get_tensor(f"{name}.step")}
            for key in ("exp_avg", "exp_avg_sq"):
                parts = [file.get_tensor(f"{name}.{key}") for file in files]
                optimizer.state[p][key] = cut_like(p, torch.cat(parts) if len(parts) > 1 else parts[0])
    return json.loads((folder / "resume" / "state.json").read_text())


def cut_like(p, tensor):
    """A whole tensor on the device of parameter p and, if p is sharded, sharded as p is."""
    if not isinstance(p, DTensor):
        return tensor.to(p.device)
    shared, rows = torch.zeros_like(p.detach()), tensor.chunk(WORLD)
    if RANK < len(rows):
        shared.to_local().copy_(rows[RANK])
    return shared


class StopSignal:
    """Turns SIGTERM or SIGUSR1 into a flag that the loops look at together; a second one exits at once."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self.handle)
        signal.signal(signal.SIGUSR1, self.handle)

    def handle(self, *_):
        if self.received:
            os._exit(143)
        self.received = True

    @property
    def requested(self):
        """Whether any process received one."""
        return any(gather(self.received))
