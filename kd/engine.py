"""The thread that owns a causal language model, and the batch that it runs: rows join and leave while others are written.

Rows are left-padded, with an attention mask and one key-value cache; those that wait are prefilled together and join every
few steps. A row's noise is a function of its seed and the token's number, so that what a seed gives does not depend on its
neighbours (up to the rounding of float sums, which differs between batch sizes).

Legend: `B` rows of a batch, `T` columns (tokens, left-padded), `V` vocabulary, `k` top tokens.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

STEPS = 8  # tokens that a running batch writes before others may join it
MAX_ELEMENTS = 1 << 26  # of a prefill's logits or attention mask
GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as int64: SplitMix64's step
LOWEST = -9999.0  # a logprob of minus infinity, which JSON cannot say, as OpenAI writes it


@dataclass(eq=False)
class Row:
    """One completion on its way through the model, and what is known of its tokens so far."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: Sequence[int] | None = None  # None: from the system
    top: int | None = None  # logprobs are wanted, with so many of the best tokens (0: the chosen one's alone)
    score_prompt: bool = False
    stop: Sequence[bytes] = ()

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)
    prompt_scores: tuple[list[float], list[list[int]], list[list[float]]] = ([], [], [])  # of prompt[1:]
    text: bytes = b""
    finish_reason: str | None = None
    done: Future[Row] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.key = int(np.random.default_rng(self.seed).integers(1 << 63))

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        if self.done.set_running_or_notify_cancel():
            self.done.set_result(self)

    def fail(self, error: Exception) -> None:
        if self.finish_reason is None:
            self.finish_reason = "error"
            if self.done.set_running_or_notify_cancel():
                self.done.set_exception(error)


class Columns(DynamicLayer):
    """A layer's keys and values, (B, heads, T, dim), with room for the steps until the batch is joined anew: a step writes
    one column and copies nothing."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Buffers of T = length + STEPS."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = (keys, values)
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values


class Batch:
    """Rows that run together: `mask` (B, T) of their real tokens, `logits` (B, V) of what follows, and the cache.

    The cache holds keys and values of (B, heads, T, dim) a layer.
    """

    def __init__(self, rows: list[Row], mask: Tensor, logits: Tensor, cache: Cache) -> None:
        self.rows, self.mask, self.logits, self.cache = rows, mask, logits, cache
        device = mask.device
        self.temperature = torch.tensor([row.temperature for row in rows], device=device)
        self.top_p = torch.tensor([row.top_p for row in rows], device=device)
        self.top = max((row.top for row in rows if row.top is not None), default=None)

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch | None:
        """The unfinished rows of all, without the columns that are padding in every row; None when there are none."""
        keep = [[i for i, row in enumerate(batch.rows) if row.finish_reason is None] for batch in batches]
        parts = [(batch, torch.tensor(kept)) for batch, kept in zip(batches, keep, strict=True) if kept]
        if not parts:
            return None
        width = max(int(batch.mask[kept].sum(1).max()) for batch, kept in parts)

        def merged(tensors: Sequence[Tensor], room: int) -> Tensor:  # (B, ..., T, *) -> (more B, ..., width + room, *)
            fitted = [x[kept][..., -width:, :] for x, (_, kept) in zip(tensors, parts, strict=True)]
            return torch.cat([F.pad(x, (0, 0, width - x.shape[-2], room)) for x in fitted])

        layers: list[Any] = []
        for same in zip(*(batch.cache.layers for batch, _ in parts), strict=True):  # one layer, of each batch
            keys, values = merged([layer.keys for layer in same], STEPS), merged([layer.values for layer in same], STEPS)
            layers.append(Columns(keys, values, width))
        mask = merged([batch.mask[..., None] for batch, _ in parts], 0)[..., 0]
        rows = [batch.rows[i] for batch, kept in parts for i in kept.tolist()]
        return cls(rows, mask, torch.cat([batch.logits[kept] for batch, kept in parts]), Cache(layers=layers))


def scores(logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs of the chosen ids and of the `top` best, nats: (..., V), (...) -> (...), ids (..., k), logprobs (..., k)."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(top, dim=-1)
    return logprobs.gather(-1, chosen[..., None])[..., 0], best.indices, best.values


def plain(values: Tensor) -> list[Any]:
    """Logprobs as lists: finite, and with six decimals, which is what their float32 sums are good for."""
    return values.double().clamp(min=LOWEST).round(decimals=6).tolist()


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's scrambling of int64 numbers, which a counter needs to become random bits."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (1 << 33) - 1)


def choose(logits: Tensor, temperature: Tensor, top_p: Tensor, keys: Tensor) -> Tensor:
    """The next ids, (B, V) -> (B,): the largest logit after Gumbel noise made of `keys` (B,) int64; temperature 0 is greedy.

    A race of all words, unlike the inversion of a distribution function, is decided by a rounding error only when two
    words finish within it: about once in a million tokens.
    """
    greedy = logits.argmax(-1)
    if not bool((temperature > 0).any()):
        return greedy
    tempered = logits / temperature.clamp(min=1e-4)[:, None]
    if bool((top_p < 1).any()):  # the smallest set of best words whose mass reaches top_p
        ordered, order = tempered.softmax(-1).sort(dim=-1, descending=True)
        inside = (ordered.cumsum(-1) - ordered < top_p[:, None]) | (top_p[:, None] >= 1)
        tempered = tempered.masked_fill(~torch.zeros_like(inside).scatter(-1, order, inside), -torch.inf)
    words = torch.arange(logits.shape[-1], device=logits.device)
    bits = mixed(mixed(keys)[:, None] + words * GOLDEN) >> 11 & (1 << 53) - 1
    uniform = (bits.double() + 0.5) * 2.0**-53
    return torch.where(temperature > 0, (tempered - (-uniform.log()).log()).argmax(-1), greedy)


class Engine:
    """The thread that owns the model. `submit` a row and wait for its `done`; `close` fails what is unfinished."""

    def __init__(
        self, model: PreTrainedModel, ends: frozenset[int], pieces: Sequence[bytes], context: int, max_batch: int
    ) -> None:
        """`ends`: ids that end a text; `pieces`: each id's bytes; `max_batch`: most rows that run together."""
        self.model, self.ends, self.pieces, self.context, self.max_batch = model.eval(), ends, pieces, context, max_batch
        self._waiting: queue.SimpleQueue[Row | None] = queue.SimpleQueue()  # None wakes the thread to see that it is over
        self._taken: list[Row] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="teacher", daemon=True)
        self._thread.start()

    def submit(self, row: Row) -> Future[Row]:
        self._waiting.put(row)
        return row.done

    def close(self) -> None:
        self._closing.set()
        self._waiting.put(None)
        self._thread.join()

    @torch.inference_mode()
    def _work(self) -> None:
        batch: Batch | None = None
        while not self._closing.is_set():
            try:
                batch = self._arrange(batch)
                if batch is not None:
                    self._run(batch)
            except Exception as error:  # out of memory, above all: those rows fail, the server goes on
                for row in self._taken:
                    row.fail(error)
                batch = None
        rest = self._taken
        while not self._waiting.empty():
            rest += [row for row in [self._waiting.get()] if row is not None]
        for row in rest:
            row.fail(RuntimeError("the server is shutting down"))

    def _arrange(self, batch: Batch | None) -> Batch | None:
        """The batch without its finished rows and with those that wait; waits itself where nothing runs."""
        for row in self._taken:
            if row.done.cancelled():  # its client went away
                row.finish_reason = "cancelled"
        self._taken = [row for row in self._taken if row.finish_reason is None]
        new: list[Row] = []
        while len(self._taken) < self.max_batch and not (self._waiting.empty() and self._taken):
            first = self._waiting.get()
            if first is None:
                break
            if not first.done.cancelled():
                new.append(first)
                self._taken.append(first)
        groups = ([row for row in new if row.score_prompt], [row for row in new if not row.score_prompt])
        return Batch.joined([*([batch] if batch else []), *(self._prefill(rows) for rows in groups if rows)])

    def _forward(self, ids: Tensor, mask: Tensor, cache: Cache, all_logits: bool = False) -> Tensor:
        """Logits of the columns `ids` (B, n), the last ones of `mask` (B, T): (B, n, V), or of the last one, (B, 1, V)."""
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :].clamp(0, self.context - 1)
        done = self.model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )  # fmt: skip
        return done.logits.float()

    def _prefill(self, rows: list[Row]) -> Batch:
        """Read the rows' prompts, a slice of columns at a time so that memory stays bounded, and score them if asked."""
        width, device = max(len(row.prompt) for row in rows), self.model.device
        padded = np.zeros((2, len(rows), width), dtype=np.int64)  # ids and mask
        for i, row in enumerate(rows):
            padded[:, i, width - len(row.prompt) :] = np.array([row.prompt, [1] * len(row.prompt)])
        ids, mask = torch.from_numpy(padded).to(device)
        mask, cache, scored = mask.bool(), DynamicCache(), rows[0].score_prompt
        top = max(row.top or 0 for row in rows)
        elements = len(rows) * max(width, len(self.pieces) if scored else 0)  # a column
        slices = []
        for start in range(0, width, step := max(1, MAX_ELEMENTS // elements)):
            end = min(start + step, width)
            logits = self._forward(ids[:, start:end], mask[:, :end], cache, scored)
            if scored:
                targets = ids[:, start + 1 : end + 1]  # none follows the last column
                slices.append(scores(logits[:, : targets.shape[1]], targets, top))
        if scored:
            values, best_ids, best = (torch.cat(parts, dim=1) for parts in zip(*slices, strict=True))
            for i, row in enumerate(rows):
                own, k = slice(width - len(row.prompt), None), row.top or 0
                row.prompt_scores = (plain(values[i, own]), best_ids[i, own, :k].tolist(), plain(best[i, own, :k]))
        for row in rows:
            if row.max_tokens == 0:
                row.finish("length")
        return Batch(rows, mask, logits[:, -1], cache)

    def _run(self, batch: Batch) -> None:
        """Up to STEPS tokens for every row. A finished row runs on, unread, until the next `_arrange`."""
        keys = torch.tensor([[row.key, len(row.ids)] for row in batch.rows], device=batch.mask.device)
        for step in range(STEPS):
            chosen = choose(batch.logits, batch.temperature, batch.top_p, keys[:, 0] + (keys[:, 1] + step) * GOLDEN)
            ids = chosen.tolist()
            if batch.top is not None:
                values, best_ids, best = scores(batch.logits, chosen, batch.top)
                logprobs, top_ids, top_logprobs = plain(values), best_ids.tolist(), plain(best)
            running = False
            for i, row in enumerate(batch.rows):
                if row.finish_reason is not None:
                    continue
                if row.top is not None:
                    row.logprobs.append(logprobs[i])
                    row.top_ids.append(top_ids[i][: row.top])
                    row.top_logprobs.append(top_logprobs[i][: row.top])
                self._append(row, ids[i])
                running |= row.finish_reason is None
            if not running or self._closing.is_set():
                return
            batch.mask = F.pad(batch.mask, (0, 1), value=True)
            batch.logits = self._forward(chosen[:, None], batch.mask, batch.cache)[:, -1]

    def _append(self, row: Row, id: int) -> None:
        """One more token; the row is finished where it ends the text."""
        row.ids.append(id)
        if id in self.ends:
            return row.finish("stop")
        if row.stop:
            row.text += self.pieces[id]
            tail = row.text[-max(map(len, row.stop)) - len(self.pieces[id]) :]
            if any(stop in tail for stop in row.stop):
                return row.finish("stop")
        if len(row.ids) == row.max_tokens:
            row.finish("length")
