"""Muon in three iterations, where torch's own takes five for much the same steps: they are most of what it costs.

Two things make up for the other two. The iterations start from singular values that reach up to 1, where dividing by the
Frobenius norm leaves those of a random square matrix at an eighth of that and less; and each iteration has its own
polynomial, the best for what the one before it leaves, instead of one for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from configs.run import has_fast_bf16

MARGIN = 1.02  # by which singular values may be larger than they are taken for: rounding, in bfloat16
# a, b, c of s -> a s + b s^3 + c s^5. Of all such polynomials those whose results are closest to 1: the first over 0.01 .. 1,
# each of the others over what the one before it leaves (arXiv 2505.16932); all but the last for s / MARGIN. What starts within
# 0.01 .. 1 ends within 0.7 .. 1.3.
QUINTICS = ((7.9347, -22.2581, 15.8015), (3.5653, -2.5649, 0.4860), (2.6613, -1.9772, 0.4526))


def orthogonalised(x: Tensor, eps: float) -> Tensor:
    """x (m, n) = U S V^T -> about U V^T, by Newton-Schulz iterations. The products are of x's own type.

    Source: https://kellerjordan.github.io/posts/muon/.
    """
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=eps)  # so that no power below overflows
    for i, (a, b, c) in enumerate(QUINTICS):
        gram = wide @ wide.T
        square = gram @ gram
        if i == 0:  # the eighth root of the sum of s^8: no less than the largest s, and hardly more
            top = MARGIN * square.norm().clamp(min=eps) ** 0.25
            wide, gram, square = wide / top, gram / top**2, square / top**4
        wide = torch.addmm(wide, torch.add(b * gram, square, alpha=c), wide, beta=a)
    return wide if x.shape[0] <= x.shape[1] else wide.T


class Muon(torch.optim.Muon):
    """torch's Muon, its options and its state, by `orthogonalised`. Steps are scaled to AdamW's (arXiv 2502.16982).

    Products are in bfloat16, but in float32 on a processor that would have to emulate them, some fifty times slower.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", ns_steps=len(QUINTICS), **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As every optimizer's; saving a sharded one calls it with closure None."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                if not (state := self.state[p]):
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(mean, momentum) if group["nesterov"] else mean
                if has_fast_bf16(p.device):
                    update = update.bfloat16()
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(orthogonalised(update, group["eps"]), alpha=-0.2 * math.sqrt(max(p.shape)) * lr)
        return loss
