"""One training over several processes: the same global batch, and the same loss curve within rounding, however it is cut.

    torchrun --nproc_per_node 8 student/train_student.py ... [--fsdp] [--grad_accum 2] [--activation_checkpointing]

Every process reads the whole batch of a step and takes its own rows of it, `--grad_accum` microbatches one after another.
A loss is a mean over what counts in its rows (tokens that are no pads, chunks, positions that a teacher scored), and each
slice has other numbers of them. So where such a number varies, `batch_at` gives that of the whole batch as a tensor without
dimensions, for the loss to divide by. A slice gets its n-th part, and the n slices' mean is the loss of the batch.

Without --fsdp each process holds the whole model (DistributedDataParallel). With it weights, gradients and optimizer are
shared out (FSDP2, a backbone layer at a time), and the training state is written in shards, by torch.distributed.checkpoint.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import UserError
from configs.files import replace_text
from configs.schema import LMTrainConfig, TrainConfig

Losses = tuple[Tensor, dict[str, Tensor]]  # the total to descend, and its named parts (detached, for the log)
PATIENCE = timedelta(minutes=30)  # how long a process waits for the others
ABOUT = "about.json"  # of a sharded save: written last
OLD = "old-"  # before the name of a save that a training before this one made


@dataclass(frozen=True)
class World:
    """This process among those of torchrun; alone without it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0  # times that torchrun has started all processes anew, after one of them died

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and logs."""
        return self.rank == 0


def world() -> World:
    """What torchrun's environment says."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    return World(*(int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0, 1, 0), strict=True)))


def started_by() -> str:
    """Which torchrun started this process: its --rdzv_id, else the number of its own process."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return str(os.getppid()) if run_id == "none" else run_id


def join(device: torch.device) -> tuple[World, torch.device]:
    """Meet the other processes, if torchrun started any; returns this one's place and its own device."""
    here = world()
    if here.size == 1:
        return here, device
    if device.type == "cuda":
        device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    return here, device


def slices(batch: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    """A batch cut into `count` equal parts along its rows; of tensors without dimensions, which are counts, such a share."""
    if count == 1:
        return [tuple(batch)]
    cut = [x.chunk(count) if x.ndim else (x / count,) * count for x in batch]
    return list(zip(*cut, strict=True))


def backbone_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The layers of the model's transformer; none where it has no transformer."""
    from transformers import PreTrainedModel

    found: list[Any] = [
        m for m in model.modules() if isinstance(m, PreTrainedModel) and isinstance(getattr(m, "layers", None), nn.ModuleList)
    ]
    return list(found[0].layers) if found else []


class _Whole(nn.Module):
    """A model behind one `forward`: DDP and FSDP act where that is called, and the losses here call a model's other methods."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class Replicas:
    """A model over all processes: its steps, its norms, its files. Make the optimizer of the model after this."""

    def __init__(self, model: nn.Module, cfg: TrainConfig, here: World, device: torch.device) -> None:
        self.model, self.here, self.device, self.seed, self.accum = model, here, device, cfg.seed, cfg.grad_accum
        self.sharded = isinstance(cfg, LMTrainConfig) and cfg.fsdp
        self.count = here.size * cfg.grad_accum
        if cfg.batch_size % self.count:
            raise UserError(
                f"--batch_size {cfg.batch_size}: expected a multiple of processes * --grad_accum = {self.count}: the batch is "
                "the whole step's, cut into equal parts"
            )
        if self.sharded and "RANK" not in os.environ:
            raise UserError("--fsdp shares a model out over processes: start it with torchrun --nproc_per_node N SCRIPT ...")
        if isinstance(cfg, LMTrainConfig) and cfg.activation_checkpointing:
            checkpoint_layers(model)
        self.whole: nn.Module = _Whole(model)
        if self.sharded:
            self._shard()
        elif here.size > 1:
            self.whole = nn.parallel.DistributedDataParallel(self.whole, gradient_as_bucket_view=True)

    def _shard(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not dist.is_initialized():  # torchrun with one process
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        mesh = dist.init_device_mesh(self.device.type, (self.here.size,))
        for layer in backbone_layers(self.model):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.whole, mesh=mesh)

    # ------------------------------------------------------------------------------------------------------ a step
    def backward(
        self, loss_of: Callable[..., Losses], batch: Sequence[Tensor], step: int, autocast: Callable[[], Any]
    ) -> Losses:
        """Leave the gradient of the whole batch in the model; returns the loss and its parts over this process's rows."""
        own = slices(batch, self.count)[self.here.rank * self.accum :][: self.accum]
        own = [tuple(x.to(self.device) for x in micro) for micro in own]  # at once: each copy waits for the device
        totals: list[Losses] = []
        for i, micro in enumerate(own):
            if self.count > 1:  # noise of its own; one slice goes on with the step's
                torch.manual_seed(_seed(self.seed, step, self.here.rank * self.accum + i))
            with self._synchronised(i == self.accum - 1):
                with autocast():  # left before the backward pass: it keeps a copy of each weight in its type
                    loss, parts = self.whole(loss_of, *micro)
                (loss / self.accum).backward()
            totals.append((loss.detach(), parts))
        if self.accum == 1:
            return totals[0]
        return _mean([loss for loss, _ in totals]), {key: _mean([parts[key] for _, parts in totals]) for key in totals[0][1]}

    def _synchronised(self, last: bool) -> Any:
        """Only the last microbatch exchanges gradients."""
        if self.sharded:
            self.whole.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif self.here.size > 1 and not last:
            return self.whole.no_sync()  # type: ignore[operator]
        return nullcontext()

    def clip(self, norm: float) -> Tensor:
        """Clip the gradient; returns the norm that it had, the same in every process."""
        found = nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        return found.full_tensor() if self.sharded else found  # type: ignore[attr-defined]

    def mean(self, values: Sequence[Tensor]) -> list[float]:
        """The means of numbers over the processes."""
        stacked = torch.stack([value.detach().float() for value in values])
        if self.here.size > 1:
            dist.all_reduce(stacked)
        return (stacked / self.here.size).tolist()

    def any(self, flag: int) -> int:
        """The largest of the processes' flags: they stop at the same step."""
        if self.here.size == 1:
            return flag
        flags = torch.tensor(flag, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return int(flags)

    def agree(self, value: int) -> bool:
        """Whether it is the same in all processes."""
        return self.any(value) == -self.any(-value)

    def in_turn(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call what may change files in the first process, and then, when they have settled, in the others."""
        result = function(*args) if self.here.first else None
        if self.here.size > 1:
            dist.barrier()
        return result if self.here.first else function(*args)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call what uses the model outside of a step, in every process; a sharded model is put together for it."""
        return self.whole(function, *args) if self.sharded else function(*args)

    # ------------------------------------------------------------------------------------------------------ files
    def weights(self) -> dict[str, Tensor]:
        """The whole model's weights; of a sharded one in the first process alone, elsewhere nothing."""
        if not self.sharded:
            return {key: value.detach() for key, value in self.model.state_dict().items()}
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole: Any = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return whole

    def save_shards(self, folder: Path, optimizers: list[torch.optim.Optimizer], about: dict[str, Any]) -> None:
        """Every process writes its part of weights and optimizer; `about` comes last, and says that the save is whole.

        The save before it is kept, older ones are removed.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        place = folder / f"step-{about['step']:08}"
        if self.here.first:
            (place / ABOUT).unlink(missing_ok=True)
        dist.barrier()
        weights, states = get_state_dict(self.model, optimizers)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=place)
        if self.here.first:
            replace_text(place / ABOUT, json.dumps(about))
            kept = whole_saves(folder)[:2]
            for old in folder.glob("*step-*"):
                if old not in kept:
                    shutil.rmtree(old)
        dist.barrier()

    def load_shards(self, place: Path, optimizers: list[torch.optim.Optimizer]) -> None:
        """Take weights and optimizer back from a save, of any number of processes. Raises UserError where it is damaged."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        weights, states = get_state_dict(self.model, optimizers)
        try:
            dcp.load({"model": weights, "optimizer": states}, checkpoint_id=place)
        except (dcp.CheckpointException, RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"--resume: {place} is damaged ({str(error).splitlines()[0]}); remove it to go on from the save before"
            ) from None
        set_state_dict(self.model, optimizers, model_state_dict=weights, optim_state_dict=states)


def whole_saves(folder: Path) -> list[Path]:
    """The finished sharded saves in `folder`, newest first; last those of a training before this one."""
    found = [about.parent for about in folder.glob(f"*step-*/{ABOUT}")]
    return sorted(found, key=lambda place: (not place.name.startswith(OLD), place.name), reverse=True)


def set_aside(folder: Path) -> None:
    """Mark all sharded saves as those of a training before: what begins anew has other weights at the same steps."""
    for place in folder.glob("step-*"):
        old = place.with_name(OLD + place.name)
        shutil.rmtree(old, ignore_errors=True)
        place.replace(old)


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only the inputs of the backbone's layers for the backward pass, which computes them once more."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # transformers 5 changes the name of it on the way
            enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            return enable({"use_reentrant": False})


def _seed(seed: int, step: int, part: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {part}".encode(), digest_size=7).digest(), "big")


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)
