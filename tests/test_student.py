"""The student's likelihood is exact: causal, normalised by enumeration; its losses against slow ones; its controls."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_LM, World, make_ae, make_student, make_token_model, run_script, student_config

from ae.ae_model import load_ae
from ae.losses import _WeightedNLL
from configs.errors import UserError
from configs.schema import config_from
from student import train_student
from student.energy import EnergyHead, energy_loss, sharpened
from student.losses import student_energy_loss, student_loss
from student.student_model import Student, StudentConfig
from student.train_student import pad_left

VARIANTS: list[dict[str, Any]] = [
    {},
    {"latents": "none"},
    {"local_decoder": "none"},
    {"k": 1},
    {"k": 8, "local_layers": 1, "local_window": 3},
    {"local_decoder": "restart"},
    {"local_memory": True},
    {"local_memory": True, "k": 1},
    {"local_memory": True, "k": 8, "local_layers": 1, "local_window": 3},
    {"local_memory": True, "latents": "none", "local_layers": 1},
    {"local_memory": True, "local_qk_norm": True},
    {"latent_bypass": True},
    {"latent_bypass": True, "latents": "none"},
    {"local_tokens": 3, "local_memory": True, "local_ffn_dim": 24},
    {"local_tokens": 3, "local_decoder": "restart"},
]
KINDS = [
    *("ours", "no latents", "independent positions", "k 1", "k 8", "restarting decoder"),
    *("memory", "memory, k 1", "memory, k 8", "memory alone", "memory, normed", "bypass", "neither latents nor bypass"),
    *("trigrams", "trigrams, restarting"),
]


@pytest.mark.parametrize("change", [*VARIANTS, {"attention": "eager"}], ids=[*KINDS, "eager attention"])
def test_no_position_sees_itself_or_a_later_token(change: dict[str, Any]) -> None:
    shape = {key: value for key, value in change.items() if key != "attention"}
    model = make_student(**shape)
    if "attention" in change:
        model.backbone.set_attn_implementation(change["attention"])
    tokens = torch.randint(2, 320, (1, 24))
    states = model.hidden(tokens)
    for t in range(24):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 7) % 320
        moved = (model.hidden(other) - states).abs().amax(-1)[0]
        assert (moved[: t + 1] < 1e-5).all(), f"token {t} is seen at position {int((moved > 1e-5).nonzero()[0])}"
        next_chunk = (t // model.cfg.k + 1) * model.cfg.k
        if not change.get("latents") and next_chunk < 24:  # and everything after its chunk does see it
            assert (moved[next_chunk:] > 0).all()
        within = change.get("local_decoder") != "restart" or (t + 1) % model.cfg.k
        if model.local is not None and t < 23 and within:  # the next token always does
            assert moved[t + 1] > 1e-5
        if model.local is not None and model.local.memory is not None:
            assert (moved[next_chunk + model.local.memory.lag * model.cfg.k :] > 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_token_model_is_causal_too(attention: str) -> None:
    model = make_token_model()
    model.lm.set_attn_implementation(attention)
    tokens = torch.randint(320, (1, 12))
    states = model.hidden(tokens)
    for t in range(12):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 7) % 320
        moved = (model.hidden(other) - states).abs().amax(-1)[0]
        assert (moved[: t + 1] < 1e-4).all() and (moved[t + 1 :] > 0).all()


SUMMED = [0, 1, 2, 5, 7]  # of K 2, but for the memory's, which at K 1 has entries to show to five tokens


@pytest.mark.parametrize("change", [VARIANTS[i] for i in SUMMED], ids=[KINDS[i] for i in SUMMED])
def test_probabilities_of_all_continuations_sum_to_one(change: dict[str, Any]) -> None:
    """V = 3: all 3^5 texts of five tokens after one token of context, across three chunks of K = 2."""
    model = make_student(**{"vocab_size": 3, "k": 2, "pad_id": 0, **change})
    texts = torch.tensor([[1, *rest] for rest in itertools.product(range(3), repeat=5)])
    probabilities = (-model.nll(texts, first=1).double().sum(1)).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert probabilities.std() > 1e-4  # and they are not all alike


def test_a_restarting_decoder_sees_nothing_of_earlier_chunks_but_their_latents() -> None:
    model = make_student(local_decoder="restart")
    tokens = torch.randint(2, 320, (1, 12))
    other = tokens.clone()
    other[0, :4] = 7
    g = model.predict(tokens)[1]
    one, two = (model.token_states(x, g) for x in (tokens, other))
    assert torch.equal(one[:, 4:], two[:, 4:]) and not torch.equal(one[:, 1:4], two[:, 1:4])


@pytest.mark.parametrize("more", [False, True])
def test_it_starts_as_the_autoencoders_own_decoder(more: bool) -> None:
    model = Student(student_config(local_memory=more, latent_bypass=more)).eval()
    tokens = torch.randint(320, (2, 16))
    z_hat, g = model.predict(tokens)
    assert torch.equal(g, model.ae.decode(z_hat).flatten(1, 2)) and torch.equal(model.token_states(tokens, g), g)


def test_it_owns_one_table_of_the_vocabularys_size() -> None:
    model = make_student(vocab_size=997)
    assert [name for name, p in model.named_parameters() if 997 in p.shape] == ["ae.embedding.weight"]


def test_latents_of_another_text() -> None:
    model = make_student()
    tokens, others = torch.randint(2, 320, (2, 2, 16))
    assert torch.equal(model.nll(tokens, latents_of=tokens), model.nll(tokens))
    assert not torch.allclose(model.nll(tokens, latents_of=others)[:, 4:], model.nll(tokens)[:, 4:])
    off = make_student(latents="none")
    assert torch.equal(off.nll(tokens, latents_of=others), off.nll(tokens))


def test_losses_against_slow_ones() -> None:
    model = make_student()
    frozen = make_ae(vocab_size=320, latent_dim=8, embed_dim=16)
    tokens, pads = torch.randint(2, 320, (3, 16)), torch.tensor([0, 3, 1])
    total, parts = student_loss(model, frozen, tokens, pads, ce_w=2.0, mse_w=0.5, base_w=0.25)
    z_hat, g = model.predict(tokens)
    states = model.token_states(tokens, g)
    ce, base, mse = [], [], []
    for b in range(3):
        for t in range(int(pads[b]), 16):
            ce.append(F.cross_entropy(states[b, t] @ model.table.T, tokens[b, t]))
            base.append(F.cross_entropy(g[b, t] @ model.table.T, tokens[b, t]))
        for i in range(4):
            if i > 0 or pads[b] == 0:  # a chunk with pads in it has no latent worth matching
                mse.append((z_hat[b, i] - frozen.encode(tokens[b, 4 * i : 4 * i + 4])[0]).square().mean())
    expected = {"ce": ce, "base": base, "mse": mse}
    for name, values in expected.items():
        assert parts[name].item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
    assert total.item() == pytest.approx(
        2 * parts["ce"].item() + 0.5 * parts["mse"].item() + 0.25 * parts["base"].item(), rel=1e-6
    )
    assert set(student_loss(model, None, tokens, pads, ce_w=1.0)[1]) == {"ce"}


def test_a_cross_entropy_of_no_weight_is_reported_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a teacher's divergence; its gradients, alone, are all that is left."""
    model, tokens, pads = make_student(), torch.randint(2, 320, (3, 16)), torch.tensor([0, 3, 1])
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(ce_w: float) -> tuple[Any, torch.Tensor]:
        kd = lambda states: (states @ model.table.T).square().mean()
        total, parts = student_loss(model, None, tokens, pads, ce_w=ce_w, kd_w=0.5, kd=kd)
        return torch.autograd.grad(total, parameters, allow_unused=True), parts["ce"]

    assert student_loss(model, None, tokens, pads, ce_w=0.0)[0].requires_grad  # alone, it still reaches every parameter
    (tiny, ce), _ = gradients(1e-30), monkeypatch.setattr(_WeightedNLL, "forward", lambda *_: pytest.fail("gradients made"))
    none, told = gradients(0.0)
    assert torch.allclose(told, ce) and not told.requires_grad
    for one, two in zip(none, tiny, strict=True):
        assert (one is None) == (two is None) and (one is None or torch.allclose(one, two))


def test_pad_left() -> None:
    tokens = torch.arange(100, 164).view(4, 16)
    out, pads = pad_left(tokens, 4, 1, 1.0, seed=0, step=5)
    assert ((pads >= 1) & (pads <= 3)).all()
    for row, p, before in zip(out.tolist(), pads.tolist(), tokens.tolist(), strict=True):
        assert row == [1] * p + before[: 16 - p]
    assert torch.equal(pad_left(tokens, 4, 1, 0.0, 0, 5)[0], tokens)
    assert torch.equal(pad_left(tokens, 1, 1, 1.0, 0, 5)[0], tokens)  # K = 1 needs no pads
    shares = [(pad_left(tokens, 4, 1, 0.25, 0, step)[1] > 0).float().mean().item() for step in range(500)]
    assert sum(shares) / 500 == pytest.approx(0.25, abs=0.04)  # 2,000 draws: 4 standard deviations


def test_energy_loss_against_loops() -> None:
    samples, targets = torch.randn(4, 3, 5), torch.randn(7, 3, 5)
    loss = energy_loss(samples, targets)
    for row in range(3):
        fit = sum(math.dist(z[row].tolist(), y[row].tolist()) for z in samples for y in targets) / 28
        pairs = [
            math.dist(a[row].tolist(), b[row].tolist()) for i, a in enumerate(samples) for j, b in enumerate(samples) if i != j
        ]
        assert loss[row].item() == pytest.approx(2 * fit - sum(pairs) / len(pairs), rel=1e-5)


def test_a_sharpened_draw_counts_the_sets_that_agree() -> None:
    """Chunk a came 4 times, b 3 times, c once: of 8 draws 6 pairs are of a and 3 of b; 4 triples of a and 1 of b; none of 5."""
    a, b, c = [1, 2], [1, 3], [7, 7]
    chunks = torch.tensor([a, b, a, c, b, a, b, a])

    def share(n: int) -> dict[str, int]:
        taken = [chunks[sharpened(chunks, n, (i + 0.5) / 360)].tolist() for i in range(360)]
        return {name: taken.count(chunk) for name, chunk in (("a", a), ("b", b), ("c", c))}

    assert share(1) == {"a": 180, "b": 135, "c": 45}
    assert share(2) == {"a": 240, "b": 120, "c": 0}
    assert share(3) == {"a": 288, "b": 72, "c": 0}
    assert share(4) == share(5) == {"a": 360, "b": 0, "c": 0}


def test_sharpened_draws_follow_the_power_of_the_distribution() -> None:
    """p^2 normalised, for p = (0.5, 0.3, 0.2): 1,000 times from 200 draws, 4 standard deviations."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
    taken = torch.zeros(3)
    for _ in range(1000):
        draws = torch.multinomial(p, 200, replacement=True)[:, None].expand(-1, 4)
        taken[draws[sharpened(draws, 2, torch.rand(()).item()), 0]] += 1
    expected = p.square() / p.square().sum()
    assert ((taken / 1000 - expected).abs() < 4 * (expected * (1 - expected) / 1000).sqrt()).all()


def test_energy_score_is_proper() -> None:
    """In expectation it is smallest for samples of the target's own distribution (alpha = 1, Szekely 2003)."""
    scores = []
    for mean, std in ((0.0, 1.0), (0.0, 0.5), (0.0, 2.0), (0.7, 1.0)):
        torch.manual_seed(0)
        scores.append(energy_loss(mean + std * torch.randn(64, 200, 2), torch.randn(64, 200, 2)).mean().item())
    assert min(scores) == scores[0]


def test_the_energy_head_learns_and_leaves_the_decoder_alone() -> None:
    model = Student(student_config(head="energy"))
    assert isinstance(model.exit, EnergyHead)
    frozen = make_ae(vocab_size=320, latent_dim=8, embed_dim=16)
    before = {name: p.clone() for name, p in model.ae.state_dict().items() if not name.startswith("encoder")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    tokens = torch.randint(320, (4, 32))
    history = []
    for _ in range(40):
        loss, _ = student_energy_loss(model, frozen, tokens, torch.zeros(4, dtype=torch.long))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.9 * sum(history[:5])  # the posterior's own spread (std 1 in a fresh autoencoder) stays
    assert all(torch.equal(value, model.ae.state_dict()[name]) for name, value in before.items())
    with pytest.raises(UserError, match="no likelihood"):
        model.nll(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_dim": 18, "num_heads": 4, "num_kv_heads": 4}, "multiple of 2 \\* num_heads"),
        ({"num_heads": 2, "num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"num_layers": 0}, "num_layers: expected at least 1"),
        ({"latents": "none", "local_decoder": "none"}, "nothing to predict from"),
        ({"latents": "none", "head": "energy"}, "needs the latents"),
        ({"local_memory": True, "local_decoder": "none"}, "none has no memory; add --no-local_memory"),
        ({"local_memory": True, "local_decoder": "restart"}, "restart has no memory; add --no-local_memory"),
        ({"local_memory": True, "head": "energy"}, "add --no-local_memory --no-latent_bypass"),
        ({"latent_bypass": True, "head": "energy"}, "add --no-local_memory --no-latent_bypass"),
        ({"embed_dim": 15}, "embed_dim: expected a multiple of 2 "),
        ({"embed_dim": 150}, "embed_dim: expected a multiple of 4 \\(the local decoder's 2 heads"),
        (
            {"embed_dim": 400, "local_decoder": "restart"},
            "embed_dim: expected a multiple of 12 .*, got 400; train an autoencoder",
        ),
    ],
)
def test_impossible_shapes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        student_config(**change)


@pytest.mark.parametrize("embed_dim", [2, 62, 126, 132, 192, 204, 448])
def test_the_local_decoder_takes_every_width_that_its_heads_divide(embed_dim: int) -> None:
    tokens = torch.randint(2, 320, (1, 8))
    assert make_student(embed_dim=embed_dim, local_memory=True, vocab_size=320).nll(tokens).isfinite().all()
    for change in ({"local_decoder": "none"}, {"head": "energy"}):  # no local decoder, no heads
        student_config(embed_dim=400, **change)


def test_a_checkpoint_from_before_memory_and_bypass_has_none() -> None:
    values = asdict(student_config())
    del values["local_memory"], values["latent_bypass"]
    model = Student(config_from(StudentConfig, values, "student.pt"))
    assert model.local is not None and model.local.memory is None
    assert not [name for name in model.state_dict() if "memory" in name or "bypass" in name]


def test_the_bypass_tells_each_position_of_a_chunk_something_else() -> None:
    model = make_student(latent_bypass=True)
    h = torch.randn(3, 5, 16)
    z_hat, g = model.unfold(h)
    assert model.bypass is not None
    more = g - model.ae.decode(z_hat)  # (3, 5, K, E)
    expected = torch.stack([h @ model.bypass.weight[j * 16 : (j + 1) * 16].T for j in range(4)], dim=2)
    assert torch.allclose(more, expected, atol=1e-5) and more.std() > 0.1


def test_an_untrained_student_predicts_the_origin() -> None:
    model = Student(student_config())
    assert not model.predict(torch.randint(320, (2, 16)))[0].any()


def test_a_checkpoint_means_what_it_meant() -> None:
    """Else a change that all paths share would make nonsense of every checkpoint, and no other test would see it."""
    model = make_student(local_memory=True, latent_bypass=True, local_qk_norm=True, local_tokens=2)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(
                torch.sin(torch.arange(p.numel()) * 0.7 + i).view(p.shape) * (1.0 if p.ndim == 1 else 2 * p.shape[-1] ** -0.5)
            )
        found = model.nll(torch.arange(2, 66).view(1, 64) * 37 % 300, 60)[0]
    assert found.tolist() == pytest.approx([6.58031, 6.44720, 6.79481, 7.68772], abs=2e-4)


def test_what_the_student_trains_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = load_ae(world.ae)[0].state_dict()

    def watched(model: Any, ae: Any, tokens: Any, pads: Any, **weights: Any) -> Any:
        assert all(torch.equal(value, frozen[key]) for key, value in model.ae.state_dict().items())
        assert (pads > 0).all() and (weights["ce_w"], weights["mse_w"], weights["base_w"]) == (0.5, 0.25, 0.125)
        seen.append(1)
        return student_loss(model, ae, tokens, pads, **weights)

    seen: list[int] = []
    monkeypatch.setattr(train_student, "student_loss", watched)
    flags = [*world.train_flags(tmp_path), *SMALL_LM, "--ae_ckpt", world.ae, "--max_steps", 1, "--pad_share", 1, "--no-compile"]
    assert run_script(train_student, *flags, "--ce_w", 0.5, "--mse_w", 0.25, "--base_w", 0.125) == 0 and seen
