"""The token-level model of the same backbone, config and data: the baseline of every table, and the demo's teacher.

    python student/baseline.py --config configs/token_model_default.yaml --data data/packed

A stock `Qwen3ForCausalLM` with tied embeddings, trained by the loop that trains the student, on the same windows.
Writes checkpoint_dir/token_model.pt and run_dir/ (config, metrics.jsonl, log).

Legend: `B` batch, `T` tokens of a window, `H` hidden width, `V` vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from ae.chunks import PackedData, TrainWindows, tokenizer_record
from ae.losses import token_nll, weighted_nll
from configs import loop, plan
from configs.errors import UserError, run_cli
from configs.run import load_model
from configs.schema import LMTrainConfig, config_from, parse_config


def causal_mask(config: Qwen3Config) -> Any:
    """The attention_mask for rows without padding.

    PyTorch's own attention ("sdpa") is causal where it is told of no mask; left to itself transformers compiles one in, and
    the kernels that skip what a causal mask hides go unused. Other implementations hide only what their mask says.
    """
    return {"full_attention": None} if config._attn_implementation == "sdpa" else None


@dataclass
class BackboneConfig:
    """The transformer's shape, shared by the token-level model and the student."""

    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    seq_len: int  # latents; the token-level model's context is seq_len * k tokens
    k: int
    vocab_size: int
    head_dim: int | None = field(default=None, kw_only=True)  # None: hidden_dim / num_heads
    rope_theta: float = field(default=10_000.0, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < (0 if name == "pad_id" else 1):
                raise UserError(f"{name}: expected at least 1, got {value}")
        if self.head_dim is not None and self.head_dim % 2:
            raise UserError(f"head_dim: expected an even number (rotary embedding), got {self.head_dim}")
        if self.head_dim is None and self.hidden_dim % (2 * self.num_heads):
            raise UserError(f"hidden_dim: expected a multiple of 2 * num_heads = {2 * self.num_heads}, got {self.hidden_dim}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads: expected a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}")

    @property
    def context(self) -> int:
        """Longest sequence, in tokens, that the model was trained on."""
        return self.seq_len * self.k

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_dim // self.num_heads

    def qwen3(self, vocab_size: int, positions: int) -> Qwen3Config:
        """The transformers config of this backbone with a table of `vocab_size` and `positions` positions."""
        return Qwen3Config(
            vocab_size=vocab_size, hidden_size=self.hidden_dim, intermediate_size=self.ffn_dim,
            num_hidden_layers=self.num_layers, num_attention_heads=self.num_heads, num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_width, max_position_embeddings=positions, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
        )  # fmt: skip


def backbone_fields(cfg: LMTrainConfig) -> dict[str, Any]:
    """The backbone's shape from a training config, unset fields filled in."""
    return {
        "hidden_dim": cfg.hidden_dim, "num_layers": cfg.num_layers, "num_heads": cfg.num_heads,
        "num_kv_heads": cfg.num_kv_heads or cfg.num_heads, "head_dim": cfg.head_dim, "rope_theta": cfg.rope_theta,
        "ffn_dim": cfg.ffn_dim or 3 * cfg.hidden_dim, "seq_len": cfg.seq_len,
    }  # fmt: skip


class TokenModel(nn.Module):
    """`Qwen3ForCausalLM` behind the interface that training and evaluation share with the student."""

    def __init__(self, cfg: BackboneConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.lm = Qwen3ForCausalLM(cfg.qwen3(cfg.vocab_size, cfg.context))

    @property
    def table(self) -> Tensor:
        """(V, H): logits are hidden @ table.T."""
        return self.lm.lm_head.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, H); row t predicts token t from the tokens before it. Row 0, with nothing before it, is zero."""
        h = self.lm.model(tokens[:, :-1], causal_mask(self.lm.config), use_cache=False).last_hidden_state  # (B, T-1, H)
        return nn.functional.pad(h, (0, 0, 1, 0))

    def nll(self, tokens: Tensor, first: int = 1) -> Tensor:
        """-log p(x_t | x_<t) of tokens `first`..T-1, nats, (B, T - first)."""
        h = self.hidden(tokens)[:, first:]
        return token_nll(h.flatten(0, 1), self.table, tokens[:, first:].flatten()).view(h.shape[:2])


def load_token_model(path: str | Path) -> tuple[TokenModel, dict[str, Any]]:
    """A token-level model and its checkpoint's content. Raises UserError as `load_model`."""
    return load_model(path, "token_model", lambda config: TokenModel(config_from(BackboneConfig, config, str(path))))


@torch.no_grad()
def mean_nll(model: Any, data: PackedData, setup: loop.Setup, limit: int, batch_size: int = 8) -> dict[str, float]:
    """Validation NLL in nats a token over windows of the model's context, first chunk left out (it has no context).

    Raises UserError for data of less than one window.
    """
    model.eval()
    nlls = []
    for tokens in data.batches(model.cfg.context, batch_size, limit):
        with setup.autocast():
            nlls.append(model.nll(tokens.to(setup.device), model.cfg.k).float().mean(1).cpu())
    model.train()
    return {"nats_per_token": torch.cat(nlls).mean().item()}


def main() -> None:
    from student.distillation import open_teacher  # here, since the models of this package import this file

    cfg = parse_config(LMTrainConfig, __doc__)
    text = PackedData(Path(str((cfg.use_kd and cfg.kd_data) or cfg.data)) / "train")
    shape = BackboneConfig(**backbone_fields(cfg), k=cfg.k, vocab_size=text.vocab_size)
    teacher = open_teacher(cfg, shape.context) if cfg.use_kd else None  # may cost money: after all that can be checked before
    train, val = PackedData.pair(teacher.folder) if teacher else PackedData.pair(cfg.data)
    windows = TrainWindows(train, shape.context, cfg.batch_size, cfg.seed)
    val.require_window(shape.context)
    total = loop.total_steps(cfg, windows.steps_per_epoch)
    setup = loop.start("token_model", cfg)
    with plan.unreal(cfg):
        model = TokenModel(shape)
    plan.place(model, setup.device)
    setup.run.log(f"token_model: {sum(p.numel() for p in model.parameters()):,} parameters, {total} steps")

    ce_w = teacher.say(setup.run.log, cfg) if teacher else 1.0 if cfg.ce_w is None else cfg.ce_w

    def loss(tokens: Tensor, *rows: Tensor) -> loop.Losses:
        states = model.hidden(tokens)[:, 1:]  # (B, T-1, H)
        targets, kd = tokens[:, 1:].flatten(), teacher.divergence(cfg, model.table, rows, tokens[:, 1:]) if teacher else None
        weights = teacher.hard(cfg, rows).flatten() / targets.numel() if teacher else None
        learn = ce_w > 0 or kd is None
        learnt, nll = weighted_nll(states.flatten(0, 1), model.table, targets, weights, learn)
        ce = nll.mean()
        if kd is None:
            return ce_w * learnt, {"ce": ce}
        kl = kd(states)
        return ce_w * learnt + cfg.kd_w * kl, {"ce": ce, "kl": kl.detach()}

    def batch_at(step: int) -> tuple[Tensor, ...]:
        rows = teacher.rows(windows.starts(step), shape.context, first=1) if teacher else ()
        return windows.batch(step), *rows

    def validate(_: bool) -> dict[str, Any]:
        kl = teacher.validate(model, setup, cfg.eval_windows) if teacher else {}
        return mean_nll(model, val, setup, cfg.eval_windows) | kl

    tokens_per_step = cfg.batch_size * model.cfg.context
    if cfg.dry_run:
        return plan.show("token_model", model, cfg, setup, total, tokens_per_step, batch_at, loss)
    content = {
        "config": asdict(model.cfg),
        "tokenizer": tokenizer_record(train, cfg.checkpoint_dir),
        "train_tokens": train.n_tokens,
        "train_config": asdict(cfg),
        "distillation": teacher.about() if teacher else None,
    }
    figures = loop.fit("token_model", model, cfg, setup, total, tokens_per_step, batch_at, loss, validate, content)
    if setup.here.first:
        print(json.dumps(figures))


if __name__ == "__main__":
    run_cli(main)
