"""Fast decoding, token by token: two ways to hold the keys and values of a batch of replies.

`Policy.generate` (model.py) is the sampling loop; it asks a decoder for the logits of each next token:

    decoder.prefill(...)     read the prompts                        -> logits (B, V) of the first token of each reply
    decoder.append(ids)      one more token to every reply           -> logits (B, V) of the next
    decoder.keep(rows)       drop the replies that have ended

A decoder reads of the policy: backbone, dtype, autocast() and, for pictures, cross_attention_mask().
"""
import math

import torch
import torch.nn.functional as F
from transformers import DynamicCache

# On an H100 torch 2.11 and later prefer cuDNN's attention, which prepares itself anew for every shape; we have many.
torch.backends.cuda.enable_cudnn_sdp(False)


def wide_product(hidden, weight):
    """Logits in float32 of hidden states (n, D) and lm_head's weight (V, D), whatever the type of both: bfloat16 would round
    a logit of 25 to a multiple of 1/8."""
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return F.linear(hidden.float(), weight.float())            # a CPU has no such product of mixed types


class CacheDecoder:
    """Decode any causal LM over the Hugging Face cache, which also keeps the keys and values of pictures."""

    graphs = False

    def __init__(self, policy):
        self.policy, self.model = policy, policy.backbone
        weight = self.model.lm_head.weight.to(policy.dtype)
        self.lm_head = weight if weight.is_cuda else weight.float()    # as `wide_product` needs it, once

    def prefill(self, input_ids, attention_mask, max_new_tokens, common=0, seen=None):
        """Read padded prompts (B, P), and pictures as `see` made them; logits (B, V) of a reply's first token.

        The first `common` columns are the same in all rows, and read once.
        """
        self.mask = attention_mask
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        self.cross_mask, vision = None, {}                         # (B, T, 1, tiles), T growing with every token
        if seen:
            states, tiles = (torch.stack(part).to(input_ids.device) for part in zip(*seen))   # (B, S, D), (B, 1, tiles)
            self.cross_mask = self.policy.cross_attention_mask(input_ids, tiles)
            vision["cross_attention_states"] = states
        if common:
            with self.policy.autocast():
                self.model.model(input_ids=input_ids[:1, :common], past_key_values=self.cache, use_cache=True)
            self.cache.batch_repeat_interleave(len(input_ids))
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.forward(input_ids[:, common:], positions[:, common:], **vision)

    def append(self, ids):
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
        return wide_product(hidden[:, -1].to(self.policy.dtype), self.lm_head)

    def keep(self, rows):
        """Drop all rows but these."""
        self.mask = self.mask[rows]
        self.cross_mask = None if self.cross_mask is None else self.cross_mask[rows]
        self.cache.batch_select_indices(rows)


class LlamaDecoder(CacheDecoder):
    """The same for Llama, faster: prompts are read as above, but each token is appended by a method of its own.

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
        self.last_norm, self.dtype = self.model.model.norm.weight.float(), dtype
        if self.model.model.rotary_emb.rope_type in ("dynamic", "longrope"):    # they look at positions: no graph can
            self.graphs = False

    def prefill(self, input_ids, attention_mask, max_new_tokens, common=0, seen=None):
        logits = super().prefill(input_ids, attention_mask, max_new_tokens, common)
        B, P = input_ids.shape
        self.end, self.capacity, self.shape = P, -(-(P + max_new_tokens) // 64) * 64, None
        self.keys, self.values = [], []                            # per layer (B, kv_heads, capacity, head_dim)
        for layer in self.cache.layers:
            for buffers, filled in ((self.keys, layer.keys), (self.values, layer.values)):
                shape = B, self.kv_heads, self.capacity, self.head_dim
                buffers.append(filled.new_zeros(shape, dtype=self.dtype))
                buffers[-1][:, :, :P] = filled
        del self.cache
        torch.clear_autocast_cache()                               # `append` has weights of its own
        visible = F.pad(attention_mask, (0, self.capacity - P)).bool()[:, None, None]              # (B, 1, 1, capacity)
        self.bias = torch.zeros_like(visible, dtype=self.dtype).masked_fill_(~visible, -math.inf)
        # Padding stands before the end, so all rows write to one column, but each counts positions of its own.
        self.column = attention_mask.new_tensor([P])               # (1,)
        self.position = attention_mask.sum(-1, keepdim=True)       # (B, 1)
        return logits

    def append(self, ids):
        self.end += 1
        self.width = -(-self.end // 64) * 64                       # columns looked at, in few different numbers
        if not self.graphs:
            return self.compute(ids)
        # Of each shape the first token runs as it is, to warm up; the second is captured; the rest are replays.
        if self.shape != (len(ids), self.width):
            self.shape, self.graph = (len(ids), self.width), None
            return self.compute(ids)
        if self.graph is None:
            self.graph, self.ids = torch.cuda.CUDAGraph(), ids.clone()
            with torch.cuda.graph(self.graph):
                self.logits = self.compute(self.ids)
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits

    def compute(self, ids):
        """The work of `append`, all of it on the device: shapes and addresses stay, what changes stands in tensors."""
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

    def keep(self, rows):
        self.bias, self.position = self.bias[rows], self.position[rows]
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
