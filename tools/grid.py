"""An ablation's grid: its YAML, its runs, and the lines of results that say which of them are done (tools/ablate.py).

What a run is, is decided by its settings, its data and the checkpoints that it starts from, each by content: a line of
results.jsonl counts as long as these are what the grid says now.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from ae.chunks import PackedData
from configs.errors import UserError
from configs.files import replace_text
from configs.loop import FREE_ON_RESUME
from configs.run import held, load_checkpoint
from configs.schema import AETrainConfig, LMTrainConfig, StudentTrainConfig, TrainConfig, config_from, read_yaml

TRAINERS: dict[str, tuple[str, type[TrainConfig]]] = {
    "ae": ("ae/train_ae.py", AETrainConfig),
    "token_model": ("student/baseline.py", LMTrainConfig),
    "student": ("student/train_student.py", StudentTrainConfig),
}
OURS = {"data", "checkpoint_dir", "run_dir", "resume", "seed"}  # set here, the same way for every run
FREE = (FREE_ON_RESUME - {"max_steps", "epochs"}) | OURS - {"seed"}  # what does not change the trained weights
REFERENCE = re.compile(r"\{([\w.-]+)\.ckpt\}")


@dataclass(frozen=True)
class Variant:
    """A named training: the trainer and its settings, in which "{NAME.ckpt}" stands for another variant's checkpoint."""

    name: str
    model: str
    settings: dict[str, Any] = field(hash=False)
    seeds: tuple[int, ...]
    control: str | None = None  # what its latents are held against; None: the grid's control
    token_model: str | None = None  # what its bits per byte are held against; None: the grid's token_model

    @property
    def needs(self) -> dict[str, str]:
        """The variants whose checkpoints it starts from, by setting."""
        matches = {key: REFERENCE.fullmatch(value) for key, value in self.settings.items() if isinstance(value, str)}
        return {key: match[1] for key, match in matches.items() if match}


@dataclass
class Grid:
    """A grid's YAML, checked."""

    path: str
    data: str
    output: Path
    variants: dict[str, Variant]
    control: str
    token_model: str
    recommended: str | None
    max_windows: int | None

    @property
    def name(self) -> str:
        return Path(self.path).stem.removeprefix("ablate_")

    @cached_property
    def data_id(self) -> str:
        """Hash of what the data says of itself; it may lie elsewhere."""
        metas = [json.dumps(split.meta, sort_keys=True) for split in PackedData.pair(self.data)]
        return hashlib.sha256("".join(metas).encode()).hexdigest()[:16]

    @cached_property
    def first(self) -> int:
        """Tokens at a window's start that no model is scored on: a multiple of each K. Raises UserError as `check_windows`."""
        return check_windows(self.variants, self.path)

    @property
    def evaluation(self) -> dict[str, Any]:
        return {"max_windows": self.max_windows, "first": self.first}

    def check_files(self) -> None:
        """Raise UserError for data or an autoencoder that is missing, before anything runs."""
        assert self.data_id and self.first

    def run(self, name: str, seed: int) -> Run:
        """The run of a variant; an autoencoder has one for all seeds."""
        variant = self.variants[name]
        return Run(self, variant, variant.seeds[0] if variant.model == "ae" else seed)

    def runs(self, only: list[str] | None = None) -> list[Run]:
        """The runs of these variants (unset: all) and of what they need, in an order that trains inputs first."""
        out: list[Run] = []

        def add(run: Run) -> None:
            for needed in run.needs.values():
                add(needed)
            if run not in out:
                out.append(run)

        for name in only or self.variants:
            known(name, self.variants, "--only", "variant")
            for seed in self.variants[name].seeds:
                add(self.run(name, seed))
        return out


@dataclass(frozen=True)
class Run:
    """One training: a variant with a seed."""

    grid: Grid = field(compare=False, repr=False)
    variant: Variant
    seed: int

    @property
    def title(self) -> str:
        return f"{self.variant.name}-s{self.seed}"

    @property
    def folder(self) -> Path:
        return self.grid.output / self.title

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"{self.variant.model}.pt"

    @property
    def state(self) -> Path:
        return self.checkpoint.with_suffix(".state.pt")

    @property
    def needs(self) -> dict[str, Run]:
        return {key: self.grid.run(name, self.seed) for key, name in self.variant.needs.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What the trainer is told."""
        inputs = {key: str(run.checkpoint) for key, run in self.needs.items()}
        folders = {"checkpoint_dir": str(self.checkpoint.parent), "run_dir": str(self.folder)}
        return {**self.variant.settings, **inputs, "data": self.grid.data, "seed": self.seed, **folders}

    def identity(self, rows: Rows) -> dict[str, Any] | None:
        """What decides the outcome: settings, data and input checkpoints by content. None while an input is to be trained."""
        inputs = {}
        for key, run in self.needs.items():
            row = current(run, rows)
            if row is None:
                return None
            inputs[key] = row["checkpoint"]
        config = asdict(config_from(TRAINERS[self.variant.model][1], self.settings, self.title))
        files = {k: v for k, v in config.items() if isinstance(v, str) and v.endswith(".pt") and k not in {*inputs, *FREE}}
        inputs |= {key: digest(path) for key, path in files.items()}
        settings = {key: value for key, value in config.items() if key not in FREE and key not in inputs}
        return {"model": self.variant.model, "data": self.grid.data_id, "inputs": inputs, "settings": settings}


def known(name: Any, names: Any, source: str, what: str) -> None:
    """Raise UserError naming the nearest one unless `name` is one of `names`."""
    if name not in names:
        near = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.0)
        raise UserError(f"{source}: unknown {what} {name!r}; did you mean {near[0]!r}? Known: {', '.join(names)}")


def load_grid(path: str | Path) -> Grid:
    """Read and check a grid, every setting of every variant included, but no other file.

    Raises UserError for what is wrong in it.
    """
    values, source = read_yaml(path), str(path)
    keys = ["data", "output", "ae", "seeds", "shared", "control", "token_model", "recommended", "max_windows", "variants"]
    for key in values:
        known(key, keys, source, "key")
    for key in ("data", "output", "control", "token_model", "variants"):
        if values.get(key) is None:
            raise UserError(f"{source}: `{key}` is missing")
    for key in ("variants", "shared"):
        if not isinstance(values.setdefault(key, {}), dict):
            raise UserError(f"{source}: expected `name: value` lines under `{key}`, got {values[key]!r}")
    limit = values.get("max_windows")
    if limit is not None and (not isinstance(limit, int) or limit < 2):
        raise UserError(f"{source}: max_windows: expected at least 2, or nothing for all, got {limit!r}")
    seeds = seeds_of(values.get("seeds", [0]), source)
    named, ae = dict(values["variants"]), values.get("ae")
    if isinstance(ae, dict):
        named.setdefault("ae", {"model": "ae", **ae})
        ae = "{ae.ckpt}"
    config_from(StudentTrainConfig, values["shared"], f"{source}: shared")
    variants = {str(name): variant_of(str(name), told, values["shared"], ae, seeds, source) for name, told in named.items()}
    for key in ("control", "token_model", "recommended"):
        if values.get(key) is not None:
            known(values[key], variants, f"{source}: {key}", "variant")
    for variant in variants.values():
        for key, name in (("control", variant.control), ("token_model", variant.token_model)):
            if name is not None:
                known(name, variants, f"{source}: {variant.name}: {key}", "variant")
    both = tuple(sorted({seed for v in variants.values() if v.model != "ae" for seed in v.seeds}))
    for name in (values["control"], values["token_model"]):  # what the others are held against, at every seed
        variants[name] = replace(variants[name], seeds=both)
    check_references(variants, source)
    names = (values["control"], values["token_model"], values.get("recommended"))
    return Grid(source, str(values["data"]), Path(values["output"]), variants, *names, limit)


def seeds_of(value: Any, source: str) -> tuple[int, ...]:
    """A list of seeds."""
    if not isinstance(value, list) or not value or not all(isinstance(s, int) and s >= 0 for s in value):
        raise UserError(f"{source}: seeds: expected a list of whole numbers such as [0, 1], got {value!r}")
    return tuple(value)


def variant_of(name: str, told: Any, shared: dict[str, Any], ae: Any, seeds: tuple[int, ...], source: str) -> Variant:
    """One variant, its settings checked against its trainer's."""
    where = f"{source}: {name}"
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{where}: a variant's name may have letters, digits, '_', '-' and '.' only")
    if not isinstance(told, dict) or told.get("model") not in TRAINERS:
        raise UserError(f"{where}: expected settings with `model:` one of {', '.join(TRAINERS)}, got {told!r}")
    own = {key: value for key, value in told.items() if key not in ("model", "seeds", "control", "token_model")}
    cls = TRAINERS[told["model"]][1]
    for key in OURS & {*own, *shared}:
        raise UserError(f"{where if key in own else source}: `{key}` is the grid's to set, not a variant's")
    settings = dict(own)
    if told["model"] != "ae":
        settings = {key: value for key, value in shared.items() if key in {f.name for f in fields(cls)}} | own
    if told["model"] == "student" and "ae_ckpt" not in settings and ae is not None:
        settings["ae_ckpt"] = ae
    checked = config_from(cls, settings, where)
    if checked.eval_every % checked.log_every:
        raise UserError(
            f"{where}: eval_every: expected a multiple of log_every = {checked.log_every} (else the time that validation "
            f"takes cannot be told from training), got {checked.eval_every}"
        )
    settings = {key: getattr(checked, key) for key in settings}  # 1e-3, not "1e-3"
    own_seeds = seeds_of(told["seeds"], where) if "seeds" in told else seeds
    return Variant(name, told["model"], settings, own_seeds, told.get("control"), told.get("token_model"))


def check_references(variants: dict[str, Variant], source: str) -> None:
    """Raise UserError for a checkpoint that no variant writes, or one that needs itself."""

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UserError(f"{source}: variants need each other's checkpoints in a circle: {' <- '.join([*above, name])}")
        for key, needed in variants[name].needs.items():
            known(needed, variants, f"{source}: {name}: {key}", "variant")
            if key == "ae_ckpt" and variants[needed].model != "ae":
                raise UserError(
                    f"{source}: {name}: ae_ckpt: {needed} is a {variants[needed].model}, expected a variant of model ae"
                )
            visit(needed, (*above, name))

    for name in variants:
        visit(name, ())


def check_windows(variants: dict[str, Variant], source: str) -> int:
    """The least common multiple of the K of token models and students.

    Raises UserError where variants do not read windows of one length, or the autoencoder is missing.
    """
    windows: dict[int, str] = {}
    ks: set[int] = set()
    for name, variant in variants.items():
        if variant.model == "ae":
            continue
        cfg = config_from(TRAINERS[variant.model][1], variant.settings, name)
        k, needed = cfg.k, variant.needs.get("ae_ckpt")
        if isinstance(cfg, StudentTrainConfig) and needed:
            k = config_from(AETrainConfig, variants[needed].settings, needed).k
        elif isinstance(cfg, StudentTrainConfig):
            k = load_checkpoint(cfg.ae_ckpt, "ae")["config"]["k"]
        assert isinstance(cfg, LMTrainConfig) and isinstance(k, int)
        ks.add(k)
        windows.setdefault(cfg.seq_len * k, name)
    if len(windows) > 1:
        told = ", ".join(f"{name} {length}" for length, name in windows.items())
        raise UserError(f"{source}: the variants' windows of seq_len * k tokens differ ({told}) and cannot be compared")
    return math.lcm(*ks)


Rows = dict[tuple[str, int], dict[str, Any]]


def read_rows(output: Path) -> Rows:
    """The lines of results.jsonl by name and seed."""
    path = output / "results.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        return {(row["name"], row["seed"]): row for row in rows}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: expected one JSON object a line with name and seed") from None


def write_row(output: Path, row: dict[str, Any]) -> None:
    """Put a row into results.jsonl, in place of that run's earlier one; several processes may do so."""
    path = output / "results.jsonl"
    with open(output / ".results.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {**read_rows(output), (row["name"], row["seed"]): row}
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows.values()))


def alike(model: str, one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two trainings have the same settings. One that only one of them tells counts by its default."""
    defaults = asdict(TRAINERS[model][1]())
    return all(one.get(key, defaults.get(key)) == two.get(key, defaults.get(key)) for key in {*one, *two} - FREE)


def same(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether two identities are of one run."""
    if before is None or any(before.get(key) != now[key] for key in ("model", "data", "inputs")):
        return False
    return alike(now["model"], before["settings"], now["settings"])


def current(run: Run, rows: Rows) -> dict[str, Any] | None:
    """The row of a run, if it was made with what the grid says now."""
    row, identity = rows.get((run.variant.name, run.seed)), run.identity(rows)
    if row is None or identity is None or not same(row["identity"], identity):
        return None
    return row if run.variant.model == "ae" or (row["evaluation"] == run.grid.evaluation and measured_as_now(row)) else None


def measured_as_now(row: dict[str, Any]) -> bool:
    """Whether a row's BrierLM is of one set of text; before, its true n-grams were of another than the drawn ones."""
    return row.get("brier_lm_all") is None or "brier_windows" in row


def published(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of a run among those of docs/quality.json, if settings and data are the grid's; its run may lie elsewhere.

    What it starts from must be such, too: its own settings only name that.
    """
    if not all(published(needed, rows) for needed in run.needs.values()):
        return None
    own = {"grid": run.grid.name, "name": run.variant.name, "seed": run.seed, "model": run.variant.model}
    for row in rows:
        if all(row[key] == value for key, value in own.items()):
            fits = row.get("data") == run.grid.data_id and alike(run.variant.model, row["settings"], run.variant.settings)
            return row if fits and (run.variant.model == "ae" or row["evaluation"] == run.grid.evaluation) else None
    return None


_digests: dict[tuple[str, float, int], str] = {}


def digest(path: str | Path) -> str:
    """Hash of a file's content."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    key = (str(path), path.stat().st_mtime, path.stat().st_size)
    if key not in _digests:
        state = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
        _digests[key] = state.hexdigest()[:16]
    return _digests[key]


def lock_of(run: Run) -> IO[str] | None:
    """The run's lock, or None while another process has it."""
    return held(run.grid.output / f".{run.title}.lock")
