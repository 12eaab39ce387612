"""Prompts in, a stream of chunks out: one backbone step, one parallel AE decode and K local steps a chunk.

A prompt is left-padded to a multiple of K; prompts of unequal length share a batch, right-aligned, with what stands
before a row's beginning masked. n new tokens cost ceil(n / K) calls of the backbone, the one over the prompt included.
Each row draws from its own generator, so that a row's text does not depend on what else is in the batch.

Legend: `B` rows, `L` chunks of the longest prompt, `K` tokens a chunk, `E` embedding width, `H` hidden width, `V` vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from ae.ae_model import load_ae
from ae.tokenizer_adapter import TokenizerAdapter, Utf8Stream
from configs.errors import UserError
from configs.run import check_fingerprint
from student.energy import CANDIDATES, NOISE_DIM, copies_for, sharpened
from student.local_decoder import LocalCache
from student.student_model import Student, load_student

SMALLEST = 1e-30  # temperature and top_p count as at least that (0, greedy, apart): less may become 0 in float32


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. temperature 0 is greedy; top_p 1 and top_k 0 leave the distribution whole."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    seed: int = 0  # row i of a batch draws from seed + i
    stop: tuple[str, ...] = ()
    ignore_eot: bool = False  # for benchmarks: go on past the end of text

    def __post_init__(self) -> None:
        for name, value, good, wanted in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("seed", self.seed, 0 <= self.seed < 1 << 63, "0 to 2^63 - 1"),
            ("stop", self.stop, all(self.stop), "strings that are not empty"),
        ):
            if not good:
                raise UserError(f"{name}: expected {wanted}, got {value!r}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, of equal ones the first."""
        return self.temperature == 0 or self.top_k == 1

    def for_row(self, i: int) -> SamplingParams:
        """What row i of a batch uses: its own seed."""
        return replace(self, seed=self.seed + i)


@dataclass
class Chunk:
    """What one latent step gave one row: the tokens kept of its K, and the text that is now certain."""

    row: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None  # "stop": end of text or a stop string; "length": max_new_tokens
    ended: int | None = None  # the token that ended the row, of the tokenizer's stop_ids; None where there was no room for it
    cut: bool = False  # a stop string ended the text, somewhere within its tokens


@dataclass
class Generation:
    """A finished row."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    latent_steps: int = 0
    finish_reason: str = ""


def pick(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """One token a row: logits (B, V), uniform (B,) in [0, 1) -> ids (B,), by inverting the filtered distribution's CDF.

    top_k keeps the k likeliest tokens; top_p the smallest set of them whose probability reaches p (arXiv 1904.09751).
    The CDF runs over the vocabulary in its own order.
    """
    if params.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    scores = (logits - logits.amax(-1, keepdim=True)) / max(SMALLEST, params.temperature)  # at most 0: no overflow
    probs = scores.softmax(-1)
    if params.top_k or params.top_p < 1:
        ordered, ids = probs.sort(-1, descending=True)
        if params.top_k:
            ordered[:, params.top_k :] = 0
        ordered[ordered.cumsum(-1) - ordered >= max(SMALLEST, params.top_p) * ordered.sum(-1, keepdim=True)] = 0
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered)
    cdf = probs.double().cumsum(-1)  # a GPU adds in another order for each sum: in float32 some would decrease
    total = cdf[:, -1:]
    target = torch.minimum(uniform[:, None] * total, total * (1 - 2**-40))  # below the total, so that some entry exceeds it
    return torch.searchsorted(cdf, target, right=True)[:, 0]


class _Text:
    """A row's tokens becoming text: whole UTF-8 characters, cut at stop strings, never showing part of one."""

    def __init__(self, tokenizer: TokenizerAdapter, stop: Sequence[str]) -> None:
        self.stream, self.stop, self.held = Utf8Stream(tokenizer), stop, ""

    def push(self, ids: list[int], last: bool) -> tuple[str, bool]:
        """New tokens -> (text that is now certain, whether a stop string was met)."""
        self.held += self.stream.push(ids) + (self.stream.flush() if last else "")
        found = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        if found:
            text, self.held = self.held[: min(found)], ""
            return text, True
        ends = (n for s in self.stop for n in range(1, min(len(s), len(self.held) + 1)) if self.held.endswith(s[:n]))
        keep = 0 if last else max(ends, default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text, False


@dataclass
class Row:
    """A sequence being written."""

    index: int
    params: SamplingParams
    generator: torch.Generator
    text: _Text
    tokens: int = 0


@dataclass
class _State:
    """A batch between two latent steps: caches, what predicts the next chunk, and the tokens before it, the last one first."""

    cache: DynamicCache
    mask: Tensor  # (B, positions so far): which cache positions are a row's own
    position: Tensor  # (B,): the backbone position of the next input
    h: Tensor  # (B, H); with the latent path off (B, 0)
    local: LocalCache | None
    previous: Tensor  # (B, n)

    def select(self, rows: Tensor) -> None:
        """Keep some rows, (n,) indices."""
        self.mask, self.position, self.previous = self.mask[rows], self.position[rows], self.previous[rows]
        self.h = self.h[rows]
        self.cache.batch_select_indices(rows)
        if self.local is not None:
            self.local = self.local.select(rows)


class Sampler:
    """Generates with a student. Raises UserError for prompts that are empty or do not fit the context."""

    def __init__(self, model: Student, tokenizer: TokenizerAdapter) -> None:
        self.model, self.tokenizer, self.cfg = model.eval(), tokenizer, model.cfg
        never = torch.zeros(model.cfg.vocab_size, dtype=torch.bool)  # rows of the table that stand for no token
        never[tokenizer.size :] = True
        never[tokenizer.pad_id] = tokenizer.pad_id != tokenizer.eot_id
        self.never = never.to(model.table.device)

    def check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Raise UserError unless a prompt and its continuation fit."""
        if not prompt:
            raise UserError("the prompt is empty: give at least one token of text to go on from")
        if (room := self.room(max_new_tokens)) < len(prompt):
            raise UserError(
                f"the prompt has {len(prompt)} tokens and {max_new_tokens} new ones were asked for, but the model's context is "
                f"{self.cfg.context} tokens (room for a prompt of {room}, counted in chunks of {self.cfg.k}); nothing was "
                "generated. Shorten one of them, or keep the prompt's end only (infer.py --truncate_prompt)"
            )

    def room(self, max_new_tokens: int) -> int:
        """The longest prompt, in tokens, that leaves room for `max_new_tokens`."""
        return max(0, (self.cfg.seq_len - -(-max_new_tokens // self.cfg.k)) * self.cfg.k)

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Generation]:
        """Continue every prompt; results in the order of the prompts."""
        out = [Generation() for _ in prompts]
        for chunk in self.stream(prompts, params):
            result = out[chunk.row]
            result.text += chunk.text
            result.token_ids += chunk.token_ids
            result.latent_steps += 1
            result.finish_reason = chunk.finish_reason or ""
        return out

    @torch.inference_mode()
    def stream(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[Chunk]:
        """Continue every prompt (token ids), yielding each row's chunk as soon as its latent step is done."""
        for prompt in prompts:
            self.check(prompt, params.max_new_tokens)
        if self.cfg.head == "energy":
            copies_for(params.temperature)
        state = self._prefill(prompts)
        rows = [self.new_row(i, params.for_row(i)) for i in range(len(prompts))]
        while rows:
            tokens = self._write_chunk(state, rows, params)  # (B, K)
            alive = []
            for at, (row, ids) in enumerate(zip(rows, tokens.tolist(), strict=True)):
                chunk = self._accept(row, ids)
                yield chunk
                if chunk.finish_reason is None:
                    alive.append(at)
            if len(alive) < len(rows):
                rows = [rows[at] for at in alive]
                keep = torch.tensor(alive, dtype=torch.long, device=tokens.device)
                tokens = tokens[keep]
                state.select(keep)
            if rows:
                self._advance(state, tokens)

    def new_row(self, index: int, params: SamplingParams) -> Row:
        """A sequence about to be written, with its own random numbers."""
        return Row(index, params, torch.Generator().manual_seed(params.seed), _Text(self.tokenizer, params.stop))

    def _accept(self, row: Row, ids: list[int]) -> Chunk:
        """What of a chunk a row keeps: nothing past its end of text, its stop string or its last token."""
        reason, ended, params = None, None, row.params
        left = params.max_new_tokens - row.tokens
        end = next((j for j, i in enumerate(ids) if i in self.tokenizer.stop_ids), None)
        if end is not None and not params.ignore_eot:
            ended = ids[end] if end < left else None
            ids, reason = ids[:end], "stop"
        if (len(ids) >= left and reason is None) or len(ids) > left:
            ids, reason = ids[:left], "length"
        row.tokens += len(ids)
        text, stopped = row.text.push(ids, last=reason is not None)
        return Chunk(row.index, ids, text, "stop" if stopped else reason, None if stopped else ended, stopped)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> _State:
        """One pass over the prompts, right-aligned: row b's first chunk stands at index begin[b]."""
        model, k, device = self.model, self.cfg.k, self.model.table.device
        chunks = [-(-len(p) // k) for p in prompts]
        longest = max(chunks)
        tokens = torch.tensor(
            [[self.cfg.pad_id] * (longest * k - len(p)) + list(p) for p in prompts], device=device
        )  # (B, L*K)
        begin = torch.tensor([longest - n for n in chunks], device=device)  # (B,)
        at = torch.arange(longest + 1, device=device)
        mask, cache = (at >= begin[:, None]), DynamicCache()  # (B, L+1)
        if self.cfg.latents == "none":
            states = model.table.new_zeros(len(tokens), longest + 1, 0)
        else:
            x = model.backbone_input(tokens.unflatten(1, (-1, k)))  # (B, L, H)
            x = torch.cat([x[:, :1], x], dim=1)
            x = torch.where(
                (at == begin[:, None])[..., None], model.start.to(x.dtype), x
            )  # (B, L+1, H): [..., start, z0, z1, ...]
            positions = (at - begin[:, None]).clamp(min=0)
            out = model.backbone(
                inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            states = out.last_hidden_state  # (B, L+1, H)
        local = None
        if model.local is not None:
            n = model.local.chunks_read(longest, k)
            g = model.unfold(states[:, -1 - n : -1])[1].flatten(1, 2)  # (B, n*K, E)
            previous = model.previous_embeddings(tokens)[:, -n * k :]
            local = model.local.prefill(g, previous, ((begin - (longest - n)) * k).clamp(min=0))
        return _State(cache, mask, at[-1] - begin + 1, states[:, -1], local, model.recent(tokens))

    def _write_chunk(self, state: _State, rows: list[Row], params: SamplingParams) -> Tensor:
        """The next K tokens of every row, (B, K)."""
        model, k, device = self.model, self.cfg.k, self.never.device
        if self.cfg.head == "energy":
            return torch.stack([self._sharpened(h, row) for h, row in zip(state.h, rows, strict=True)])
        g = model.unfold(state.h)[1]  # (B, K, E)
        uniform = torch.stack([torch.rand(k, generator=row.generator) for row in rows]).to(device)  # (B, K)
        if model.local is not None and self.cfg.local_decoder == "restart":
            state.local, state.previous = model.local.empty(len(rows), g), torch.full_like(state.previous, self.cfg.pad_id)
        tokens = []
        for j in range(k):
            hidden = g[:, j]  # (B, E)
            if model.local is not None and state.local is not None:
                hidden = hidden + model.local.step(hidden, model.ae.embed(state.previous), state.local)
            logits = model.ae.logits(hidden).masked_fill(self.never, -torch.inf)
            tokens.append(pick(logits, params, uniform[:, j]))
            state.previous = torch.cat([tokens[-1][:, None], state.previous[:, :-1]], dim=1)
        return torch.stack(tokens, dim=1)

    def _sharpened(self, h: Tensor, row: Row) -> Tensor:
        """The next chunk (K,) of an energy head's row at h (H,): one draw, or, below temperature 1, one of many."""
        n = copies_for(row.params.temperature)
        noise = torch.rand(CANDIDATES if n > 1 else 1, NOISE_DIM, generator=row.generator).to(h.device)
        z = self.model.exit(h.expand(len(noise), -1), noise.to(h.dtype))  # (N, D)
        chunks = self.model.ae.logits(self.model.ae.decode(z)).masked_fill(self.never, -torch.inf).argmax(-1)  # (N, K)
        return chunks[sharpened(chunks, n, torch.rand((), generator=row.generator).item()) if n > 1 else 0]

    def _advance(self, state: _State, tokens: Tensor) -> None:
        """Feed the chunk just written, (B, K), to the backbone: one step."""
        if self.cfg.latents == "none":
            return
        x = self.model.backbone_input(tokens)[:, None]  # (B, 1, H)
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], dim=1)
        out = self.model.backbone(
            inputs_embeds=x,
            attention_mask=state.mask,
            position_ids=state.position[:, None],
            past_key_values=state.cache,
            use_cache=True,
        )
        state.h, state.position = out.last_hidden_state[:, -1], state.position + 1


def load_sampler(student: str | Path, ae: str | Path | None = None, device: torch.device | str = "cpu") -> Sampler:
    """The sampler of a student checkpoint, with the tokenizer it names.

    The student carries its own, further trained copy of the autoencoder; `ae`, where given, is checked to be of the same
    shape and tokenizer. Raises UserError as `load_checkpoint`, and for what does not fit together.
    """
    model, content = load_student(student)
    if ae is not None:
        frozen, ae_content = load_ae(ae)
        check_fingerprint(ae_content["tokenizer"]["fingerprint"], content["tokenizer"]["fingerprint"], str(ae), str(student))
        if frozen.cfg != model.cfg.ae:
            raise UserError(
                f"{ae} has another shape than the autoencoder that {student} was trained from: "
                f"{frozen.cfg} against {model.cfg.ae}"
            )
    return Sampler(model.to(device), checkpoint_tokenizer(content["tokenizer"], student))


def checkpoint_tokenizer(record: dict[str, str], checkpoint: str | Path) -> TokenizerAdapter:
    """The tokenizer that a checkpoint names: beside it, or by the name it was loaded from. Raises UserError for another one."""
    beside = Path(checkpoint).parent / record["path"]
    tokenizer = TokenizerAdapter.load(beside if os.path.exists(beside) else record["path"])
    check_fingerprint(tokenizer.fingerprint, record["fingerprint"], f"the tokenizer {tokenizer.source}", str(checkpoint))
    return tokenizer
