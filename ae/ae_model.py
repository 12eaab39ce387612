"""The autoencoder: K tokens -> one latent vector -> K tokens. Context-free and without attention, as in CALM
(arXiv 2510.27688, section 2): it must reconstruct any chunk, whatever stands around it.

Legend: `B` chunks, `K` tokens a chunk, `D` latent width, `E` embedding width, `C` chunk width, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ae.layers import SwiGLU
from configs.errors import UserError
from configs.run import load_model
from configs.schema import config_from


@dataclass
class AEConfig:
    """The shape of an autoencoder, as its checkpoint carries it."""

    vocab_size: int
    k: int
    latent_dim: int
    embed_dim: int
    num_layers: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        if self.num_layers % 4:
            raise UserError(
                f"num_layers: expected a multiple of 4 (token and chunk level, encoder and decoder), got {self.num_layers}"
            )

    @property
    def chunk_dim(self) -> int:
        """C, width of the blocks that see the whole chunk."""
        return max(self.embed_dim, self.latent_dim)


class Encoder(nn.Module):
    """Embeddings of K tokens -> mean and log-scale of the latent's Gaussian posterior."""

    def __init__(self, cfg: AEConfig) -> None:
        super().__init__()
        n = cfg.num_layers // 4
        self.token_blocks = nn.Sequential(*(SwiGLU(cfg.embed_dim, 2 * cfg.embed_dim) for _ in range(n)))
        self.join = nn.Linear(cfg.k * cfg.embed_dim, cfg.chunk_dim)
        self.chunk_blocks = nn.Sequential(*(SwiGLU(cfg.chunk_dim, 2 * cfg.chunk_dim) for _ in range(n)))
        self.norm = nn.RMSNorm(cfg.chunk_dim, eps=1e-6)
        self.head = nn.Linear(cfg.chunk_dim, 2 * cfg.latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (..., K, E) -> 2 x (..., D)
        x = self.join(self.token_blocks(x).flatten(-2))  # (..., C)
        mean, log_std = self.head(self.norm(self.chunk_blocks(x))).chunk(2, dim=-1)
        return mean, log_std


class Decoder(nn.Module):
    """Latent -> one hidden vector a token of the chunk, all K in parallel; mirrors the encoder."""

    def __init__(self, cfg: AEConfig) -> None:
        super().__init__()
        n = cfg.num_layers // 4
        self.shape = (cfg.k, cfg.embed_dim)
        self.enter = nn.Linear(cfg.latent_dim, cfg.chunk_dim)
        self.chunk_blocks = nn.Sequential(*(SwiGLU(cfg.chunk_dim, 2 * cfg.chunk_dim) for _ in range(n)))
        self.split = nn.Linear(cfg.chunk_dim, cfg.k * cfg.embed_dim)
        self.token_blocks = nn.Sequential(*(SwiGLU(cfg.embed_dim, 2 * cfg.embed_dim) for _ in range(n)))
        self.norm = nn.RMSNorm(cfg.embed_dim, eps=1e-6)

    def forward(self, z: Tensor) -> Tensor:  # (..., D) -> g (..., K, E)
        x = self.split(self.chunk_blocks(self.enter(z))).unflatten(-1, self.shape)
        return self.norm(self.token_blocks(x))


class Autoencoder(nn.Module):
    """Encoder, decoder and the one embedding table (V, E) that both use: it embeds tokens and gives their logits."""

    def __init__(self, cfg: AEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.embed_dim)
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        # Rows of unit length: logits of normed hidden vectors start near unit scale, and so do scaled embeddings.
        nn.init.normal_(self.embedding.weight, std=cfg.embed_dim**-0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        """(...,) int64 -> (..., E) of unit variance; std 1/sqrt(E) beside unit-scale layers would not train."""
        return self.embedding(tokens) * self.cfg.embed_dim**0.5

    def encode(self, tokens: Tensor, token_mask: float = 0.0) -> tuple[Tensor, Tensor]:
        """Chunks (..., K) -> mean and log-scale of the latent, each (..., D).

        token_mask: share of the tokens whose embedding is replaced by the zero vector (training noise).
        """
        x = self.embed(tokens)  # (..., K, E)
        if token_mask:
            x = x * (torch.rand(tokens.shape, device=x.device) >= token_mask).unsqueeze(-1)
        return self.encoder(x)

    def posterior(self, tokens: Tensor, token_mask: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of `encode` in float32, the log-scale within -6 .. 2: what is drawn from."""
        mean, log_std = self.encode(tokens, token_mask)
        return mean.float(), log_std.float().clamp(-6, 2)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (..., D) -> hidden vectors g (..., K, E); their logits are `logits(g)`."""
        return self.decoder(z)

    def logits(self, g: Tensor) -> Tensor:
        """(..., E) -> (..., V) through the tied embedding."""
        return g @ self.embedding.weight.T


def load_ae(path: str | Path) -> tuple[Autoencoder, dict[str, Any]]:
    """An autoencoder and its checkpoint's content (config, tokenizer, figures). Raises UserError as `load_model`."""
    return load_model(path, "ae", lambda config: Autoencoder(config_from(AEConfig, config, str(path))))
