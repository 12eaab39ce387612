"""Where a chunk's time goes on the fast path: its compiled steps, and what can be left out of them, timed one by one.

For a CPU: on a GPU a chunk is one CUDA graph, whose kernels torch.profiler shows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student.compiled import CompiledStep
from student.drawing import Vocabulary
from student.fast import FastSampler, filters_of
from student.sampler import SamplingParams


@dataclass
class Part:
    """A part of a chunk: milliseconds of each of its `times` runs, the median."""

    name: str
    ms: float
    times: int


class Logits(nn.Module):
    """The vocabulary product alone."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, hidden: Tensor, constant: None) -> Tensor:
        return self.vocabulary(hidden)


@torch.no_grad()
def chunk_parts(sampler: FastSampler, prompts: Sequence[Sequence[int]], params: SamplingParams, repeats: int) -> list[Part]:
    """The parts of a chunk right behind the prompts, one for each slot of an empty sampler; they take turns, `repeats` times.

    A latent step and K token steps make up a chunk; what follows is part of a token step: the product alone, the draw's
    filters by difference. Each finds the processor's cache as another part has left it, so that they add up to a little more
    than the chunk. Raises UserError for prompts that do not fit.
    """
    sampler.add(prompts, [params] * len(prompts))
    filters, length, recent = filters_of([params]), sampler.length.clone(), sampler.recent.clone()
    sampler.uniform.copy_(torch.rand(sampler.uniform.shape, generator=torch.Generator().manual_seed(params.seed)))
    g, entered = (x.clone() for x in sampler.write_latent())
    product = CompiledStep(Logits(sampler.token_step.vocabulary), sampler.slots)

    def chunk() -> None:
        sampler.advance(filters)
        sampler.length.copy_(length)

    runs: dict[str, Callable[[], Any]] = {
        "chunk": chunk,
        "latent step": sampler.write_latent,
        "token step": lambda: sampler.write_token(g, entered, recent, 0, filters),
        "token step unfiltered": lambda: sampler.write_token(g, entered, recent, 0, (False, False)),
        "vocabulary product": lambda: product(g[:, 0], None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    ms = {name: 1000 * statistics.median(each) for name, each in seconds.items()}
    ms["filters of a draw"] = ms["token step"] - ms.pop("token step unfiltered")
    return [Part(name, each, 1 if name in ("chunk", "latent step") else sampler.cfg.k) for name, each in ms.items()]
