"""BrierLM against exact enumeration of all n-grams, for the token-level model and for the student across chunk borders."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import make_student, make_token_model

from student.baseline import TokenModel
from student.brier import brier_by_samples, brier_lm, collisions, ngram_probabilities
from student.student_model import Student

V = 4
PREFIX = [1, 3, 2, 2, 0, 1, 3, 1, 2, 0, 3, 3]


def enumerated(model: TokenModel | Student, start: int) -> torch.Tensor:
    """sum_x p(x)^2 over all V^n n-grams after PREFIX[:start], n = 1..4, by one likelihood each: (4,)."""
    sums = []
    for n in range(1, 5):
        texts = torch.tensor([PREFIX[:start] + list(x) + PREFIX[start + n :] for x in itertools.product(range(V), repeat=n)])
        nll = model.nll(texts, 1)[:, start - 1 : start - 1 + n].double().sum(1)
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-4)
        sums.append((-2 * nll).exp().sum())
    return torch.stack(sums)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("token", {}),
    ("student", {"k": 2}),
    ("student", {"k": 4}),
    ("student", {"k": 1}),
    ("student", {"k": 2, "local_decoder": "none"}),
    ("student", {"k": 2, "latents": "none"}),
    ("student", {"k": 4, "local_decoder": "restart"}),
    ("student", {"k": 4, "local_memory": True}),
    ("student", {"k": 4, "latent_bypass": True}),
    ("student", {"k": 4, "local_tokens": 3, "local_memory": True}),
    ("student", {"k": 4, "local_tokens": 3, "local_decoder": "restart"}),
    ("student", {"k": 2, "local_memory": True}),
    ("student", {"k": 1, "local_memory": True, "local_window": 2}),
    ("student", {"k": 4, "local_memory": True, "latents": "none"}),
    ("student", {"k": 2, "local_memory": True, "latents": "none", "local_layers": 1}),
    ("student", {"k": 1, "local_memory": True, "latents": "none", "local_qk_norm": True}),
]


@pytest.mark.parametrize(("kind", "change"), CASES, ids=lambda value: str(value))
@torch.inference_mode()
def test_collisions_against_enumeration(kind: str, change: dict[str, Any]) -> None:
    """The estimate is unbiased: its mean over many draws is the enumerated sum, at every place in a chunk."""
    if kind == "token":
        model: TokenModel | Student = make_token_model(vocab_size=V, k=2)
    else:
        model = make_student(vocab_size=V, pad_id=0, **change)
    starts = torch.tensor([4, 5, 6, 7, 8])
    draws = 1500
    estimate = collisions(model, torch.tensor([PREFIX]).repeat(draws, 1), starts).double()  # (4, draws, 5)
    mean, error = estimate.mean(1), estimate.std(1) / draws**0.5
    exact = torch.stack([enumerated(model, int(start)) for start in starts], dim=1)  # (4, 5)
    assert torch.allclose(mean[0], exact[0], atol=1e-5)  # n = 1 needs no sampling
    assert ((mean - exact).abs() < 4.5 * error + 1e-5).all(), f"{mean}\n{exact}\n{error}"
    assert (estimate[3].std(0) > 0).all()


def test_ngram_probabilities() -> None:
    nll = torch.rand(2, 9)
    p = ngram_probabilities(nll)
    assert p.shape == (4, 2, 6)
    for n, b, t in itertools.product(range(4), range(2), range(6)):
        assert p[n, b, t].item() == pytest.approx((-nll[b, t : t + n + 1].sum()).exp().item(), rel=1e-5)


def test_brier_lm() -> None:
    perfect = torch.ones(4)
    assert brier_lm(perfect, perfect) == pytest.approx(100)
    p, c = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.3, 0.2, 0.1, 0.05])
    assert brier_lm(p, c) == pytest.approx(100 * (0.5 * 0.4 * 0.3 * 0.15) ** 0.25)
    assert brier_lm(torch.zeros(4), c) == 0


def test_both_estimators_agree() -> None:
    """CALM's two samples and our closed form, on unigrams repeated: p(x) of a known distribution."""
    probs = torch.tensor([0.5, 0.3, 0.2])
    n = 200_000
    first, second, truth = (torch.multinomial(probs, n * 4, True).view(n, 4) for _ in range(3))
    collision = torch.stack([probs.square().sum() ** i for i in range(1, 5)])
    assert brier_by_samples(first, second, truth) == pytest.approx(brier_lm(collision, collision), rel=0.05)
    assert brier_by_samples(first[:, :2], second[:, :2], truth[:, :2]) is None
