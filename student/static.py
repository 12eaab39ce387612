"""The backbone as a decoding step of fixed shapes: fused weights, a static cache, per-row positions.

The layers of a `Qwen3Model`, written out: one product for queries, keys and values, one for gate and up, and attention of
one query over a cache of fixed size. Rows are aligned at position 0 and each has its own length, so that rows of any
age share a batch and nothing is ever moved. The student and the token-level model are raced on this same code.

Legend: `B` rows, `L` positions of a prompt, `S` positions of the cache, in `N` blocks of n, `H` hidden width, `A` key/value
heads, `G` query heads for each of them, `d` head width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from configs.errors import UserError

BLOCK = 32  # positions whose keys lie side by side: what a processor's widest vectors take at once
M = TypeVar("M", bound=nn.Module)
Cache = list[tuple[Tensor, Tensor]]  # keys (B, A, N, d, BLOCK) and values (B, A, d, S) of each layer


def in_dtype(model: M, dtype: torch.dtype) -> M:
    """A copy of a model in another dtype, but for the frequencies of rotary positions: rounded to bfloat16 they turn position
    511 by 0.6 rad too far or too little, position 2,047 by 2.5.
    """
    made = copy.deepcopy(model).to(dtype)
    for module, own in zip(made.modules(), model.modules(), strict=True):
        if isinstance(module, Qwen3RotaryEmbedding):
            module.inv_freq = own.inv_freq.clone()  # type: ignore[assignment, union-attr, operator]
    return made


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32 whatever x is."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dim: int = -1) -> Tensor:
    """Rotary position embedding: x (..., d), cos and sin (..., d/2), all of them along `dim`."""
    a, b = x.float().chunk(2, dim)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim).to(x.dtype)


def blocks(positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-positions // BLOCK)


def attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """One query a row: q (B, A, G, d), keys (B, A, N, d, n), values (B, A, d, S), bias (B, S), S = N * n -> (B, A, G, d).

    Products and sums written out: with one query there is nothing to reuse, and the compiler streams the cache once, many
    positions at a time and in the order in which they lie. The softmax's sum divides what was found, not each weight, which
    would be done anew for each of the d sums. Behind 2,000 tokens that takes 1.1 to 1.4 times as long as to sum the
    cache (docs/log.md); `scaled_dot_product_attention` takes 5 to 10 times as long on a CPU in bfloat16.
    """
    scores = (q[:, :, :, None, :, None].float() * keys[:, :, None].float()).sum(-2).flatten(3)  # (B, A, G, S)
    scores = scores * q.shape[-1] ** -0.5 + bias[:, None, None]
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    found = (weights[:, :, :, None] * values[:, :, None].float()).sum(-1)
    return (found / weights.sum(-1, keepdim=True)).to(q.dtype)


class StaticLayer(nn.Module):
    """One layer of a Qwen3Model with its weights fused."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.eps, self.head_dim = config.rms_norm_eps, attention.head_dim
        self.kv_heads, self.groups = config.num_key_value_heads, attention.num_key_value_groups

        def fused(*linears: Any) -> nn.Parameter:
            return nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)

        self.qkv = fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = fused(attention.o_proj)
        self.gate_up, self.down = fused(mlp.gate_proj, mlp.up_proj), fused(mlp.down_proj)
        self.norms = nn.ParameterList(
            nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
            for norm in (layer.input_layernorm, attention.q_norm, attention.k_norm, layer.post_attention_layernorm)
        )

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., H), cos and sin (..., d/2) -> queries (..., A * G, d), keys and values (..., A, d)."""
        both = F.linear(rms_norm(x, self.norms[0], self.eps), self.qkv).unflatten(-1, (-1, self.head_dim))
        q, k, v = both.split([self.kv_heads * self.groups, self.kv_heads, self.kv_heads], dim=-2)
        cos, sin = cos[..., None, :], sin[..., None, :]
        q = rotate(rms_norm(q, self.norms[1], self.eps), cos, sin)
        return q, rotate(rms_norm(k, self.norms[2], self.eps), cos, sin), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what attention found, (..., A * G * d), then the feed-forward block."""
        x = x + F.linear(attended, self.out)
        gate, up = F.linear(rms_norm(x, self.norms[3], self.eps), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)


class StaticBackbone(nn.Module):
    """Raises UserError for a backbone that it does not cover."""

    cos: Tensor  # (S, d/2)
    sin: Tensor

    def __init__(self, model: Qwen3Model, positions: int) -> None:
        super().__init__()
        config = model.config
        odd = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
        if type(model) is not Qwen3Model or odd or config.attention_bias or config.hidden_act != "silu":
            raise UserError(
                f"the fast path covers stock Qwen3 layers with full attention, got {type(model).__name__} with "
                f"{', '.join(sorted(odd)) or 'other projections'}; use infer.py without --compile"
            )
        self.layers: Sequence[StaticLayer] = nn.ModuleList(StaticLayer(layer, config) for layer in model.layers)  # type: ignore[assignment]
        self.norm, self.eps = nn.Parameter(model.norm.weight.detach().clone(), requires_grad=False), config.rms_norm_eps
        angle = torch.arange(blocks(positions) * BLOCK)[:, None] * model.rotary_emb.inv_freq.float().cpu()  # (S, d/2)
        self.register_buffer("cos", angle.cos().to(self.norm.device))
        self.register_buffer("sin", angle.sin().to(self.norm.device))

    def new_cache(self, rows: int) -> Cache:
        """An empty cache of the backbone's positions."""
        first = self.layers[0]
        values = first.qkv.new_zeros(rows, first.kv_heads, first.head_dim, len(self.cos))
        return [(values.clone().view(rows, first.kv_heads, -1, first.head_dim, BLOCK), values.clone()) for _ in self.layers]

    def step(self, x: Tensor, cache: Cache, length: Tensor) -> Tensor:
        """x (B, H) is put at position length[b] of each row, in place -> h (B, H), which has seen it and all before it."""
        rows = torch.arange(len(x), device=x.device)
        cos, sin = self.cos[length], self.sin[length]  # (B, d/2)
        bias = torch.where(torch.arange(len(self.cos), device=x.device) <= length[:, None], 0.0, -torch.inf)  # (B, S)
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            q, k, v = layer.project(x, cos, sin)
            keys[rows, :, length // BLOCK, :, length % BLOCK] = k
            values[rows, :, :, length] = v
            attended = attend(q.unflatten(1, (layer.kv_heads, layer.groups)), keys, values, bias)
            x = layer.finish(x, attended.flatten(1))
        return rms_norm(x, self.norm, self.eps)

    def prefill(self, x: Tensor, cache: Cache, rows: Tensor) -> Tensor:
        """x (n, L, H), left-aligned, goes into rows (n,) of the cache -> (n, L, H).

        What stands behind a shorter row's end is garbage that no position of that row ever sees.
        """
        length = x.shape[1]
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            q, k, v = (t.transpose(1, 2) for t in layer.project(x, self.cos[:length], self.sin[:length]))  # (n, heads, L, d)
            whole = F.pad(k, (0, 0, 0, -length % BLOCK)).unflatten(2, (-1, BLOCK))  # (n, A, blocks, BLOCK, d)
            keys[rows, :, : blocks(length)] = whole.transpose(3, 4)
            values[rows, :, :, :length] = v.transpose(2, 3)
            grouped = layer.groups > 1
            if grouped and q.is_cuda and q.dtype is torch.float32:  # its one kernel for that keeps all scores
                k, v, grouped = k.repeat_interleave(layer.groups, 1), v.repeat_interleave(layer.groups, 1), False
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            x = layer.finish(x, attended.transpose(1, 2).flatten(2))
        return rms_norm(x, self.norm, self.eps)
