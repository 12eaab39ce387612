"""Every setting once: defaults live in dataclasses, then a YAML file, then `--set`, then flags.

Each field of a config dataclass is a YAML key and a flag of the same name. An unknown key fails and names the
nearest known one; values are coerced by the field's type (PyYAML reads `3e-4` as a string).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import UserError
from configs.files import read_plain_yaml

C = TypeVar("C")


def opt(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text; `choices=` limits a string, `low=` and `high=` (both allowed) a number."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainConfig:
    """What every training script shares."""

    data: str = opt("data/packed", "packed data: a folder written by tools/data_packing.py")
    k: int = opt(8, "tokens a chunk", low=1)
    batch_size: int = opt(8, "sequences (student, token model) or chunks (AE) a step", low=1)
    epochs: float = opt(1.0, "passes over the training data; --max_steps beside it wins", low=1e-9, high=1e6)
    max_steps: int | None = opt(None, "optimizer steps; unset: from --epochs", low=1)
    lr: float = opt(3e-4, "peak learning rate", low=0)
    warmup_steps: int = opt(20, "steps of linear warm-up", low=0)
    lr_decay: float = opt(
        0.0,
        "share of max_steps, at the end, over which the rate falls linearly to 0. 0 keeps it constant, "
        "so that a finished run can be prolonged exactly (--resume with a larger --max_steps)",
        low=0,
        high=1,
    )
    weight_decay: float = opt(0.1, "AdamW decay of matrices (not of norms, biases and scales)", low=0)
    grad_clip: float = opt(1.0, "largest norm of the gradient", low=1e-9)
    bf16: bool | None = opt(None, "bfloat16 autocast; auto: where the processor has it")
    compile: bool | None = opt(False, "torch.compile the loss; auto: where a C++ compiler is installed")
    seed: int = opt(0, "seed of weights, data order and noise", low=0, high=2**31 - 1)
    device: str = opt("auto", "cpu, cuda, cuda:N or auto")
    checkpoint_dir: str = opt("checkpoints", "where checkpoints are written")
    run_dir: str | None = opt(None, "config, metrics.jsonl and log; unset: runs/<model>")
    resume: bool = opt(False, "go on from the training state in --checkpoint_dir")
    save_every: int = opt(500, "steps between saves (0: only at the end)")
    log_every: int = opt(20, "steps between lines of metrics.jsonl", low=1)
    eval_every: int = opt(0, "steps between validations on a sample (0: only the full one at the end)")
    grad_accum: int = opt(1, "microbatches that a process works off one after another for each step's batch", low=1)
    dry_run: bool = opt(False, "print the memory and time that this training takes, and train nothing")
    tensorboard: bool = opt(False, "write the figures of metrics.jsonl as TensorBoard events, too (pip install tensorboard)")


@dataclass
class AETrainConfig(TrainConfig):
    """`ae/train_ae.py`."""

    latent_dim: int = opt(1024, "D, width of the latent")
    embed_dim: int = opt(768, "E, width of the token embedding")
    num_layers: int = opt(4, "residual SwiGLU blocks in all; a multiple of 4")
    batch_size: int = opt(512, "chunks a step", low=1)
    lr: float = opt(1e-3, "peak learning rate", low=0)
    weight_decay: float = opt(0.0, "AdamW decay of matrices", low=0)
    kl_weight: float = opt(1e-3, "weight of the KL to the unit Gaussian")
    free_bits: float = opt(0.5, "KL per dimension, in nats, that costs nothing more")
    l2_weight: float = opt(0.0, "weight of the mean latent's squared norm")
    latent_dropout: float = opt(0.15, "share of latent dimensions zeroed in training", low=0, high=1)
    token_mask: float = opt(0.15, "share of the encoder's input embeddings zeroed in training", low=0, high=1)
    init_from: str | None = opt(
        None, "start the embedding from that of a token_model.pt or of a local folder of the Llama or Qwen3 family"
    )
    random_tokens: float = opt(0.0, "share of training chunks replaced by uniformly random tokens (rare words)", low=0, high=1)


@dataclass
class LMTrainConfig(TrainConfig):
    """`student/baseline.py`, and what the student shares with it: the backbone and the loop."""

    hidden_dim: int = opt(2048, "H, width of the backbone")
    num_layers: int = opt(12, "layers of the backbone")
    num_heads: int = opt(16, "attention heads of the backbone")
    num_kv_heads: int | None = opt(None, "key/value heads (GQA); unset: as --num_heads")
    head_dim: int | None = opt(None, "width of an attention head; unset: hidden_dim / num_heads", low=2)
    rope_theta: float = opt(10_000.0, "base of the rotary embedding's wavelengths", low=1)
    ffn_dim: int | None = opt(None, "width of the feed-forward blocks; unset: 3 * hidden_dim")
    seq_len: int = opt(64, "latents a window; a window has seq_len * k tokens")
    fsdp: bool = opt(False, "share weights, gradients and optimizer out over torchrun's processes (FSDP2)")
    activation_checkpointing: bool = opt(False, "keep only the inputs of the backbone's layers, and compute them twice")
    eval_windows: int = opt(64, "windows of the validation text that the trainer scores; tools/evaluate.py scores all", low=1)
    optimizer: str = opt(
        "adamw",
        "adamw; muon, which has all matrices but tables and those of the student's autoencoder; muon_all: those, too",
        choices=("adamw", "muon", "muon_all"),
    )
    table_lr: float = opt(1.0, "learning rate of the embedding table, as a multiple of --lr", low=1e-9)
    ce_w: float | None = opt(
        None,
        "weight of the token cross-entropy under the exact conditional; unset: 1, but 0 where a teacher's logprobs are "
        "known, since its token is one draw from them",
        low=0,
    )
    use_kd: bool = opt(False, "distill: train on a teacher's text, and on its logprobs where it tells them")
    kd_w: float = opt(1.0, "weight of the KL from the teacher; without logprobs it is added to --ce_w", low=0)
    kd_temperature: float = opt(1.0, "temperature of both sides of that KL", low=1e-9)
    kd_data: str | None = opt(None, "answers packed by kd/kd_batcher.py; unset: --data if it is such, else --kd_store's")
    kd_store: str | None = opt(None, "the teacher's answers, as of kd/harvest.py; unset: data/teacher/MODEL.sqlite")
    kd_tokens: int = opt(1_000_000, "tokens of the teacher's text to harvest first while the store holds fewer", low=1)
    kd_k: int = opt(20, "teacher's words a position to ask for and to pack; 0: its text alone, whatever its tokenizer", low=0)
    kd_budget_usd: float | None = opt(None, "most dollars that the store may cost, earlier runs included", low=0)


@dataclass
class StudentTrainConfig(LMTrainConfig):
    """`student/train_student.py`."""

    ae_ckpt: str = opt("checkpoints/ae.pt", "the trained autoencoder")
    init_from: str | None = opt(
        None, "start the backbone from the layers of a token_model.pt or of a local folder of the Llama or Qwen3 family"
    )
    k: int | None = opt(  # type: ignore[assignment]
        None, "tokens a chunk; unset: the AE's (must agree when given)"
    )
    latent_dim: int | None = opt(None, "D; unset: the AE's (must agree when given)")
    mse_w: float = opt(1.0, "weight of the squared error between predicted and true next latent", low=0)
    base_w: float = opt(0.0, "weight of the cross-entropy of the parallel logits alone", low=0)
    local_layers: int = opt(2, "layers of the local decoder")
    local_window: int = opt(64, "tokens each layer of the local decoder sees")
    local_tokens: int = opt(1, "tokens right before its own that the local decoder's input holds, embedded")
    local_ffn_dim: int | None = opt(None, "width of the local decoder's feed-forward blocks; unset: 2 * AE's embed_dim", low=1)
    local_qk_norm: bool = opt(False, "normalise the queries and keys of the local decoder's heads, as the backbone does")
    local_memory: bool = opt(
        False, "let the local decoder look up what followed where the text read alike, however far back; its windows should "
        "reach two chunks, since the last is not looked up",
    )  # fmt: skip
    latent_bypass: bool = opt(
        False, "let the backbone's state reach the tokens of a chunk past the latent, too: one projection a position"
    )
    local_decoder: str = opt(
        "window",
        "window; controls: restart, which sees its own chunk only, and none, independent positions",
        choices=("window", "restart", "none"),
    )
    head: str = opt("direct", "direct, or energy: CALM's generative head (a control)", choices=("direct", "energy"))
    latents: str = opt("on", "on, or none: the latent path switched off (a control)", choices=("on", "none"))
    pad_share: float = opt(
        0.25, "share of training windows that begin with 1..k-1 pads, as left-padded prompts do", low=0, high=1
    )


def _base_type(kind: Any) -> tuple[type, bool]:
    """(type, may be None) of a field's annotation."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        return inner[0], True
    return kind, False


def _coerce(name: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    base, optional = _base_type(kind)
    # a number left empty is not among them: --budget_usd "$UNSET" is no wish for no limit
    unset = ("none", "null", "auto") if base in (int, float) else ("", "none", "null", "auto")
    if optional and (value is None or (isinstance(value, str) and value.lower() in unset)):
        return None
    try:
        if base is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        if base is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            value = int(float(value))
        elif value is None or isinstance(value, (bool, dict, list)):
            raise ValueError
        else:
            value = base(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{name}: expected {base.__name__}, got {reprlib.repr(value)}") from None
    if (choices := limits.get("choices")) and value not in choices:
        raise UserError(f"{name}: expected one of {', '.join(choices)}, got {reprlib.repr(value)}")
    low, high = limits.get("low"), limits.get("high")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        wanted = f"at least {low}" if high is None else f"{low} to {high}"
        raise UserError(f"{name}: expected {wanted}, got {reprlib.repr(value)}")
    return value


def config_from(cls: type[C], values: dict[str, Any], source: str) -> C:
    """Build a config dataclass from loose values, coerced by field type.

    Raises UserError for an unknown key (naming the nearest known one), a value of the wrong type, or one that is missing.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            known = f"did you mean {near[0]!r}? Known: {', '.join(sorted(fields))}"
            raise UserError(f"{source}: unknown key {reprlib.repr(key)}; {known}")
        out[key] = _coerce(f"{source}: {key}", value, hints[key], fields[key].metadata)
    if missing := [key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in out]:
        raise UserError(f"{source}: no value for {', '.join(missing)}")
    return cls(**out)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that is one flat mapping. Raises UserError when missing or malformed."""
    try:
        values = read_plain_yaml(path)
    except FileNotFoundError:
        raise UserError(f"cannot read config {path}: there is no such file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config {path}: expected `key: value` lines, got a {type(values).__name__}")
    return values


def parse_config(cls: type[C], description: str | None, argv: Sequence[str] | None = None) -> C:
    """A script's configuration from its command line: dataclass defaults < --config < --set < flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of the settings below")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, as in the YAML file")
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        base, _ = _base_type(hints[f.name])
        shown = "auto/unset" if f.default is None else f.default
        extra: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction} if base is bool else {"metavar": base.__name__.upper()}
        )
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f"{f.metadata['help']} [{shown}]", **extra)
    flags = vars(parser.parse_args(argv))
    config_path, sets = flags.pop("config"), flags.pop("set")
    values = read_yaml(config_path) if config_path else {}
    config_from(cls, values, str(config_path))  # so that an error names the file it comes from
    for item in sets:
        key, eq, value = item.partition("=")
        if not eq:
            raise UserError(f"--set {item}: expected KEY=VALUE")
        config_from(cls, {key: value}, "--set")
        values[key] = value
    told = flags.keys() | {item.partition("=")[0] for item in sets}
    if "epochs" in told and "max_steps" not in told:
        values.pop("max_steps", None)  # the file's: flags win
    return config_from(cls, {**values, **flags}, "command line")


@dataclass
class ServeConfig:
    """`server.py`. The environment's AE_CHECKPOINT, STUDENT_CHECKPOINT and SERVE_<NAME> come between YAML and flags.

    The bearer key is no setting, lest it be printed: it is the environment's SERVE_API_KEY.
    """

    student_ckpt: str = opt(
        "checkpoints/student.pt", "student checkpoint; AE_CHECKPOINT's sister STUDENT_CHECKPOINT sets it too"
    )
    ae_ckpt: str | None = opt(
        None, "autoencoder checkpoint it was trained from: checked to fit (the student carries its own copy)"
    )
    model_name: str | None = opt(None, "what clients call the model; unset: the student checkpoint's file name")
    host: str = opt("127.0.0.1", "address to listen on; 0.0.0.0 is every interface: set SERVE_API_KEY first")
    port: int = opt(7860, "port to listen on; 0: any free one", low=0, high=65535)
    device: str = opt("auto", "cpu, cuda, cuda:N or auto")
    dtype: str = opt(
        "auto", "of weights and caches; auto: bfloat16 where the processor has it", choices=("auto", "float32", "bfloat16")
    )
    compile: bool | None = opt(
        False, "compile the step before the server is ready (minutes, once a machine); auto: where it can"
    )
    slots: int = opt(32, "rows that are written together; a step costs the same however many are in use", low=1)
    prefill_rows: int = opt(
        1, "prompts read in one pass; at 1 a seed gives the same text whoever else is served, more is faster under load", low=1
    )
    words: int = opt(0, "vocabulary screen: words whose exact logits are computed; 0: all", low=0)
    rank: int | None = opt(None, "rank of the screen; unset: 64", low=1)
    int8: bool = opt(False, "vocabulary in 8 bits: on a CPU faster with up to 4 slots, slower with more; not quite exact")
    max_queue: int = opt(256, "rows that may wait for a slot; beyond that requests get 429", low=1)
    max_choices: int = opt(128, "rows a request may ask for: prompts times n", low=1)
    max_new_tokens: int = opt(4096, "tokens a row may ask for", low=1)
    max_logprobs: int = opt(20, "most likely words a position that a request may ask for", low=0)
    max_body_bytes: int = opt(2 << 20, "largest request body", low=1)
    timeout_s: float = opt(300.0, "seconds until a request is given up, waiting included", low=0.001, high=1e6)
    grace_s: float = opt(20.0, "seconds that shutting down leaves to what runs and waits", low=0, high=1e6)
