"""The counted costs against torch's own counter, and against sums done by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import make_ae, make_student, make_token_model, student_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ae.losses import ae_loss
from configs.loop import optimizers
from configs.schema import LMTrainConfig, StudentTrainConfig
from kd.losses import mean_kl
from student.baseline import BackboneConfig
from student.flops import (
    ae_training_flops,
    backbone_steps,
    encoder_flops,
    forward_flops,
    generation_bytes,
    generation_flops,
    optimizer_flops,
    training_flops,
)
from student.losses import student_energy_loss, student_loss

SHAPE: dict[str, Any] = {"hidden_dim": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 96, "seq_len": 16, "k": 4}
STUDENTS: list[dict[str, Any]] = [
    {},
    {"latents": "none"},
    {"local_decoder": "none"},
    {"local_layers": 1, "local_window": 8, "ae_layers": 8},
    {"local_window": 512},  # wider than the context
    {"k": 8, "latent_dim": 24, "num_layers": 3},
    {"k": 1},
    {"local_decoder": "restart"},
    {"local_memory": True},
    {"local_memory": True, "latents": "none", "k": 1, "local_layers": 1},
    {"latent_bypass": True},
    {"local_tokens": 4, "local_ffn_dim": 24},
]
KINDS = [
    "ours",
    "no latents",
    "independent positions",
    "deep autoencoder",
    "a window beyond the context",
    "k 8",
    "k 1",
    "restarting decoder",
    "memory",
    "memory alone",
    "bypass",
    "four tokens",
]


def counted(run: Any) -> int:
    """FLOPs by torch's counter; the plain attention is made of products that it knows on a CPU too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("change", STUDENTS, ids=KINDS)
def test_a_students_forward_pass(change: dict[str, Any]) -> None:
    model = make_student(**{**SHAPE, "embed_dim": 32, "local_window": 4, **change})
    tokens = torch.randint(2, 320, (1, model.cfg.context))
    told = sum(forward_flops(model.cfg).values()) * model.cfg.context
    assert counted(lambda: model.nll(tokens)) == pytest.approx(told, rel=0.02)


@pytest.mark.parametrize("k", [1, 4])
def test_what_a_memory_adds(k: int) -> None:
    tokens = torch.randint(2, 320, (1, 16 * k))
    models = [make_student(**{**SHAPE, "k": k, "local_memory": memory}) for memory in (True, False)]
    with_memory, without = (sum(forward_flops(model.cfg).values()) * 16 * k for model in models)
    counts = [counted(lambda model=model: model.nll(tokens)) for model in models]
    none = 2 * 2 * 32 * 16  # its key and value, once in a pass
    assert counts[0] - counts[1] == pytest.approx(with_memory - without + none, abs=0.1)


@pytest.mark.parametrize("change", [{}, {"num_layers": 3, "num_kv_heads": 4}])
def test_a_token_models_forward_pass(change: dict[str, int]) -> None:
    model = make_token_model(**{**SHAPE, **change})
    tokens = torch.randint(320, (1, 64))
    told = sum(forward_flops(model.cfg).values()) * 64
    assert counted(lambda: model.nll(tokens)) == pytest.approx(told, rel=0.02)


@pytest.mark.parametrize(
    ("change", "weights"),
    [
        ({}, {"mse_w": 1.0}),
        ({}, {"mse_w": 0.0, "base_w": 0.5}),
        ({"latents": "none"}, {"mse_w": 0.0}),
        ({"local_decoder": "none"}, {}),
        ({"local_memory": True}, {"mse_w": 0.0}),
        ({"head": "energy"}, {}),
    ],
)
def test_a_students_training_step(change: dict[str, Any], weights: dict[str, float]) -> None:
    model = make_student(**{**SHAPE, "embed_dim": 32, "local_window": 4, **change})
    frozen = make_ae(vocab_size=320, latent_dim=8, embed_dim=32).requires_grad_(False)
    tokens, pads = torch.randint(2, 320, (1, 64)), torch.tensor([0])
    train = StudentTrainConfig(**weights)

    def step() -> None:
        if model.cfg.head == "energy":
            loss = student_energy_loss(model, frozen, tokens, pads)[0]
        else:
            loss = student_loss(model, frozen, tokens, pads, ce_w=1.0, mse_w=train.mse_w, base_w=train.base_w)[0]
        loss.backward()

    assert counted(step) == pytest.approx(training_flops(model.cfg, train) * 64, rel=0.04)


@pytest.mark.parametrize("ce_w", [1.0, 0.0])
def test_a_students_training_step_with_soft_targets(ce_w: float) -> None:
    """What the cross-entropy adds is only reported where its weight is 0: one product with the table instead of three."""
    model = make_student(**{**SHAPE, "embed_dim": 32, "local_window": 4, "vocab_size": 1280})
    tokens, pads = torch.randint(2, 1280, (1, 64)), torch.tensor([0])
    ids, logprobs = tokens[..., None], torch.full((1, 64, 1), -0.5)

    def step() -> None:
        kd = partial(mean_kl, table=model.table, top_ids=ids, top_logprobs=logprobs)
        student_loss(model, None, tokens, pads, ce_w=ce_w, kd_w=1.0, kd=kd)[0].backward()

    train = StudentTrainConfig(use_kd=True, ce_w=ce_w, mse_w=0.0)
    assert counted(step) == pytest.approx(training_flops(model.cfg, train) * 64, rel=0.04)


def test_a_token_models_training_step() -> None:
    model = make_token_model(**SHAPE)
    tokens = torch.randint(320, (1, 64))
    told = training_flops(model.cfg, LMTrainConfig())
    assert counted(lambda: model.nll(tokens).mean().backward()) == pytest.approx(told * 64, rel=0.04)
    more = training_flops(model.cfg, LMTrainConfig(use_kd=True)) - told  # soft targets: the vocabulary once more
    assert more == pytest.approx(3 * 2 * 64 * 320 * 63 / 64)


@pytest.mark.parametrize("choice", ["adamw", "muon", "muon_all"])
def test_the_optimizers_step(choice: str) -> None:
    """Of the matrices it has: neither the frozen ones nor the table, and the autoencoder's only with muon_all."""
    train = StudentTrainConfig(optimizer=choice, table_lr=5)
    for model in (make_student(**SHAPE), make_student(**SHAPE, latents="none"), make_token_model(**SHAPE)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        told = optimizer_flops(model.cfg, train)
        assert sum(counted(optimizer.step) for optimizer in optimizers(model, train)) == told
        assert (told > 0) == (choice != "adamw")


def test_the_autoencoders_training_step() -> None:
    model = make_ae()
    chunks = torch.randint(50, (16, 4))
    told = ae_training_flops(model.cfg) * 64
    assert counted(lambda: ae_loss(model, chunks, kl_weight=1e-3, free_bits=0.5)[0].backward()) == pytest.approx(told, rel=0.04)
    assert counted(lambda: model.encode(chunks)) == encoder_flops(model.cfg) * 64


def test_generation_by_hand() -> None:
    """H 16, 2 layers, 2 heads and 1 for keys, F 32, K 4, V 320, D 8, E 16, W 5, 64 tokens of context."""
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32
    vocabulary = 320 * 16
    token_model = make_token_model().cfg
    assert generation_flops(token_model) == {"backbone": 2 * 2 * layer + 4 * 2 * 16 * 64, "vocabulary": 2 * vocabulary}
    norms = 2 * (2 * 16 + 2 * 8) + 16
    assert generation_bytes(token_model, 4) == {"backbone": 4 * (2 * layer + norms), "vocabulary": 4 * vocabulary}
    student = student_config()
    flops, read = generation_flops(student), generation_bytes(student, 1)
    assert flops["backbone"] == pytest.approx((2 * 2 * layer + 4 * 2 * 16 * 16) / 4)
    assert flops["vocabulary"] == 2 * vocabulary and read["vocabulary"] == vocabulary
    assert read["backbone"] == pytest.approx((2 * layer + norms) / 4)
    swiglu = 6 * 16 * 16  # 16 -> 2 x 32 -> 16
    local = 2 * 16 * 16 + 2 * (3 * 16 * 16 + 16 * 16 + swiglu) + 16 * 16
    assert flops["local decoder"] == 2 * local + 4 * 2 * 16 * 5
    decoder = 8 * 16 + swiglu + 16 * 4 * 16
    assert flops["decoder"] == pytest.approx(2 * (decoder / 4 + swiglu))
    biases = 16 + 64 + 3 * 16  # of two projections; three norms
    assert read["decoder"] == pytest.approx((decoder + swiglu + biases) / 4)  # four positions at once read them once
    assert flops["head"] == pytest.approx(2 * 16 * 8 / 4)


@pytest.mark.parametrize(("k", "hidden"), [(8, 8), (4, 4), (2, 4), (1, 3)])
def test_generation_with_a_memory_by_hand(k: int, hidden: int) -> None:
    """E 16; of 64 tokens of context the last chunks are hidden; one entry more stands for nothing."""
    cfg, without = (student_config(k=k, seq_len=64 // k, local_memory=memory) for memory in (True, False))
    ends, entry = 2 * 16 * 16, 2 * 32 * 16  # query and output; key and value, of two vectors each
    added = generation_flops(cfg)["local decoder"] - generation_flops(without)["local decoder"]
    assert added == 2 * (ends + entry) + 4 * 16 * (64 - hidden + 1)
    early = generation_flops(cfg, 2)["local decoder"] - generation_flops(without, 2)["local decoder"]
    assert early == 2 * (ends + entry) + 4 * 16  # no entry is to be seen yet
    read = generation_bytes(cfg, 1)["local decoder"] - generation_bytes(without, 1)["local decoder"]
    assert read == pytest.approx(ends + 5 * 16 + entry / k)  # five norms; a chunk's entries are made together


def test_a_large_model_costs_no_memory() -> None:
    cfg = BackboneConfig(1 << 15, 28, 256, 8, 1 << 17, 512, 8, 151_936)
    assert sum(generation_bytes(cfg, 1).values()) > 4e11  # more weights than any machine holds
    assert generation_flops(cfg, 0)["backbone"] < generation_flops(cfg)["backbone"]


def test_backbone_steps() -> None:
    assert backbone_steps(make_token_model().cfg) == 1
    assert (backbone_steps(student_config(k=8)), backbone_steps(student_config(latents="none"))) == (0.125, 0.0)
