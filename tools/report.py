"""Write the report of a demo run from what its stages left: report.md, loss.png, nll_by_position.png.

python tools/report.py runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from configs.errors import UserError, run_cli
from configs.files import read_json
from tools.plot import loss_curves, nll_by_position, read_metrics

MODELS = ("token_model", "student")


def report(root: Path) -> str:
    """The report as Markdown; draws its two plots into `root`."""
    try:
        figures, bench, times = (read_json(root / f"{name}.json") for name in ("evaluate", "bench", "stages"))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is not there yet; run `make demo` first") from None
    token_model, student, ae, where = figures["token_model"], figures["student"], figures["ae"], bench["environment"]
    loss_curves({name: root / name for name in MODELS}, root / "loss.png")
    nll_by_position({name: figures[name]["nll_by_position"] for name in MODELS}, root / "nll_by_position.png")
    trained = {name: read_metrics(root / name)[-1] for name in ("ae", "token_model", "student")}
    if young := [name for name, last in trained.items() if not last.get("final")]:
        raise UserError(f"the training of {', '.join(young)} in {root} has not ended; `make demo` goes on with it")
    k = len(student["nll_by_position"])
    rows = [
        ("training tokens", *(f"{trained[n]['tokens']:,}" for n in MODELS)),
        ("training time, s (validation included)", *(f"{times[n]['seconds']:.0f}" for n in ("token model", "student"))),
        *(
            (title, format(token_model[key], style), format(student[key], style))
            for title, key, style in (
                ("bits per byte", "bits_per_byte", ".4f"),
                ("NLL, nats per token", "nats_per_token", ".4f"),
                ("BrierLM, n-grams from the chunk start", "brier_lm", ".3f"),
                ("BrierLM, n-grams from all positions", "brier_lm_all", ".3f"),
            )
        ),
        ("cost of another document's latents, nats per token", "-", f"{student['latent_swap_cost']:.4f}"),
        (f"backbone steps for {bench['student']['tokens']} new tokens", *(str(bench[n]["backbone_steps"]) for n in MODELS)),
        ("tokens a second, batch 1, eager", *(f"{bench[n]['tokens_per_s']:.0f}" for n in MODELS)),
    ]
    brier = ""
    if token_model["brier_lm"] > 0:  # a model of a few steps can be worse than never committing
        brier = f", its BrierLM is {student['brier_lm'] / token_model['brier_lm']:.0%} of the other's"
    samples = [path.read_text(encoding="utf-8").rstrip() for path in sorted(root.glob("sample_*.txt"))]
    total = sum(stage["seconds"] for stage in times.values() if "seconds" in stage)
    lines = [
        "# Demo report",
        "",
        f"Text: the interpreter's standard library. {where['processor']}, {where['threads']} threads, torch {where['torch']}, "
        f"transformers {where['transformers']}, Python {where['python']}, commit {where['commit'] or 'unknown'}.",
        "",
        f"The autoencoder reconstructs {round(ae['chunk_exact'] * ae['chunks']):,} of {ae['chunks']:,} validation chunks of "
        f"{k} tokens exactly ({ae['token_exact']:.4%} of tokens), {ae['noisy_chunk_exact']:.2%} with N(0, 0.3) noise on the "
        "latent.",
        "",
        "| | token-level model | student |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"At equal training tokens the student's bits per byte are "
        f"{student['bits_per_byte'] / token_model['bits_per_byte'] - 1:+.1%} against the token-level model's{brier}. The "
        f"student starts from the autoencoder, which read {trained['ae']['tokens']:,} tokens before; the token-level model "
        "starts from random weights. If the cost of another document's latents is small, the local decoder does most of it.",
        "",
        "![training loss](loss.png)",
        "![NLL by position in the chunk](nll_by_position.png)",
        "",
        "## Samples of the student",
        "",
        *(f"```python\n{sample}\n```\n" for sample in samples),
        "## Stages",
        "",
        "| stage | seconds |",
        "|---|---|",
        *(f"| {name} | {stage['seconds']:.0f} |" for name, stage in times.items() if "seconds" in stage and name != "report"),
        f"| all | {total:.0f} |",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="runs/demo", help="a demo's folder [runs/demo]")
    root = Path(parser.parse_args().root)
    text = report(root)
    (root / "report.md").write_text(text, encoding="utf-8")
    print(root / "report.md")


if __name__ == "__main__":
    run_cli(main)
