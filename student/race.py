"""The race: the same tokens from the token-level model and from the student, eager and compiled, timed alike.

A racer fills its rows with prompts (`start`), then writes (`run`). Rates are of what comes after the first delivery - the
first token, or the student's first chunk - so that the pass over the prompt is in the time to first token alone.

Legend: `B` rows.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

from configs.errors import UserError
from student.baseline import BackboneConfig, TokenModel
from student.drawing import NEIGHBOURS, Int8, Screen, Vocabulary
from student.fast import FastSampler, filters_of
from student.fast_token import FastTokenModel
from student.flops import generation_bytes, generation_flops
from student.sampler import Sampler, SamplingParams
from student.static import in_dtype
from student.student_model import Student, StudentConfig

RACERS = ("token-eager", "token-compiled", "student-eager", "student-compiled")
EXTRA = ("token-generate-compiled", "token-compiled-screen")
Prompts = Sequence[Sequence[int]]


@dataclass
class Lap:
    """What one run took: seconds to the first delivery and in all, tokens of each row in the first delivery and in all."""

    first_s: float
    seconds: float
    first_tokens: int
    tokens: int
    backbone_steps: int

    def tokens_per_s(self, rows: int) -> float:
        return rows * (self.tokens - self.first_tokens) / (self.seconds - self.first_s)


class Ids:
    """A stand-in for a tokenizer, for models of no text: every word is the letter x."""

    pad_id, eot_id, stop_ids = 1, 0, frozenset({0})

    def __init__(self, size: int) -> None:
        self.size = size

    def token_bytes(self, id: int) -> bytes:
        return b"x"


T = TypeVar("T")


class Racer(Protocol):
    """Continues prompts of equal length by `new` tokens each."""

    def run(self, prompts: Prompts, new: int, seed: int) -> Lap: ...


def settings(new: int, seed: int) -> SamplingParams:
    return SamplingParams(new, temperature=0.8, top_p=0.95, seed=seed, ignore_eot=True)


def say(line: str) -> None:
    """A line for who waits."""
    print(line, file=sys.stderr, flush=True)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class _FirstToken(BaseStreamer):
    """Notes when `generate` hands out its first new tokens (the prompt comes first)."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None: ...


def count_calls(module: nn.Module, run: Callable[[], T]) -> tuple[T, int]:
    """What `run` returns, and how often `module` was called meanwhile."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = module.register_forward_hook(hook)
    try:
        result = run()
    finally:
        handle.remove()
    return result, calls


class TokenEager:
    """The token-level model through transformers' `generate`: a growing cache, nothing compiled.

    static: a static cache and transformers' own compilation of the forward pass instead. Its weights cannot be frozen: the
    caches count as weights then, and the next call, which has a cache of its own, writes beyond the first one's end.
    """

    def __init__(self, model: TokenModel, dtype: torch.dtype = torch.float32, static: bool = False) -> None:
        lm: Any = model.lm
        self.model: Any = in_dtype(lm, dtype).eval()
        self.extra: dict[str, Any] = {}
        if static:
            compiling: Any = CompileConfig(fullgraph=False, dynamic=False, mode="default")
            compiling._compile_all_devices = True  # it compiles on a GPU alone unless told
            self.extra = {"cache_implementation": "static", "compile_config": compiling}

    @torch.no_grad()
    def run(self, prompts: Prompts, new: int, seed: int) -> Lap:
        torch.manual_seed(seed)
        ids = torch.tensor([list(p) for p in prompts], device=self.model.device)
        streamer, start = _FirstToken(), time.perf_counter()

        def generate() -> Tensor:
            return self.model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=True,
                temperature=0.8, top_p=0.95, top_k=0, eos_token_id=None, pad_token_id=0, streamer=streamer, **self.extra,
            )  # fmt: skip

        if self.extra:  # a hook would be compiled away
            import torch._inductor.config as inductor

            with inductor.patch(cpp_wrapper=ids.device.type == "cpu"):
                out, steps = generate(), new
        else:
            out, steps = count_calls(self.model.model, generate)
        synchronise(ids.device)
        assert out.shape[1] == ids.shape[1] + new
        return Lap(streamer.at - start, time.perf_counter() - start, 1, new, steps)


class TokenCompiled:
    """The token-level model on our own fast path: the baseline that counts. vocabulary: the student's screen or int8."""

    def __init__(self, model: TokenModel, dtype: torch.dtype, rows: int, positions: int, vocabulary: dict[str, Any]) -> None:
        self.model = FastTokenModel(model, slots=rows, positions=positions, dtype=dtype, **vocabulary)

    def run(self, prompts: Prompts, new: int, seed: int) -> Lap:
        params, model = settings(new, seed), self.model
        before, start = model.backbone_steps, time.perf_counter()
        model.start(prompts, params)
        first = model.advance(filters_of([params])).tolist()
        first_s, out = time.perf_counter() - start, [first]
        for _ in range(new - 1):
            out.append(model.advance(filters_of([params])).tolist())  # delivered as they come, as the others do
        return Lap(first_s, time.perf_counter() - start, 1, len(out), model.backbone_steps - before)


class StudentEager:
    """The student through the eager sampler. Raises UserError for one without a backbone, whose steps could not be counted."""

    def __init__(self, sampler: Sampler) -> None:
        if sampler.cfg.latents == "none":
            raise UserError("a student trained with --latents none has no backbone to race; give another --student")
        self.sampler = sampler

    def run(self, prompts: Prompts, new: int, seed: int) -> Lap:
        lap, steps = count_calls(self.sampler.model.backbone, lambda: _student_lap(self.sampler, prompts, new, seed))
        return Lap(*lap, steps)


class StudentCompiled:
    """The student through the fast path."""

    def __init__(self, sampler: FastSampler) -> None:
        self.sampler = sampler

    def run(self, prompts: Prompts, new: int, seed: int) -> Lap:
        before = self.sampler.backbone_steps
        lap = _student_lap(self.sampler, prompts, new, seed)
        return Lap(*lap, self.sampler.backbone_steps - before)


def _student_lap(sampler: Sampler, prompts: Prompts, new: int, seed: int) -> tuple[float, float, int, int]:
    start, first_s, first, tokens = time.perf_counter(), 0.0, 0, 0
    for chunk in sampler.stream(prompts, settings(new, seed)):
        if chunk.row == 0:  # the first of a step's chunks: the step is over
            first_s = first_s or time.perf_counter() - start
            first = first or len(chunk.token_ids)
            tokens += len(chunk.token_ids)
    return first_s, time.perf_counter() - start, first, tokens


def make_racer(
    name: str, model: Student | TokenModel, tokenizer: Any, *, rows: int, prompt: int, new: int, dtype: torch.dtype,
    **vocabulary: Any,
) -> Racer:  # fmt: skip
    """A racer for `rows` rows of `prompt` tokens and `new` ones behind them.

    Raises UserError for an unknown name, and for a student that cannot race.

    vocabulary: words, rank and int8 of the compiled student, and of token-compiled-screen.
    """
    if name not in (*RACERS, *EXTRA):
        raise UserError(f"--racers {name}: expected {', '.join((*RACERS, *EXTRA))}")
    if isinstance(model, TokenModel):
        if name in ("token-eager", "token-generate-compiled"):
            return TokenEager(model, dtype, static=name == "token-generate-compiled")
        return TokenCompiled(model, dtype, rows, prompt + new, vocabulary if name == "token-compiled-screen" else {})
    if name == "student-eager":
        return StudentEager(Sampler(in_dtype(model, dtype), tokenizer))
    positions = positions_for(prompt, new, model.cfg.k)
    return StudentCompiled(FastSampler(model, tokenizer, slots=rows, positions=positions, dtype=dtype, **vocabulary))


def positions_for(prompt: int, new: int, k: int) -> int:
    """Chunks that a prompt and what is written behind it take."""
    return -(-prompt // k) + -(-new // k)


def cost(cfg: BackboneConfig, vocabulary: Vocabulary | None, rows: int, context: int, width: int) -> tuple[float, float]:
    """(FLOPs, bytes read) for one token of one row behind `context` tokens: weights shared by the rows, and its own cache.

    vocabulary: what the student multiplies by (None: the whole table). width: bytes of a number. Weights that a step uses
    several times count every time, whether or not the processor's cache still holds them.
    """
    flops, weights = generation_flops(cfg, context), generation_bytes(cfg, width)
    if vocabulary is not None:
        flops["vocabulary"] = vocabulary.flops()
        weights["vocabulary"] = vocabulary.bytes_read(rows)
    positions, steps = (context / cfg.k, cfg.k) if isinstance(cfg, StudentConfig) else (context, 1)
    cache = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_width * width * positions / steps
    if isinstance(cfg, StudentConfig) and cfg.has_local_decoder:  # its windows and its memory, read at every token
        entries = cfg.local_layers * (cfg.window + cfg.k) + (context if cfg.local_memory else 0)
        cache += 2 * entries * cfg.embed_dim * width
    return sum(flops.values()), sum(weights.values()) / rows + cache


def bandwidth(device: torch.device, size: int = 256 << 20) -> dict[str, float]:
    """The machine's measured bandwidth, bytes/s: copying (read and written bytes) and summing (read bytes), best of 5."""
    a = torch.ones(size // 4, device=device)
    b = torch.empty_like(a)

    def best(run: Callable[[], Any], moved: int) -> float:
        seconds = []
        for _ in range(6):
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            seconds.append(time.perf_counter() - start)
        return moved / min(seconds[1:])

    return {"copy": best(lambda: b.copy_(a), 2 * size), "read": best(a.sum, size)}


def screen_quality(
    model: Student, never: Tensor, batches: Sequence[Tensor], ranks: Sequence[int], counts: Sequence[int]
) -> list[dict[str, Any]]:
    """What the screen changes, over the positions of some windows (B, T), by rank and words; what 8 bits change; and what
    bfloat16 does, in which both the exact product and the one in 8 bits are computed.

    total_variation: between the exact float32 distribution and the other, mean, at temperature 1; nucleus: the same at
    temperature 0.8 and top_p 0.95. nats: of the true words, the excess over the exact distribution's. Of a screen alone:
    cut, what the total variation would be if words outside were dropped; max_missed, share of the positions whose likeliest
    word has no exact logit.
    """
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        hidden = torch.cat([model.hidden(tokens)[:, model.cfg.k :].flatten(0, 1) for tokens in batches]).float()
        targets = torch.cat([tokens[:, model.cfg.k :].flatten() for tokens in batches])
        table = model.table.float()
        low = table.bfloat16()
        exact = Vocabulary(table, never)

        def others() -> Iterator[tuple[str, Vocabulary]]:  # made when their turn comes: all at once are many tables
            yield "bfloat16", Vocabulary(low, never)
            if low.device.type == "cpu":
                yield "int8", Int8(low, never)
            for rank, words in itertools.product(ranks, counts):
                if rank <= table.shape[1] and words < len(table):
                    yield f"rank {rank}, {words} words", Screen(table, never, words, rank)

        for name, near in others():
            parts = [_difference(near, exact(h), h, t) for h, t in zip(hidden.split(256), targets.split(256), strict=True)]
            values = {key: torch.cat([part[key] for part in parts]).double().mean().item() for key in parts[0]}
            size = {"rank": near.left.shape[1], "words": near.words} if isinstance(near, Screen) else {}
            rows.append({"table": name, **size, **values})
    return rows


def _difference(near: Vocabulary, true: Tensor, hidden: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The measures of `screen_quality` at some positions, (n,) each: hidden (n, E), their exact logits (n, V), target (n,)."""
    logits = near(hidden.to(near.table.dtype))
    p = true.softmax(-1)
    out = {
        "total_variation": (p - logits.softmax(-1)).abs().sum(-1) / 2,
        "nucleus": (nucleus(true) - nucleus(logits)).abs().sum(-1) / 2,
        "nats": (true.log_softmax(-1) - logits.log_softmax(-1)).gather(1, target[:, None])[:, 0],
    }
    if isinstance(near, Screen):
        inside = torch.zeros(len(hidden), len(near.table), dtype=torch.bool, device=hidden.device)
        chosen = near.choose(linear_scores(near, hidden))[..., None]
        inside.unflatten(1, (-1, NEIGHBOURS)).scatter_(1, chosen.expand(-1, -1, NEIGHBOURS), True)
        inside = inside[:, : p.shape[1]]
        out["cut"] = torch.where(inside, 0.0, p).sum(-1)
        out["max_missed"] = ~inside.gather(1, p.argmax(-1, keepdim=True))[:, 0]
    return out


def linear_scores(screen: Screen, hidden: Tensor) -> Tensor:
    """The factor's logits, (B, V)."""
    return hidden @ screen.right.T @ screen.left.T + screen.bias


def nucleus(logits: Tensor, temperature: float = 0.8, top_p: float = 0.95) -> Tensor:
    """The distribution that the sampler's default parameters draw from, (B, V)."""
    ordered, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    ordered = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    return torch.zeros_like(ordered).scatter(-1, ids, ordered / ordered.sum(-1, keepdim=True))


def table(rows: Sequence[dict[str, Any]]) -> None:
    """The race for people."""
    columns = (
        "racer words batch prompt tokens/s (min..max) ms/step ttft peak steps MFLOP/token MB/token bandwidth bits/byte ratio"
    )
    cells: list[tuple[str, ...]] = [tuple(columns.split())]
    for r in rows:
        low, high = r["tokens_per_s_range"]
        share, ratio, peak = r["bandwidth_share"], r["ratio_to_compiled_token_model"], r["peak_mb"]
        cells.append((
            r["racer"], "int8" if r["int8"] else str(r["words"] or "all"), str(r["batch"]), str(r["prompt_tokens"]),
            f"{r['tokens_per_s']:.1f}", f"({low:.1f}..{high:.1f})",
            f"{r['ms_per_step']:.2f}", f"{r['ttft_s'] * 1000:.0f} ms", f"{peak:.0f} MiB" if peak else "-",
            str(r["backbone_steps"]), f"{r['flops_per_token'] / 1e6:.1f}", f"{r['bytes_per_token'] / 1e6:.1f}",
            f"{share:.0%}" if share else "-", f"{r['bits_per_byte']:.3f}" if r["bits_per_byte"] else "-",
            f"{ratio:.2f}" if ratio else "-",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in cells) + 2 for i in range(len(cells[0]))]
    for row in cells:
        print("".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def plot(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Tokens a second of each racer, by batch size, one panel for each prompt length."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    lengths = sorted({row["prompt_tokens"] for row in rows})
    figure, axes = plt.subplots(1, max(1, len(lengths)), figsize=(5 * max(1, len(lengths)), 4), sharey=True, squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=False):
        for name in dict.fromkeys(row["racer"] for row in rows):
            mine = sorted((r["batch"], r["tokens_per_s"]) for r in rows if (r["racer"], r["prompt_tokens"]) == (name, length))
            axis.plot(*zip(*mine, strict=True), marker="o", label=name) if mine else None
        axis.set(xscale="log", yscale="log", xlabel="batch", title=f"after {length} tokens")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("tokens a second")
    if rows:
        axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
