"""Measure token-level model and student side by side on validation text.

    python tools/evaluate.py --ae checkpoints/ae.pt --student checkpoints/student.pt \\
        --baseline checkpoints/token_model.pt --data data/packed

Both models see the same windows and are scored on the same tokens: all but the first chunk of each window, which is
context. Where the data is a shard of a teacher's answers with logprobs, the KL to the teacher is measured too. Prints a
table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ae.ae_model import load_ae
from ae.chunks import PackedData
from ae.losses import MAX_LOGITS
from ae.tokenizer_adapter import TokenizerAdapter
from ae.train_ae import NOISE, reconstruction
from configs.errors import UserError, run_cli
from configs.run import check_fingerprint, has_fast_bf16, pick_device, tune_process
from kd.kd_batcher import KDShard
from kd.losses import bucket_kl
from student.baseline import TokenModel, load_token_model
from student.brier import N, brier_by_samples, brier_lm, collisions, ngram_probabilities
from student.student_model import Student, load_student
from tools.metrics import BUCKETS, MeanBy, Places, places, word_of

BATCH = 8  # windows at a time
DRAWN_IN = 64  # windows, spread over all, in which n-grams are drawn


def score(hidden: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (B, T, E), table (V, E), targets (B, T) -> NLL in nats and whether the arg max is right, each (B, T)."""
    nll, right = [], []
    rows = max(1, MAX_LOGITS // table.shape[0])
    for h, t in zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True):
        logits = (h @ table.T).float()
        nll.append(torch.nn.functional.cross_entropy(logits, t, reduction="none"))
        right.append(logits.argmax(-1) == t)
    return torch.cat(nll).view(targets.shape), torch.cat(right).view(targets.shape)


@dataclass
class Batch:
    """Windows of the validation text, and what `Measure` needs to score them."""

    tokens: Tensor  # (B, T)
    others: Tensor  # (B, T), windows of other documents to take the latents from
    places: Places
    teacher: tuple[Tensor, Tensor] | None = None  # its top ids and logprobs, (B, T, k) each


class Measure:
    """Collects a model's scores over windows; `figures` sums them up. Scored are the positions from `first` on."""

    def __init__(self, model: TokenModel | Student, byte_lengths: Tensor, first: int) -> None:
        self.model, self.k, self.byte_lengths, self.first = model, model.cfg.k, byte_lengths, first
        self.nll: list[Tensor] = []
        self.right: list[Tensor] = []
        self.swapped: list[Tensor] = []
        self.collision: dict[str, list[Tensor]] = {"chunk start": [], "all": []}
        self.by_distance, self.by_seen, self.far_copy, self.kl = (MeanBy(n) for n in (len(BUCKETS), len(BUCKETS), 1, 1))
        self.n_bytes = 0

    def add(self, batch: Batch) -> None:
        """Score a batch of windows."""
        first, model, tokens = self.first, self.model, batch.tokens
        targets = tokens[:, first:]
        self.n_bytes += int(self.byte_lengths[targets].sum())
        hidden = model.hidden(tokens)[:, first:]
        nll, right = (x.cpu() for x in score(hidden, model.table, targets))
        self.nll.append(nll)
        self.right.append(right)
        for mean, classes in (
            (self.by_distance, batch.places.by_distance),
            (self.by_seen, batch.places.by_seen),
            (self.far_copy, batch.places.far_copy),
        ):
            mean.add(nll, classes[:, first:])
        if batch.teacher:
            ids, logprobs = (x[:, first:] for x in batch.teacher)
            told = (ids >= 0).any(-1)  # (B, T - first); a row of nothing but missing entries says nothing
            kl = bucket_kl(hidden[told], model.table, ids[told], logprobs[told]).cpu()
            self.kl.add(kl, torch.zeros(len(kl), dtype=torch.int64))
        if isinstance(model, Student):
            self.swapped.append(score(model.hidden(tokens, batch.others)[:, first:], model.table, targets)[0].cpu())

    def draw(self, tokens: Tensor, rng: np.random.Generator) -> None:
        """Draw n-grams in windows (B, T), which should be spread over those that are scored; rng: where they begin."""
        k = self.k
        chunks = torch.arange(self.first // k, (tokens.shape[1] - N - k + 1) // k + 1)  # those that leave room for any n-gram
        if len(chunks):
            anywhere = chunks * k + torch.from_numpy(rng.integers(k, size=len(chunks)))
            for name, starts in (("chunk start", chunks * k), ("all", anywhere)):
                self.collision[name].append(collisions(self.model, tokens, starts.to(tokens.device)).cpu())

    def figures(self) -> dict[str, Any]:
        nll, right, k = torch.cat(self.nll), torch.cat(self.right).float(), self.k
        p_true = ngram_probabilities(nll)  # (4, n, T - first - 3)
        brier = {}  # stays empty where the context is too short for an n-gram after its first chunk
        for name, p in (("chunk start", p_true[:, :, ::k]), ("all", p_true)):
            if self.collision[name]:
                brier[name] = brier_lm(p.mean((1, 2)), torch.cat(self.collision[name], dim=1).mean((1, 2)))
        out = {
            "bits_per_byte": nll.sum().item() / math.log(2) / self.n_bytes,
            "nats_per_token": nll.mean().item(),
            "brier_lm": brier.get("chunk start"),
            "brier_lm_all": brier.get("all"),
            "brier_windows": sum(part.shape[1] for part in self.collision["all"]),
            "nll_by_position": nll.unflatten(1, (-1, k)).mean((0, 1)).tolist(),
            "accuracy": right.mean().item(),
            "accuracy_by_position": right.unflatten(1, (-1, k)).mean((0, 1)).tolist(),
            "nll_by_distance": dict(zip(BUCKETS, self.by_distance.means(), strict=True)),
            "tokens_by_distance": dict(zip(BUCKETS, self.by_distance.count.tolist(), strict=True)),
            "nll_by_seen": dict(zip(BUCKETS, self.by_seen.means(), strict=True)),
            "tokens_by_seen": dict(zip(BUCKETS, self.by_seen.count.tolist(), strict=True)),
            "nll_far_copy": self.far_copy.means()[0],
            "far_copy_tokens": int(self.far_copy.count),
        }
        if self.swapped:
            out["latent_swap_cost"] = torch.cat(self.swapped).mean().item() - out["nats_per_token"]
        if self.kl.count:
            out |= {"kl_to_teacher": self.kl.means()[0], "kl_scored": int(self.kl.count)}
        return out


def context_tokens(first: int | None, k: int, context: int) -> int:
    """How many tokens at a window's start are context only: `first`; unset, K. Raises UserError for what is no whole chunks of
    it, or leaves nothing to score.
    """
    first = k if first is None else first
    if first % k or not 0 < first < context:
        raise UserError(f"--first: expected a multiple of k = {k} within the context of {context} tokens, got {first}")
    return first


@torch.inference_mode()
def evaluate(
    models: dict[str, TokenModel | Student],
    data: PackedData,
    tokenizer: TokenizerAdapter,
    limit: int | None,
    device: torch.device,
    first: int | None = None,
) -> dict[str, Any]:
    """Figures of each model over the split's windows (or the first `limit`).

    The first `first` tokens of a window (a multiple of the models' K; unset: K) are context and not scored: with one
    `first` for all, models of different K are scored on the same tokens.
    """
    context, k = next((model.cfg.context, model.cfg.k) for model in models.values())
    n = min(limit or data.windows(context), data.windows(context))
    if n < 2:
        raise UserError(f"{data.folder} holds {data.windows(context)} windows of {context} tokens; at least 2 are needed")
    first = context_tokens(first, k, context)
    shard = KDShard(data.folder) if data.meta.get("kd_kind") == "logprobs" else None
    byte_lengths, words = torch.from_numpy(tokenizer.byte_lengths).to(device), word_of(tokenizer)
    half = n // 2  # the latents of window i + n/2: another document's
    measures = {name: Measure(model, byte_lengths, first) for name, model in models.items()}
    drawn_in = np.linspace(0, n - 1, min(DRAWN_IN, n)).astype(int)

    def windows(index: np.ndarray) -> Tensor:
        return data.rows((index * context).tolist(), context).to(device)

    for measure in measures.values():
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        for i in range(0, n, BATCH):
            index = np.arange(i, min(i + BATCH, n))
            told = shard.windows(index * context, context)[1:] if shard else None
            batch = Batch(
                windows(index),
                windows((index + half) % n),
                places(data, words, index * context, context),
                (told[0].to(device), told[1].to(device)) if told else None,
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device)):
                measure.add(batch)
        for i in range(0, len(drawn_in), BATCH):
            with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device)):
                measure.draw(windows(drawn_in[i : i + BATCH]), rng)
    return {name: {**measure.figures(), "windows": n, "tokens": n * (context - first)} for name, measure in measures.items()}


@torch.inference_mode()
def evaluate_energy(
    model: Student, data: PackedData, limit: int | None, device: torch.device, first: int | None = None
) -> dict[str, Any]:
    """What can be measured of a head without likelihood: BrierLM from the chunk start, by two samples a chunk.

    first: as in `evaluate`.
    """
    skipped = context_tokens(first, model.cfg.k, model.cfg.context) // model.cfg.k
    torch.manual_seed(0)
    samples: list[Tensor] = []
    for tokens in data.batches(model.cfg.context, BATCH, limit):
        h = model.backbone_states(tokens.to(device))[:, skipped:]  # (B, L - skipped, H)
        two = [model.ae.logits(model.ae.decode(model.exit(h))).argmax(-1).cpu() for _ in range(2)]
        samples.append(torch.stack([*two, tokens.unflatten(1, (-1, model.cfg.k))[:, skipped:]]))
    one, other, truth = torch.cat(samples, dim=1)
    brier = brier_by_samples(one, other, truth)
    return dict.fromkeys(("bits_per_byte", "nats_per_token", "brier_lm_all", "nll_by_position")) | {"brier_lm": brier}


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    names = [name for name in ("token_model", "student") if name in result]
    rows = [
        ("bits per byte", "bits_per_byte", ".4f"),
        ("NLL, nats/token", "nats_per_token", ".4f"),
        ("next-token accuracy", "accuracy", ".2%"),
        ("BrierLM (from chunk start)", "brier_lm", ".3f"),
        ("BrierLM (all positions)", "brier_lm_all", ".3f"),
        ("cost of another document's latents, nats", "latent_swap_cost", ".4f"),
        ("NLL of words repeated from far away", "nll_far_copy", ".4f"),
        ("KL to the teacher, nats/token", "kl_to_teacher", ".4f"),
    ]

    def line(title: str, values: list[Any], style: str) -> str:
        return f"{title:42}" + "".join(f"{'-' if v is None else format(v, style):>14}" for v in values)

    lines = [line("", names, "")]
    for title, key, style in rows:
        values = [result[name].get(key) for name in names]
        if key not in ("nll_far_copy", "kl_to_teacher") or any(v is not None for v in values):
            lines.append(line(title, values, style))
    for title, key, style in (
        ("NLL at in-chunk position", "nll_by_position", ".3f"),
        ("accuracy at in-chunk position", "accuracy_by_position", ".1%"),
    ):
        for i in range(len(next((result[n][key] for n in names if result[n].get(key)), []))):
            values = [result[name].get(key) for name in names]
            lines.append(line(f"{title} {i + 1}", [v and v[i] for v in values], style))
    for title, key in (("NLL at document's token", "nll_by_distance"), ("NLL after this many tokens seen", "nll_by_seen")):
        for name in BUCKETS:
            values = [(result[model].get(key) or {}).get(name) for model in names]
            if any(v is not None for v in values):
                lines.append(line(f"{title} {name}", values, ".3f"))
    if "ae" in result:
        ae = result["ae"]
        lines.append(
            f"AE: {ae['chunk_exact']:.2%} of chunks and {ae['token_exact']:.3%} of tokens exact; "
            f"{ae['noisy_chunk_exact']:.2%} of chunks with N(0, {NOISE}) noise on the latent"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ae", help="autoencoder checkpoint, for its reconstruction")
    parser.add_argument("--student", help="student checkpoint")
    parser.add_argument("--baseline", help="token-level model checkpoint")
    parser.add_argument("--data", default="data/packed", help="packed data; its val split is read [data/packed]")
    parser.add_argument(
        "--max_windows", type=int, help="only the first windows of the split; the autoencoder: their chunks, unless alone [all]"
    )
    parser.add_argument("--first", type=int, help="tokens at a window's start that are context only, a multiple of k [k]")
    parser.add_argument("--output", help="write the JSON there too")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if not (args.ae or args.student or args.baseline):
        raise UserError("nothing to evaluate: give --ae, --student or --baseline")
    if args.max_windows is not None and args.max_windows < 2:
        raise UserError(f"--max_windows: expected at least 2, got {args.max_windows}")
    if args.output and not Path(args.output).parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {Path(args.output).parent}; make it first")
    if args.output and Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is a folder; name a file to write")
    tune_process()
    device = pick_device(args.device)
    data = PackedData(f"{args.data}/val")
    loaded: dict[str, Any] = {}
    for name, path, load in (
        ("ae", args.ae, load_ae),
        ("token_model", args.baseline, load_token_model),
        ("student", args.student, load_student),
    ):
        if path:
            model, content = load(path)
            check_fingerprint(content["tokenizer"]["fingerprint"], data.fingerprint, path, args.data)
            loaded[name] = model.to(device)
    models: dict[str, TokenModel | Student] = {name: loaded[name] for name in ("token_model", "student") if name in loaded}
    if len({(model.cfg.context, model.cfg.k) for model in models.values()}) > 1:
        told = ", ".join(f"{name} {m.cfg.context} tokens in chunks of {m.cfg.k}" for name, m in models.items())
        raise UserError(f"the models were trained on different windows ({told}) and cannot be compared")
    result: dict[str, Any] = {}
    if "ae" in loaded:
        window = next((model.cfg.context for model in models.values()), None)
        chunks = args.max_windows * window // loaded["ae"].cfg.k if args.max_windows and window else None
        result["ae"] = reconstruction(loaded["ae"], data, device, has_fast_bf16(device), chunks)
    if "student" in models and loaded["student"].cfg.head == "energy":
        del models["student"]
        result["student"] = evaluate_energy(loaded["student"], data, args.max_windows, device, args.first)
    if models:
        result |= evaluate(models, data, TokenizerAdapter.load(data.tokenizer), args.max_windows, device, args.first)
    print(table(result))
    line = json.dumps(result)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    run_cli(main)
