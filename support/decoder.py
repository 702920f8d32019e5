"""Fast decoding, token by token: two ways to hold the keys and values of a batch of replies.

`Policy.sample` (model.py) is the sampling loop. It asks a decoder for logits, token by token:

    decoder.prefill(...)   read what is new in the prompts -> logits (B, V) of each first token
    decoder.append(ids)    one more token to every reply   -> logits (B, V) of each next token
    decoder.keep(rows)     drop the replies that have ended: the memory gets their keys and values

A decoder reads of the policy: backbone, dtype, autocast() and, for pictures, vision
(support/vision.py).

    B  rows, each a prompt and its reply   P  columns of the prompts   T  tokens of a dialogue
    D  hidden size   V  vocabulary         F  numbers of a token in keys and values of all layers
"""
import inspect
import math
import os

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# On an H100 torch 2.11 and later prefer cuDNN's attention. It prepares itself anew for every shape,
# and we have many.
torch.backends.cuda.enable_cudnn_sdp(False)


def wide_product(hidden, weight):
    """Logits (n, V) of hidden states (n, D) and lm_head's weight (V, D), hidden @ weight.T.

    They are float32 whatever the type of both: bfloat16 would round a logit of 25 to a multiple of
    1/8.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return F.linear(hidden.float(), weight.float())   # a CPU has no product of mixed types


def up_to_64(number):
    """The next multiple of 64."""
    return math.ceil(number / 64) * 64


def is_plain_llama(config):
    """Whether `LlamaDecoder` can decode a model of this config."""
    return (config.model_type == "llama" and config.hidden_act == "silu"
            and not config.attention_bias and not config.mlp_bias)


class RolloutMemory:
    """What is kept from one `Policy.generate` to the next while the weights stand still.

    Of a dialogue it keeps the keys and values of all that was read and sampled. Of the next prompt
    only what is behind the longest common beginning is read. So it is whether the dialogue goes on
    (a retry) or another begins alike (the next position in V-IRL). They stay on the device, up to
    `limit` bytes. What does not fit is read again. Nothing is dropped for it, because rows come
    round in one order: the oldest is the next to be wanted.

    Of a picture it keeps what `Policy.see` made of it, in the CPU's memory (52 MB for the 11B model
    in bfloat16). What a call does without is forgotten.
    """

    def __init__(self, policy, token_budget, limit=0):
        self.policy, self.token_budget = policy, token_budget
        self.limit, self.num_bytes = limit, 0
        self.dialogues = {}            # owner -> ids (T,), picture, keys and values (T, F)
        self.seen = {}                 # id of a picture -> the picture, its states

    def see(self, pictures):
        """The states of each picture in order; None if there are no pictures."""
        if None in pictures:
            return None
        wanted = {id(picture): picture for picture in pictures}
        self.seen = {key: self.seen[key] for key in wanted if key in self.seen}
        new = [key for key in wanted if key not in self.seen]
        # As many are encoded at once as the budget allows if all are as large as the largest.
        patches = [self.policy.vision.num_patches(wanted[key]) for key in new]
        at_once = max(1, self.token_budget // max(patches, default=1))
        for start in range(0, len(new), at_once):
            keys = new[start:start + at_once]
            for key, seen in zip(keys, self.policy.see([wanted[key] for key in keys])):
                self.seen[key] = wanted[key], [tensor.cpu() for tensor in seen]
        return [self.seen[id(picture)][1] for picture in pictures]

    def forget_all_but(self, owners):
        for owner in self.dialogues.keys() - set(owners):
            self.take(owner)

    def take(self, owner, prompt=[], picture=None):
        """The keys and values (T, F) of what a prompt begins with, as its owner kept them, or None.

        They are forgotten here. The prompt's last token is never among them, since its logits are
        wanted. Behind another picture nothing is the same.
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
    """One layer's keys and values in buffers (B, heads, capacity, width).

    The buffers are made once for a batch, in one type. The layer of transformers copies all keys
    and values for each new token.
    """

    def __init__(self, capacity, dtype):
        super().__init__()
        self.capacity, self.dtype_kept = capacity, dtype
        self.end, self.buffers = 0, None

    def update(self, keys, values, *args, **kwargs):
        if self.buffers is None:
            self.buffers = []
            for t in (keys, values):
                shape = (*t.shape[:2], self.capacity, t.shape[3])
                self.buffers.append(t.new_zeros(shape, dtype=self.dtype_kept))
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


def cache_argument(model):
    """What a model calls the argument for its cache, which transformers renamed in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class CacheDecoder:
    """Decode any causal LM over the Hugging Face cache.

    The cache also keeps the keys and values of pictures. All replies begin at one column, so the
    columns of a row are

        there already in the cache | padding | the rest of its prompt || its reply
    """

    graphs = False

    def __init__(self, policy, memory):
        self.policy, self.memory, self.model = policy, memory, policy.backbone
        self.cache_name = cache_argument(self.model.model)
        weight = self.model.lm_head.weight.to(policy.dtype)
        # Cast once, as `wide_product` needs it.
        self.lm_head = weight if weight.is_cuda else weight.float()
        config = self.model.config.get_text_config()
        # The layers that look at pictures alone.
        self.crossing = getattr(config, "cross_attention_layers", ())
        # Whether the cache is keys and values and nothing else.
        self.plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
                         for layer in DynamicCache(config=config).layers)

    def prefill(self, prompts, owners, pictures, max_new_tokens, seen=None):
        """The logits (B, V) of each reply's first token.

        Reads what is not yet there of the prompts, lists of ids. `seen` are the pictures as `see`
        made them.
        """
        # What the memory has of each prompt. Columns count padding, too: if they may exceed the
        # context, everything is read again.
        pasts = self.find_pasts(prompts, owners, pictures)
        there = [0 if past is None else len(past) for past in pasts]
        start = max(there)
        if start + max(map(len, prompts)) + max_new_tokens > self.policy.context:
            pasts, there, start = [None] * len(prompts), [0] * len(prompts), 0

        # Lay the prompts out in columns, with -1 where there is padding.
        columns = start + max(len(prompt) - num for prompt, num in zip(prompts, there))
        padded = []
        for prompt, num in zip(prompts, there):
            padded.append(prompt[:num] + [-1] * (columns - len(prompt)) + prompt[num:])
        input_ids = torch.tensor(padded, device=self.policy.device)            # (B, P)
        self.rows = list(zip(owners, prompts, there, pictures))
        self.drawn, self.num_drawn = input_ids.new_zeros(len(prompts), max_new_tokens), 0
        self.mask = (input_ids >= 0).long()
        self.capacity = up_to_64(columns + max_new_tokens)
        self.cache = self.make_cache(pasts, start, self.capacity)

        # Count positions without the padding, and read what is new.
        vision = self.policy.vision.read(input_ids, self.mask, start, seen) if seen else {}
        # (B, P, 1, tiles), where P grows with every token.
        self.cross_mask = vision.pop("cross_attention_mask", None)
        plain_positions = (self.mask.cumsum(-1) - 1).clamp(min=0)              # (B, P)
        positions = vision.pop("position_ids", plain_positions)                # also (3, B, P)
        last = positions.view(-1, *self.mask.shape).amax((0, 2))               # (B,)
        self.position = last[:, None] + 1                                      # (B, 1), of the next
        return self.forward(input_ids.clamp(min=0)[:, start:], positions[..., start:], **vision)

    def find_pasts(self, prompts, owners, pictures):
        """For each prompt the keys and values (T, F) of what it begins with, or None.

        What all prompts begin with is read once.
        """
        pasts = [self.memory.take(*row) for row in zip(owners, prompts, pictures)]
        common = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        lacking = [past is None or len(past) < common for past in pasts]
        if sum(lacking) < 2 or not common or pictures[0] is not None or not self.plain:
            return pasts
        if all(lacking):
            self.cache = self.make_cache([], 0, common)
            with self.policy.autocast():
                ids = torch.tensor([prompts[0][:common]], device=self.policy.device)
                self.model.model(input_ids=ids, use_cache=True, **{self.cache_name: self.cache})
            beginning = self.flat([0])[0]
        else:
            beginning = pasts[lacking.index(False)][:common]
        return [beginning if lacks else past for past, lacks in zip(pasts, lacking)]

    def make_cache(self, pasts, columns, capacity):
        """A cache in whose first columns stand the keys and values of each row."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        if not self.plain:
            return cache
        layers = [i for i in range(len(cache.layers)) if i not in self.crossing]
        for i in layers:
            cache.layers[i] = BufferLayer(capacity, self.policy.dtype)
        if columns:
            some = next(past for past in pasts if past is not None)
            filled = some.new_zeros(len(pasts), columns, some.shape[1])        # (B, columns, F)
            for row, past in zip(filled, pasts):
                if past is not None:
                    row[:len(past)] = past
            # F is cut into keys, values, keys, values, ... of the layers, which `flat` has joined.
            shapes = self.memory.shapes
            parts = filled.split([math.prod(shape) for shape in shapes], dim=2)
            tensors = [part.unflatten(2, shape).transpose(1, 2)    # (B, heads, columns, width)
                       for part, shape in zip(parts, shapes)]
            for i, keys, values in zip(layers, tensors[::2], tensors[1::2]):
                cache.update(keys, values, i)
        return cache

    def keys_values(self):
        """Keys and values of every layer that looks at tokens, each (B, heads, columns, width)."""
        tensors = []
        for i, layer in enumerate(self.cache.layers):
            if i not in self.crossing:
                tensors += [layer.keys, layer.values]
        return tensors

    def flat(self, rows):
        """The keys and values of these rows, (number of rows, columns, F).

        Those of all layers and heads stand side by side.
        """
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
        if self.cross_mask is not None:        # text models do not know the argument
            vision["cross_attention_mask"] = self.cross_mask
        with self.policy.autocast():
            out = self.model.model(input_ids=input_ids, attention_mask=self.mask,
                                   position_ids=position_ids, use_cache=True,
                                   **{self.cache_name: self.cache}, **vision)
        last = out.last_hidden_state[:, -1].to(self.policy.dtype)              # (B, D)
        return wide_product(last, self.lm_head) / self.policy.logits_scaling

    def keep(self, rows):
        """Drop all rows but these; the memory gets what has been read and drawn in the others."""
        dropped = sorted(set(range(len(self.rows))) - set(rows.tolist()))
        if dropped and self.memory.limit and self.plain:
            drawn_ids = self.drawn[dropped, :self.num_drawn].tolist()
            for row, kept, drawn in zip(dropped, self.flat(dropped), drawn_ids):
                owner, prompt, there, picture = self.rows[row]
                rest = len(prompt) - there + len(drawn)
                without_padding = torch.cat([kept[:there], kept[len(kept) - rest:]])
                self.memory.put(owner, prompt + drawn, picture, without_padding)
        self.rows = [self.rows[i] for i in rows.tolist()]
        self.drawn = self.drawn[rows]
        self.keep_columns(rows)

    def keep_columns(self, rows):
        self.mask, self.position = self.mask[rows], self.position[rows]
        self.cross_mask = None if self.cross_mask is None else self.cross_mask[rows]
        self.cache.reorder_cache(rows)


def rotate(t, cos, sin):
    """The rotary embedding of queries or keys (B, heads, head_dim), whose halves (a, b) become
    (a cos - b sin, b cos + a sin)."""
    half = t.shape[-1] // 2
    return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin


class LlamaDecoder(CacheDecoder):
    """The same for Llama, faster: prompts are read as above, but `step` appends each token.

    Keys and values stand in buffers that are made once for a batch. Projections are fused and
    weights cast once for a `generate`. On a GPU a token is one launch of a CUDA graph. The first
    two of a shape are not, and none where rotary embeddings change with the length.
    """

    graphs = None                              # True, False, or None: on a GPU

    def __init__(self, policy, memory):
        super().__init__(policy, memory)
        config = self.model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, self.dtype = config.rms_norm_eps, policy.dtype
        self.layers = [self.weights_of(layer) for layer in self.model.model.layers]
        self.last_norm = self.model.model.norm.weight.float()
        if self.graphs is None:
            self.graphs = policy.device.type == "cuda"
        # These rotary embeddings look at the positions, which no graph can.
        if self.model.model.rotary_emb.rope_type in ("dynamic", "longrope"):
            self.graphs = False

    def weights_of(self, layer):
        a, m, dtype = layer.self_attn, layer.mlp, self.dtype
        return {
            "qkv": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]).to(dtype),
            "out": a.o_proj.weight.to(dtype),
            "gate_up": torch.cat([m.gate_proj.weight, m.up_proj.weight]).to(dtype),
            "down": m.down_proj.weight.to(dtype),
            "norm_1": layer.input_layernorm.weight.float(),
            "norm_2": layer.post_attention_layernorm.weight.float(),
        }

    def prefill(self, prompts, owners, pictures, max_new_tokens, seen=None):
        logits = super().prefill(prompts, owners, pictures, max_new_tokens)
        P = self.mask.shape[1]
        self.end = P
        self.shape = self.graph = self.logits = None           # the last graph, which holds memory
        # Take the buffers over from the cache: for each layer (B, kv_heads, capacity, head_dim).
        self.keys, self.values = zip(*(layer.buffers for layer in self.cache.layers))
        del self.cache
        torch.clear_autocast_cache()                           # `step` uses other copies of weights
        visible = F.pad(self.mask, (0, self.capacity - P)).bool()[:, None, None]
        self.bias = torch.zeros_like(visible, dtype=self.dtype)                # (B, 1, 1, capacity)
        self.bias.masked_fill_(~visible, -math.inf)
        # Padding stands before the end, so all rows write to one column. Their positions differ.
        self.column = self.mask.new_tensor([P])                                # (1,)
        return logits

    def keys_values(self):
        if hasattr(self, "cache"):             # what all prompts begin with is being read
            return super().keys_values()
        return [t[:, :, :self.end] for pair in zip(self.keys, self.values) for t in pair]

    def compute(self, ids):
        self.end += 1
        self.width = up_to_64(self.end)        # columns that are looked at, in few shapes
        if not self.graphs:
            return self.step(ids)
        # Of each shape the first token runs as it is, to warm up. The second is captured, and the
        # rest are replays.
        if self.shape != (len(ids), self.width):
            self.shape, self.graph = (len(ids), self.width), None
            return self.step(ids)
        if self.graph is None:
            self.graph, self.ids = torch.cuda.CUDAGraph(), ids.clone()
            # Only this thread is captured: NCCL has another.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = self.step(self.ids)
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits

    def step(self, ids):
        """The work of `compute`, all of it on the device.

        Shapes and addresses stay, and what changes stands in tensors.
        """
        # The residual stream stays in float32.
        x = self.model.model.embed_tokens(ids).float()                         # (B, D)
        cos, sin = self.model.model.rotary_emb(x, self.position)               # (B, 1, head_dim)
        self.bias.index_fill_(3, self.column, 0.0)
        bias = self.bias[..., :self.width]
        for weights, keys, values in zip(self.layers, self.keys, self.values):
            # Queries, keys and values of the new token, each (B, heads, head_dim).
            qkv = F.linear(self.norm(x, weights["norm_1"]), weights["qkv"])
            heads = [self.heads, self.kv_heads, self.kv_heads]
            q, k, v = qkv.view(len(x), -1, self.head_dim).split(heads, dim=1)
            q = rotate(q, cos, sin).to(v.dtype)
            k = rotate(k, cos, sin).to(v.dtype)
            keys.index_copy_(2, self.column, k[:, :, None])
            values.index_copy_(2, self.column, v[:, :, None])
            # Heads that share keys and values stand side by side, like tokens of one row.
            attended = F.scaled_dot_product_attention(
                q.view(len(x), self.kv_heads, -1, self.head_dim), keys[:, :, :self.width],
                values[:, :, :self.width], bias)
            x = x + F.linear(attended.flatten(1), weights["out"])
            both = F.linear(self.norm(x, weights["norm_2"]), weights["gate_up"])
            gate, up = both.chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, weights["down"])
        self.column += 1
        self.position += 1
        return wide_product(self.norm(x, self.last_norm), self.lm_head)

    def norm(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, self.eps).to(self.dtype)

    def keep_columns(self, rows):
        self.bias, self.position = self.bias[rows], self.position[rows]
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
