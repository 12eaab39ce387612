"""The training loop of every model here: AdamW or Muon, one loss a step, metrics, saves, exact resume.

A step is a function of (seed, step) and the weights alone: its data comes from `TrainWindows`, its noise from a
generator seeded by the step. So a resumed run equals an undisturbed one, bit for bit on the CPU.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from configs.errors import EXIT_INTERRUPTED, UserError
from configs.files import read_json
from configs.muon import Muon
from configs.parallel import ABOUT, OLD, Losses, Replicas, World, join, set_aside, started_by, whole_saves, world
from configs.run import (
    Run,
    has_fast_bf16,
    held,
    load_state,
    load_weights,
    pick_device,
    remove_temporaries,
    save_checkpoint,
    saved_states,
    set_state_aside,
    state_aside,
    state_before,
    tune_process,
    wants_compile,
)
from configs.schema import LMTrainConfig, TrainConfig

# Settings that may change on --resume silently; a change of any other is logged, since it makes a different run.
FREE_ON_RESUME = {"max_steps", "epochs", "checkpoint_dir", "run_dir", "resume", "save_every", "log_every", "eval_every"}
FREE_ON_RESUME |= {"eval_windows", "device", "tensorboard", "dry_run", "grad_accum", "fsdp", "activation_checkpointing"}
SPREAD = 0x9E3779B1  # 2^32 over the golden ratio: steps of different seeds are far apart


class NoRun(Run):
    """Writes no files: for a dry run (which still prints) and for every process but the first (which does not)."""

    def __init__(self, says: bool) -> None:
        self.folder, self._says = Path(os.devnull), says

    def log(self, line: str) -> None:
        if self._says:
            print(line, file=sys.stderr)

    def metrics(self, **values: Any) -> None:
        pass

    def describe(self, config: dict[str, Any]) -> None:
        pass

    def go_on_from(self, step: int) -> None:
        pass


@dataclass
class Setup:
    """What a training script starts from."""

    run: Run
    device: torch.device
    bf16: bool
    compile: bool
    here: World = field(default_factory=World)

    def autocast(self) -> torch.autocast:
        """bfloat16 products where they pay, float32 elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def start(name: str, cfg: TrainConfig) -> Setup:
    """Seed, device, threads and run folder of a training script."""
    threads = tune_process()
    if world().size > 1 and cfg.device.startswith("cuda") and torch.cuda.is_available():
        torch.cuda.set_device(world().local_rank)  # else every process would also take memory on the first GPU
    here, device = join(pick_device(cfg.device))
    bf16 = has_fast_bf16(device) if cfg.bf16 is None else cfg.bf16
    run: Run = NoRun(says=here.first)
    if here.first and not cfg.dry_run:
        run = Run(cfg.run_dir or f"runs/{name}", cfg.tensorboard)
    setup = Setup(run, device, bf16, wants_compile(cfg.compile, device), here)
    torch.manual_seed(cfg.seed)
    how = ("bfloat16 autocast" if bf16 else "float32") + (", compiled" if setup.compile else "")
    many = f"{here.size} processes, " if here.size > 1 else ""
    where = "dry run: nothing is written" if cfg.dry_run else f"run folder {setup.run.folder}"
    setup.run.log(f"{name}: {many}{device}, {threads} threads, {how}, {where}")
    return setup


def total_steps(cfg: TrainConfig, steps_per_epoch: int) -> int:
    """--max_steps, or --epochs in steps."""
    return cfg.max_steps or max(1, math.ceil(cfg.epochs * steps_per_epoch))


def learning_rate(step: int, total: int, cfg: TrainConfig) -> float:
    """Linear warm-up, constant, then linear to 0 over the last `lr_decay` of the run."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    fall = cfg.lr_decay * total
    return cfg.lr * warm * (min(1.0, (total - step) / fall) if fall > 0 else 1.0)


def parameter_groups(model: nn.Module, cfg: TrainConfig) -> dict[str, list[nn.Parameter]]:
    """What is trained, by its optimizer: `muon`, or AdamW's `matrices`, `vectors` and `tables` (with a rate of their own)."""
    choice, table_lr = (cfg.optimizer, cfg.table_lr) if isinstance(cfg, LMTrainConfig) else ("adamw", 1.0)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parts: dict[str, list[nn.Parameter]] = {"muon": [], "matrices": [], "vectors": [], "tables": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        for_muon = choice == "muon_all" or (choice == "muon" and not name.startswith("ae."))
        if id(p) in tables and table_lr != 1:
            parts["tables"].append(p)
        elif for_muon and p.ndim == 2 and id(p) not in tables:
            parts["muon"].append(p)
        else:
            parts["matrices" if p.ndim >= 2 else "vectors"].append(p)
    return parts


def optimizers(model: nn.Module, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW with decay on matrices only; with `optimizer: muon` Muon has the matrices instead, all but tables and, unless it is
    `muon_all`, the autoencoder's.

    Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982), so that both go by one learning rate.
    """
    parts = parameter_groups(model, cfg)
    groups: list[dict[str, Any]] = [
        {"params": parts["matrices"], "weight_decay": cfg.weight_decay},
        {"params": parts["vectors"], "weight_decay": 0.0},
    ]
    if isinstance(cfg, LMTrainConfig) and parts["tables"]:  # a higher rate, but no more decay
        groups.append({"params": parts["tables"], "weight_decay": cfg.weight_decay / cfg.table_lr, "scale": cfg.table_lr})
    groups = [group for group in groups if group["params"]]  # a sharded save with an empty one cannot be read back
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    if not isinstance(cfg, LMTrainConfig) or cfg.optimizer == "adamw":
        return [adamw]
    return [Muon(parts["muon"], lr=cfg.lr, weight_decay=cfg.weight_decay), adamw]


class _StopSignal:
    """Ctrl-C and SIGTERM ask the loop to stop after the step it is in; a second Ctrl-C stops at once.

    Not where torchrun started the process: its own signal follows the terminal's.
    """

    def __init__(self, alone: bool) -> None:
        self.asked: signal.Signals | None = None
        self._alone = alone
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and self._alone:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def fit(
    name: str,
    model: nn.Module,
    cfg: TrainConfig,
    setup: Setup,
    total: int,
    tokens_per_step: int,
    batch_at: Callable[[int], tuple[Tensor, ...]],
    loss_of: Callable[..., Losses],
    validate: Callable[[bool], dict[str, Any]],
    content: dict[str, Any],
) -> dict[str, Any]:
    """Train `model` for `total` steps; returns the figures of the final validation.

    batch_at(step) gives a step's batch, tensors on the CPU, and loss_of(*batch) its loss, with the batch on the device;
    validate(full) the validation figures, on a sample or on everything; `content` is what checkpoint_dir/NAME.pt carries
    beside weights, step and figures (config, tokenizer). The training state (weights, optimizer, step) lies beside it in
    NAME.state.pt, the one saved before in NAME.state.prev.pt. Raises UserError on a loss or gradient that is not finite,
    and leaves the batch in NAME.bad_batch.pt; and where another process trains into one of the folders.
    """
    with ExitStack() as locks:
        for path in (Path(cfg.checkpoint_dir) / f".{name}.lock", setup.run.folder / ".lock") if setup.here.first else ():
            lock = held(path)
            if lock is None:
                raise UserError(
                    f"another training writes to {path.parent}: wait until it is done, or choose another --checkpoint_dir and "
                    "--run_dir"
                )
            locks.enter_context(lock)
            locks.callback(path.unlink, missing_ok=True)
        return _fit(name, model, cfg, setup, total, tokens_per_step, batch_at, loss_of, validate, content)


def _fit(
    name: str, model: nn.Module, cfg: TrainConfig, setup: Setup, total: int, tokens_per_step: int,
    batch_at: Callable[[int], tuple[Tensor, ...]], loss_of: Callable[..., Losses], validate: Callable[[bool], dict[str, Any]],
    content: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    folder, here, run = Path(cfg.checkpoint_dir), setup.here, setup.run
    replicas = Replicas(model, cfg, here, setup.device)
    if replicas.sharded and setup.compile:  # as --set compile=auto may have it
        raise UserError("--fsdp with --compile is not supported: leave one of them out")
    every, first = optimizers(model, cfg), 0
    loss_of = torch.compile(loss_of) if setup.compile else loss_of
    state_path, shards = folder / f"{name}.state.pt", folder / f"{name}.shards"
    if here.first:
        remove_temporaries(folder, name)
    begun, place = folder / f".{name}.begun", shards if replicas.sharded else state_path

    def own_saves() -> list[Path]:
        """This training's, newest first; the first process puts another one's aside, for torchrun's restarts, too."""
        goes_on = cfg.resume or (here.restarts and begun.is_file() and begun.read_text() == started_by())
        if here.first and not goes_on:
            set_aside(shards)
            set_state_aside(state_path)
            if "RANK" in os.environ:
                begun.write_text(started_by())
        if replicas.sharded:
            return [save for save in whole_saves(shards) if not save.name.startswith(OLD)]
        return saved_states(state_path)

    saved = replicas.in_turn(own_saves)
    if not replicas.agree(int(bool(saved))):
        raise UserError(f"not every process finds the save in {folder}: it must be one folder for all machines")
    if cfg.resume or (here.restarts and saved):
        state = replicas.in_turn(_saved_state, name, place, saved, cfg, content, run)
        first, source = state["step"], saved[0] if replicas.sharded else place
        if not replicas.agree(first):
            raise UserError(f"the processes read different saves in {folder}: it must be one folder for all machines")
        if first > total:
            raise UserError(f"--resume: {source} is at step {first}, past the {total} that were asked for; raise --max_steps")
        decays = [[group["weight_decay"] for group in optimizer.param_groups] for optimizer in every]
        if replicas.sharded:
            replicas.load_shards(saved[0], every)
        else:
            load_weights(model, state["state"], state_path)
            for optimizer, kept in zip(every, state.get("optimizers") or [state["optimizer"]], strict=True):
                groups = [group for group in kept["param_groups"] if group["params"]]  # older saves have empty ones
                optimizer.load_state_dict({**kept, "param_groups": groups})
        for optimizer, asked_for in zip(every, decays, strict=True):  # the save has its own
            for group, decay in zip(optimizer.param_groups, asked_for, strict=True):
                group["weight_decay"] = decay
        run.log(f"{name}: resumed at step {first} of {total} from {source}")
        before = state["train_config"]
        if cfg.lr_decay and (before.get("max_steps"), before.get("epochs")) != (cfg.max_steps, cfg.epochs):
            rate = learning_rate(first, total, cfg)
            run.log(f"{name}: --lr_decay {cfg.lr_decay:g} is laid out anew for {total} steps: the rate goes on at {rate:.3g}")
    run.describe(asdict(cfg))
    run.go_on_from(first)
    data = _data_of(content)

    def save_model(step: int, figures: dict[str, Any]) -> None:
        weights = replicas.weights()
        if here.first:
            save_checkpoint(folder / f"{name}.pt", name, {**content, "state": weights, "step": step, "figures": figures})

    def save(step: int) -> None:
        about = {"config": content["config"], "train_config": content["train_config"], "data": data, "step": step}
        if replicas.sharded:
            replicas.save_shards(shards, every, about)
        elif here.first:
            state = {**about, "state": replicas.weights(), "optimizers": [x.state_dict() for x in every]}
            save_checkpoint(state_path, f"{name}.state", state, state_before(state_path))
            state_aside(state_path).unlink(missing_ok=True)
        save_model(step, {})

    stop = _StopSignal(alone=here.size == 1)
    bar = tqdm(
        total=total, initial=first, desc=name, unit="step", mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True,
        disable=not here.first,
    )  # fmt: skip
    mark, mark_step = time.perf_counter(), first
    try:
        for step in range(first, total):
            rate = learning_rate(step, total, cfg)
            for group in (group for optimizer in every for group in optimizer.param_groups):
                group["lr"] = rate * group.get("scale", 1.0)
            torch.manual_seed((cfg.seed * SPREAD + step) % 2**32)  # a CPU's generator takes no more bits
            batch = batch_at(step)
            loss, parts = replicas.backward(loss_of, batch, step, setup.autocast)
            norm = replicas.clip(cfg.grad_clip)
            if not math.isfinite(norm):  # one check for loss and gradient, before the weights are touched
                raise _not_finite(name, folder, cfg, step, replicas.mean([loss])[0], norm.item(), batch if here.first else None)
            asked = replicas.any(stop.asked or 0)  # here the host has waited for the device anyway
            for optimizer in every:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bar.update()
            done = step + 1
            if done % cfg.log_every == 0 or done == total:
                mean, *means = (round(value, 5) for value in replicas.mean([loss, *parts.values()]))
                shown = dict(zip(parts, means, strict=True))
                seconds = time.perf_counter() - mark
                run.metrics(
                    step=done,
                    tokens=done * tokens_per_step,
                    loss=mean,
                    **shown,
                    lr=rate,
                    grad_norm=round(float(norm), 4),
                    tokens_per_s=round((done - mark_step) * tokens_per_step / seconds, 1),
                )
                bar.set_postfix_str(", ".join(f"{key} {value:.3f}" for key, value in shown.items()), refresh=False)
                mark, mark_step = time.perf_counter(), done
            if cfg.eval_every and done % cfg.eval_every == 0 and done < total:
                run.metrics(
                    step=done,
                    tokens=done * tokens_per_step,
                    **{f"val_{k}": v for k, v in replicas.run(validate, False).items()},
                )
            if asked and done < total:
                save(done)
                bar.close()
                run.log(f"{name}: stopped at step {done} of {total} and saved {place}. Go on with: {_resume_command()}")
                sys.exit(EXIT_INTERRUPTED if asked == signal.SIGINT else 0)
            if cfg.save_every and done % cfg.save_every == 0 and done < total:
                save(done)
    finally:
        bar.close()
        stop.restore()
    save(total)  # before the validation, so that an interrupt there costs nothing
    figures = replicas.run(validate, True)
    save_model(total, figures)
    run.metrics(step=total, tokens=total * tokens_per_step, final=True, **figures)
    run.log(f"{name}: {total} steps, {total * tokens_per_step:,} tokens -> {folder / f'{name}.pt'}")
    return figures


def _saved_state(
    name: str, path: Path, saved: list[Path], cfg: TrainConfig, content: dict[str, Any], run: Run
) -> dict[str, Any]:
    """What the last save says of itself, with its tensors where it is one file; checks that it belongs to this model."""
    shape = content["config"]
    if path.suffix == ".pt":
        state = load_state(path, f"{name}.state", run.log)
    elif saved:
        state = read_json(saved[0] / ABOUT)
    else:
        raise UserError(f"--resume: {path} holds no save of this --fsdp training; train without --resume")
    its_own = state["config"]  # a setting that is younger than the save is not in it; the weights tell whether they fit
    if changed := sorted(k for k in shape if k in its_own and its_own[k] != shape[k]):
        raise UserError(f"--resume: {path} belongs to another model (different {', '.join(changed)}); train without --resume")
    before, now = state["train_config"], asdict(cfg)
    for key, default in (("optimizer", "adamw"), ("table_lr", 1.0)):  # the saved optimizers are made of these
        if (was := before.get(key, default)) != (asked := now.get(key, default)):
            raise UserError(f"--resume: {path} was saved with --{key} {was}, got {asked}; go on with {was}")
    changed = [key for key in now if key in before and before[key] != now[key] and key not in FREE_ON_RESUME]
    other = [f"{key} {before[key]} -> {now[key]}" for key in changed]
    data, was = _data_of(content), state.get("data") or _data_of(content)  # saves from before they told it have none
    if was["tokenizer"] != data["tokenizer"]:
        raise UserError(f"--resume: {path} was trained on data of another tokenizer than {cfg.data}'s; train without --resume")
    if was["tokens"] != data["tokens"]:
        other.append(f"data of {was['tokens']:,} -> {data['tokens']:,} tokens")
    if was.get("autoencoder", data["autoencoder"]) != data["autoencoder"]:
        other.append("the latents of another autoencoder")
    if other:
        run.log(f"{name}: this goes on as another run than the one that was saved: {', '.join(other)}")
    return state


def _data_of(content: dict[str, Any]) -> dict[str, Any]:
    """What a save says of the text that it was trained on, which the folder's name does not tell."""
    told = {"tokenizer": content["tokenizer"]["fingerprint"], "tokens": content["train_tokens"]}
    return {**told, "autoencoder": content.get("autoencoder")}


def _not_finite(
    name: str, folder: Path, cfg: TrainConfig, step: int, loss: float, norm: float, batch: tuple[Tensor, ...] | None
) -> UserError:
    """Keep the batch, if given, whose loss or gradient is not finite; returns what to say of it."""
    path, kind = folder / f"{name}.bad_batch.pt", f"{name}.bad_batch"
    if batch is not None:
        found = {"step": step, "seed": cfg.seed, "loss": loss, "grad_norm": norm}
        save_checkpoint(path, kind, {**found, "batch": [x.cpu().clone() for x in batch]})
    return UserError(
        f"{name}: the loss is {loss:g} and its gradient {norm:g} at step {step}: nothing was updated. "
        f"The step's batch is kept in {path}; look at it with "
        f"python -c \"import torch; print(torch.load('{path}', weights_only=True))\". "
        f"Try a lower --lr (now {cfg.lr:g}), a longer --warmup_steps or --no-bf16, and go on from the last save with --resume"
    )


def _resume_command() -> str:
    args = [a for a in sys.argv if a != "--resume"]
    here = world()
    start = f"torchrun --nproc_per_node {here.local_size}" if here.size > 1 else "python"
    return " ".join([start, *map(shlex.quote, args), "--resume"])
