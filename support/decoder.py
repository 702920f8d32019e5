"""Fast decoding, token by token: two ways to hold the keys and values of a batch of replies.

`Policy.generate` (model.py) is the sampling loop; it asks a decoder for the logits of each next token:

    decoder.prefill(...)     read what is new in the prompts         -> logits (B, V) of the first token of each reply
    decoder.append(ids)      one more token to every reply           -> logits (B, V) of the next
    decoder.keep(rows)       drop the replies that have ended; their keys and values go to the memory

A decoder reads of the policy: backbone, dtype, autocast() and, for pictures, vision (support/vision.py).
"""
import math
import os

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# On an H100 torch 2.11 and later prefer cuDNN's attention, which prepares itself anew for every shape; we have many.
torch.backends.cuda.enable_cudnn_sdp(False)


def wide_product(hidden, weight):
    """Logits in float32 of hidden states (n, D) and lm_head's weight (V, D), whatever the type of both: bfloat16 would round
    a logit of 25 to a multiple of 1/8."""
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return F.linear(hidden.float(), weight.float())            # a CPU has no such product of mixed types


def is_plain_llama(config):
    """Whether `LlamaDecoder` can decode a model of this config."""
    return (config.model_type == "llama" and config.hidden_act == "silu"
            and not config.attention_bias and not config.mlp_bias)


class RolloutMemory:
    """What is kept from one `Policy.generate` to the next while the weights stand still, in a rollout or an evaluation.

    Of a dialogue the keys and values of all that was read and sampled: of its next prompt only what is behind the longest
    common beginning is read, whether the dialogue goes on (a retry) or another begins alike (V-IRL's next step). They stay
    on the device, up to `limit` bytes; what does not fit is read again, and nothing is dropped for it: rows come round in
    one order, so the oldest is the next to be wanted. Of a picture what `Policy.see` made of it, in the CPU's memory (52 MB
    in the 11B model in bfloat16). What a call does without is forgotten.
    """

    def __init__(self, policy, token_budget, limit=0):
        self.policy, self.token_budget, self.limit, self.num_bytes = policy, token_budget, limit, 0
        self.dialogues = {}                                        # owner -> ids (T,), picture, keys and values (T, F)
        self.seen = {}                                             # id of a picture -> the picture, its states

    def see(self, pictures):
        """The states of each picture in order; None if there are no pictures."""
        if None in pictures:
            return None
        wanted = {id(picture): picture for picture in pictures}
        self.seen = {key: self.seen[key] for key in wanted if key in self.seen}
        new = [key for key in wanted if key not in self.seen]
        at_once = max(1, self.token_budget // max((self.policy.vision.num_patches(wanted[key]) for key in new), default=1))
        for start in range(0, len(new), at_once):
            keys = new[start:start + at_once]
            for key, seen in zip(keys, self.policy.see([wanted[key] for key in keys])):
                self.seen[key] = wanted[key], [tensor.cpu() for tensor in seen]
        return [self.seen[id(picture)][1] for picture in pictures]

    def forget_all_but(self, owners):
        for owner in self.dialogues.keys() - set(owners):
            self.take(owner)

    def take(self, owner, prompt=[], picture=None):
        """The keys and values (T, F) of what a prompt begins with, as its owner kept them, or None; they are forgotten here.

        The prompt's last token is never among them: its logits are wanted. Behind another picture nothing is the same.
        """
        ids, same, kept = self.dialogues.pop(owner, ([], None, None))
        self.num_bytes -= 0 if kept is None else kept.nbytes
        num = min(len(os.path.commonprefix([ids, prompt])), len(prompt) - 1)
        return kept[:num] if num > 0 and picture is same else None

    def put(self, owner, ids, picture, kept):
        if self.num_bytes + kept.nbytes <= self.limit:
            self.dialogues[owner] = ids, picture, kept
            self.num_bytes += kept.nbytes


class BufferLayer(DynamicLayer):
    """One layer's keys and values in buffers (B, heads, capacity, width), made once for a batch and in one type: transformers'
    own layer copies all of them for each new token."""

    def __init__(self, capacity, dtype):
        super().__init__()
        self.capacity, self.dtype_kept, self.end, self.buffers = capacity, dtype, 0, None

    def update(self, keys, values, *args, **kwargs):
        self.buffers = self.buffers or [t.new_zeros(*t.shape[:2], self.capacity, t.shape[3], dtype=self.dtype_kept)
                                        for t in (keys, values)]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, self.end:self.end + new.shape[2]] = new
        self.end += keys.shape[2]
        self.keys, self.values = (buffer[:, :, :self.end] for buffer in self.buffers)
        self.is_initialized = True
        return self.keys, self.values

    def get_seq_length(self):
        return self.end

    def reorder_cache(self, rows):
        self.buffers = [buffer[rows] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :self.end] for buffer in self.buffers)


class CacheDecoder:
    """Decode any causal LM over the Hugging Face cache, which also keeps the keys and values of pictures.

    The columns of a row b, so that all replies begin at one of them and each row is in two pieces:

        there already in the cache | padding | the rest of its prompt || its reply
    """

    graphs = False

    def __init__(self, policy, memory):
        self.policy, self.memory, self.model = policy, memory, policy.backbone
        weight = self.model.lm_head.weight.to(policy.dtype)
        self.lm_head = weight if weight.is_cuda else weight.float()    # as `wide_product` needs it, once
        config = self.model.config.get_text_config()
        self.crossing = getattr(config, "cross_attention_layers", ())  # layers that look at pictures alone
        self.plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)

    def prefill(self, prompts, owners, pictures, max_new_tokens, seen=None):
        """Read what is not yet there of the prompts, lists of ids, and the pictures as `see` made them; the logits (B, V) of
        each reply's first token."""
        pasts = self.find_pasts(prompts, owners, pictures)
        there = [0 if past is None else len(past) for past in pasts]
        start = max(there)
        if start + max(map(len, prompts)) + max_new_tokens > self.policy.context:     # columns are not tokens, but near it
            pasts, there, start = [None] * len(prompts), [0] * len(prompts), 0
        columns = start + max(len(prompt) - num for prompt, num in zip(prompts, there))
        padded = [prompt[:num] + [-1] * (columns - len(prompt)) + prompt[num:] for prompt, num in zip(prompts, there)]
        input_ids = torch.tensor(padded, device=self.policy.device)                                # (B, P)
        self.rows = list(zip(owners, prompts, there, pictures))
        self.drawn, self.num_drawn = input_ids.new_zeros(len(prompts), max_new_tokens), 0
        self.mask = (input_ids >= 0).long()
        self.capacity = -(-(columns + max_new_tokens) // 64) * 64
        self.cache = self.make_cache(pasts, start, self.capacity)
        vision = self.policy.vision.read(input_ids, self.mask, start, seen) if seen else {}
        self.cross_mask = vision.pop("cross_attention_mask", None)         # (B, P, 1, tiles), P growing with every token
        positions = vision.pop("position_ids", (self.mask.cumsum(-1) - 1).clamp(min=0))               # (B, P) or (3, B, P)
        self.position = positions.view(-1, *self.mask.shape).amax((0, 2))[:, None] + 1        # (B, 1), of the next token
        return self.forward(input_ids.clamp(min=0)[:, start:], positions[..., start:], **vision)

    def find_pasts(self, prompts, owners, pictures):
        """For each prompt the keys and values (T, F) of what it begins with, or None. What all begin with is read once."""
        pasts = [self.memory.take(*row) for row in zip(owners, prompts, pictures)]
        common = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        lacking = [past is None or len(past) < common for past in pasts]
        if sum(lacking) < 2 or not common or pictures[0] is not None or not self.plain:
            return pasts
        if all(lacking):
            self.cache = self.make_cache([], 0, common)
            with self.policy.autocast():
                self.model.model(input_ids=torch.tensor([prompts[0][:common]], device=self.policy.device),
                                 past_key_values=self.cache, use_cache=True)
            beginning = self.flat([0])[0]
        else:
            beginning = pasts[lacking.index(False)][:common]
        return [beginning if lacks else past for past, lacks in zip(pasts, lacking)]

    def make_cache(self, pasts, columns, capacity):
        """A cache in whose first columns stand the keys and values of each row."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        if not self.plain:
            return cache
        own = [i for i in range(len(cache.layers)) if i not in self.crossing]
        for i in own:
            cache.layers[i] = BufferLayer(capacity, self.policy.dtype)
        if columns:
            some, shapes = next(past for past in pasts if past is not None), self.memory.shapes
            filled = some.new_zeros(len(pasts), columns, some.shape[1])                         # (B, columns, F)
            for row, past in zip(filled, pasts):
                if past is not None:
                    row[:len(past)] = past
            tensors = [part.unflatten(2, shape).transpose(1, 2)                       # (B, heads, columns, width)
                       for part, shape in zip(filled.split([math.prod(shape) for shape in shapes], dim=2), shapes)]
            for i, keys, values in zip(own, tensors[::2], tensors[1::2]):
                cache.update(keys, values, i)
        return cache

    def keys_values(self):
        """Keys and values of every layer that looks at tokens, each (B, heads, columns, width)."""
        return [t for i, layer in enumerate(self.cache.layers) if i not in self.crossing for t in (layer.keys, layer.values)]

    def flat(self, rows):
        """The keys and values of these rows, those of all layers and heads side by side: (n, columns, F)."""
        tensors = self.keys_values()
        self.memory.shapes = [(t.shape[1], t.shape[3]) for t in tensors]
        return torch.cat([t[rows].transpose(1, 2).flatten(2) for t in tensors], dim=2)

    def append(self, ids):
        """Append one token to every row, ids (B,); the logits (B, V) of the next."""
        self.drawn[:, self.num_drawn] = ids
        self.num_drawn += 1
        return self.compute(ids)

    def compute(self, ids):
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        if self.cross_mask is not None:
            self.cross_mask = torch.cat([self.cross_mask, self.cross_mask[:, -1:]], dim=1)
        self.position = self.position + 1
        return self.forward(ids[:, None], self.position - 1)

    def forward(self, input_ids, position_ids, **vision):
        if self.cross_mask is not None:                            # text models do not know the argument
            vision["cross_attention_mask"] = self.cross_mask
        with self.policy.autocast():
            hidden = self.model.model(input_ids=input_ids, attention_mask=self.mask, position_ids=position_ids,
                                      past_key_values=self.cache, use_cache=True, **vision).last_hidden_state
        return wide_product(hidden[:, -1].to(self.policy.dtype), self.lm_head) / self.policy.logits_scaling

    def keep(self, rows):
        """Drop all rows but these; the memory gets what has been read and drawn in the others."""
        dropped = sorted(set(range(len(self.rows))) - set(rows.tolist()))
        if dropped and self.memory.limit and self.plain:
            for row, kept, drawn in zip(dropped, self.flat(dropped), self.drawn[dropped, :self.num_drawn].tolist()):
                owner, prompt, there, picture = self.rows[row]
                rest = len(prompt) - there + len(drawn)
                self.memory.put(owner, prompt + drawn, picture, torch.cat([kept[:there], kept[len(kept) - rest:]]))
        self.rows = [self.rows[i] for i in rows.tolist()]
        self.drawn = self.drawn[rows]
        self.keep_columns(rows)

    def keep_columns(self, rows):
        self.mask, self.position = self.mask[rows], self.position[rows]
        self.cross_mask = None if self.cross_mask is None else self.cross_mask[rows]
        self.cache.reorder_cache(rows)


class LlamaDecoder(CacheDecoder):
    """The same for Llama, faster: prompts are read as above, but each token is appended by a method of its own.

    Keys and values stand in buffers made once per batch; projections are fused and weights cast once per `generate`.
    On a GPU a token is one launch of a CUDA graph, but for the first two of a shape, and for rotary embeddings that change
    with the length.
    """

    graphs = None                                                  # True, False, or None: on a GPU

    def __init__(self, policy, memory):
        super().__init__(policy, memory)
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
        self.last_norm, self.dtype = self.model.model.norm.weight.float(), dtype
        if self.graphs is None:
            self.graphs = policy.device.type == "cuda"
        if self.model.model.rotary_emb.rope_type in ("dynamic", "longrope"):    # they look at positions: no graph can
            self.graphs = False

    def prefill(self, prompts, owners, pictures, max_new_tokens, seen=None):
        logits = super().prefill(prompts, owners, pictures, max_new_tokens)
        P = self.mask.shape[1]
        self.end, self.shape, self.graph, self.logits = P, None, None, None        # a graph holds memory
        self.keys, self.values = zip(*(layer.buffers for layer in self.cache.layers))    # per layer (B, kv_heads, capacity, head_dim)
        del self.cache
        torch.clear_autocast_cache()                               # `append` has weights of its own
        visible = F.pad(self.mask, (0, self.capacity - P)).bool()[:, None, None]              # (B, 1, 1, capacity)
        self.bias = torch.zeros_like(visible, dtype=self.dtype).masked_fill_(~visible, -math.inf)
        # Padding stands before the end, so all rows write to one column, but each counts positions of its own.
        self.column = self.mask.new_tensor([P])                    # (1,)
        return logits

    def keys_values(self):
        if hasattr(self, "cache"):                                 # what all prompts begin with
            return super().keys_values()
        return [t[:, :, :self.end] for pair in zip(self.keys, self.values) for t in pair]

    def compute(self, ids):
        self.end += 1
        self.width = -(-self.end // 64) * 64                       # columns looked at, in few different numbers
        if not self.graphs:
            return self.step(ids)
        # Of each shape the first token runs as it is, to warm up; the second is captured; the rest are replays.
        if self.shape != (len(ids), self.width):
            self.shape, self.graph = (len(ids), self.width), None
            return self.step(ids)
        if self.graph is None:
            self.graph, self.ids = torch.cuda.CUDAGraph(), ids.clone()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):    # NCCL has a thread of its own
                self.logits = self.step(self.ids)
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits

    def step(self, ids):
        """The work of `compute`, all of it on the device: shapes and addresses stay, what changes stands in tensors."""
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
        return wide_product(self.norm(x, self.last_norm), self.lm_head)

    def norm(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, self.eps).to(self.dtype)

    def keep_columns(self, rows):
        self.bias, self.position = self.bias[rows], self.position[rows]
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
