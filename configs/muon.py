"""Muon for processors without bfloat16 products of their own.

torch's Muon orthogonalises its steps in bfloat16. A processor that has to emulate such products is some fifty times slower at
them than at float32 ones (docs/log.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def orthogonalised(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """x (m, n) = U S V^T -> about U V^T, by Newton-Schulz iterations s -> a s + b s^3 + c s^5 of its singular values.

    Source: https://kellerjordan.github.io/posts/muon/. The products are of x's own type.
    """
    a, b, c = coefficients
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=eps)  # no singular value is above 1
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[0] <= x.shape[1] else wide.T


class Float32Muon(torch.optim.Muon):
    """torch's Muon, its options and its state, with products in float32. Steps are scaled to AdamW's (arXiv 2502.16982)."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # the loop passes no closure
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                if not (state := self.state[p]):
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(mean, momentum) if group["nesterov"] else mean
                update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * lr)
