"""What the autoencoder and the local decoder share: the residual block, and the heads that a width is cut into."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64


def heads_of(dim: int) -> int:
    """Heads of the local decoder's attention, about HEAD_DIM wide each. Rotary embedding needs a `dim` that is a multiple of
    twice as many.
    """
    return max(1, dim // HEAD_DIM)


class SwiGLU(nn.Module):
    """x + W_down(silu(W_gate n) * W_up n), n = RMSNorm(x): the feed-forward block of Llama and Qwen."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)
