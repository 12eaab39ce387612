"""The local decoder against dense attention, its own parallel pass, and its stated reach."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import make_student
from torch import Tensor

from student import local_decoder
from student.local_decoder import LocalCache, LocalDecoder, Memory, fused, lag, windowed_attention, written_out


def decoder(window: int, layers: int = 2, memory: int = 0, dim: int = 16, tokens: int = 1) -> LocalDecoder:
    model = LocalDecoder(dim, layers, window, memory=memory, tokens=tokens)
    torch.nn.init.normal_(model.exit.weight, std=0.5)
    if model.memory is not None:
        torch.nn.init.normal_(model.memory.out.weight, std=0.5)
    return model.eval()


def inputs(rows: int, length: int, dim: int = 16, tokens: int = 1) -> tuple[Tensor, Tensor]:
    """g (B, T, E) and the embeddings of the n tokens before, (B, T, n, E), each independent of all others."""
    return torch.randn(rows, length, dim), torch.randn(rows, length, tokens, dim)


def written(model: LocalDecoder, g: Tensor, previous: Tensor, cache: LocalCache, start: int) -> Tensor:
    """What steps from `start` to the end of g, previous give, (B, T - start, E)."""
    return torch.stack([model.step(g[:, t], previous[:, t], cache) for t in range(start, g.shape[1])], dim=1)


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

    def seen_by(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
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
    g, previous = inputs(3, 20)
    whole = model(g, previous)
    cache = model.prefill(g[:, :known], previous[:, :known], torch.zeros(3, dtype=torch.long))
    for t in range(known, 20):
        assert torch.allclose(model.step(g[:, t], previous[:, t], cache), whole[:, t], atol=1e-5)


def test_prefill_needs_no_more_than_layers_times_window_tokens() -> None:
    model = decoder(5)
    g, previous = inputs(1, 30)
    zero = torch.zeros(1, dtype=torch.long)
    whole, tail = model.prefill(g, previous, zero), model.prefill(g[:, -10:], previous[:, -10:], zero)
    one, two = (model.step(g[:, 0], previous[:, 0], cache) for cache in (whole, tail))
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(("window", "layers", "tokens"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (4, 3, 1), (1, 1, 3), (3, 2, 4)])
def test_reach(window: int, layers: int, tokens: int) -> None:
    """The last position sees the `reach` tokens before its own, and not one more."""
    model = decoder(window, layers, tokens=tokens)
    g, known = torch.randn(1, 20, 16), torch.randn(1, 19 + tokens, 16)  # token i of `known` stands before position i - n + 1

    def last(known: Tensor) -> Tensor:
        return model(g, known.unfold(1, tokens, 1).transpose(2, 3).flip(2))[0, -1]

    changes = []
    for t in range(known.shape[1]):
        other = known.clone()
        other[0, t] += 1
        changes.append((last(other) - last(known)).abs().max().item() > 1e-6)
    assert changes == [t >= known.shape[1] - model.reach for t in range(known.shape[1])]


def test_it_starts_as_nothing() -> None:
    model = LocalDecoder(16, 2, 4)
    assert (model(*inputs(1, 8)) == 0).all()
    with_memory = LocalDecoder(16, 2, 4, memory=2)
    assert (with_memory(*inputs(1, 8)) == 0).all()
    assert with_memory.memory is not None and not with_memory.memory.out.weight.any()


def test_its_feed_forward_blocks_are_as_wide_as_told() -> None:
    def widths(decoder: LocalDecoder) -> set[int]:
        return {layer.mlp.down.in_features for layer in decoder.layers}

    assert widths(LocalDecoder(16, 2, 4)) == {32} and widths(LocalDecoder(16, 2, 4, ffn_dim=24)) == {24}
    student = make_student(local_ffn_dim=24)
    assert student.local is not None and widths(student.local) == {24}


KS = [1, 2, 4, 8]


def test_the_memory_finds_what_followed_the_same_state() -> None:
    """Of 24 unlike states the one that is met again finds the token that stood behind it, and nobody else's.

    A query is its state, made long so that the best key takes all; a key is its state, a value its token.
    """
    memory = Memory(32, 4)
    states, tokens = torch.randn(2, 1, 24, 32)
    with torch.no_grad():
        memory.query.weight.copy_(torch.eye(32))
        memory.norm_q.weight.fill_(8.0)
        memory.key.weight.copy_(torch.eye(32, 64))
        memory.value.weight.copy_(torch.eye(32, 64).roll(32, 1))
        memory.out.weight.copy_(torch.eye(32))
        met, entries = states[:, 5:9], memory.with_none(*memory.entries(states, tokens))
        all_but = torch.ones(1, 4, 25, dtype=torch.bool)
        found = memory(met, *entries, all_but) - met
        all_but[..., 6:10] = False
        others = memory(met, *entries, all_but) - met
    assert torch.allclose(found, memory.norm_token(tokens[:, 5:9]), atol=1e-2)
    assert ((others - found).abs().amax(-1) > 0.5).all()


@pytest.mark.parametrize("k", KS)
def test_a_token_sees_all_chunks_but_the_last(k: int) -> None:
    """Far beyond its window; of the chunks before its own those that three tokens reach back into are left out."""
    model = decoder(1, 1, memory=k)  # with a window of 1, only the memory sees any other token
    length = (lag(k) + 3) * k
    g, previous = inputs(1, length)
    for token in range(length - 1):
        other = previous.clone()
        other[0, token + 1] += 1
        moved = (model(g, other) - model(g, previous))[0].abs().amax(-1) > 1e-6
        moved[token + 1] = False  # this one reads it itself
        assert moved.tolist() == [t >= (token // k + lag(k) + 1) * k for t in range(length)], token


def test_without_a_memory_nothing_lies_beyond_the_reach() -> None:
    g, previous = inputs(1, 40)
    other = previous.clone()
    other[0, :8] += 1
    for memory in (0, 4):
        model = decoder(3, 2, memory)
        assert bool((model(g, other) - model(g, previous))[0, 8 + model.reach :].any()) is bool(memory)


def test_entries_have_no_order() -> None:
    memory = decoder(5, memory=4).memory
    assert memory is not None
    x, states, tokens = torch.randn(2, 6, 16), *torch.randn(2, 2, 20, 16)
    seen, order = torch.rand(2, 6, 21) > 0.3, torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(20)])
    seen[..., 0] = True
    k, v = memory.with_none(*memory.entries(states, tokens))
    shuffled = memory(x, k[:, :, order], v[:, :, order], seen[:, :, order])
    assert torch.allclose(memory(x, k, v, seen), shuffled, atol=1e-6)
    assert not torch.allclose(memory(x, k, v, seen), memory(x, k, v[:, :, order], seen), atol=1e-3)
    seen[..., 1:] = False  # `none` is left, whatever the entries are
    assert torch.equal(memory(x, k, v, seen), memory(x, k[:, :, :1], v[:, :, :1], seen[:, :, :1]))


@pytest.mark.parametrize("k", KS)
def test_both_ways_to_look_up_agree(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two heads, forward and backward, where rows begin later, too."""
    model = decoder(5, memory=k, dim=128)
    assert model.memory is not None
    weights = list(model.memory.parameters())
    g, previous = inputs(3, 6 * k, 128)
    kernel = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    out = []
    for most in (1 << 20, 0):
        monkeypatch.setattr(local_decoder, "WRITTEN_OUT", most)
        for first in (None, torch.tensor([0, k, 4 * k])):
            u = model(g, previous, first)
            loss = u.square().mean() if first is None else u[:, 4 * k :].square().mean()
            out.append((u[:, 4 * k :], torch.autograd.grad(loss, weights)))
    assert kernel.call_count == 2
    for (u, grads), (other, others) in ((out[0], out[2]), (out[1], out[3])):
        assert torch.allclose(u, other, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) and b.any() for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("k", KS)
@torch.no_grad()
def test_steps_with_a_memory_equal_the_parallel_pass(k: int) -> None:
    model = decoder(5, layers=3, memory=k)
    g, previous = inputs(3, 7 * k)
    whole = model(g, previous)
    for known in (k, 2 * k, 5 * k):
        cache = model.prefill(g[:, :known], previous[:, :known], torch.zeros(3, dtype=torch.long))
        assert torch.allclose(written(model, g, previous, cache, known), whole[:, known:], atol=1e-5)


@pytest.mark.parametrize("k", KS)
@torch.no_grad()
def test_rows_of_a_batch_are_as_alone(k: int) -> None:
    """Rows that begin later, in the parallel pass and in steps; some of them selected, and in another order."""
    model = decoder(5, memory=k)
    g, previous = inputs(3, 9 * k)
    first = torch.tensor([0, k, 3 * k])
    known, middle = 4 * k, 7 * k
    whole, cache = model(g, previous, first), model.prefill(g[:, :known], previous[:, :known], first)
    for t in range(known, middle):
        model.step(g[:, t], previous[:, t], cache)
    kept = torch.tensor([2, 0])
    steps = written(model, g[kept], previous[kept], cache.select(kept), middle)
    for row, begin in enumerate(first.tolist()):
        alone = model(g[row : row + 1, begin:], previous[row : row + 1, begin:])[0]
        assert torch.allclose(whole[row, begin:], alone, atol=1e-5)
        if row in kept:
            assert torch.allclose(steps[kept.tolist().index(row)], alone[middle - begin :], atol=1e-5)


@pytest.mark.parametrize(("memory", "restarts"), [(0, 0), (0, 4), (1, 0), (2, 0), (4, 0), (8, 0)])
@torch.no_grad()
def test_branches_equal_steps_from_each_start(memory: int, restarts: int) -> None:
    """Of two texts, from each of some positions, by four tokens of the branch's own."""
    model, k = decoder(3, memory=memory), memory or 4
    g, previous = inputs(2, 40)
    starts = torch.tensor([1, 2, 5, 8, 9, 15, 16, 31, 36])
    cache = model.branches(g, previous, starts, restarts)
    new_g, new = inputs(2 * len(starts), 4)
    new[:, 0] = previous[:, starts].flatten(0, 1)  # what stands before a branch is the text's own
    at, out = starts.repeat(2), []
    for j in range(4):
        if restarts:
            cache.seen = cache.seen & ((at + j) % k > 0)[:, None]
        if model.memory is not None and cache.memory is not None:
            cache.memory.own = model.memory.visible(40, at.device)[at + j]
        out.append(model.step(new_g[:, j], new[:, j], cache))
    for i, start in enumerate(at.tolist()):
        row_g, row = (x[i // len(starts)].clone() for x in (g, previous))
        row_g[start : start + 4], row[start : start + 4] = new_g[i], new[i]
        whole = model(*(x.unflatten(0, (-1, restarts or 40)) for x in (row_g, row))).view(40, 16)
        assert torch.allclose(torch.stack(out)[:, i], whole[start : start + 4], atol=1e-5), start
