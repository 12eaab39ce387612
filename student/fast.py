"""The sampler's fast path: compiled steps of fixed shapes over a fixed number of slots.

    sampler = FastSampler(model, tokenizer, slots=8)
    sampler.add([prompt, other], [params, params])        # one pass over both prompts
    while sampler.active: chunks = sampler.step()         # rows that end leave; others may be added at any time

A chunk is one latent step (the chunk before through encoder and backbone, the predicted latent through the decoder) and K
token steps (local decoder, vocabulary product, draw). The host gives K uniform numbers a row and reads the K tokens at
the end. On a CPU the two steps are two compiled functions: unrolled into one, inductor would pack a copy of the local
decoder and of the vocabulary for each of the K tokens, and a processor's cache holds one of them, not eight (measured:
twice as slow, and minutes to compile). On a GPU a whole chunk is one CUDA graph. Same seed, same parameters, same tokens
as the eager sampler's, as far as rounding allows, whoever shares the batch.

Legend: `B` slots, `n` prompts, `L` chunks of a prompt, `K` tokens a chunk, `E` embedding width, `W` window of the local
decoder, `A` its heads, `d` their width, `N` blocks of BLOCK positions, as many as the context takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from configs.run import has_fast_bf16
from student import local_decoder
from student.compiled import CompiledStep, Replayed
from student.drawing import Vocabulary, draw, make_vocabulary
from student.local_decoder import LocalDecoder, Memory, MemoryCache
from student.sampler import SMALLEST, Chunk, Row, Sampler, SamplingParams
from student.static import BLOCK, Cache, StaticBackbone, attend, blocks, in_dtype, rotate
from student.student_model import Student

RANK = 64  # of the vocabulary screen, unless another is asked for
UNCOVERED = {"latents": "none", "head": "energy", "local_decoder": "restart"}  # by the fast path


@dataclass
class Draws:
    """Each row's parameters, (B,)."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Draws:
        ones = torch.ones(rows, device=device)
        return cls(ones, ones.clone(), torch.zeros(rows, dtype=torch.long, device=device))

    def set(self, row: int | slice, params: SamplingParams) -> None:
        self.temperature[row], self.top_k[row] = 0.0 if params.greedy else params.temperature, params.top_k
        self.top_p[row] = max(SMALLEST, params.top_p)


def filters_of(params: Sequence[SamplingParams]) -> tuple[bool, bool]:
    """Whether any row filters by (top_p, top_k)."""
    drawn = [p for p in params if not p.greedy]
    return any(p.top_p < 1 for p in drawn), any(p.top_k > 0 for p in drawn)


def turns(positions: Tensor, local: LocalDecoder) -> tuple[Tensor, Tensor]:
    """Cosine and sine of what the local decoder's keys are turned by at some positions, (n,) -> (n, d/2) each, float32."""
    half = local.enter.out_features // local.layers[0].heads // 2
    cos, sin = local_decoder.rotate(F.pad(torch.ones(len(positions), half), (0, half)), positions).chunk(2, dim=-1)
    return cos, sin  # what (1, 0) becomes


class LatentStep(nn.Module):
    """The chunk before -> what the next chunk's tokens start from."""

    cos: Tensor  # (d/2, W), as keys lie
    sin: Tensor

    def __init__(self, model: Student, positions: int) -> None:
        super().__init__()
        self.ae, self.enter, self.unfold = model.ae, model.backbone_input, model.unfold
        self.backbone = StaticBackbone(model.backbone, positions)
        self.local = model.local
        if (local := model.local) is not None:
            enter_g = local.enter.weight[:, : model.cfg.embed_dim].detach()
            self.enter_g = nn.Parameter(enter_g.contiguous(), requires_grad=False)
            cos, sin = turns(torch.arange(-local.window, 0), local)
            self.register_buffer("cos", cos.T.contiguous().to(enter_g.device))
            self.register_buffer("sin", sin.T.contiguous().to(enter_g.device))

    def forward(
        self, chunk: Tensor, cache: Cache, length: Tensor, window: Window | None, entries: Entries | None, constant: None
    ) -> tuple[Tensor, Tensor]:
        """chunk (B, K), length (B,): positions in the cache -> g and the local decoder's share of it, (B, K, E) each.

        The window moves on by a chunk, and the memory takes the chunk in, both in place.
        """
        h = self.backbone.step(self.enter(chunk), cache, length)  # (B, H)
        g = self.unfold(h)[1]  # (B, K, E)
        if self.local is None or window is None:
            return g, g
        self._move(window, self.local.window)
        if self.local.memory is not None and entries is not None:
            self._remember(self.local.memory, entries, chunk, length)
        return g, F.linear(self.local.norm_g(g), self.enter_g)

    def _move(self, window: Window, size: int) -> None:
        """Every entry moves to the front by a chunk, the first W turned by positions -W..-1; the last K are to be written."""
        k = window.bias.shape[1] - size
        for keys, turned, values in zip(window.keys, window.turned, window.values, strict=True):
            turned[..., :size] = rotate(keys[..., k:], self.cos, self.sin, dim=2)
            keys.copy_(keys.roll(-k, 3))
            values.copy_(values.roll(-k, 3))
        window.bias.copy_(F.pad(window.bias[:, k:], (0, k)))

    def _remember(self, memory: Memory, entries: Entries, chunk: Tensor, length: Tensor) -> None:
        """Write the entries of a row's chunk length - 1, and show those that the next chunk may look at."""
        keys, values = memory.entries(entries.states, self.ae.embed(chunk))  # (B, A, K, d)
        rows = torch.arange(len(chunk), device=chunk.device)[:, None]
        at = 1 + (length[:, None] - 1).clamp(min=0) * memory.k + torch.arange(memory.k, device=chunk.device)  # (B, K)
        entries.keys[rows, :, at // BLOCK, :, at % BLOCK] = keys.transpose(1, 2)
        entries.values[rows, :, :, at] = values.transpose(1, 2)
        shown = (length[:, None] - memory.lag) * memory.k
        entries.bias.copy_(
            torch.where(torch.arange(entries.bias.shape[1], device=chunk.device) <= shown.clamp(min=0), 0.0, -torch.inf)
        )


class TokenStep(nn.Module):
    """The n tokens before -> the next token of a chunk.

    What the local decoder's first projection makes of a token before depends on that token and its distance alone, so it is
    a table.
    """

    cos: Tensor  # (K, d/2)
    sin: Tensor
    back: Tensor  # (n,), 0..n-1
    outside: Tensor  # (K, W + K), -inf where token j of a chunk does not look

    def __init__(self, model: Student, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary, self.local, local = vocabulary, model.local, model.local
        if local is not None:
            enter = local.enter.weight[:, model.cfg.embed_dim :].detach().unflatten(1, (local.tokens, -1))  # (E, n, E)
            ids = torch.arange(len(model.table), device=model.table.device).split(8192)
            with torch.no_grad():
                made = [torch.einsum("ve,fne->nvf", local.norm_token(model.ae.embed(part)), enter) for part in ids]
            self.token = nn.Parameter(torch.cat(made, dim=1), requires_grad=False)  # (n, V, E)
            self.register_buffer("back", torch.arange(local.tokens, device=enter.device))
            step, entry = torch.arange(model.cfg.k), torch.arange(local.window + model.cfg.k)
            seen = (entry > step[:, None]) & (entry <= step[:, None] + local.window)
            outside = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
            for name, buffer in zip(("cos", "sin", "outside"), (*turns(step, local), outside), strict=True):
                self.register_buffer(name, buffer.to(enter.device))

    def forward(
        self, g: Tensor, entered: Tensor, previous: Tensor, j: Tensor, window: Window | None, entries: Entries | None,
        draws: Draws, uniform: Tensor, filters: tuple[bool, bool],
    ) -> Tensor:  # fmt: skip
        """g, entered (B, E), previous (B, n), the last one first, j (1,) in 0..K-1, uniform (B,) -> ids (B,); what is kept of
        token j is written.

        j is a tensor, so that one compiled step serves all K tokens.
        """
        if self.local is not None and window is not None:
            x = entered + self.token[self.back, previous].sum(1)  # (B, E)
            g = g + self._local(self.local, x, j, window, entries)
        return draw(self.vocabulary(g), draws.temperature, draws.top_p, draws.top_k, uniform, filters)

    def _local(self, local: LocalDecoder, x: Tensor, j: Tensor, window: Window, entries: Entries | None) -> Tensor:
        cos, sin, bias = self.cos[j], self.sin[j], window.bias + self.outside[j]  # (1, d/2), (1, d/2), (B, W + K)
        for layer, keys, turned, values in zip(local.layers, window.keys, window.turned, window.values, strict=True):
            q, k, v = (part[:, :, None] for part in layer.split(x))  # (B, A, 1, d)
            for kept, new in ((keys, k), (turned, rotate(k, cos, sin)), (values, v)):
                kept[..., local.window + j] = new.transpose(2, 3)
            x = layer.mlp(x + layer.out(attend(rotate(q, cos, sin), turned[:, :, None], values, bias).flatten(1)))
            if layer is local.layers[0] and local.memory is not None and entries is not None:
                entries.states[:, j] = x[:, None]
                q = local.memory.queries(x)[:, :, None]  # (B, A, 1, d)
                x = x + local.memory.out(attend(q, entries.keys, entries.values, entries.bias).flatten(1))
        return local.exit(local.norm(x))


@dataclass
class Window:
    """What the local decoder's layers look back at: W entries of earlier chunks, then the K of the chunk being written.

    Keys are kept twice. `turned` by their position in the chunk, -W..K-1, is what queries meet; from the others it is made
    anew at each chunk, so that no rounding adds up however long the text.

    keys, turned, values: (B, A, d, W + K) a layer; bias: (B, W + K), -inf before a row begins.
    """

    keys: list[Tensor]
    turned: list[Tensor]
    values: list[Tensor]
    bias: Tensor


@dataclass
class Entries:
    """The local decoder's memory: `none`, then an entry for each token of a row, left-aligned.

    In blocks, as the backbone's cache. keys: (B, A, N, d, BLOCK); values: (B, A, d, N * BLOCK); bias: (B, N * BLOCK), -inf
    where a row may not look; states: (B, K, E), of the chunk being written, what its entries will be made from.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    states: Tensor

    @classmethod
    def empty(cls, memory: Memory, rows: int, tokens: int, like: Tensor) -> Entries:
        """Room for `tokens` tokens a row, of `like`'s dtype and device."""
        count, width, heads = blocks(1 + tokens), memory.out.in_features, memory.heads
        nothing = like.new_zeros(rows, heads, 0, width // heads)
        keys = like.new_zeros(rows, heads, count, width // heads, BLOCK)
        values = like.new_zeros(rows, heads, width // heads, count * BLOCK)
        keys[:, :, 0, :, 0], values[..., 0] = (x[:, :, 0] for x in memory.with_none(nothing, nothing))
        bias = F.pad(torch.full((rows, count * BLOCK - 1), -torch.inf, device=like.device), (1, 0))
        return cls(keys, values, bias, like.new_zeros(rows, memory.k, width))

    def put(self, slots: Tensor, made: MemoryCache, first: Tensor) -> None:
        """What a prompt's pass made goes into slots (n,); row i's own entries begin at first[i]."""
        count = made.keys.shape[2] - 1  # without `none`
        if made.states is not None:
            self.states[slots] = made.states.to(self.states.dtype)
        if count:
            at = (torch.arange(count, device=slots.device) + first[:, None]).clamp(max=count - 1)  # (n, count)
            rows, to = torch.arange(len(slots), device=slots.device)[:, None], torch.arange(1, count + 1, device=slots.device)
            keys, values = (x[rows, :, 1 + at].to(self.keys.dtype) for x in (made.keys, made.values))  # (n, count, A, d)
            self.keys[slots[:, None], :, to // BLOCK, :, to % BLOCK] = keys
            self.values[slots[:, None], :, :, to] = values


class FastSampler(Sampler):
    """A Sampler of `slots` rows that share a compiled step; raises UserError for a student that the step does not cover.

    positions: chunks of context that a slot has room for (unset: the model's). dtype: of weights and caches (unset:
    bfloat16 where the processor has it). words, rank: the vocabulary screen; 0 words is the exact product. int8: its table
    in 8 bits.
    """

    def __init__(
        self, model: Student, tokenizer: TokenizerAdapter, *, slots: int = 1, positions: int | None = None,
        dtype: torch.dtype | None = None, words: int = 0, rank: int | None = None, int8: bool = False, compile: bool = True,
    ) -> None:  # fmt: skip
        cfg, device = model.cfg, model.table.device
        if odd := [f"--{name} {value}" for name, value in UNCOVERED.items() if getattr(cfg, name) == value]:
            raise UserError(
                f"the fast path, which the server takes with and without --compile, has no student of {' '.join(odd)}; "
                "use infer.py without --compile"
            )
        dtype = dtype or (torch.bfloat16 if has_fast_bf16(device) else torch.float32)
        model = in_dtype(model, dtype).requires_grad_(False)
        super().__init__(model, tokenizer)
        self.slots, self.positions, self.backbone_steps = slots, positions or cfg.seq_len, 0
        table = model.table
        vocabulary = make_vocabulary(table, self.never, words, RANK if rank is None else rank, int8)
        self.latent_step, self.token_step = LatentStep(model, self.positions).eval(), TokenStep(model, vocabulary).eval()
        del model.backbone  # its weights are in the step now, fused
        steps = (self.latent_step, self.token_step)
        self._latent, self._token = (CompiledStep(step, slots) if compile else step for step in steps)
        self.cache = self.latent_step.backbone.new_cache(slots)
        self.length = torch.zeros(slots, dtype=torch.long, device=device)
        self.chunk = torch.full((slots, cfg.k), cfg.pad_id, dtype=torch.long, device=device)
        self.recent = model.recent(self.chunk)  # (slots, n): the tokens before the next chunk, the last one first
        self.draws, self.uniform = Draws.empty(slots, device), torch.zeros(slots, cfg.k, device=device)
        self.each = torch.arange(cfg.k, device=device).split(1)
        self.window: Window | None = None
        self.entries: Entries | None = None
        # not the cache, nor the memory's entries: they are written from `length` on only, and shown when written anew
        state = [self.length, self.chunk, self.recent]
        if (local := model.local) is not None:
            heads, entries = local.layers[0].heads, local.window + cfg.k
            shape = (slots, heads, cfg.embed_dim // heads, entries)
            keys, turned, values = ([table.new_zeros(shape) for _ in local.layers] for _ in range(3))
            self.window = Window(keys, turned, values, torch.zeros(slots, entries, device=device))
            state += [*keys, *values, self.window.bias]
            if local.memory is not None:
                with torch.no_grad():
                    self.entries = Entries.empty(local.memory, slots, self.positions * cfg.k, table)
                state += [self.entries.bias, self.entries.states]
        self._write = Replayed(self._write_chunk_of_all, device, state)
        self.rows: list[Row | None] = [None] * slots
        self._free = deque(range(slots))

    @property
    def active(self) -> int:
        """Slots in use."""
        return self.slots - len(self._free)

    @property
    def free(self) -> int:
        """Slots that `add` can fill."""
        return len(self._free)

    def room(self, max_new_tokens: int) -> int:
        return max(0, (min(self.positions, self.cfg.seq_len) - -(-max_new_tokens // self.cfg.k)) * self.cfg.k)

    @torch.no_grad()
    def add(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], indices: Sequence[int] = ()) -> list[int]:
        """Give each prompt a slot, in one pass over all of them; returns the slots. Their chunks carry indices[i], or the slot.

        Raises UserError for prompts that do not fit, or more than there are free slots; then nothing was added.
        """
        if len(prompts) > self.free:
            raise UserError(f"{len(prompts)} prompts for {self.free} free slots; wait for rows to end, or use more slots")
        for prompt, p in zip(prompts, params, strict=True):
            self.check(prompt, p.max_new_tokens)
        if not prompts:
            return []
        slots = [self._free[i] for i in range(len(prompts))]
        self._prefill_slots(prompts, torch.tensor(slots, device=self.length.device))
        for _ in slots:  # only now: a pass that fails, for want of memory say, costs no slot
            self._free.popleft()
        for i, (slot, p) in enumerate(zip(slots, params, strict=True)):
            self.rows[slot] = self.new_row(indices[i] if indices else slot, p)
            self.draws.set(slot, p)
        return slots

    def remove(self, slot: int) -> None:
        """Free a slot, whether its row has ended or not."""
        if self.rows[slot] is not None:
            self.rows[slot] = None
            self._free.append(slot)

    @torch.no_grad()
    def step(self) -> list[Chunk]:
        """One latent step: the next chunk of every row. Rows that end leave their slots."""
        rows = [(slot, row) for slot, row in enumerate(self.rows) if row is not None]
        uniform = torch.zeros(self.uniform.shape)
        for slot, row in rows:
            uniform[slot] = torch.rand(self.cfg.k, generator=row.generator)
        self.uniform.copy_(uniform, non_blocking=True)
        tokens = self.advance(filters_of([row.params for _, row in rows])).tolist()
        chunks = []
        for slot, row in rows:
            chunks.append(self._accept(row, tokens[slot]))
            if chunks[-1].finish_reason is not None:
                self.remove(slot)
        return chunks

    @torch.no_grad()
    def advance(self, filters: tuple[bool, bool] = (True, False)) -> Tensor:
        """The step itself: every slot's next K tokens, (slots, K), still on the device; empty slots give noise."""
        self.backbone_steps += 1
        return self._write(filters)

    def write_latent(self) -> tuple[Tensor, Tensor]:
        """The first part of a step: what the next chunk's tokens start from, as `LatentStep`."""
        return self._latent(self.chunk, self.cache, self.length, self.window, self.entries, None)

    def write_token(self, g: Tensor, entered: Tensor, recent: Tensor, j: int, filters: tuple[bool, bool]) -> Tensor:
        """One of the K parts that follow: token j of every slot, (slots,). g, entered: of all K; recent: as `self.recent`."""
        return self._token(
            g[:, j], entered[:, j], recent, self.each[j], self.window, self.entries, self.draws, self.uniform[:, j], filters
        )

    def _write_chunk_of_all(self, filters: tuple[bool, bool]) -> Tensor:
        g, entered = self.write_latent()
        recent, tokens = self.recent.clone(), []
        for j in range(self.cfg.k):
            tokens.append(self.write_token(g, entered, recent, j, filters))
            recent = torch.cat([tokens[-1][:, None], recent[:, :-1]], dim=1)
        self.chunk.copy_(torch.stack(tokens, dim=1))
        self.recent.copy_(recent)
        self.length.add_(1).clamp_(max=self.positions - 1)  # an empty slot stays at the end
        return self.chunk

    def warm_up(self, params: Sequence[SamplingParams] = ()) -> None:
        """Compile before the first row comes: what any mix of `params` needs, or (unset) anything that can be asked for.

        Raises UserError while slots are in use.
        """
        if self.active:
            raise UserError(f"{self.active} slots are in use: warm up before adding rows")
        for filters in [filters_of(params)] if params else [(p, k) for p in (False, True) for k in (False, True)]:
            self.advance(filters)

    def stream(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[Chunk]:
        """As the eager sampler's; prompts beyond the slots wait until rows end."""
        for prompt in prompts:
            self.check(prompt, params.max_new_tokens)
        if self.active:
            raise UserError(f"{self.active} slots are in use; finish them, or remove them, before another stream")
        waiting = deque(range(len(prompts)))
        try:
            while waiting or self.active:
                now = [waiting.popleft() for _ in range(min(len(waiting), self.free))]
                self.add([prompts[i] for i in now], [params.for_row(i) for i in now], now)
                yield from self.step()
        finally:
            for slot in range(self.slots):
                self.remove(slot)

    def _prefill_slots(self, prompts: Sequence[Sequence[int]], slots: Tensor) -> None:
        """All but each prompt's last chunk goes through the backbone; that one is the next step's input.

        Rows are aligned at their first position, so that causal attention needs no mask.
        """
        model, k, device = self.model, self.cfg.k, slots.device
        longest = max(-(-len(p) // k) for p in prompts)
        chunks = torch.tensor([-(-len(p) // k) for p in prompts], device=device)  # (n,)
        padded = [[self.cfg.pad_id] * (-len(p) % k) + list(p) for p in prompts]
        tokens = torch.tensor([p + [self.cfg.pad_id] * (longest * k - len(p)) for p in padded], device=device).unflatten(
            1, (-1, k)
        )
        x = model.start.expand(len(prompts), 1, -1)
        if longest > 1:
            x = torch.cat([x, model.backbone_input(tokens[:, :-1])], dim=1)  # (n, L, H): [start, z0, z1, ...]
        h = self.latent_step.backbone.prefill(x, self.cache, slots)  # (n, L, H)
        self.backbone_steps += 1
        self.length[slots] = chunks
        each = torch.arange(len(prompts), device=device)
        self.chunk[slots] = tokens[each, chunks - 1]
        tail = chunks[:, None] * k - 1 - torch.arange(self.cfg.local_tokens, device=device)  # (n, tokens of `recent`)
        self.recent[slots] = tokens.flatten(1)[each[:, None], tail.clamp(min=0)].where(tail >= 0, self.cfg.pad_id)
        if model.local is None or self.window is None:
            return
        # Only the chunks that the next one still depends on, aligned at their ends: all of them where there is a memory.
        need = model.local.chunks_read(longest, k)
        at = chunks[:, None] - need + torch.arange(need, device=device)  # (n, need)
        rows, first = each[:, None], (-at[:, 0]).clamp(min=0) * k  # (n,): where a row begins
        g = model.unfold(h[rows, at.clamp(min=0)])[1].flatten(1, 2)  # (n, need * K, E)
        place = at[:, :1] * k + torch.arange(-self.cfg.local_tokens, need * k - 1, device=device)
        known = tokens.flatten(1)[rows, place.clamp(min=0)].where(place >= 0, self.cfg.pad_id)
        previous = model.ae.embed(known.unfold(1, self.cfg.local_tokens, 1).flip(-1))  # (n, need * K, tokens before, E)
        made = model.local.prefill(g, previous, first)
        if self.entries is not None and made.memory is not None:
            self.entries.put(slots, made.memory, first)
        size = model.local.window
        cos, sin = (x.to(device) for x in turns(-torch.arange(-size, 0) - need * k, model.local))  # back from where they stood
        for kept, keys in zip(self.window.keys, made.keys, strict=True):
            kept[slots, ..., -size:] = rotate(keys, cos, sin).transpose(2, 3)
        for kept, values in zip(self.window.values, made.values, strict=True):
            kept[slots, ..., -size:] = values.transpose(2, 3)
        self.window.bias[slots, -size:] = torch.where(made.seen, 0.0, -torch.inf)
