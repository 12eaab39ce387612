"""What training and generation cost by count: matrix products and weights read, per token.

Counted are matrix products only, 2 FLOPs a multiply-add, the attention's and the vocabulary's included; not lookups,
norms or activations. Attention counts the whole square of a training window, as dense kernels and the literature do
(PaLM, arXiv 2204.02311, appendix B). A backward pass costs twice its forward pass.

Shapes come from the modules themselves, made on the meta device (no memory, any size); what is told here is how often
each part runs. tests/test_flops.py holds the sum against torch's own counter.

Legend: `K` tokens a chunk, `L` chunks a window, `T` = L * K tokens, `W` window of the local decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ae.ae_model import AEConfig, Autoencoder
from configs.loop import parameter_groups
from configs.muon import QUINTICS
from configs.schema import LMTrainConfig, StudentTrainConfig
from student.baseline import BackboneConfig, TokenModel
from student.energy import MODEL_SAMPLES
from student.local_decoder import lag
from student.student_model import Student, StudentConfig


@dataclass(frozen=True)
class Rate:
    """How often the parameters below a name run; all figures are per token."""

    part: str
    trained_on: float  # positions in the forward pass of training
    written_at: float  # positions in generation
    read: float  # times the weights are read in generation at batch 1: positions run together read them once


def _token_model_rates(cfg: BackboneConfig) -> dict[str, Rate]:
    scored = (cfg.context - 1) / cfg.context  # nothing stands before the first token
    rate = Rate("backbone", scored, 1, 1)
    return {"lm.model.layers": rate, "lm.model.norm": rate, "lm.model.embed_tokens": Rate("vocabulary", scored, 1, 1)}


def _student_rates(cfg: StudentConfig) -> dict[str, Rate]:
    chunk, energy = 1 / cfg.k, cfg.head == "energy"
    used = float(cfg.latents == "on")
    known = (cfg.seq_len - 1) / cfg.seq_len  # the last chunk of a window is predicted only
    encoded = used * known
    decoded = float(not energy)  # the energy head trains on latents alone
    return {
        "ae.embedding": Rate("vocabulary", decoded, 1, chunk if energy else 1),
        "ae.encoder": Rate("encoder", encoded * chunk, used * chunk, used * chunk),
        "ae.encoder.token_blocks": Rate("encoder", encoded, used, used * chunk),
        "enter": Rate("encoder", encoded * chunk, chunk, chunk),
        "enter_norm": Rate("encoder", encoded * chunk, chunk, chunk),
        "backbone": Rate("backbone", chunk, chunk, chunk),
        "exit": Rate("head", chunk * (MODEL_SAMPLES if energy else 1), chunk, chunk),
        "bypass": Rate("decoder", chunk, chunk, chunk),
        "ae.decoder": Rate("decoder", decoded * chunk, chunk, chunk),
        "ae.decoder.token_blocks": Rate("decoder", decoded, 1, chunk),
        "local": Rate("local decoder", 1, 1, 1),
        "local.memory.key": Rate("local decoder", known, 1, chunk),  # the last chunk of a window is looked up by none
        "local.memory.value": Rate("local decoder", known, 1, chunk),
        "local.memory.none": Rate("local decoder", 0, 0, 0),  # its key and value are made once
        "start": Rate("encoder", 0, 0, 0),  # once a text
    }


def _rated(cfg: BackboneConfig) -> list[tuple[nn.Parameter, Rate]]:
    """Every parameter with the rate of the longest name above it."""
    student = isinstance(cfg, StudentConfig)
    with torch.device("meta"):
        model = Student(cfg) if isinstance(cfg, StudentConfig) else TokenModel(cfg)
    rates = _student_rates(cfg) if isinstance(cfg, StudentConfig) else _token_model_rates(cfg)
    out = []
    for name, parameter in model.named_parameters():
        above = [prefix for prefix in rates if name == prefix or name.startswith(prefix + ".")]
        assert above, f"{name} of the {'student' if student else 'token model'} has no rate in student/flops.py"
        out.append((parameter, rates[max(above, key=len)]))
    return out


def _sum(parts: list[tuple[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part, value in parts:
        total[part] = total.get(part, 0.0) + value
    return total


def _attention(cfg: BackboneConfig, keys: float, local_keys: float, entries: float) -> list[tuple[str, float]]:
    """Attention of one token over `keys` positions of the backbone (tokens, or chunks), `local_keys` of each of the local
    decoder's windows and, where it has a memory, `entries` and the one that stands for nothing.
    """
    backbone = 4.0 * cfg.num_layers * cfg.num_heads * cfg.head_width * keys
    if not isinstance(cfg, StudentConfig):
        return [("backbone", backbone)]
    local_keys = cfg.local_layers * local_keys + (entries + 1 if cfg.local_memory else 0)
    return [
        ("backbone", backbone / cfg.k if cfg.latents == "on" else 0.0),
        ("local decoder", 4.0 * cfg.embed_dim * local_keys if cfg.has_local_decoder else 0.0),
    ]


def forward_flops(cfg: BackboneConfig) -> dict[str, float]:
    """FLOPs a token, by part, of the forward pass over a whole training window."""
    weights = [(rate.part, 2 * p.numel() * rate.trained_on) for p, rate in _rated(cfg) if p.ndim == 2]
    if not isinstance(cfg, StudentConfig):
        seen = cfg.context - 1
        return _sum(weights + _attention(cfg, seen * seen / cfg.context, 0, 0))
    # the local decoder's parallel pass has blocks of W queries by 2 W keys, and no entries of the last chunk
    return _sum(weights + _attention(cfg, cfg.seq_len, 2 * min(cfg.window, cfg.context), cfg.context - cfg.k))


def training_flops(cfg: BackboneConfig, train: LMTrainConfig) -> float:
    """FLOPs a training token, the optimizer's apart: three forward passes' worth of what learns, one of what is frozen.

    The mse loss runs the frozen encoder; base loss and soft targets each multiply by the vocabulary once more. Beside soft
    targets a cross-entropy of ce_w 0 has no backward pass. With use_kd the teacher is assumed to give logprobs.
    """
    parts = forward_flops(cfg)
    unlearnt = 2 * (train.use_kd and train.ce_w == 0) * parts["vocabulary"]
    if not isinstance(cfg, StudentConfig):
        return 3 * (sum(parts.values()) + train.use_kd * parts["vocabulary"]) - unlearnt
    assert isinstance(train, StudentTrainConfig)
    encoder = encoder_flops(cfg.ae)
    if cfg.head == "energy":  # a frozen autoencoder gives the targets
        return 3 * sum(parts.values()) + encoder
    products = (train.base_w > 0) + train.use_kd
    frozen = encoder if train.mse_w > 0 and cfg.latents == "on" else 0.0
    return 3 * (sum(parts.values()) + products * parts["vocabulary"]) - unlearnt + frozen


def optimizer_flops(cfg: BackboneConfig, train: LMTrainConfig) -> float:
    """FLOPs of one step of Muon, whatever its batch: X X^T, its square, and that times X, each iteration. AdamW has none."""
    with torch.device("meta"):
        model = Student(cfg) if isinstance(cfg, StudentConfig) else TokenModel(cfg)
    sides = [sorted(p.shape) for p in parameter_groups(model, train)["muon"]]
    return float(sum(len(QUINTICS) * (4 * small**2 * large + 2 * small**3) for small, large in sides))


def _ae_flops(cfg: AEConfig, name: str) -> float:
    with torch.device("meta"):
        model = getattr(Autoencoder(cfg), name)
    return sum(
        2 * p.numel() * (1 if path.startswith("token_blocks") else 1 / cfg.k)
        for path, p in model.named_parameters()
        if p.ndim == 2
    )


def encoder_flops(cfg: AEConfig) -> float:
    """FLOPs a token of an autoencoder's encoder, forward."""
    return _ae_flops(cfg, "encoder")


def ae_training_flops(cfg: AEConfig) -> float:
    """FLOPs a training token of the autoencoder itself."""
    return 3 * (encoder_flops(cfg) + _ae_flops(cfg, "decoder") + 2 * cfg.vocab_size * cfg.embed_dim)


def generation_flops(cfg: BackboneConfig, context: int | None = None) -> dict[str, float]:
    """FLOPs of one generated token, by part, behind `context` tokens (unset: the longest context), with caches."""
    tokens = cfg.context if context is None else context
    weights = [(rate.part, 2 * p.numel() * rate.written_at) for p, rate in _rated(cfg) if p.ndim == 2]
    if not isinstance(cfg, StudentConfig):
        return _sum(weights + _attention(cfg, tokens, 0, 0))
    return _sum(weights + _attention(cfg, tokens / cfg.k, cfg.window, max(0, tokens - lag(cfg.k) * cfg.k)))


def generation_bytes(cfg: BackboneConfig, bytes_per_weight: float = 2) -> dict[str, float]:
    """Bytes of weights read for one generated token at batch 1, by part (caches are not weights; 2: bfloat16)."""
    return _sum([(rate.part, p.numel() * rate.read * bytes_per_weight) for p, rate in _rated(cfg)])


def backbone_steps(cfg: BackboneConfig) -> float:
    """Runs of the backbone for one token."""
    if not isinstance(cfg, StudentConfig):
        return 1.0
    return 1 / cfg.k if cfg.latents == "on" else 0.0
