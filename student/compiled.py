"""Compiling decoding steps of fixed shapes: inductor with frozen, packed weights on a CPU, a CUDA graph on a GPU.

Inductor is imported where something is compiled: it would add a third to the seconds in which any script starts.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from configs.errors import UserError

FEW_ROWS = 4


@contextmanager
def steady_source() -> Iterator[None]:
    """Keep the weights' addresses out of the code that inductor generates: they stand there in a comment, which makes it
    another program, to be compiled again, in every process. The weights are handed over at every call."""
    from torch._inductor.graph import GraphLowering

    allocate = GraphLowering.allocate_non_dup_const_name

    def without_address(graph: Any, name: str | None, data: Tensor) -> str:
        name = allocate(graph, name, data)
        graph.constant_reprs[name] = graph.constant_reprs[name].rsplit(" ", 1)[0]
        return name

    with mock.patch.object(GraphLowering, "allocate_non_dup_const_name", without_address):
        yield


def cpu_settings(rows: int) -> dict[str, Any]:
    """Inductor's settings on a CPU, for products of `rows` rows.

    Measured on one core of a Zen 4 in bfloat16, 4096 x 768: with one row inductor's own products read 21 GB/s of weights,
    oneDNN's 15 GB/s; with 4 rows 19 and 17; with 32 rows they reach 42 and 142 GFLOP/s.
    """
    return {
        "freezing": True,  # weights become constants, packed once
        "cpp_wrapper": True,  # no Python between kernels
        "max_autotune": True,
        "max_autotune_gemm_backends": "CPP" if rows <= FEW_ROWS else "ATEN",
    }


def keep_for_later() -> None:
    """Have inductor keep what it makes in ~/.cache/latentforge, unless the user named another place.

    Its own choice, a folder that the system may empty, it writes into the environment as soon as it is imported, which
    transformers does. Raises UserError where there is no home to write to.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") not in (None, os.path.abspath(default_cache_dir())):
        return
    try:
        folder = Path.home() / ".cache" / "latentforge" / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise UserError(
            f"no place to keep compiled steps: {error}; set TORCHINDUCTOR_CACHE_DIR to a folder that can be written, or run "
            "without --compile"
        ) from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


class CompiledStep:
    """`torch.compile` as a decoding step wants it: called with tensors and, last, what is constant (the filters).

    The tensors of all calls must be alike: nothing is checked any more, since the checks take as long as a small model's
    step. What is made is kept on disk, and found again by the next process.
    """

    def __init__(self, step: nn.Module, rows: int) -> None:
        self.step = step
        self.config = {} if next(step.parameters()).device.type == "cuda" else cpu_settings(rows)
        self.ready: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        if (ready := self.ready.get(args[-1])) is not None:
            return ready(*args)
        import torch._inductor.config as inductor

        keep_for_later()
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        ready = self.ready[args[-1]] = torch.compile(self._own_function(), fullgraph=True, dynamic=False, options=options)
        with (
            steady_source(),
            inductor.patch(self.config),
        ):  # not among the options: the tracer, too, must know of the freezing
            return ready(*args)

    def _own_function(self) -> Callable[..., Any]:
        """The step as a function with a code object of its own: compiled code belongs to that, and is not guarded."""
        step = self.step

        def run(*args: Any) -> Any:
            return step(*args)

        return types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__)


class Replayed:
    """A function of no tensors that works on static ones, recorded once per argument as one CUDA graph and replayed.

    state: those that the warm-up before a recording changes and the next call reads. The result is overwritten by the next
    call. On a CPU the function is simply called.
    """

    def __init__(self, run: Callable[[Any], Tensor], device: torch.device, state: list[Tensor]) -> None:
        self.run, self.device, self.state = run, device, state
        self.graphs: dict[Any, tuple[Any, Tensor]] = {}
        self.pool: Any = None  # of memory, one for all recordings: they are never replayed at the same time

    def __call__(self, constant: Any) -> Tensor:
        if self.device.type != "cuda":
            return self.run(constant)
        if constant not in self.graphs:
            with torch.cuda.device(self.device):  # which is the current one is a thread's own affair
                self.graphs[constant] = self._record(constant)
        graph, result = self.graphs[constant]
        graph.replay()
        return result

    def _record(self, constant: Any) -> tuple[Any, Tensor]:
        """Warm up on a side stream, put the state back as it was, and record."""
        before = [tensor.clone() for tensor in self.state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run(constant)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(self.state, before, strict=True):
            tensor.copy_(value)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = self.run(constant)
        return graph, result
