"""The bucket KL against the dense KL, its gradients, its edges, and its memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd import losses
from kd.losses import bucket_kl, log1mexp, logits_kl

N, V, E = 6, 11, 5


def dense_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), word by word."""
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def top_of(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = teacher.log_softmax(-1).topk(k)
    return best.indices, best.values


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Teacher and student logits."""
    return 3 * torch.randn(N, V, dtype=dtype), (3 * torch.randn(N, V, dtype=dtype)).requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_equals_the_dense_kl_when_all_words_are_known(temperature: float) -> None:
    teacher, student = pair()
    ours, dense = logits_kl(student, *top_of(teacher, V), temperature), dense_kl(teacher, student, temperature)
    torch.testing.assert_close(ours, dense)
    weights = torch.rand(N, dtype=torch.float64)
    (ours_grad,) = torch.autograd.grad((ours * weights).sum(), student)
    (dense_grad,) = torch.autograd.grad((dense * weights).sum(), student)
    torch.testing.assert_close(ours_grad, dense_grad)


@pytest.mark.parametrize("k", [1, 4])
def test_equals_the_kl_of_the_merged_distributions(k: int) -> None:
    teacher, student = pair()
    ids, logprobs = top_of(teacher, k)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = []
    for row in range(N):
        kept = set(ids[row].tolist())
        masses = [(p[row, i], q[row, i]) for i in kept]
        masses.append(tuple(sum(x[row, i] for i in range(V) if i not in kept) for x in (p, q)))  # type: ignore[arg-type]
        expected.append(sum(a * (a / b).log() for a, b in masses))
    torch.testing.assert_close(logits_kl(student, ids, logprobs), torch.stack(expected))  # type: ignore[arg-type]


def test_more_buckets_come_closer_to_the_dense_kl_from_below() -> None:
    """Merging words loses information: the data-processing inequality."""
    teacher, student = pair()
    by_k = torch.stack([logits_kl(student, *top_of(teacher, k)) for k in range(1, V + 1)])
    assert (by_k.diff(dim=0) > -1e-12).all()


def test_never_negative_and_zero_for_the_teacher_itself() -> None:
    teacher = 4 * torch.randn(500, V)
    ids, logprobs = top_of(teacher, 4)
    for told, rounding in ((logprobs, 1e-5), (logprobs.half(), 5e-4)):  # float16 is good to 2.4e-4 at -0.5 to -1
        own = logits_kl(teacher, ids, told)
        assert (own >= 0).all()
        assert own.max() < rounding
        assert (logits_kl(torch.randn(500, V), ids, told) > 0).all()


def test_missing_entries_count_for_the_rest() -> None:
    teacher, student = pair()
    ids, logprobs = top_of(teacher, 3)
    padded_ids = torch.cat([ids, torch.full((N, 2), -1)], dim=1)
    for junk in (0.0, math.nan):  # what stands beside a missing id does not matter
        padded = torch.cat([logprobs, torch.full((N, 2), junk, dtype=torch.float64)], dim=1)
        torch.testing.assert_close(logits_kl(student, padded_ids, padded), logits_kl(student, ids, logprobs))


def test_a_position_of_which_nothing_is_known_gives_nothing() -> None:
    _, student = pair(torch.float32)
    ids, logprobs = torch.full((N, 4), -1), torch.full((N, 4), torch.nan)
    kl = logits_kl(student, ids, logprobs)
    kl.sum().backward()
    assert (kl == 0).all()
    assert (student.grad == 0).all()


def test_a_teacher_that_is_certain() -> None:
    """No mass in the rest: the cross-entropy of the word, also where float16 puts the words above 1."""
    _, student = pair(torch.float32)
    ids = torch.tensor([[2, -1]]).expand(N, 2)
    for told in (0.0, 1e-3):
        kl = logits_kl(student, ids, torch.full((N, 2), told))
        torch.testing.assert_close(kl, -student.log_softmax(-1)[:, 2])
        assert torch.autograd.grad(kl.sum(), student)[0].isfinite().all()


def test_a_student_that_is_certain_keeps_exact_gradients() -> None:
    """A rest of exp(-60), which 1 - (the others) would round to 0 in float32."""
    student = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    kl = logits_kl(student, torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]))
    kl.sum().backward()
    torch.testing.assert_close(kl.item(), math.log(0.5) + 0.5 * (60 - math.log(2)), rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.25, -0.25]]))


def test_gradcheck() -> None:
    hidden = torch.randn(N, E, dtype=torch.float64, requires_grad=True)
    table = torch.randn(V, E, dtype=torch.float64, requires_grad=True)
    ids, logprobs = top_of(torch.randn(N, V, dtype=torch.float64), 3)
    ids[0, 1:] = -1
    ids[1] = -1
    assert torch.autograd.gradcheck(lambda h, t: bucket_kl(h, t, ids, logprobs, 2.0), (hidden, table))


def test_slices_change_nothing_and_keep_memory_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, table = torch.randn(40, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    ids, logprobs = top_of(torch.randn(40, V), 3)
    whole = bucket_kl(hidden, table, ids, logprobs)
    expected = torch.autograd.grad(whole.sum(), (hidden, table))
    monkeypatch.setattr(losses, "MAX_LOGITS", 7 * V)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        sliced = bucket_kl(hidden, table, ids, logprobs)
        found = torch.autograd.grad(sliced.sum(), (hidden, table))
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(found, expected)
    assert max(sizes) <= 7 * (V + 1)
    with torch.no_grad():
        torch.testing.assert_close(bucket_kl(hidden, table, ids, logprobs), whole)


def test_a_large_vocabulary_under_bf16_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = 151_936
    monkeypatch.setattr(losses, "MAX_LOGITS", 8 * vocab)
    hidden, table = torch.randn(20, 16, requires_grad=True), torch.randn(vocab, 16)
    ids, logprobs = top_of(hidden.detach() @ table.T, 20)
    with torch.autocast("cpu", torch.bfloat16):
        kl = bucket_kl(hidden, table, ids, logprobs)
    kl.sum().backward()
    assert kl.dtype == torch.float32
    assert (kl >= 0).all()
    assert kl.max() < 0.01  # bfloat16 logits of the same product
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_log1mexp() -> None:
    x = torch.tensor([-1e-10, -1e-3, -math.log(2), -1.0, -40.0], dtype=torch.float64)
    expected = torch.tensor(
        [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(log1mexp(x), expected, rtol=1e-12, atol=0)
    assert log1mexp(torch.zeros(1)) == -torch.inf


def test_with_the_drawn_token_the_mean_is_the_dense_kl() -> None:
    """Summed over all tokens that the teacher may draw, values and gradients: KL over buckets, and the draw inside the rest."""
    teacher = torch.randn(3, 12, dtype=torch.float64).mul(2).log_softmax(-1)
    logprobs, ids = teacher.topk(4)
    logits = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    dense = (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1)
    outside = torch.ones(3, 12, dtype=torch.bool).scatter(-1, ids, False)
    within = teacher.masked_fill(~outside, -torch.inf).log_softmax(-1)  # of the words beyond the row
    entropy = -(teacher.exp() * within.masked_fill(~outside, 0.0)).sum(-1)  # the constant
    mean = sum(teacher[:, v].exp() * logits_kl(logits, ids, logprobs, drawn=torch.full((3,), v)) for v in range(12))
    torch.testing.assert_close(mean, dense + entropy)
    (expected,), (found,) = (torch.autograd.grad(x.sum(), logits, retain_graph=True) for x in (dense, mean))
    torch.testing.assert_close(found, expected)


def test_the_drawn_token_counts_only_beside_a_row() -> None:
    logits, ids = torch.randn(2, 9), torch.tensor([[3, 5], [-1, -1]])
    logprobs = torch.tensor([[0.5, 0.2], [1.0, 1.0]]).log()
    plain = logits_kl(logits, ids, logprobs)
    for token in (3, 5):
        torch.testing.assert_close(logits_kl(logits, ids, logprobs, drawn=torch.tensor([token, 4])), plain)
    more = logits_kl(logits, ids, logprobs, drawn=torch.tensor([4, 4])) - plain
    rest = torch.tensor([v for v in range(9) if v not in (3, 5)])
    assert more[0].item() == pytest.approx((logits[0, rest].logsumexp(0) - logits[0, 4]).item(), rel=1e-5)
    assert more[1].item() == 0
