"""The local decoder: a small causal transformer over the token stream that writes the tokens inside a chunk.

Each layer sees the last W tokens, across chunk borders, so that the first token of a chunk knows what stands just before
it; their keys and values live in a window of W. The input at a token holds the n tokens right before it. With a memory, one
more attention behind the first layer looks up what followed wherever the text read like this before, however far back.

Legend: `B` batch, `T` tokens, `E` width, `A` heads, `d` their width, `W` window, `N` blocks of W tokens, `K` tokens a
chunk, `S` entries of the memory, `n` tokens that the input holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ae.layers import SwiGLU, heads_of

WRITTEN_OUT = 1 << 20  # queries times keys up to which attention to the memory is written out on a CPU
ROPE_BASE = 1000.0  # wavelengths from 6 to about 4,000 tokens: far more than a window


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864): x (..., T, d), positions (T,) -> (..., T, d)."""
    half = x.shape[-1] // 2
    frequency = ROPE_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions.float()[:, None] * frequency  # (T, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention in which query i sees key j where seen[..., i, j]: q (..., T, d), k and v (..., S, d), seen broadcastable to
    (..., T, S) -> (..., T, d). For CPUs, whose fused kernels are slow on many short rows with a
    mask, above all backwards.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, A, N, T, S)
    return scores.float().masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The same for (B, A, N, T, d), for GPUs, whose kernels keep no scores; they take four dimensions."""
    seen = seen.expand(*q.shape[:-1], k.shape[-2]).flatten(0, 1)  # (B * A, N, T, S)
    out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=seen)
    return out.unflatten(0, q.shape[:2])


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, first: Tensor | None = None) -> Tensor:
    """Causal attention in which position t sees t-window+1..t: (B, A, T, d) each -> (B, A, T, d).

    Done in blocks of `window` positions, each against itself and the block before: O(T * window), not O(T^2).
    first: (B,), positions before it are hidden (rows that begin later than position 0).
    """
    length = q.shape[2]
    window = min(window, length)
    blocks = -(-length // window)

    def split(x: Tensor) -> Tensor:  # (B, A, T, d) -> (B, A, N, W, d)
        return F.pad(x, (0, 0, 0, blocks * window - length)).unflatten(2, (blocks, window))

    def with_previous(x: Tensor) -> Tensor:  # (B, A, N, W, d) -> (B, A, N, 2W, d)
        return torch.cat([F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x], dim=3)

    # 32-bit positions: a compiled CPU kernel does as many of them at once as of the scores
    at = torch.arange(blocks, device=q.device, dtype=torch.int32)[:, None, None] * window  # (N, 1, 1)
    query_at = torch.arange(window, device=q.device, dtype=torch.int32)[:, None]  # (W, 1), within the block
    key_at = torch.arange(-window, window, device=q.device, dtype=torch.int32)  # (2W,)
    seen = (key_at <= query_at) & (key_at > query_at - window) & (at + key_at >= 0)  # (N, W, 2W)
    if first is not None:  # a hidden query still needs one key to look at: itself
        seen = (seen & (at + key_at >= first[:, None, None, None])) | (key_at == query_at)  # (B, N, W, 2W)
        seen = seen[:, None]
    attend = written_out if q.device.type == "cpu" else fused
    return attend(split(q), with_previous(split(k)), with_previous(split(v)), seen).flatten(2, 3)[:, :, :length]


@dataclass
class MemoryCache:
    """Keys and values of `none` and of the memory's entries, (B, A, 1 + S, d); `own` (B, 1 + S) marks those of a row.

    states, tokens: of the chunk being written, (B, up to K, E) each: what its entries will be made from.
    Where `states` is None no more entries are taken, `own` marks what may be looked at, and there may be more rows than
    keys: n rows with the keys of row 0, then n with those of row 1, and so on.
    """

    keys: Tensor
    values: Tensor
    own: Tensor
    states: Tensor | None = None
    tokens: Tensor | None = None

    def select(self, rows: Tensor) -> MemoryCache:
        """The cache of some rows, (n,) indices."""
        states, tokens = (part if part is None else part[rows] for part in (self.states, self.tokens))
        return MemoryCache(self.keys[rows], self.values[rows], self.own[rows], states, tokens)


@dataclass
class LocalCache:
    """Rotated keys and values of the last W positions of each layer, (B, A, W, d); `seen` (B, W) marks real ones."""

    keys: list[Tensor]
    values: list[Tensor]
    seen: Tensor
    position: int
    memory: MemoryCache | None = None

    def select(self, rows: Tensor) -> LocalCache:
        """The cache of some rows, (n,) indices."""
        memory = self.memory and self.memory.select(rows)
        return LocalCache([k[rows] for k in self.keys], [v[rows] for v in self.values], self.seen[rows], self.position, memory)


class LocalLayer(nn.Module):
    """Windowed causal attention and a SwiGLU block, both pre-norm and residual.

    qk_norm: RMSNorm of each head's queries and keys, as in the backbone's layers (arXiv 2302.05442, 2505.09388).
    """

    def __init__(self, dim: int, window: int, qk_norm: bool, ffn_dim: int) -> None:
        super().__init__()
        self.heads, self.window = heads_of(dim), window
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // self.heads, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = SwiGLU(dim, ffn_dim)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, E) -> rotated queries, rotated keys, values, each (B, A, T, d)."""
        q, k, v = (part.transpose(1, 2) for part in self.split(x))
        return rotate(q, positions), rotate(k, positions), v

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., E) -> queries and keys that are not rotated yet, and values, each (..., A, d)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return self.norm_q(q), self.norm_k(k), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what attention (B, A, T, d) found to x (B, T, E), then the feed-forward block."""
        return self.mlp(x + self.out(attended.transpose(1, 2).flatten(2)))


def lag(k: int) -> int:
    """Chunks right before a token's own that its memory leaves out, as many as it takes for three tokens.

    The window has them, where it is that wide; and a text of four tokens, wherever it begins, never looks at an entry of its
    own (`student/brier.py`).
    """
    return -(-3 // k)


class Memory(nn.Module):
    """Attention to the tokens of all earlier chunks but the last `lag`.

    An entry is made of a token and of the state right before it: what the first layer had read when the token was next. A
    token whose own state is like that finds, in one layer, what came next then (arXiv 2411.19574 shifts keys against
    values to the same end). Entries have no positions; `none` is the one to look at where nothing was found.
    """

    def __init__(self, dim: int, k: int) -> None:
        super().__init__()
        self.heads, self.k, self.lag = heads_of(dim), k, lag(k)
        self.norm, self.norm_state, self.norm_token = (nn.RMSNorm(dim, eps=1e-6) for _ in range(3))
        self.query = nn.Linear(dim, dim, bias=False)
        self.key, self.value = nn.Linear(2 * dim, dim, bias=False), nn.Linear(2 * dim, dim, bias=False)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // self.heads, eps=1e-6) for _ in range(2))
        self.none = nn.Parameter(torch.randn(2 * dim))
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def entries(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, S, E) and embeddings of the tokens that followed them (B, S, E) -> keys, values (B, A, S, d)."""
        return self._entries(torch.cat([self.norm_state(states), self.norm_token(tokens)], dim=-1))

    def _entries(self, both: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (part(both).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.key, self.value))
        return self.norm_k(k), v

    def with_none(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`none` put before the entries, (B, A, S, d) -> (B, A, 1 + S, d)."""
        k, v = (part.expand(len(keys), -1, -1, -1) for part in self._entries(self.none.expand(1, 1, -1).to(keys.dtype)))
        return torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2)

    def queries(self, x: Tensor) -> Tensor:
        """x (..., E) -> (..., A, d)."""
        return self.norm_q(self.query(self.norm(x)).unflatten(-1, (self.heads, -1)))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """x (B, T, E) -> the same with what was found added; keys, values of `with_none`; seen (B or 1, T, 1 + S): which of
        them a token may look at."""
        q = self.queries(x).transpose(1, 2)  # (B, A, T, d)
        if x.device.type == "cpu" and q.shape[2] * keys.shape[2] <= WRITTEN_OUT:
            found = written_out(q, keys, values, seen[:, None])
        else:
            found = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None])
        return x + self.out(found.transpose(1, 2).flatten(2))

    def visible(self, length: int, device: torch.device, cut: int = 0) -> Tensor:
        """(T - cut, 1 + T - K): what each of T tokens, whole chunks, may look at, from token `cut` on."""
        chunk = torch.arange(length, device=device) // self.k
        return F.pad(chunk[: length - self.k] < chunk[cut:, None] - self.lag, (1, 0), value=True)


class LocalDecoder(nn.Module):
    """g_t and the embeddings of the n tokens before t -> u_t, which is added to g_t before the vocabulary product.

    tokens: n. What stands right before a token is thus known to the first layer without attention, whose keys and values are
    those of n-grams. memory: tokens a chunk, where there is to be a memory of earlier chunks; the first token then begins a
    chunk. The last projection starts at zero, so that training starts as the autoencoder's own parallel decoder.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        window: int,
        qk_norm: bool = False,
        memory: int = 0,
        tokens: int = 1,
        ffn_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.window, self.tokens = window, tokens
        self.memory = Memory(dim, memory) if memory else None
        self.norm_g, self.norm_token = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.enter = nn.Linear((1 + tokens) * dim, dim, bias=False)
        ffn_dim = 2 * dim if ffn_dim is None else ffn_dim
        self.layers: Sequence[LocalLayer] = nn.ModuleList(LocalLayer(dim, window, qk_norm, ffn_dim) for _ in range(layers))  # type: ignore[assignment]
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.exit = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.exit.weight)

    @property
    def reach(self) -> int:
        """How many tokens back the windows reach, through all layers; a memory has no such limit."""
        return len(self.layers) * (self.window - 1) + self.tokens

    def chunks_read(self, chunks: int, k: int) -> int:
        """Of so many chunks, the last ones that the next chunk depends on through this decoder; with a memory, all."""
        return chunks if self.memory is not None else min(chunks, -(-len(self.layers) * self.window // k))

    def _enter(self, g: Tensor, previous: Tensor) -> Tensor:
        return self.enter(torch.cat([self.norm_g(g), self.norm_token(previous).flatten(-2)], dim=-1))

    def forward(self, g: Tensor, previous: Tensor, first: Tensor | None = None) -> Tensor:
        """g (B, T, E), previous (B, T, n, E) embeddings of the n tokens before each, the last one first -> u (B, T, E).

        first: (B,), the position at which each row begins (earlier ones are hidden and their u is meaningless).
        """
        return self._run(g, previous, first)[0]

    def prefill(self, g: Tensor, previous: Tensor, first: Tensor) -> LocalCache:
        """Run over known tokens, as `forward`, and keep what the next W positions need."""
        return self._run(g, previous, first, last=max(1, len(self.layers) - 1) * self.window)[1]

    def empty(self, batch: int, like: Tensor) -> LocalCache:
        """The cache of `batch` rows that have seen nothing, of `like`'s dtype and device."""
        zeros = like.new_zeros(batch, 1, self.exit.in_features)
        hidden = torch.ones(batch, dtype=torch.long, device=like.device)  # the one position is
        return self.prefill(zeros, zeros[:, :, None].expand(-1, -1, self.tokens, -1), hidden)

    def branches(self, g: Tensor, previous: Tensor, starts: Tensor, restarts: int = 0) -> LocalCache:
        """The caches of texts that go on from some positions of whole chunks g, previous: starts (n,) -> B * n rows.

        Those of one text stand together and share its entries in the memory, of which a row that goes on into the next
        chunk is to be shown more. restarts: tokens a chunk, for a decoder that begins anew in each.
        """
        rows = [x.flatten(0, 1).unflatten(0, (-1, restarts or g.shape[1])) for x in (g, previous)]
        _, cache, made = self._run(rows[0], rows[1], None)
        near = starts[:, None] + torch.arange(-self.window, 0, device=g.device)  # (n, W)

        def at_starts(x: Tensor) -> Tensor:  # (rows, A, T of a row, d), not rotated -> (B * n, A, W, d)
            x = x.transpose(1, 2).reshape(len(g), -1, *x.shape[1::2])  # (B, T, A, d)
            return x[:, near.clamp(min=0)].flatten(0, 1).transpose(1, 2)

        keys = [rotate(at_starts(k), torch.arange(self.window, device=g.device)) for k, _ in made]
        begins = starts - starts % restarts if restarts else torch.zeros_like(starts)
        seen = (near >= begins[:, None]).repeat(len(g), 1)
        cache = LocalCache(keys, [at_starts(v) for _, v in made], seen, self.window, cache.memory)
        if self.memory is not None and cache.memory is not None:
            own = self.memory.visible(g.shape[1], g.device)[starts].repeat(len(g), 1)
            cache.memory = MemoryCache(cache.memory.keys, cache.memory.values, own)
        return cache

    def _run(
        self, g: Tensor, previous: Tensor, first: Tensor | None, last: int | None = None
    ) -> tuple[Tensor, LocalCache, list[tuple[Tensor, Tensor]]]:
        """The parallel pass: u, what the next token needs, and each layer's keys, not rotated, and values, (B, A, T, d).

        last: behind the memory only the last so many positions go on.
        """
        x = self._enter(g, previous)  # (B, T, E)
        positions = torch.arange(x.shape[1], device=x.device)
        begins = torch.zeros(len(x), dtype=torch.long, device=x.device) if first is None else first
        made, keys, values, memory = [], [], [], None
        for layer in self.layers:
            q, k, v = (part.transpose(1, 2) for part in layer.split(x))
            made.append((k, v))
            q, k = rotate(q, positions), rotate(k, positions)
            x = layer.finish(x, windowed_attention(q, k, v, self.window, first))
            keys.append(self._last(k, 2))
            values.append(self._last(v, 2))
            if self.memory is not None and memory is None:
                cut = 0 if last is None else max(0, len(positions) - last)
                x, memory = self._look_up(self.memory, x, previous[:, :, 0], first, cut)
                positions, first = positions[cut:], None if first is None else (first - cut).clamp(min=0)
        seen = self._last(positions >= begins[:, None], 1)
        return self.exit(self.norm(x)), LocalCache(keys, values, seen, g.shape[1], memory), made

    def _look_up(
        self, memory: Memory, x: Tensor, previous: Tensor, first: Tensor | None, cut: int
    ) -> tuple[Tensor, MemoryCache]:
        """x (B, T, E) after the first layer, whole chunks -> from position `cut` on the same after the memory, and what the
        next chunk needs."""
        known = x.shape[1] - memory.k  # of the last chunk nothing is looked up yet
        keys, values = memory.with_none(*memory.entries(x[:, :known], previous[:, 1 : known + 1]))
        seen = memory.visible(x.shape[1], x.device, cut)[None]
        own = torch.ones(len(x), 1 + known, dtype=torch.bool, device=x.device)
        if first is not None:
            own = F.pad(torch.arange(known, device=x.device) >= first[:, None], (1, 0), value=True)
            seen = seen & own[:, None]
        cache = MemoryCache(keys, values, own, x[:, known:], previous[:, known + 1 :])
        return memory(x[:, cut:], keys, values, seen), cache

    def _last(self, x: Tensor, dim: int) -> Tensor:
        """The last W entries along `dim`, zeros in front where there are fewer."""
        short = self.window - x.shape[dim]
        if short > 0:
            x = torch.cat([x.new_zeros(*x.shape[:dim], short, *x.shape[dim + 1 :]), x], dim)
        return x.narrow(dim, x.shape[dim] - self.window, self.window)

    def step(self, g: Tensor, previous: Tensor, cache: LocalCache) -> Tensor:
        """One position, g (B, E), previous (B, n, E) -> u (B, E); the cache moves on by one."""
        x = self._enter(g, previous)[:, None]  # (B, 1, E)
        position = torch.full((1,), cache.position, device=x.device)  # made there: a copy would wait for the device
        cache.seen = torch.cat([cache.seen[:, 1:], cache.seen.new_ones(len(x), 1)], dim=1)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(x, position)
            cache.keys[i] = torch.cat([cache.keys[i][:, :, 1:], k], dim=2)
            cache.values[i] = torch.cat([cache.values[i][:, :, 1:], v], dim=2)
            attended = F.scaled_dot_product_attention(q, cache.keys[i], cache.values[i], attn_mask=cache.seen[:, None, None])
            x = layer.finish(x, attended)
            if i == 0 and self.memory is not None and cache.memory is not None:
                x = self._look_up_one(self.memory, x, previous[:, 0], cache.memory)
        cache.position += 1
        return self.exit(self.norm(x))[:, 0]

    def _look_up_one(self, memory: Memory, x: Tensor, previous: Tensor, cache: MemoryCache) -> Tensor:
        """x (B, 1, E) after the first layer -> the same after the memory, which takes in a chunk as soon as it has ended."""
        rows, shown = x.unflatten(0, (len(cache.keys), -1))[:, :, 0], cache.keys.shape[2]  # rows of one text: (texts, n, E)
        if cache.states is not None and cache.tokens is not None:
            cache.tokens = torch.cat([cache.tokens, previous[:, None]], dim=1)
            if cache.tokens.shape[1] == memory.k:
                keys, values = memory.entries(cache.states, cache.tokens)
                cache.keys, cache.values = torch.cat([cache.keys, keys], dim=2), torch.cat([cache.values, values], dim=2)
                cache.own = F.pad(cache.own, (0, memory.k), value=True)
                cache.states, cache.tokens = cache.states[:, :0], cache.tokens[:, :0]
            cache.states = torch.cat([cache.states, x], dim=1)
            shown = max(1, cache.keys.shape[2] - memory.lag * memory.k)
        seen = cache.own[:, :shown].unflatten(0, rows.shape[:2])  # (texts, n, S)
        return memory(rows, cache.keys[:, :, :shown], cache.values[:, :, :shown], seen).flatten(0, 1)[:, None]
