"""Muon in float32 against the singular value decomposition, and against torch's own in bfloat16."""

from __future__ import annotations

import pytest
import torch

from configs import loop
from configs.muon import Float32Muon, orthogonalised
from configs.run import has_fast_bf16
from configs.schema import LMTrainConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(6, 6), (6, 17), (17, 6), (1, 5)])
def test_the_iterations_act_on_singular_values_alone(shape: tuple[int, int]) -> None:
    x, (a, b, c) = torch.randn(shape), COEFFICIENTS
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonalised(x, COEFFICIENTS, 5, 1e-7).double(), u * s @ v, atol=1e-4)
    assert not orthogonalised(torch.zeros(shape), COEFFICIENTS, 5, 1e-7).any()


def test_a_step_is_torchs_but_for_its_bfloat16() -> None:
    """Eight significant bits in 15 products in a row: a relative error of a few percent."""
    start = torch.randn(24, 40)
    one, other, idle = (torch.nn.Parameter(start.clone()) for _ in range(3))
    options = {"lr": 0.02, "weight_decay": 0.1, "ns_steps": 5}
    ours, theirs = Float32Muon([one, idle], **options), torch.optim.Muon([other], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(4):
        one.grad = torch.randn(24, 40)
        other.grad = one.grad.clone()
        before = one.detach().clone()
        ours.step()
        theirs.step()
        assert (one - other).norm() < 0.05 * (one - before).norm()
        with torch.no_grad():
            other.copy_(one)
    assert torch.equal(idle, start)  # it had no gradient
    elsewhere = torch.optim.Muon([other, idle], adjust_lr_fn="match_rms_adamw", **options)
    elsewhere.load_state_dict(ours.state_dict())  # a run goes on on another machine
    assert torch.equal(elsewhere.state[other]["momentum_buffer"], theirs.state[other]["momentum_buffer"])


@pytest.mark.parametrize(("fast", "kind"), [(True, torch.optim.Muon), (False, Float32Muon)])
def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch, fast: bool, kind: type) -> None:
    monkeypatch.setattr(loop, "has_fast_bf16", lambda device: fast)
    made = loop.optimizers(torch.nn.Linear(3, 4), LMTrainConfig(optimizer="muon"))
    assert [type(x) for x in made] == [kind, torch.optim.AdamW]
    assert made[0].defaults["adjust_lr_fn"] == "match_rms_adamw" and made[0].defaults["ns_steps"] == loop.NS_STEPS


def test_a_gpu_that_emulates_bfloat16_is_not_fast_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)  # a T4
    assert not has_fast_bf16(torch.device("cuda"))
