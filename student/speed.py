"""Training speed: one row for each thing that is added to a plain fp32 eager loop, so that all see what buys what.

Every row runs in a process of its own, since allocator settings cannot be taken back. A step is what the training loop
does: loss, backward pass, clipping, AdamW, and last the demo's own optimizer; on random tokens, in the demo's shapes or those
of a larger backbone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ae.ae_model import AEConfig, Autoencoder
from ae.losses import ae_loss, weighted_nll
from configs.errors import UserError
from configs.loop import optimizers
from configs.run import asked_threads, environment, has_fast_bf16, pick_device, tune_process, wants_compile
from configs.schema import AETrainConfig, StudentTrainConfig, read_yaml
from student.baseline import BackboneConfig, TokenModel
from student.losses import student_loss
from student.student_model import Student, StudentConfig

MODELS = ("ae", "token_model", "student")
VARIANTS = ("fp32 eager", "+ allocator", "+ bf16", "+ compile", "+ Muon")  # each has those before it, where they exist
CONFIGS = Path(__file__).parent.parent / "configs"
VOCABULARY = 4096


@dataclass(frozen=True)
class Scale:
    """What is trained: the models' shapes and the batch of a step."""

    backbone: dict[str, Any]  # BackboneConfig's fields
    ae: AEConfig
    windows: int
    chunks: int  # of the autoencoder's batch


def recipe(embed_dim: int) -> dict[str, Any]:
    """What the demo's student is made of beside its sizes, for a local decoder of this width; the trainer's defaults where its
    config is silent."""
    told, default = read_yaml(CONFIGS / "demo_student.yaml"), StudentTrainConfig()
    names = ("local_layers", "local_window", "local_tokens", "local_qk_norm", "local_memory", "latent_bypass")
    same = {name: told.get(name, getattr(default, name)) for name in names}
    return same | {"local_ffn_dim": told["local_ffn_dim"] * embed_dim // read_yaml(CONFIGS / "demo_ae.yaml")["embed_dim"]}


def has_variant(model: str, variant: int, device: torch.device) -> bool:
    """Whether the thing that this row adds can be had on this device, and is of use to this model."""
    available = {"+ bf16": has_fast_bf16(device), "+ compile": wants_compile(None, device), "+ Muon": model != "ae"}
    return available.get(VARIANTS[variant], True)


def train_config(variant: int) -> StudentTrainConfig:
    """What `optimizers` reads: the defaults, in the last row the demo's."""
    told = read_yaml(CONFIGS / "demo_student.yaml") if VARIANTS[variant] == "+ Muon" else {}
    return StudentTrainConfig(**{name: told[name] for name in ("optimizer", "table_lr") if name in told})


def demo_scale() -> Scale:
    """The shapes and batches of `make demo`."""
    ae, lm = read_yaml(CONFIGS / "demo_ae.yaml"), read_yaml(CONFIGS / "demo_student.yaml")
    backbone = {name: lm[name] for name in ("hidden_dim", "num_layers", "num_heads", "seq_len")}
    backbone |= {"num_kv_heads": lm["num_heads"], "ffn_dim": 3 * lm["hidden_dim"], "k": ae["k"], "vocab_size": VOCABULARY}
    shape = AEConfig(VOCABULARY, ae["k"], ae["latent_dim"], ae["embed_dim"], ae["num_layers"])
    return Scale(backbone, shape, lm["batch_size"], ae["batch_size"])


def larger_scale(shape: Mapping[str, int]) -> Scale:
    """One window of 64 chunks, which on one core takes 100 M parameters seconds; `shape` as in bench.py."""
    own, k, seq_len = ("latent_dim", "embed_dim"), 8, 64
    backbone = {name: value for name, value in shape.items() if name not in own} | {"k": k, "seq_len": seq_len}
    ae = AEConfig(k=k, num_layers=4, **{name: shape[name] for name in ("vocab_size", *own)})
    return Scale(backbone, ae, windows=1, chunks=seq_len)


def make_step(model: str, device: torch.device, scale: Scale | None = None) -> tuple[nn.Module, Callable[[], Tensor], int]:
    """A model of this scale (unset: the demo's), the loss of a batch of random tokens, and the tokens of that batch."""
    scale = scale or demo_scale()
    ae, vocabulary = scale.ae, scale.ae.vocab_size
    torch.manual_seed(0)
    if model == "ae":
        chunks = torch.randint(2, vocabulary, (scale.chunks, ae.k), device=device)
        defaults = AETrainConfig()
        autoencoder = Autoencoder(ae).to(device)
        weights = {"kl_weight": defaults.kl_weight, "free_bits": defaults.free_bits, "latent_dropout": defaults.latent_dropout}
        return autoencoder, lambda: ae_loss(autoencoder, chunks, token_mask=defaults.token_mask, **weights)[0], chunks.numel()
    tokens = torch.randint(2, vocabulary, (scale.windows, scale.backbone["seq_len"] * ae.k), device=device)
    if model == "token_model":
        token_model = TokenModel(BackboneConfig(**scale.backbone)).to(device)

        def token_loss() -> Tensor:
            states = token_model.hidden(tokens)[:, 1:].flatten(0, 1)
            return weighted_nll(states, token_model.table, tokens[:, 1:].flatten())[0]

        return token_model, token_loss, tokens.numel()
    cfg = StudentConfig(
        **scale.backbone, latent_dim=ae.latent_dim, embed_dim=ae.embed_dim, ae_layers=ae.num_layers,
        pad_id=1, **recipe(ae.embed_dim),
    )  # fmt: skip
    student = Student(cfg).to(device)
    pads = torch.zeros(scale.windows, dtype=torch.long, device=device)
    loss = lambda: student_loss(student, None, tokens, pads, ce_w=1.0)[0]
    return student, loss, tokens.numel()


def measure(model: str, variant: int, device_name: str, repeats: int, scale: Scale | None = None) -> dict[str, Any]:
    """Tokens a second of one row; `variant` is an index of VARIANTS; scale as `make_step`."""
    if variant >= 1:
        tune_process()
    else:
        torch.set_num_threads(asked_threads(len(os.sched_getaffinity(0))))
    device = pick_device(device_name)
    module, loss, tokens = make_step(model, device, scale)
    bf16, compiled = (variant >= index and has_variant(model, index, device) for index in (2, 3))
    compute = torch.compile(loss) if compiled else loss
    every = optimizers(module, train_config(variant))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = compute()
        value.backward()
        nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 1.0)
        for optimizer in every:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    seconds = []
    for i in range(3 + max(3, 4 * repeats)):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 3:  # warm
            seconds.append(time.perf_counter() - start)
    rates = [tokens / s for s in seconds]
    return {"model": model, "variant": VARIANTS[variant], "tokens_per_s": statistics.median(rates),
            "tokens_per_s_range": [min(rates), max(rates)], "seconds_per_step": statistics.median(seconds),
            "tokens_per_step": tokens}  # fmt: skip


def student_to_token(rows: list[dict[str, Any]]) -> float:
    """Seconds a step of the student over the token-level model's, each with all that was added."""
    last = {row["model"]: row for row in rows}
    assert last["student"]["tokens_per_step"] == last["token_model"]["tokens_per_step"]
    return float(last["student"]["seconds_per_step"] / last["token_model"]["seconds_per_step"])


def main(variant: str | None, device: str, repeats: int, scale: str, shape: Mapping[str, int] | None) -> dict[str, Any]:
    """`bench.py --train`: prints a table and returns what is in it; `variant` "MODEL:INDEX" measures one row alone.

    shape: that of `scale` in bench.py; None is the demo's.
    """
    if variant is not None:
        model, _, number = variant.partition(":")
        if model not in MODELS or not number.isdigit() or int(number) >= len(VARIANTS):
            raise UserError(f"--variant {variant}: expected MODEL:INDEX, a model of {', '.join(MODELS)}")
        return measure(model, int(number), device, repeats, larger_scale(shape) if shape else None)
    where = pick_device(device)
    rows = []
    print(f"{scale:14}{'':14}{'tokens/s':>12}{'(min .. max)':>22}{'s/step':>10}{'ratio':>8}")
    for model in MODELS:
        plain = None
        for index in range(len(VARIANTS)):
            if not has_variant(model, index, where):
                continue
            command = [sys.executable, sys.argv[0], "--train", "--variant", f"{model}:{index}", "--device", device]
            command += ["--scale", scale, "--repeats", str(repeats)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise UserError(f"timing {model}, {VARIANTS[index]} failed: {said[-1]}")
            row = json.loads(done.stdout.splitlines()[-1])
            plain = plain or row["tokens_per_s"]
            row["ratio_to_plain"] = row["tokens_per_s"] / plain
            spread = "({:.0f} .. {:.0f})".format(*row["tokens_per_s_range"])
            print(
                f"{model:14}{row['variant']:14}{row['tokens_per_s']:>12.0f}{spread:>22}{row['seconds_per_step']:>10.3f}"
                f"{row['ratio_to_plain']:>8.2f}",
                flush=True,
            )
            rows.append(row)
    ratio = student_to_token(rows)
    print(f"student / token_model seconds a step at equal tokens: {ratio:.2f}")
    return {"scale": scale, "rows": rows, "student_to_token_model": ratio, "environment": environment()}
