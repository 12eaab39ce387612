"""`--dry_run`: what a training will take of memory and time, without its memory and without training.

The model is made of torch's fake tensors (shape, type and device, no memory), so that any size can be planned on any
machine. Two whole steps run on them, optimizer included: every tensor that an operation makes is added up until it is
freed, and matrix products are counted (not those inside the CPU's fused attention, which has no count). So nothing here is
a formula of the model; the second step counts, since only then are the optimizer's states there while the gradients are
made. Not seen: what a kernel takes for itself inside one
operation, the allocator's rounding, and the process itself (Python and torch on the CPU: 0.5 GB; a CUDA context: about 1).

The time is the counted products at a rate measured here, on plain square products of the training's type. It is a lower
bound: norms, activations, attention, AdamW and the reading of data are not in it. Muon's products are.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configs import loop, parallel
from configs.errors import UserError
from configs.run import pick_device
from configs.schema import LMTrainConfig, TrainConfig

GPU_BYTES = 80e9
MANY = 8  # processes of the other columns: one machine's GPUs, as a rule
ROWS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "frozen": "frozen weights, batch",
    "activations": "kept for the backward pass",
    "rest": "the rest, at the peak",
    "peak": "peak of a step",
}
STATES = 3  # training states on the disk while one is saved: the last one and the one before stay until it is whole


@lru_cache
def _fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def unreal(cfg: TrainConfig) -> Iterator[None]:
    """In a dry run the tensors made inside are fake ones on the training's device; else nothing changes."""
    with _fake() if cfg.dry_run else nullcontext(), pick_device(cfg.device) if cfg.dry_run else nullcontext():
        yield


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to the device; a fake one was made there."""
    return model if isinstance(next(model.parameters()), FakeTensor) else model.to(device)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and nobody freed yet: `now`, and the most that there were, `peak`.

    `given`: bytes of the tensors that were there before and that an operation has read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.given = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._new((args, kwargs)):
            self.given += self._watch(tensor, lambda key, size: self._known.discard(key))
        out = func(*args, **(kwargs or {}))
        for tensor in self._new(out):
            self.now += self._watch(tensor, self._free)
            self.peak = max(self.peak, self.now)
        return out

    def _new(self, values: Any) -> list[Tensor]:
        """One tensor of each memory area that was not seen before."""
        found = {x.untyped_storage()._cdata: x for x in tree_leaves(values) if isinstance(x, Tensor)}
        return [x for key, x in found.items() if key not in self._known]

    def _watch(self, tensor: Tensor, freed: Callable[[int, int], Any]) -> int:
        storage = tensor.untyped_storage()
        self._known.add(storage._cdata)
        weakref.finalize(storage, freed, storage._cdata, storage.nbytes())
        return storage.nbytes()

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, and FLOPs of the products that it does in a step."""

    parameters: int
    frozen: int  # weights that are read and not trained, and the batch
    gradients: int
    optimizer: int
    activations: int  # what the forward pass of a microbatch leaves for its backward pass
    rest: int  # temporary buffers at the peak; below 0 where the parts are not all there at once
    peak: int
    flops: int  # of a microbatch, forward and backward
    optimizer_flops: int  # Muon's, once a step


def measure(
    model: nn.Module, cfg: TrainConfig, loss_of: Callable[..., loop.Losses], batch: tuple[Tensor, ...], setup: loop.Setup
) -> Memory:
    """Memory and FLOPs of a training step on `batch`, one microbatch. Real and fake tensors are measured alike."""
    optimizers = loop.optimizers(model, cfg)
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    counter, updates, live = FlopCounterMode(display=False), FlopCounterMode(display=False), LiveBytes()
    with live:
        for _ in range(2):
            live.peak, before = live.now, live.now
            with counter:
                with setup.autocast():
                    loss, parts = loss_of(*batch)
                activations = live.now - before
                loss.backward()
            gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
            nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
            with updates:
                for optimizer in optimizers:
                    optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            del loss, parts
    states = [x for optimizer in optimizers for x in tree_leaves(list(optimizer.state.values())) if isinstance(x, Tensor)]
    kept = sum(x.numel() * x.element_size() for x in states)
    peak = live.given + live.peak
    frozen = live.given - sum(p.numel() * p.element_size() for p in trained)
    rest = peak - parameters - frozen - gradients - kept - activations
    flops = counter.get_total_flops(), updates.get_total_flops()
    return Memory(parameters, frozen, gradients, kept, activations, rest, peak, *flops)


def device_bytes(device: torch.device) -> int:
    """Memory of the device: the GPU's; on the CPU the machine's, or the container's where that is less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def matmul_rate(device: torch.device, bf16: bool, seconds: float = 1.0) -> float:
    """FLOPs a second of square matrix products, measured for about `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    a @ a  # the first one also loads the library
    count, start = 0, wait()
    while (now := wait()) - start < seconds:
        a @ a
        count += 1
    return 2 * size**3 * count / (now - start)


def show(
    name: str,
    model: nn.Module,
    cfg: TrainConfig,
    setup: loop.Setup,
    total: int,
    tokens_per_step: int,
    batch_at: Callable[[int], tuple[Tensor, ...]],
    loss_of: Callable[..., loop.Losses],
) -> None:
    """Print the plan of a training: a table for people and, last, one JSON line. The arguments are those of `loop.fit`.

    Raises UserError under torchrun: a plan is of one process, and tells of more.
    """
    if parallel.world().size > 1:
        raise UserError("--dry_run plans for one process and for several at once: run it without torchrun")
    if isinstance(cfg, LMTrainConfig) and cfg.activation_checkpointing:
        parallel.checkpoint_layers(model)
    batch, columns = batch_at(0), {}
    for processes in (1, MANY):
        if cfg.batch_size % (processes * cfg.grad_accum) == 0:
            micro = parallel.slices(batch, processes * cfg.grad_accum)[0]
            with _fake() as fake:
                memory = measure(model, cfg, loss_of, tuple(fake.from_tensor(x.clone()).to(setup.device) for x in micro), setup)
            if processes == 1:
                columns["1 process"] = memory
                continue
            columns[f"{processes} processes"] = data_parallel(memory)
            if isinstance(cfg, LMTrainConfig):
                columns[f"{processes}, --fsdp"] = sharded(memory, model, processes)
    if not columns:
        raise UserError(f"--batch_size {cfg.batch_size}: expected a multiple of --grad_accum {cfg.grad_accum}")
    have, rate = device_bytes(setup.device), matmul_rate(setup.device, setup.bf16)
    one = next(iter(columns.values()))
    flops = one.flops * cfg.grad_accum + one.optimizer_flops
    seconds = flops / rate
    muon = f", {one.optimizer_flops / flops:.0%} of them Muon's, whatever the batch" if one.optimizer_flops else ""
    weights = one.parameters
    disk = weights + STATES * (weights + one.optimizer)

    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, GB a process:")
    print(f"{'':28}" + "".join(f"{title:>16}" for title in columns))
    for field, label in ROWS.items():
        print(f"{label:28}" + "".join(f"{getattr(memory, field) / 1e9:16.2f}" for memory in columns.values()))
    for label, size in ((f"of this {setup.device.type}'s {have / 1e9:.0f} GB", have), ("of an 80 GB GPU", GPU_BYTES)):
        print(f"{label:28}" + "".join(f"{memory.peak / size:16.0%}" for memory in columns.values()))
    print(
        f"a step: {tokens_per_step:,} tokens, {flops / 1e12:.3g} TFLOP of products{muon}; measured here, {_kind(setup)}: "
        f"{rate / 1e12:.3g} TFLOP/s\nso at best {seconds:.3g} s a step, {tokens_per_step / seconds:,.0f} tokens/s, "
        f"{total:,} steps ({total * tokens_per_step:,} tokens) in {total * seconds / 3600:,.3g} h; "
        f"{disk / 1e9:.2f} GB on the disk"
    )
    print(
        json.dumps(
            {
                "plan": name,
                "memory": {title: asdict(memory) for title, memory in columns.items()},
                "device_bytes": have,
                "flops_per_step": flops,
                "matmul_flops_per_s": rate,
                "seconds_per_step": seconds,
                "tokens_per_s": tokens_per_step / seconds,
                "steps": total,
                "hours": total * seconds / 3600,
                "disk_bytes": disk,
            }
        )
    )


def data_parallel(memory: Memory) -> Memory:
    """Where processes exchange gradients, these lie in buckets that are never freed: all parts are there at once."""
    rest = max(memory.rest, 0)
    return replace(memory, rest=rest, peak=memory.peak - memory.rest + rest)


def sharded(memory: Memory, model: nn.Module, processes: int) -> Memory:
    """An estimate of what a process of --fsdp takes, from what one of plain data-parallel training takes.

    Weights, gradients and optimizer are cut into `processes` parts. Whole are: all outside of the backbone's layers, with
    its gradient until it is handed round; the layer at work with its gradient; and the next layer, fetched meanwhile.
    """
    trained = {p: p.numel() * p.element_size() for p in model.parameters()}
    layers = [sum(trained.pop(p) for p in layer.parameters()) for layer in parallel.backbone_layers(model)]
    extra = 2 * sum(trained.values()) + 3 * max(layers, default=0)
    cut = {field: getattr(memory, field) // processes for field in ("parameters", "gradients", "optimizer")}
    saved = sum(getattr(memory, field) - part for field, part in cut.items())
    return replace(memory, **cut, rest=memory.rest + extra, peak=memory.peak - saved + extra)


def _kind(setup: loop.Setup) -> str:
    return "bfloat16" if setup.bf16 else "float32"
