"""The local decoder against dense attention, its own parallel pass, and its stated reach."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from student import local_decoder
from student.local_decoder import LocalDecoder, fused, windowed_attention, written_out


def decoder(window: int, layers: int = 2) -> LocalDecoder:
    model = LocalDecoder(16, layers, window)
    torch.nn.init.normal_(model.exit.weight, std=0.5)
    return model.eval()


@pytest.fixture(params=[written_out, fused])
def attend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to attend, whatever device it is meant for."""
    monkeypatch.setattr(local_decoder, "written_out", request.param)


@pytest.mark.parametrize("window", [1, 2, 5, 16])
@pytest.mark.parametrize("length", [1, 5, 16, 23])
def test_windowed_attention_is_dense_attention_with_a_mask(attend: None, window: int, length: int) -> None:
    q, k, v = qkv = torch.randn(3, 2, 3, length, 8, requires_grad=True)
    at = torch.arange(length)
    mask = (at[:, None] >= at) & (at[:, None] - at < window)
    out, dense = windowed_attention(q, k, v, window), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(out, dense, atol=1e-6)
    weights = torch.randn_like(out)
    one, two = (torch.autograd.grad((x * weights).sum(), qkv, retain_graph=True)[0] for x in (out, dense))
    assert torch.allclose(one, two, atol=1e-5)


def test_a_window_beyond_the_text_costs_no_more_than_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def seen_by(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        shapes.append((q.shape, k.shape))
        return written_out(q, k, v, seen)

    monkeypatch.setattr(local_decoder, "written_out", seen_by)
    q, k, v = torch.randn(3, 1, 2, 3, 8)
    assert torch.allclose(windowed_attention(q, k, v, 64), windowed_attention(q, k, v, 3))
    assert shapes == [((1, 2, 1, 3, 8), (1, 2, 1, 6, 8))] * 2


def test_positions_before_a_row_begins_are_hidden(attend: None) -> None:
    q, k, v = qkv = torch.randn(3, 3, 2, 13, 8, requires_grad=True)
    first = torch.tensor([0, 4, 11])
    out = windowed_attention(q, k, v, 5, first)
    for row, begin in enumerate(first.tolist()):
        alone = windowed_attention(q[row : row + 1, :, begin:], k[row : row + 1, :, begin:], v[row : row + 1, :, begin:], 5)
        assert torch.allclose(out[row, :, begin:], alone[0], atol=1e-6)
    (grad,) = torch.autograd.grad(out[1, :, 4:].sum(), qkv)
    assert grad.isfinite().all() and grad[:, 1, :, 4:].abs().sum() > 0 and (grad[:, 1, :, :4] == 0).all()


@pytest.mark.parametrize("known", [1, 3, 5, 12])
def test_steps_equal_the_parallel_pass(known: int) -> None:
    model = decoder(5)
    g, previous = torch.randn(2, 3, 20, 16)
    whole = model(g, previous)
    cache = model.prefill(g[:, :known], previous[:, :known], torch.zeros(3, dtype=torch.long))
    for t in range(known, 20):
        assert torch.allclose(model.step(g[:, t], previous[:, t], cache), whole[:, t], atol=1e-5)


def test_prefill_needs_no_more_than_layers_times_window_tokens() -> None:
    model = decoder(5)
    g, previous = torch.randn(2, 1, 30, 16)
    zero = torch.zeros(1, dtype=torch.long)
    whole, tail = model.prefill(g, previous, zero), model.prefill(g[:, -10:], previous[:, -10:], zero)
    one, two = (model.step(g[:, 0], previous[:, 0], cache) for cache in (whole, tail))
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(("window", "layers"), [(1, 1), (3, 1), (3, 2), (4, 3)])
def test_reach(window: int, layers: int) -> None:
    """The last position sees `reach` inputs, its own included, and not one more."""
    model = decoder(window, layers)
    g, previous = torch.randn(2, 1, 20, 16)
    changes = []
    for t in range(20):
        other = previous.clone()
        other[0, t] += 1
        changes.append((model(g, other) - model(g, previous))[0, -1].abs().max().item() > 1e-6)
    assert changes == [t >= 20 - model.reach for t in range(20)]


def test_it_starts_as_nothing() -> None:
    model = LocalDecoder(16, 2, 4)
    assert (model(*torch.randn(2, 1, 8, 16)) == 0).all()
