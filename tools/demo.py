"""The whole chain on the interpreter's own standard library: corpus -> tokenizer -> pack -> AE -> token-level model ->
student -> samples -> evaluate -> bench -> report.

    python tools/demo.py            # `make demo`; --quick for `make demo QUICK=1`

Every stage is one of the project's own commands. A finished stage is not run again as long as its command, its config
and the stages before it are the same; an interrupted training goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import EXIT_INTERRUPTED, UserError, run_cli
from configs.files import read_json, replace_text
from configs.run import saved_states, training_ended
from tools.grid import digest

PROMPTS = ("import os\nimport sys\n\n\ndef main():\n", "class Node:\n    def __init__(self, ")


@dataclass
class Stage:
    """One command of the chain. `outputs` and `stdout` must exist afterwards. A training has a run folder, and `state` is what
    it can resume from."""

    name: str
    command: list[str]
    outputs: list[Path]
    reads: list[Path] = field(default_factory=list)  # configs and checkpoints that its result depends on, by content
    state: Path | None = None
    stdout: Path | None = None
    run: Path | None = None


def stages(root: Path, quick: bool) -> list[Stage]:
    """The chain, writing below `root`."""
    corpus, tokenizer, packed, checkpoints = root / "corpus.jsonl", root / "tokenizer", root / "packed", root / "checkpoints"
    ae, token_model, student = (checkpoints / f"{name}.pt" for name in ("ae", "token_model", "student"))

    def train(name: str, script: str, checkpoint: Path, steps: int, *extra: str) -> Stage:
        config, run = Path(f"configs/demo_{checkpoint.stem}.yaml"), root / checkpoint.stem
        command = [script, "--config", str(config), "--data", str(packed), "--checkpoint_dir", str(checkpoints)]
        command += ["--run_dir", str(run), *extra]
        command += ["--set", f"max_steps={steps}"] if quick else []
        state, stdout = checkpoint.with_suffix(".state.pt"), root / f"{checkpoint.stem}.json"
        return Stage(name, command, [checkpoint], [config], state, stdout, run)

    models = ["--ae", str(ae), "--student", str(student)]
    both = [*models, "--baseline", str(token_model)]
    train_tokenizer = ["tools/train_tokenizer.py", "--input", str(corpus), "--output", str(tokenizer), "--vocab_size", "4096"]
    pack = ["tools/data_packing.py", "--input", str(corpus), "--output", str(packed), "--tokenizer", str(tokenizer)]
    evaluate = ["tools/evaluate.py", *both, "--data", str(packed), "--output", str(root / "evaluate.json")]
    bench = ["bench.py", *both, "--max_new_tokens", "128", "--output", str(root / "bench.json")]
    return [
        Stage("corpus", ["tools/get_corpus.py", "--output", str(corpus), *(["--max_files", "200"] if quick else [])], [corpus]),
        Stage("tokenizer", train_tokenizer, [tokenizer]),
        Stage(
            "packing", [*pack, "--seq_len", "512", "--k", "8"], [packed / "train" / "meta.json", packed / "val" / "meta.json"]
        ),
        train("autoencoder", "ae/train_ae.py", ae, 60),
        train("token model", "student/baseline.py", token_model, 24),
        train("student", "student/train_student.py", student, 24, "--ae_ckpt", str(ae)),
        *(
            Stage(f"sample {i}", ["infer.py", *models, "--prompt", prompt, "--echo"], [], stdout=root / f"sample_{i}.txt")
            for i, prompt in enumerate(PROMPTS, 1)
        ),
        Stage(
            "evaluation",
            [*evaluate, "--max_windows", "8" if quick else "448"],
            [root / "evaluate.json"],
            stdout=root / "evaluate.txt",
        ),
        Stage("benchmark", [*bench, "--repeats", "1" if quick else "3"], [root / "bench.json"], stdout=root / "bench.txt"),
        Stage("report", ["tools/report.py", str(root)], [root / "report.md"]),
    ]


def run_stage(stage: Stage, resume: bool) -> None:
    """Run one command; raises UserError with its exit code, and ends with 130 where it was interrupted."""
    command = [sys.executable, *stage.command, *(["--resume"] if resume else [])]
    out = open(stage.stdout, "w", encoding="utf-8") if stage.stdout else None
    try:
        # what the commands print for people goes to standard error; results lie in files
        process = subprocess.Popen(command, stdout=out or sys.stderr, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:  # the command got the same Ctrl-C: let it save
                continue
    finally:
        if out:
            out.close()
    if code in (EXIT_INTERRUPTED, -signal.SIGINT):  # the latter: before it had loaded what says it
        raise KeyboardInterrupt
    if code:
        raise UserError(
            f"the stage {stage.name!r} failed with exit code {code}: {' '.join(command[:8])} ...; its own message is above"
        )


def run_chain(root: Path, chain: list[Stage]) -> int:
    """Run the stages that are not done yet, keeping the record of `root`/stages.json; returns an exit code."""
    root.mkdir(parents=True, exist_ok=True)
    record_path, key = root / "stages.json", ""
    record = read_json(record_path) if record_path.exists() else {}
    for number, stage in enumerate(chain, 1):
        key = hashlib.sha256(json.dumps([key, stage.command, *map(digest, stage.reads)]).encode()).hexdigest()
        before = record.get(stage.name, {})
        same = before.get("key") == key
        title = f"[{number:2}/{len(chain)}] {stage.name}"
        if same and "seconds" in before and all(path.exists() for path in [*stage.outputs, stage.stdout or root]):
            print(f"{title}: done before, in {before['seconds']:.0f} s", file=sys.stderr)
            continue
        print(f"{title} ...", file=sys.stderr, flush=True)
        spent = before.get("spent", 0.0) if same else 0.0
        start = time.time()
        resume = bool(same and stage.state and saved_states(stage.state))

        def note(result: str, stage: Stage = stage, key: str = key, start: float = start, spent: float = spent) -> None:
            record[stage.name] = {"key": key, result: round(spent + time.time() - start, 1)}
            replace_text(record_path, json.dumps(record, indent=1))

        if not same and stage.state:
            for old in saved_states(stage.state):  # of another training, which this one must not go on from
                old.unlink()
        note("spent")  # first, so that a killed training is resumed too
        try:
            run_stage(stage, resume)
            if stage.run and not training_ended(stage.run):  # it was asked to stop: it saved, and exited with 0
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            note("spent")
            print(f"\ninterrupted in {stage.name!r}; the same command goes on from there", file=sys.stderr)
            return EXIT_INTERRUPTED
        note("seconds")
        if stage.name != "report":
            print(f"{title}: {record[stage.name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same chain with a few steps of training, some minutes")
    parser.add_argument("--output", help="where everything is written [runs/demo, or runs/demo-quick]")
    args = parser.parse_args()
    root = Path(args.output or ("runs/demo-quick" if args.quick else "runs/demo"))
    begin = time.time()
    if code := run_chain(root, stages(root, args.quick)):
        return code
    print((root / "report.md").read_text())
    print(f"all stages in {time.time() - begin:.0f} s; this report: {root / 'report.md'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_cli(main)
