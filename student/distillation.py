"""A teacher's text and soft targets for the trainers of student and token-level model (`--use_kd`).

The teacher's answers are the training text; where it told logprobs, each window comes with its rows, and the loss gets a
KL term. They are packed from the store (kd/store.py), which is harvested first while it holds too little.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ae.chunks import PackedData, tokenizer_record
from ae.tokenizer_adapter import TokenizerAdapter
from configs import loop
from configs.errors import UserError
from configs.files import read_json
from configs.parallel import world
from configs.run import pick_device
from configs.schema import LMTrainConfig
from kd.harvest import HarvestConfig, harvest, store_path
from kd.kd_batcher import PACKING, KDShard, pack_answers
from kd.kd_client import Interrupted, Settings
from kd.losses import mean_kl, scored_positions
from kd.records import MISSING
from kd.store import Store


def shift_right(x: Tensor, pads: Tensor, fill: float) -> Tensor:
    """Move each row of (B, T, ...) right by its number of pads, (B,); what is new in front is `fill`."""
    at = torch.arange(x.shape[1]) - pads[:, None]  # (B, T)
    rows = torch.arange(len(x))[:, None]
    return x[rows, at.clamp(min=0)].masked_fill((at < 0).view(*at.shape, *[1] * (x.ndim - 2)), fill)


@dataclass
class Teacher:
    """The packed answers of a teacher: `folder` holds train and val, which `PackedData` reads as plain text too."""

    folder: Path
    train: KDShard
    val: KDShard
    temperature: float

    @property
    def soft(self) -> bool:
        """Whether there are logprobs; without them the text alone teaches (sequence-level distillation)."""
        return self.train.kind == "logprobs"

    def about(self) -> dict[str, Any]:
        """What the run, its report and its checkpoint say of the distillation."""
        told = {"kind": "token-level", "k": self.train.k} if self.soft else {"kind": "sequence-level"}
        counts = {"tokens": self.train.n_tokens, "scored_tokens": self.train.scored}
        return {**told, "teacher": self.train.teacher, **counts}

    def say(self, log: Callable[[str], None], cfg: LMTrainConfig) -> float:
        """Say what kind of distillation this is; returns the weight of the cross-entropy that goes with it."""
        about, ce_w = self.about(), 1.0 if cfg.ce_w is None else cfg.ce_w
        log(f"distillation: {about['kind']} from {', '.join(about['teacher'])}, {about['tokens']:,} tokens in {self.folder}")
        if self.soft:
            if cfg.ce_w is None and cfg.kd_w and not self.train.drawn:
                log("the text is not drawn at temperature 1, or not the teacher's: it is learned from as well, --ce_w 1")
            return ce_w
        log(f"no logprobs of the teacher's: --kd_w {cfg.kd_w:g} is added to --ce_w {ce_w:g}, on the tokens that it wrote")
        return ce_w + cfg.kd_w

    def hard(self, cfg: LMTrainConfig, rows: Sequence[Tensor]) -> Tensor:
        """The positions (B, T) that learn from the cross-entropy: those without a row, or, with --ce_w, all; but never an end
        that stands for a cut.

        A teacher's token is one draw from the distribution that its row tells: where the row is known, the draw tells more
        only of the words beyond the row, and `divergence` takes that from it (docs/distillation.md).
        """
        cut = rows[0]
        return (rows[1] < 0).all(-1) & ~cut if self._rows_say_it(cfg) else ~cut

    def _rows_say_it(self, cfg: LMTrainConfig) -> bool:
        """Whether the tokens are left to the divergence where there is a row."""
        return self.soft and cfg.ce_w is None and cfg.kd_w > 0 and self.train.drawn

    def rows(self, starts: Iterable[int], window: int, pads: Tensor | None = None, first: int = 0) -> tuple[Tensor, ...]:
        """What the teacher said of each token of the training windows that begin at `starts`, shifted as their tokens are.

        Where an end stands for a cut, (B, T - first); with logprobs also top ids and top logprobs, (B, T - first, k) each, and
        how many positions it scored, ().
        """
        cut = self.train.cut(starts, window)
        if pads is not None:
            cut = shift_right(cut, pads, False)
        if not self.soft:
            return (cut[:, first:],)
        _, ids, logprobs = self.train.windows(starts, window)
        if pads is not None:
            ids, logprobs = shift_right(ids, pads, MISSING), shift_right(logprobs, pads, 0.0)
        return cut[:, first:], ids[:, first:], logprobs[:, first:], scored_positions(ids[:, first:])

    def divergence(
        self, cfg: LMTrainConfig, table: Tensor, rows: Sequence[Tensor], tokens: Tensor
    ) -> Callable[[Tensor], Tensor] | None:
        """States (B, T, E) -> their mean KL to the teacher's rows; where the cross-entropy leaves them out, the tokens (B, T)
        still tell the words beyond the row apart. None without logprobs."""
        if not self.soft:
            return None
        _, ids, logprobs, count = rows
        told: dict[str, Any] = {
            "top_ids": ids,
            "top_logprobs": logprobs,
            "drawn": tokens if self._rows_say_it(cfg) else None,
            "count": count,
        }
        return partial(mean_kl, table=table, temperature=self.temperature, **told)

    @torch.no_grad()
    def validate(self, model: Any, setup: loop.Setup, limit: int, batch_size: int = 8) -> dict[str, float]:
        """Mean KL(teacher || model) over validation windows, temperature 1, first chunk left out; {} without logprobs."""
        context, k = model.cfg.context, model.cfg.k
        n = min(limit, self.val.n_tokens // context) if self.soft else 0
        model.eval()
        total, scored = 0.0, 0
        for i in range(0, n, batch_size):
            starts = range(i * context, min(i + batch_size, n) * context, context)
            tokens, ids, logprobs = (x.to(setup.device) for x in self.val.windows(starts, context))
            count = int((ids[:, k:] >= 0).any(-1).sum())
            with setup.autocast():
                kl = mean_kl(model.hidden(tokens)[:, k:], model.table, ids[:, k:], logprobs[:, k:])
            total, scored = total + kl.item() * count, scored + count
        model.train()
        return {"kl_to_teacher": total / scored} if scored else {}


def open_teacher(cfg: LMTrainConfig, window: int) -> Teacher:
    """The packed answers that `cfg` asks for; harvests and packs them where they are not there yet.

    A harvested document is no longer than `window`, the model's own in tokens: its prompt is up to an eighth of that.

    Raises UserError as `Settings.load`, `harvest`, `pack_answers` and `KDShard` do.
    """
    folder = Path(cfg.kd_data) if cfg.kd_data else Path(cfg.data)
    if not cfg.kd_data and "kd_kind" not in PackedData(folder / "train").meta:
        if cfg.dry_run or world().size > 1:
            raise UserError(
                "--use_kd with --dry_run or under torchrun asks no teacher: harvest and pack first (kd/harvest.py, "
                "kd/kd_batcher.py), then give the packed answers as --kd_data"
            )
        folder = _from_store(cfg, window)
    return Teacher(folder, KDShard(folder / "train"), KDShard(folder / "val"), cfg.kd_temperature)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _from_store(cfg: LMTrainConfig, window: int) -> Path:
    """Pack the answers of the store, after harvesting what it lacks of --kd_tokens with the beginnings of --data."""
    prompt = max(1, min(HarvestConfig.prompt_tokens, window // 8))
    wanted = HarvestConfig(
        n_tokens=cfg.kd_tokens,
        whole_store=True,
        data=cfg.data,
        prompt_tokens=prompt,
        max_new_tokens=max(1, min(HarvestConfig.max_new_tokens, window - prompt - 1)),  # one for the start of text
        store=cfg.kd_store,
        top_logprobs=cfg.kd_k,
        budget_usd=cfg.kd_budget_usd,
    )
    data = PackedData(Path(cfg.data) / "train")
    pick_device(cfg.device)  # one that is not there, or a folder that cannot be written to, is told before it costs anything
    tokenizer_record(data, cfg.checkpoint_dir)
    path = Path(cfg.kd_store) if cfg.kd_store else store_path(wanted, Settings.load())
    folder = path.with_name(f"{path.stem}-packed")
    with Store(path) as store, store.harvesting(wait=_log):  # a second training waits, and finds what the first one packed
        held = store.totals().completion_tokens
        if held < cfg.kd_tokens:
            budget = cfg.kd_budget_usd
            limit = "with no --kd_budget_usd, whatever it costs" if budget is None else f"for at most ${budget:g} in all"
            _log(f"{path} holds {held:,} of --kd_tokens {cfg.kd_tokens:,} tokens: harvesting the rest; {limit}")
            try:
                harvest(wanted, log=_log, store=store)
            except Interrupted:
                raise KeyboardInterrupt from None
        answers = len(store)
        made_of = {"store_answers": answers, "store_newest": store.newest(), "kd_asked": cfg.kd_k}
        meta = folder / "train" / "meta.json"
        if meta.exists():
            packed = read_json(meta)
            known = {**made_of, "packing": PACKING, "tokenizer_fingerprint": data.fingerprint}
            if all(packed.get(key) == value for key, value in known.items()):
                return folder
        tokenizer = TokenizerAdapter.load(data.tokenizer)
        _log(f"packing {answers:,} answers of {path} into {folder}")
        counts = pack_answers(store, tokenizer, folder, k=cfg.kd_k, **made_of)
    _log(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    return folder
