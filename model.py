"""The policy: a Hugging Face causal language model with the paper's value head, and what it needs to run.

Messages become token ids (`encode`), ids become log-probs and values (`Policy.forward`), prompts become sampled
replies (`Policy.generate`). Nothing here knows a game. The last section, "Running", is checkpoints, the config
parser, the log and the stop signal, so that the scripts show only the method.

    B rows of a batch   P prompt tokens   R response tokens   T = P + R   V vocabulary   D hidden size   L layers

    prompt_ids (P,)     everything before the reply, the dialogue so far included
    response_ids (R,)   the reply, with its end-of-turn token unless it was cut at the limit

Left out: other architectures than text causal LMs, and more than one device.
"""
import argparse
import contextlib
import difflib
import json
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import MISSING, asdict, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig,
                          LlamaForCausalLM, PreTrainedTokenizerFast)

# ---- Messages <-> tokens -----------------------------------------------------------------------------------

CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] "
                 "+ '<|end_of_turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


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


def render(processor, messages, **kwargs):
    # The date is fixed because some templates (Llama 3.2) print today's, and prompts must not change overnight.
    return processor.apply_chat_template(messages, tokenize=False, date_string="01 Jan 2025", **kwargs)


def encode(processor, messages, prior_ids=None):
    """The prompt ids (P,) for the next reply to `messages`, which end with a user message.

    `prior_ids` are the ids of the dialogue up to and including the last reply, as it was sampled. With them, only what
    follows that reply is tokenized: sampled ids are never decoded and encoded again. A reply that was cut at the
    limit is closed with an end-of-turn, which belongs to the prompt and so to no loss.
    """
    text = render(processor, messages, add_generation_prompt=True)
    if prior_ids is None:
        return processor(text, add_special_tokens=False).input_ids
    last_reply = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    head = render(processor, messages[:last_reply + 1])
    cut = head.rindex(processor.eos_token) + len(processor.eos_token)
    if text[:cut] != head[:cut]:
        raise ValueError("the chat template rewrites earlier turns, so sampled ids cannot be kept: use another model")
    end_of_turn = [] if prior_ids[-1] == processor.eos_token_id else [processor.eos_token_id]
    return prior_ids + end_of_turn + processor(text[cut:], add_special_tokens=False).input_ids


def encode_reply(processor, reply):
    """The response ids (R,) that SFT learns: the reply and its end-of-turn."""
    return processor(reply, add_special_tokens=False).input_ids + [processor.eos_token_id]


def decode_reply(processor, response_ids):
    """The text of a sampled reply, without its end-of-turn."""
    return processor.decode([i for i in response_ids if i != processor.eos_token_id])


def collate(dialogues, device):
    """One row of tokens for each dialogue, padded on the right, and where in it the replies stand.

    A dialogue is a list of (prompt_ids, response_ids) in which each prompt begins with the whole turn before it, so
    its last turn holds them all and one pass serves every reply: 5 tries cost the tokens of the longest, not the sum.
    Returns input_ids (rows, T) and, for each of the B replies in order, row, prompt_length and response_length (B,).
    No attention mask: under causal attention no token sees what follows it, padding or later turns.
    """
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
            "response_length": response_length}


def micro_batches(lengths, token_budget):
    """Group row indices by length, with at most `token_budget` padded tokens in a group (one row always fits)."""
    groups = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):   # longest first: it sets the padding
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


# ---- Decoding: two ways to hold the keys and values of a batch ---------------------------------------------

class CacheDecoder:
    """Decode any causal LM over the Hugging Face cache."""

    def __init__(self, policy):
        self.policy, self.model = policy, policy.backbone

    def prefill(self, input_ids, attention_mask, max_new_tokens):
        """Read left-padded prompts (B, P); the logits (B, V) of the first token of the reply."""
        self.mask = attention_mask
        self.cache = DynamicCache(config=self.model.config)
        return self.forward(input_ids, (attention_mask.cumsum(-1) - 1).clamp(min=0))

    def step(self, ids):
        """Append one token to every row, ids (B,); the logits (B, V) of the next."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        return self.forward(ids[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def forward(self, input_ids, position_ids):
        with self.policy.autocast():
            hidden = self.model.model(input_ids=input_ids, attention_mask=self.mask, position_ids=position_ids,
                                      past_key_values=self.cache, use_cache=True).last_hidden_state
            return self.model.lm_head(hidden[:, -1])

    def keep(self, rows):
        """Drop all rows but these."""
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)


class LlamaDecoder(CacheDecoder):
    """The same for Llama, faster: prompts are read as above, but each token is appended by a `step` of its own.

    Keys and values stand in buffers made once per batch; projections are fused and weights cast once per `generate`.
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
            "norm_1": layer.input_layernorm.weight, "norm_2": layer.post_attention_layernorm.weight,
        } for layer in self.model.model.layers for a, m in [(layer.self_attn, layer.mlp)]]
        self.lm_head = self.model.lm_head.weight.to(dtype)

    def prefill(self, input_ids, attention_mask, max_new_tokens):
        logits = super().prefill(input_ids, attention_mask, max_new_tokens)
        B, P = input_ids.shape
        self.keys, self.values = [], []                            # per layer (B, kv_heads, P + N, head_dim)
        for layer in self.cache.layers:
            for buffers, filled in ((self.keys, layer.keys), (self.values, layer.values)):
                shape = B, self.kv_heads, P + max_new_tokens, self.head_dim
                buffers.append(filled.new_empty(shape, dtype=self.lm_head.dtype))
                buffers[-1][:, :, :P] = filled
        del self.cache
        self.mask = F.pad(attention_mask, (0, max_new_tokens), value=1).bool()[:, None, None]   # (B, 1, 1, P + N)
        self.position = attention_mask.sum(-1, keepdim=True)       # (B, 1): left padding keeps the columns in step,
        self.column = P                                            # while every row counts its own positions
        return logits

    def step(self, ids):
        x = self.model.model.embed_tokens(ids).float()             # (B, D): the residual stream stays in float32
        cos, sin = self.model.model.rotary_emb(x, self.position)   # (B, 1, head_dim)
        end = self.column + 1
        for weights, keys, values in zip(self.layers, self.keys, self.values):
            qkv = F.linear(self.norm(x, weights["norm_1"]), weights["qkv"])
            q, k, v = qkv.view(len(x), -1, self.head_dim).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            q, k = (t * cos + torch.cat([-t[..., self.head_dim // 2:], t[..., :self.head_dim // 2]], -1) * sin
                    for t in (q, k))                               # rotary embedding, (B, heads, head_dim)
            keys[:, :, self.column], values[:, :, self.column] = k, v
            attended = F.scaled_dot_product_attention(q.to(v.dtype)[:, :, None], keys[:, :, :end], values[:, :, :end],
                                                      self.mask[..., :end], enable_gqa=self.heads != self.kv_heads)
            x = x + F.linear(attended.flatten(1), weights["out"])
            gate, up = F.linear(self.norm(x, weights["norm_2"]), weights["gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, weights["down"])
        self.column, self.position = end, self.position + 1
        return F.linear(self.norm(x, self.model.model.norm.weight), self.lm_head)

    def norm(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, self.eps).to(self.lm_head.dtype)

    def keep(self, rows):
        self.mask, self.position = self.mask[rows], self.position[rows]
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]


# ---- The policy --------------------------------------------------------------------------------------------

class TokenLogprobs(torch.autograd.Function):
    """log_softmax of hidden @ weight.T, without the ids in `ban`, at the targets: (n, D), (V, D), ids, (n,) -> (n,).

    What autograd makes of the same formula holds four (n, V) tensors. Here one is overwritten: the forward pass makes
    exponentials of the logits, the backward pass makes their gradient of these.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ban, targets):
        logits = F.linear(hidden, weight).float().index_fill_(1, ban, -math.inf)                   # (n, V)
        picked, peak = logits.gather(1, targets[:, None]), logits.amax(1, keepdim=True)            # (n, 1)
        total = logits.sub_(peak).exp_().sum(1, keepdim=True)                                      # (n, 1)
        ctx.save_for_backward(hidden, weight, targets, total)
        ctx.exponentials = logits
        return (picked - peak - total.log())[:, 0]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, total = ctx.saved_tensors
        grad, grad_logits, ctx.exponentials = grad[:, None], ctx.exponentials, None   # used up: no second backward
        grad_logits = grad_logits.mul_(-grad / total).scatter_add_(1, targets[:, None], grad).to(hidden.dtype)
        return grad_logits @ weight, grad_logits.T @ hidden, None, None


class Policy(nn.Module):
    """A causal LM that also says how much reward it expects: one value per reply, read at the last prompt token.

    The value head is the paper's (D -> 1024 -> 512 -> 1, ReLU) on a trunk shared with the policy. `dtype` bfloat16
    computes in bfloat16 over float32 weights; log-softmax and sums of log-probs are float32 always.
    """

    def __init__(self, backbone, processor, dtype="float32"):
        super().__init__()
        self.backbone = backbone
        hidden = backbone.config.hidden_size
        self.value_head = nn.Sequential(nn.Linear(hidden, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(),
                                        nn.Linear(512, 1))
        self.eos_id = processor.eos_token_id
        rows = backbone.lm_head.weight.shape[0]
        special = {i for i, token in processor.added_tokens_decoder.items() if token.special and i < rows}
        banned = torch.zeros(rows, dtype=torch.bool)               # special ids and rows without a token are never
        banned[list(special - {self.eos_id})] = True               # sampled; end-of-turn is
        banned[len(processor):] = True
        self.register_buffer("banned", banned, persistent=False)
        self.dtype = getattr(torch, dtype)

    @property
    def device(self):
        return self.banned.device

    @property
    def num_params(self):
        """N of the paper's compute formula: weights that multiply; without the input embedding and the value head."""
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
        with self.autocast():
            hidden = self.backbone.model(input_ids=batch["input_ids"],
                                         use_cache=False).last_hidden_state                        # (rows, T, D)
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

    @torch.no_grad()
    def generate(self, prompts, uniforms, max_new_tokens, temperature, token_budget=65536):
        """Sample one reply to each prompt: (response_ids, the log-probs (R,) seen while sampling) per prompt.

        `uniforms` (number of prompts, max_new_tokens) in [0, 1) decide the tokens, one row a reply, so but for
        rounding a reply does not depend on the rows beside it. Temperature 0 takes the likeliest token. Rows that
        end leave the batch. The log-probs serve only to check those of `forward`.
        """
        replies = [None] * len(prompts)
        uniforms = torch.as_tensor(uniforms, device=self.device)
        config = self.backbone.config
        plain_llama = (config.model_type == "llama" and config.hidden_act == "silu"
                       and not config.attention_bias and not config.mlp_bias)
        decoder = LlamaDecoder(self) if plain_llama else CacheDecoder(self)
        for rows in micro_batches([len(p) + max_new_tokens for p in prompts], token_budget):
            P = max(len(prompts[row]) for row in rows)
            padding = [P - len(prompts[row]) for row in rows]                                      # on the left
            input_ids = torch.tensor([[0] * pad + prompts[row] for pad, row in zip(padding, rows)], device=self.device)
            mask = torch.tensor([[0] * pad + [1] * (P - pad) for pad in padding], device=self.device)
            logits = decoder.prefill(input_ids, mask, max_new_tokens)
            alive = torch.tensor(rows, device=self.device)         # which prompt each row of the batch answers
            going = torch.ones_like(alive, dtype=torch.bool)
            drawn_ids, drawn_logprobs = [], []
            for position in range(max_new_tokens):
                ids, logprobs = self.pick(logits, uniforms[alive, position], temperature)
                for drawn, new, empty in ((drawn_ids, ids, -1), (drawn_logprobs, logprobs, 0.0)):
                    drawn.append(torch.full((len(prompts),), empty, dtype=new.dtype, device=self.device)
                                 .scatter(0, alive[going], new[going]))
                going &= ids != self.eos_id
                num_going = int(going.sum())
                if num_going == 0 or position == max_new_tokens - 1:
                    break
                if num_going < 0.9 * len(ids):                     # dropping rows copies the cache: not for each one
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


def sampling_uniforms(keys, max_new_tokens):
    """Uniforms (len(keys), max_new_tokens) for `generate`, each row from a generator seeded by its key of integers."""
    return np.stack([np.random.default_rng(key).random(max_new_tokens) for key in keys])


# ---- Making and loading one --------------------------------------------------------------------------------

TINY = re.compile(r"tiny(?::(\d+)x(\d+))?")


def make_tiny(name, texts, atoms):
    """A random-init Llama, "tiny" (128x4) or "tiny:WIDTHxLAYERS", and a tokenizer trained on `texts`."""
    width, layers = (int(number or default) for number, default in zip(TINY.fullmatch(name).groups(), (128, 4)))
    if width % 32 or not width or not layers:
        raise ValueError(f"model {name!r}: WIDTH must be a multiple of 32 and LAYERS at least 1")
    tokenizer = train_tokenizer(texts, atoms)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, intermediate_size=width * 8 // 3 // 32 * 32, max_position_embeddings=4096,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return LlamaForCausalLM(config), tokenizer


def check_model(path, backbone, processor):
    """ValueError unless this model and its chat template behave as `encode` and `Policy` take for granted."""
    if processor.chat_template is None or processor.eos_token is None:
        raise ValueError(f"model {path!r}: its tokenizer has no chat template or no end-of-sequence token")
    messages = [{"role": role, "content": text} for role, text in (("user", "1"), ("assistant", "2"), ("user", "3"))]
    first = render(processor, messages[:1], add_generation_prompt=True)
    whole = render(processor, messages, add_generation_prompt=True)
    if not whole.startswith(f"{first}2{processor.eos_token}"):
        raise ValueError(f"model {path!r}: its chat template must keep earlier turns as they were and end a reply with "
                         f"{processor.eos_token!r}; allowed are models whose template does")
    ids = torch.tensor([processor(first, add_special_tokens=False).input_ids])
    with torch.no_grad():
        expected, product = backbone(ids).logits, backbone.lm_head(backbone.model(ids).last_hidden_state)
        if backbone.lm_head.bias is not None or not torch.allclose(expected, product, atol=1e-4):
            raise ValueError(f"model {path!r}: its logits are not plain products of hidden states and lm_head "
                             f"({backbone.config.model_type}), which is not supported")


def load_policy(path, dtype="float32", device="cpu", texts=(), atoms=()):
    """(policy, processor) from a folder that any Hugging Face tool opens, or "tiny" for a random-init Llama.

    `texts` and `atoms` are what the tokenizer of "tiny" is trained on. A missing value head is
    initialised from torch's seed. ValueError says what is wrong with a folder that is not a text causal LM.
    """
    if TINY.fullmatch(path):
        backbone, processor = make_tiny(path, texts, atoms)
    else:
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ValueError(f"model {path!r}: no such model folder (it would have a config.json); "
                             "allowed: tiny, tiny:WIDTHxLAYERS, or a folder")
        try:
            config = AutoConfig.from_pretrained(folder)
            backbone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            processor = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model {path!r}: not a text causal language model with its tokenizer: "
                             f"{str(error).splitlines()[0]}") from None
        if not hasattr(backbone, "model") or not hasattr(backbone, "lm_head"):
            raise ValueError(f"model {path!r}: architecture {config.model_type} is not supported; "
                             "supported are causal LMs shaped like Llama (.model and .lm_head)")
        check_model(path, backbone, processor)
    policy = Policy(backbone, processor, dtype).eval()   # no dropout: sampling and update must agree
    value_head = Path(path) / "value_head.safetensors"
    if value_head.is_file():
        policy.value_head.load_state_dict(load_file(value_head))
    return policy.to(device), processor


# ---- Running: configs --------------------------------------------------------------------------------------

def knob(default, help, low=None, high=None, choices=None):
    """A field of a script's Config: its default, a remark with its source, and what values are allowed."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors of one line, and the nearest known flag for a misspelt one."""

    def error(self, message):
        for word in re.findall(r"(?<!\S)--[\w-]+", message) if "unrecognized" in message else []:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {' '.join(known)}"
            message = f"unknown option {word}; {hint}"
            break
        fail(message)


def fail(message):
    """Say one line and exit with 2: the ending for the user's mistakes."""
    sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_config(cls, argv=None):
    """A Config from the command line; a flag, type or value that is not allowed ends the program with one line."""
    parser = OneLineParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(cls):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=None if f.default is MISSING else f.default,
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


def pick_device(name):
    """"auto" is CUDA where there is one; anything else is torch's name of a device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def learning_rate(step, steps, peak, warmup_ratio=0.0, final=0.0):
    """Linear warm-up over a share of the `steps`, then a cosine from `peak` to `final`."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


# ---- Running: run folders, checkpoints, log ----------------------------------------------------------------

# Fields that say how a run is executed, not what it computes: they may differ when it is continued.
RUNNING = {"out", "device", "micro_batch_tokens", "generate_tokens", "save_every", "keep_resume"}


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
        print(f"{torn} was never finished: skipped")
    resumable = [p for p in checkpoints(out) if (p / "resume" / "state.json").is_file()]
    if checkpoints(out) and not resumable:
        raise ValueError(f"out folder {config.out} has checkpoints but none with its resume/ folder: "
                         f"go on with --model {checkpoints(out)[-1]} and another --out")
    return resumable[-1] if resumable else None


def open_run(config, newest):
    """Make the run folder with its config.json, or cut its log back to the checkpoint it goes on from."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    last_step = checkpoint_step(newest) if newest else 0
    for name in ("metrics.jsonl", "turns.jsonl"):
        if (out / name).is_file():
            rows = [row for row in read_jsonl(out / name) if row["step"] <= last_step]
            write_whole(out / name, "".join(json.dumps(row) + "\n" for row in rows))


def write_whole(path, text):
    """Replace a file's content in one move, so that no reader and no crash ever sees half of it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_jsonl(path):
    """The rows of a log; a last line that was never finished is left out, and a file that is not there is empty."""
    if not Path(path).is_file():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines(keepends=True) if line.endswith("\n")]


def log_jsonl(path, **row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def checkpoint_step(folder):
    return int(Path(folder).name.removeprefix("step_"))


def checkpoints(out):
    """The complete checkpoints of a run folder, oldest first."""
    return sorted((p for p in Path(out).glob("step_*") if not p.suffix), key=checkpoint_step)


def save_checkpoint(out, step, policy, processor, optimizer, state, keep_resume=2, with_value_head=True):
    """Write step_000400/: a Hugging Face folder, value_head.safetensors, and resume/ (optimizer and `state`).

    It is written as step_000400.tmp/ and renamed when it is complete. Weights stay; resume/ is kept for the newest
    `keep_resume` checkpoints.
    """
    final = Path(out) / f"step_{step:06d}"
    if final.exists():
        return final
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "resume").mkdir(parents=True)
    policy.backbone.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    if with_value_head:
        save_file(policy.value_head.state_dict(), temporary / "value_head.safetensors")
    names = {p: name for name, p in policy.named_parameters()}
    tensors = {f"{names[p]}.{key}": value for p, entry in optimizer.state.items() for key, value in entry.items()}
    save_file(tensors, temporary / "resume" / "optimizer.safetensors")
    (temporary / "resume" / "state.json").write_text(json.dumps(state))
    for path in temporary.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    os.replace(temporary, final)
    folder = os.open(out, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    for old in checkpoints(out)[:-keep_resume]:
        shutil.rmtree(old / "resume", ignore_errors=True)
    return final


def load_resume(folder, policy, optimizer):
    """Put the optimizer state of a checkpoint back and return its `state`; the weights come with load_policy."""
    tensors = load_file(folder / "resume" / "optimizer.safetensors", device=str(policy.device))
    for name, p in policy.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors]
        entry = {key: tensors[f"{name}.{key}"] for key in keys}
        if entry:
            optimizer.state[p] = {**entry, "step": entry["step"].cpu()}
    return json.loads((folder / "resume" / "state.json").read_text())


class StopSignal:
    """Turns SIGTERM into a flag that the loops look at; a second one exits at once."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, *_):
        if self.requested:
            os._exit(143)
        self.requested = True
