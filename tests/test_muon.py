"""Muon's three iterations against the singular value decomposition, and its steps against torch's own."""

from __future__ import annotations

import pytest
import torch

from configs import muon
from configs.loop import optimizers
from configs.muon import Muon, orthogonalised
from configs.run import has_fast_bf16
from configs.schema import LMTrainConfig

SPECTRA = {  # what a step's singular values may look like
    "flat": torch.ones(48),
    "random": torch.linalg.svdvals(torch.randn(48, 64, generator=torch.Generator().manual_seed(0))),
    "falling": torch.logspace(0, -1.5, 48),
    "one": torch.eye(48)[0],
    "one of 100": torch.eye(48)[0] + 0.01,
}


def of_spectrum(s: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix (S, columns) of these singular values, and its singular vectors; float64."""
    u, v = (torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64))[0] for n in (len(s), columns))
    return u * s @ v.T, u, v


def test_the_polynomials() -> None:
    """What lies in 0.01 .. 1, or is a little larger by rounding, ends within 0.3 of 1; what is less grows 75 times."""
    s = torch.cat([torch.linspace(0.01, muon.MARGIN, 100_001, dtype=torch.float64), torch.tensor([1e-6])])
    for a, b, c in muon.QUINTICS:
        s = a * s + b * s**3 + c * s**5
    assert s[:-1].min() > 0.7 and s[:-1].max() < 1.3
    assert s[-1] == pytest.approx(75e-6, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_become_alike(name: str, scale: float, dtype: torch.dtype) -> None:
    """From a fiftieth of the largest one on they end within 0.3 of 1, whatever the matrix's size; bfloat16 adds noise."""
    noise = 0.0 if dtype == torch.float32 else 0.1
    for columns in (48, 200):
        x, u, v = of_spectrum(SPECTRA[name].double(), columns)
        for matrix, left, right in ((x, u, v), (x.T, v, u)):
            done = orthogonalised((matrix * scale).to(dtype), 1e-7).double()
            along = (left * (done @ right)).sum(0)  # what has become of each singular value
            large = SPECTRA[name] >= 0.02 * SPECTRA[name].max()
            assert torch.linalg.svdvals(done).max() < 1.3 + noise and along[large].min() > 0.7 - noise
            if dtype == torch.float32:
                assert (done - left * along @ right.T).norm() < 1e-3  # and of nothing else


@pytest.mark.parametrize("shape", [(6, 6), (6, 17), (17, 6), (1, 5)])
def test_the_iterations_act_on_singular_values_alone(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (muon.MARGIN * (s**8).sum() ** (1 / 8))
    for a, b, c in muon.QUINTICS:
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonalised(x, 1e-7).double(), u * s @ v, atol=1e-4)


def test_nothing_comes_of_nothing() -> None:
    for shape in ((6, 6), (17, 6), (1, 5)):
        assert not orthogonalised(torch.zeros(shape), 1e-7).any()


def test_steps_are_scaled_decayed_and_averaged_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same orthogonal factor for both, the same weights and state: a run may go on with either."""

    def polar(x: torch.Tensor, *_: object) -> torch.Tensor:
        u, _, v = torch.linalg.svd(x.float(), full_matrices=False)
        return u @ v

    monkeypatch.setattr(muon, "orthogonalised", polar)
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", polar)
    monkeypatch.setattr(muon, "has_fast_bf16", lambda device: False)
    start = torch.randn(24, 40)
    one, other, idle = (torch.nn.Parameter(start.clone()) for _ in range(3))
    options = {"lr": 0.02, "weight_decay": 0.1}
    ours, theirs = Muon([one, idle], **options), torch.optim.Muon([other], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(4):
        one.grad = torch.randn(24, 40)
        other.grad = one.grad.clone()
        ours.step()
        theirs.step()
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.equal(idle, start)  # it had no gradient
    assert ours.step(lambda: 3.0) == 3.0 and ours.step() is None
    elsewhere = torch.optim.Muon([other, idle], adjust_lr_fn="match_rms_adamw", **options)
    elsewhere.load_state_dict(ours.state_dict())
    assert torch.equal(elsewhere.state[other]["momentum_buffer"], ours.state[one]["momentum_buffer"])


@pytest.mark.parametrize("fast", [True, False])
def test_the_processor_decides_what_products_are_of(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    seen = []
    monkeypatch.setattr(muon, "has_fast_bf16", lambda device: fast)
    monkeypatch.setattr(muon, "orthogonalised", lambda x, eps: seen.append(x.dtype) or x)
    layer = torch.nn.Linear(3, 4)
    first, second = optimizers(layer, LMTrainConfig(optimizer="muon"))
    assert (type(first), type(second)) == (Muon, torch.optim.AdamW)
    layer(torch.randn(2, 3)).sum().backward()
    first.step()
    assert seen == [torch.bfloat16 if fast else torch.float32]


def test_a_gpu_that_emulates_bfloat16_is_not_fast_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)  # a T4
    assert not has_fast_bf16(torch.device("cuda"))
