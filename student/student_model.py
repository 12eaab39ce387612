"""The student: latents of the chunks so far -> the predicted latent of the next chunk -> its K tokens.

    tokens (B, T)  |x0 .. x7|x8 .. x15|x16 .. x23|            T = L * K, here K = 8, L = 3; a prompt that is no
    AE encoder        z0       z1        z2                   multiple of K has pads in front: |P P P x0 .. x4|...
    backbone in     start      z0        z1                   one position a chunk, causal
    predicted       z^0        z^1       z^2                  each from the chunks before it
    AE decoder    g0 .. g7  g8 .. g15  g16 .. g23             K hidden vectors at once
    (a bypass       adds to each what the backbone's state says past the latent)
    local decoder   reads g_t and the n tokens before x_t, sees W back, adds u_t
    (its memory     looks up what followed where the text read like this before)
    logits        (g_t + u_t) . embedding

so p(x_t | x_<t) is exact: it depends on all earlier chunks through z^ and on the last tokens through the local decoder,
whose memory, where it has one, sees the tokens of all earlier chunks but the last (for K < 3: the last few), too.

Legend: `B` batch, `L` chunks, `K` tokens a chunk, `T` = L * K, `D` latent width, `E` embedding width, `H` hidden width,
`V` vocabulary, `n` tokens that the local decoder reads at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Model

from ae.ae_model import AEConfig, Autoencoder
from ae.layers import heads_of
from ae.losses import token_nll
from configs.errors import UserError
from configs.run import load_model
from configs.schema import config_from
from student.baseline import BackboneConfig, causal_mask
from student.energy import EnergyHead
from student.local_decoder import LocalDecoder


@dataclass
class StudentConfig(BackboneConfig):
    """The student's shape: the backbone's, the autoencoder's and the local decoder's."""

    latent_dim: int
    embed_dim: int
    ae_layers: int
    local_layers: int
    local_window: int
    pad_id: int
    local_decoder: str = "window"
    head: str = "direct"
    latents: str = "on"
    local_qk_norm: bool = False
    local_memory: bool = False
    latent_bypass: bool = False
    local_tokens: int = 1
    local_ffn_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "energy" and self.latents == "none":
            raise UserError("--head energy needs the latents; leave --latents on")
        if self.latents == "none" and self.local_decoder == "none":
            raise UserError("--latents none with --local_decoder none leaves nothing to predict from; switch one of them on")
        if self.head == "energy" and (self.local_memory or self.latent_bypass):
            raise UserError("with --head energy only a latent reaches the tokens; add --no-local_memory --no-latent_bypass")
        if self.local_memory and self.local_decoder != "window":
            raise UserError(f"--local_decoder {self.local_decoder} has no memory; add --no-local_memory")
        if self.has_local_decoder and self.embed_dim % (even := 2 * heads_of(self.embed_dim)):
            raise UserError(
                f"embed_dim: expected a multiple of {even} (the local decoder's {even // 2} heads of an even width), got "
                f"{self.embed_dim}; train an autoencoder of another --embed_dim, of which any multiple of 64 will do"
            )

    @property
    def has_local_decoder(self) -> bool:
        return self.head == "direct" and self.local_decoder != "none"

    @property
    def window(self) -> int:
        """Tokens that a layer of the local decoder sees: a decoder that restarts sees its own chunk's at most."""
        return min(self.local_window, self.k) if self.local_decoder == "restart" else self.local_window

    @property
    def ae(self) -> AEConfig:
        return AEConfig(self.vocab_size, self.k, self.latent_dim, self.embed_dim, self.ae_layers)


class Student(nn.Module):
    """See the module's docstring. It owns one vocabulary-sized table: the embedding of its copy of the autoencoder."""

    def __init__(self, cfg: StudentConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.ae = Autoencoder(cfg.ae)
        self.local: LocalDecoder | None = None
        self.bypass: nn.Linear | None = None
        if cfg.has_local_decoder:
            memory = cfg.k if cfg.local_memory else 0
            self.local = LocalDecoder(
                cfg.embed_dim, cfg.local_layers, cfg.window, cfg.local_qk_norm, memory, cfg.local_tokens, cfg.local_ffn_dim
            )
        if cfg.latents == "none":
            self.ae.encoder.requires_grad_(False)  # nothing reads it
            return
        self.enter = nn.Linear(cfg.latent_dim, cfg.hidden_dim, bias=False)
        self.enter_norm = nn.RMSNorm(cfg.hidden_dim, eps=1e-6)
        self.start = nn.Parameter(torch.randn(cfg.hidden_dim))  # the backbone's input before the first chunk
        self.backbone = Qwen3Model(cfg.qwen3(1, cfg.seq_len))
        self.backbone.embed_tokens = None  # type: ignore[assignment]  # inputs come as vectors
        if cfg.head == "energy":
            self.exit: nn.Module = EnergyHead(cfg.hidden_dim, cfg.latent_dim)
            for part in (self.ae.decoder, self.ae.embedding):  # samples are decoded by the autoencoder as it was trained
                part.requires_grad_(False)
        else:
            self.exit = nn.Linear(cfg.hidden_dim, cfg.latent_dim)
            # A random prediction decodes to confident nonsense, and a model that learns to ignore it never listens again
            # (docs/log.md): start from the latent at the origin instead.
            nn.init.zeros_(self.exit.weight)
            nn.init.zeros_(self.exit.bias)
            if cfg.latent_bypass:
                self.bypass = nn.Linear(cfg.hidden_dim, cfg.k * cfg.embed_dim, bias=False)
                nn.init.zeros_(self.bypass.weight)

    @property
    def table(self) -> Tensor:
        """(V, E): logits are hidden @ table.T."""
        return self.ae.embedding.weight

    def backbone_input(self, chunks: Tensor) -> Tensor:
        """Chunks of tokens (..., K) -> the backbone's input vectors (..., H)."""
        return self.enter_norm(self.enter(self.ae.encode(chunks)[0]))

    def backbone_states(self, tokens: Tensor) -> Tensor:
        """(B, T) -> h (B, L, H); row i has seen the chunks before i. With the latent path off there is none: (B, L, 0)."""
        if self.cfg.latents == "none":
            return self.table.new_zeros(len(tokens), tokens.shape[1] // self.cfg.k, 0)
        x, k = self.start.expand(len(tokens), 1, -1), self.cfg.k
        if tokens.shape[1] > k:
            known = self.backbone_input(tokens[:, :-k].unflatten(1, (-1, k)))
            x = torch.cat([x.to(known.dtype), known], dim=1)  # (B, L, H)
        mask = causal_mask(self.backbone.config)
        return self.backbone(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state

    def unfold(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone states (..., H) -> the latents they predict, z_hat (..., D), and what the tokens of those chunks start
        from, g (..., K, E). With the latent path off z_hat is zero.
        """
        z_hat = self.table.new_zeros(*h.shape[:-1], self.cfg.latent_dim) if self.cfg.latents == "none" else self.exit(h)
        g = self.ae.decode(z_hat)
        return z_hat, g if self.bypass is None else g + self.bypass(h).unflatten(-1, g.shape[-2:])

    def predict(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) -> z_hat (B, L, D), each from the chunks before it, and g (B, T, E); see `unfold`."""
        z_hat, g = self.unfold(self.backbone_states(tokens))
        return z_hat, g.flatten(1, 2)

    def previous_embeddings(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, n, E), entry i of row t the embedding of token t-1-i; before the first, or the chunk, stand pads."""
        n, pad = self.cfg.local_tokens, self.cfg.pad_id
        previous = nn.functional.pad(tokens[:, :-1], (n, 0), value=pad).unfold(1, n, 1).flip(-1)  # (B, T, n)
        if self.cfg.local_decoder == "restart":
            inside = torch.arange(tokens.shape[1], device=tokens.device) % self.cfg.k  # tokens of the chunk before each
            previous = previous.masked_fill(torch.arange(n, device=tokens.device) >= inside[:, None], pad)
        return self.ae.embed(previous)

    def recent(self, tokens: Tensor) -> Tensor:
        """The last n of tokens (B, T), the very last first, pads where there are fewer: (B, n)."""
        n = self.cfg.local_tokens
        return nn.functional.pad(tokens, (n, 0), value=self.cfg.pad_id)[:, -n:].flip(1)

    def token_states(self, tokens: Tensor, g: Tensor) -> Tensor:
        """Tokens (B, T) and g (B, T, E) -> g + u (B, T, E)."""
        if self.local is None:
            return g
        previous = self.previous_embeddings(tokens)
        if self.cfg.local_decoder == "restart":  # every chunk is a row of its own
            u = self.local(*(x.flatten(0, 1).unflatten(0, (-1, self.cfg.k)) for x in (g, previous)))
            return g + u.view_as(g)
        return g + self.local(g, previous)

    def hidden(self, tokens: Tensor, latents_of: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, E); row t predicts token t from the tokens before it.

        latents_of: other tokens (B, T) to take the latent path's input from (to measure what that path adds).
        """
        if self.cfg.head == "energy":
            raise UserError("the energy head has no likelihood; only its samples can be scored")
        return self.token_states(tokens, self.predict(tokens if latents_of is None else latents_of)[1])

    def nll(self, tokens: Tensor, first: int = 0, latents_of: Tensor | None = None) -> Tensor:
        """-log p(x_t | x_<t) of tokens `first`..T-1, nats, (B, T - first)."""
        h = self.hidden(tokens, latents_of)[:, first:]
        return token_nll(h.flatten(0, 1), self.table, tokens[:, first:].flatten()).view(h.shape[:2])


def load_student(path: str | Path) -> tuple[Student, dict[str, Any]]:
    """A student and its checkpoint's content. Raises UserError as `load_model`."""
    return load_model(path, "student", lambda config: Student(config_from(StudentConfig, config, str(path))))
