"""Training speed: one row for each thing that is added to a plain fp32 eager loop, so that all see what buys what.

Every row runs in a process of its own, since allocator settings cannot be taken back. A step is what the training loop
does: loss, backward pass, clipping, AdamW; on random tokens, in the demo's shapes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ae.ae_model import AEConfig, Autoencoder
from ae.losses import ae_loss
from configs.errors import UserError
from configs.loop import adamw
from configs.run import environment, has_fast_bf16, pick_device, tune_process, wants_compile
from configs.schema import AETrainConfig, StudentTrainConfig, read_yaml
from student.baseline import BackboneConfig, TokenModel
from student.losses import student_loss
from student.student_model import Student, StudentConfig

MODELS = ("ae", "token_model", "student")
VARIANTS = ("fp32 eager", "+ allocator", "+ bf16", "+ compile")  # each has those before it
CONFIGS = Path(__file__).parent.parent / "configs"
VOCABULARY = 4096


def make_step(model: str, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor], int]:
    """A model of the demo's shape, the loss of a batch of random tokens, and the tokens of that batch."""
    ae_cfg, lm = read_yaml(CONFIGS / "demo_ae.yaml"), read_yaml(CONFIGS / "demo_student.yaml")
    k, batch, length = ae_cfg["k"], lm["batch_size"], lm["seq_len"]
    torch.manual_seed(0)
    if model == "ae":
        chunks = torch.randint(2, VOCABULARY, (ae_cfg["batch_size"], k), device=device)
        defaults = AETrainConfig()
        autoencoder = _ae(ae_cfg).to(device)
        weights = {"kl_weight": defaults.kl_weight, "free_bits": defaults.free_bits, "latent_dropout": defaults.latent_dropout}
        return autoencoder, lambda: ae_loss(autoencoder, chunks, token_mask=defaults.token_mask, **weights)[0], chunks.numel()
    shape = {name: lm[name] for name in ("hidden_dim", "num_layers", "num_heads", "seq_len")}
    shape |= {"num_kv_heads": lm["num_heads"], "ffn_dim": 3 * lm["hidden_dim"], "k": k, "vocab_size": VOCABULARY}
    tokens = torch.randint(2, VOCABULARY, (batch, length * k), device=device)
    if model == "token_model":
        token_model = TokenModel(BackboneConfig(**shape)).to(device)
        return token_model, lambda: token_model.nll(tokens).mean(), tokens.numel()
    defaults_lm = StudentTrainConfig()
    cfg = StudentConfig(
        **shape, latent_dim=ae_cfg["latent_dim"], embed_dim=ae_cfg["embed_dim"], ae_layers=ae_cfg["num_layers"],
        local_layers=defaults_lm.local_layers, local_window=defaults_lm.local_window, pad_id=1,
    )  # fmt: skip
    student, frozen = Student(cfg).to(device), _ae(ae_cfg).to(device).requires_grad_(False)
    pads = torch.zeros(batch, dtype=torch.long, device=device)
    loss = lambda: student_loss(student, frozen, tokens, pads, ce_w=1.0, mse_w=defaults_lm.mse_w)[0]
    return student, loss, tokens.numel()


def _ae(cfg: dict[str, Any]) -> Autoencoder:
    return Autoencoder(AEConfig(VOCABULARY, cfg["k"], cfg["latent_dim"], cfg["embed_dim"], cfg["num_layers"]))


def measure(model: str, variant: int, device_name: str, repeats: int) -> dict[str, Any]:
    """Tokens a second of one row; `variant` is an index of VARIANTS."""
    if variant >= 1:
        tune_process()
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    device = pick_device(device_name)
    module, loss, tokens = make_step(model, device)
    compute = torch.compile(loss) if variant >= 3 else loss
    optimizer = adamw(module, StudentTrainConfig())

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=variant >= 2):
            value = compute()
        value.backward()
        nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    seconds = []
    for _ in range(max(3, 4 * repeats)):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rates = [tokens / s for s in seconds]
    return {"model": model, "variant": VARIANTS[variant], "tokens_per_s": statistics.median(rates),
            "tokens_per_s_range": [min(rates), max(rates)], "seconds_per_step": statistics.median(seconds)}  # fmt: skip


def main(variant: str | None, device: str, repeats: int, output: str | None) -> None:
    """`bench.py --train`; `variant` "MODEL:INDEX" measures one row and prints it as JSON."""
    if variant is not None:
        model, _, number = variant.partition(":")
        if model not in MODELS or not number.isdigit() or int(number) >= len(VARIANTS):
            raise UserError(f"--variant {variant}: expected MODEL:INDEX, a model of {', '.join(MODELS)}")
        print(json.dumps(measure(model, int(number), device, repeats)))
        return
    where = pick_device(device)
    count = 4 if wants_compile(None, where) else 3
    rows = []
    print(f"{'':14}{'':14}{'tokens/s':>12}{'(min .. max)':>22}{'s/step':>10}{'ratio':>8}")
    for model in MODELS:
        plain = None
        for index in range(count):
            if index == 2 and not has_fast_bf16(where):
                continue
            command = [sys.executable, sys.argv[0], "--train", "--variant", f"{model}:{index}", "--device", device]
            done = subprocess.run([*command, "--repeats", str(repeats)], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"timing {model}, {VARIANTS[index]} failed: {done.stderr.strip().splitlines()[-1]}")
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
    line = json.dumps({"rows": rows, "environment": environment()})
    if output:
        Path(output).write_text(line + "\n", encoding="utf-8")
    print(line)
