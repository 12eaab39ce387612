"""CALM's generative head (arXiv 2510.27688, section 3.2): the control that our likelihood-based head is compared with.

h and uniform noise -> one sample of the next latent, trained by the energy score, a strictly proper scoring rule that
needs samples only. There is no likelihood.

Legend: `N` samples of the model, `M` samples of the target, `D` latent width, `H` hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_SAMPLES, TARGET_SAMPLES = 8, 100  # N and M of the paper
NOISE_DIM = 64


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
