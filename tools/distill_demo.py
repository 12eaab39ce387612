"""Distillation from end to end: serve a teacher, harvest its text and logprobs over HTTP, pack them, train on them with and
without its soft targets, and compare. Everything goes through the commands that a remote teacher would be used with.

    python tools/distill_demo.py                                # `make distill-demo`: the demo's token-level model teaches
    python tools/distill_demo.py --teacher DIR --grid configs/ablate_stories.yaml --n_tokens 3300000

DIR is a causal language model of transformers with its tokenizer. The grid (tools/ablate.py) says what is trained; the
answers are packed into its `data`, and store and report lie beside that. A finished stage is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import UserError, run_cli
from configs.schema import LMTrainConfig, config_from
from kd.store import Store
from tools.demo import Stage, run_chain
from tools.export_hf import export_token_model
from tools.grid import Grid, Rows, digest, known, load_grid, read_rows

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("student_ce", "student_kd", "token_model_kd")  # the variants that the report compares
SHOWN = 400  # characters of a sample


@contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """Serve `model` on this machine as long as the block runs; the server's address, up to /v1."""
    command = [sys.executable, str(ROOT / "kd" / "local_teacher.py"), "--model", str(model), "--port", "0"]
    with open(log, "w", encoding="utf-8") as out, subprocess.Popen(command, stderr=out, start_new_session=True) as process:
        try:
            while " at http://" not in (said := log.read_text(encoding="utf-8")):
                if process.poll() is not None:
                    last = said.strip().splitlines()[-1:] or ["it said nothing"]
                    raise UserError(f"the server of --teacher {model} ended: {last[0]}")
                time.sleep(0.2)
            yield said.rsplit(" at ", 1)[1].strip()
        finally:
            process.send_signal(signal.SIGTERM)


def store_of(root: Path, teacher: Path) -> Path:
    """Where this teacher's answers are kept: by its weights, since another of the same name would answer otherwise."""
    weights = sorted(path for suffix in ("safetensors", "bin") for path in teacher.glob(f"*.{suffix}"))
    return root / f"teacher-{hashlib.sha256(''.join(map(digest, weights)).encode()).hexdigest()[:12]}.sqlite"


def stages(root: Path, grid: Grid, args: argparse.Namespace) -> list[Stage]:
    """Ask the teacher, pack what it said, train and measure, and let each student write."""
    cfg = config_from(LMTrainConfig, grid.variants["token_model_kd"].settings, grid.path)
    store, context = store_of(root, Path(args.teacher)), cfg.seq_len * cfg.k
    harvest = ["kd/harvest.py", "--n_tokens", str(args.n_tokens), "--store", str(store), "--tokenizer", str(args.teacher)]
    harvest += ["--model", Path(args.teacher).name, "--mode", "completions", "--concurrency", "64"]
    prompt = context // 8 if args.prompts else 0  # a document is as long as the models' windows at most
    harvest += ["--data", str(args.prompts), "--prompt_tokens", str(prompt)] if args.prompts else []
    harvest += ["--max_new_tokens", str(context - prompt - 1)]
    pack = ["kd/kd_batcher.py", "--store", str(store), "--tokenizer", str(args.teacher), "--output", grid.data]
    ablate = ["tools/ablate.py", "--grid", grid.path, "--only", *NAMES, "--jobs", str(args.jobs), "--docs", str(root)]
    settings = [variant.settings.get("ae_ckpt", "") for variant in grid.variants.values()]
    start_from = sorted({Path(path) for path in settings if path.endswith(".pt")})
    chain = [
        Stage("harvest", harvest, [store]),
        Stage("packing", pack, [Path(grid.data) / "train" / "meta.json"]),
        Stage("training and evaluation", ablate, [], [Path(grid.path), *start_from]),
    ]
    for name in NAMES[:2]:
        student = grid.run(name, grid.variants[name].seeds[0]).checkpoint
        write = ["infer.py", "--student", str(student), "--prompt", args.sample, "--echo", "--max_new_tokens", "160"]
        chain.append(Stage(f"sample of {name}", write, [], stdout=root / f"sample_{name}.txt"))
    return chain


def closed(ce: dict[str, Any], kd: dict[str, Any]) -> float:
    """The share of the student's KL to the teacher that the soft targets take away."""
    return 1 - kd["kl_to_teacher"] / ce["kl_to_teacher"]


def compared(grid: Grid, rows: Rows) -> Rows:
    """The rows of NAMES of the seeds that all of them have in the grid; what lies there of others is of earlier grids."""
    seeds = set.intersection(*(set(grid.variants[name].seeds) for name in NAMES))
    return {(name, seed): rows[name, seed] for name in NAMES for seed in seeds}


def report(root: Path, rows: Rows, teacher: str, written: str) -> str:
    """The comparison as Markdown."""
    seeds = sorted({seed for name, seed in rows if name == "student_kd"})
    columns = (
        ("KL(teacher, model), nats", "kl_to_teacher", ".4f"), ("NLL, nats/token", "nats_per_token", ".4f"),
        ("bits per byte", "bits_per_byte", ".4f"), ("BrierLM, all positions", "brier_lm_all", ".3f"),
        ("training s", "train_seconds", ".0f"),
    )  # fmt: skip
    lines = [
        "# Distillation report",
        "",
        f"Teacher: {teacher}. Held-out text of the teacher; KL over its top words and the rest, each position after the first "
        "chunk of a window. `_ce` learned from its text alone, `_kd` from its text and soft targets, in as many steps.",
        "",
        "| model | seed | " + " | ".join(title for title, _, _ in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for name in NAMES:
        for seed in seeds:
            row = rows[name, seed]
            cells = ["-" if row.get(key) is None else format(row[key], style) for _, key, style in columns]
            lines.append(f"| {name} | {seed} | {' | '.join(cells)} |")
    shares = ", ".join(f"{closed(rows['student_ce', s], rows['student_kd', s]):.0%} (seed {s})" for s in seeds)
    lines += ["", f"Of the KL that the student has left after cross-entropy alone, the soft targets close {shares}.", ""]
    lines += ["## Side by side", "", "The teacher:", "", f"```\n{written}\n```", ""]
    for path in sorted(root.glob("sample_*.txt")):
        text = path.read_text(encoding="utf-8").strip()[:SHOWN]
        lines += [f"{path.stem.removeprefix('sample_')}:", "", f"```\n{text}\n```", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder of a causal language model [the demo's token-level model]")
    parser.add_argument(
        "--prompts", help="packed data to take prompts from [none: start of text; the demo's teacher: its data]"
    )
    parser.add_argument("--grid", default="configs/ablate_distill_demo.yaml", help="what to train [%(default)s]")
    parser.add_argument("--n_tokens", type=int, default=150_000, help="tokens to harvest [%(default)s]")
    parser.add_argument("--sample", default="Once upon a time", help="beginning of the samples [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time [1]")
    args = parser.parse_args()
    grid, demo, begin = load_grid(args.grid), Path("runs/demo"), time.time()
    for name in NAMES:
        known(name, grid.variants, args.grid, "variant")
    root = Path(grid.data).parent
    root.mkdir(parents=True, exist_ok=True)
    if args.teacher is None:
        if not (demo / "checkpoints/token_model.pt").exists():
            raise UserError("the demo's token-level model is the teacher: run `make demo` first, or give --teacher")
        args.teacher, args.prompts = root / "token-model", args.prompts or demo / "packed"
        export_token_model(demo / "checkpoints/token_model.pt", args.teacher)
    with serving(Path(args.teacher), root / "teacher.log") as url:
        os.environ |= {"VENICE_BASE_URL": url, "VENICE_API_KEY": "none"}
        if code := run_chain(root, stages(root, grid, args)):
            return code
    rows = compared(grid, read_rows(grid.output))
    with Store(store_of(root, Path(args.teacher)), must_exist=True) as store:
        first = next(iter(store)).answer["choices"][0]["text"]
    text = report(root, rows, Path(args.teacher).name, first.strip()[:SHOWN])
    (root / "report.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"all in {time.time() - begin:.0f} s; this report: {root / 'report.md'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_cli(main)
