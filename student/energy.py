"""CALM's generative head (arXiv 2510.27688, section 3.2): the control that our likelihood-based head is compared with.

h and uniform noise -> one sample of the next latent, trained by the energy score, a strictly proper scoring rule that
needs samples only. There is no likelihood.

Legend: `N` samples of the model, `M` samples of the target, `D` latent width, `H` hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError

MODEL_SAMPLES, TARGET_SAMPLES = 8, 100  # N and M of the paper
NOISE_DIM = 64
CANDIDATES = 200  # chunks drawn to sharpen one from, as CALM's generation does


class _Block(nn.Module):
    """x + MLP(x, h): a residual block that sees the hidden state again."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.mix = nn.Linear(2 * dim, 2 * dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        gate, up = self.mix(torch.cat([self.norm(x), h], dim=-1)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class EnergyHead(nn.Module):
    """Hidden states (..., H) -> samples of the next latent (..., D)."""

    def __init__(self, hidden_dim: int, latent_dim: int, blocks: int = 3) -> None:
        super().__init__()
        self.noise = nn.Linear(NOISE_DIM, hidden_dim)
        self.norm_h = nn.RMSNorm(hidden_dim, eps=1e-6)
        self.blocks = nn.ModuleList(_Block(hidden_dim) for _ in range(blocks))
        self.norm = nn.RMSNorm(hidden_dim, eps=1e-6)
        self.exit = nn.Linear(hidden_dim, latent_dim)

    def forward(self, h: Tensor, uniform: Tensor | None = None) -> Tensor:
        """One sample for each hidden state (repeat h for more); uniform (..., 64) in [0, 1) replaces the drawn noise."""
        if uniform is None:
            uniform = torch.rand(*h.shape[:-1], NOISE_DIM, device=h.device, dtype=h.dtype)
        x, h = self.noise(uniform - 0.5), self.norm_h(h)
        for block in self.blocks:
            x = block(x, h)
        return self.exit(self.norm(x))


def energy_loss(samples: Tensor, targets: Tensor) -> Tensor:
    """Energy score to minimise (arXiv 2510.27688, eq. 12, alpha = 1): 2 E|z - y| - E|z - z'|, per position.

    samples (N, ..., D) of the model, targets (M, ..., D) of the posterior -> (...). Pairs z, z' are distinct.
    """
    n = samples.shape[0]
    fit = torch.stack([(targets - z).norm(dim=-1).mean(0) for z in samples]).mean(0)
    pairs = [(samples[i] - samples[j]).norm(dim=-1) for i in range(n) for j in range(i)]
    return 2 * fit - torch.stack(pairs).mean(0)


def copies_for(temperature: float) -> int:
    """n = 1 / temperature. Raises UserError where that is no whole number: there is no likelihood to divide."""
    n = round(1 / temperature) if temperature * (CANDIDATES + 1) > 1 else 0
    if not 1 <= n <= CANDIDATES or abs(1 / temperature - n) > 0.02 * n:
        raise UserError(
            f"the energy head has no likelihood to sharpen: expected temperature 1, 0.5, 0.33 or another 1/n, got {temperature}"
        )
    return n


def sharpened(chunks: Tensor, n: int, uniform: float) -> int:
    """Which of the sampled chunks (N, K) to take so that a chunk of probability p comes with about p^n (CALM, algorithm 2).

    Of N draws, a chunk that came c times makes C(c, n) of the sets of n draws that agree. Where no n agree, it is asked for
    n - 1, and so on; with N without bound this becomes exact. uniform: in [0, 1), the random number that chooses.
    """
    distinct, counts = torch.unique(chunks, dim=0, return_counts=True)
    for needed in range(n, 0, -1):
        weight = torch.tensor([float(math.comb(int(count), needed)) for count in counts], dtype=torch.double)
        if (total := weight.sum()) > 0:
            chosen = distinct[int((weight.cumsum(0) <= uniform * total).sum())]
            return int((chunks == chosen).all(-1).int().argmax())
    raise AssertionError("one draw agrees with itself")
