"""Train and measure named variants on the same data, steps and seeds, and write what each part of the model buys.

    python tools/ablate.py --grid configs/ablate_small.yaml [--only NAME ...] [--jobs 2]

Each run is the project's own trainer, then tools/evaluate.py, in OUTPUT/NAME-sSEED (settings, metrics.jsonl, output.txt,
checkpoints); a line of OUTPUT/results.jsonl says how it ended. A run that is there with the same settings, data and input
checkpoints is not run again, an interrupted one goes on where it was. Last come the tables of docs/quality.md, the rows of
docs/quality.json and a plot; rows that stand there from runs made elsewhere stay as long as settings and data are the
grid's. The grid's YAML:

    data: data/packed              # packed data for all
    output: runs/ablate_small
    ae: checkpoints/ae.pt          # for all students; or settings of ae/train_ae.py, to train one
    seeds: [0]
    shared: {max_steps: 800}       # settings of all token models and students; those without a setting leave it out
    control: local_only            # the variant without latents
    token_model: token_model       # the variant that every other one is held against
    recommended: student           # optional
    max_windows: 448               # of validation text; unset: all
    variants:
      token_model: {model: token_model}
      local_only: {model: student, latents: none}
      student: {model: student}
      other: {model: student, ae_ckpt: "{ae4.ckpt}"}   # the checkpoint of variant ae4, of the same seed, trained before
      ae4: {model: ae, k: 4}       # trained once, with the first seed

A variant may have `seeds` of its own, and a `control` of its own (the same decoder without latents). With --jobs N, N runs
go on at once, each on its own cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import IO, Any

import yaml

from ae.ae_model import AEConfig
from configs.errors import UserError, run_cli
from configs.files import read_json, replace_text
from configs.run import asked_threads, load_checkpoint, saved_states, training_ended
from configs.schema import LMTrainConfig, config_from
from student.baseline import BackboneConfig
from student.flops import ae_training_flops, backbone_steps, optimizer_flops, training_flops
from student.student_model import StudentConfig
from tools.grid import TRAINERS, Rows, Run, current, digest, load_grid, lock_of, published, read_rows, same, write_row
from tools.plot import read_metrics
from tools.quality import read_page, write_quality

ROOT = Path(__file__).resolve().parent.parent


def finish(run: Run, identity: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """The row of a run that is trained and evaluated."""
    lines = read_metrics(run.folder)
    content = load_checkpoint(run.checkpoint, run.variant.model)
    end, seconds, curve, before = lines[-1], 0.0, [], None
    for line in lines:  # validation stands right behind the training line of its step, and is no training time
        if "loss" in line:
            seconds += line["time"] - (before["time"] if before else 0.0)
        elif "val_nats_per_token" in line:
            curve.append([line["tokens"], round(seconds, 1), line["val_nats_per_token"]])
        before = line
    row: dict[str, Any] = {"grid": run.grid.name, "name": run.variant.name, "model": run.variant.model, "seed": run.seed}
    row |= {"data": run.grid.data_id, "settings": run.variant.settings}
    row |= {"training_tokens": end["tokens"], "train_seconds": round(seconds, 1)}
    if run.variant.model == "ae":
        row |= {key: end[key] for key in ("chunk_exact", "token_exact")}
        flops = end["tokens"] * ae_training_flops(config_from(AEConfig, content["config"], run.title))
    else:
        shape, settings = (StudentConfig if run.variant.model == "student" else BackboneConfig), content["train_config"]
        cfg: BackboneConfig = config_from(shape, content["config"], run.title)
        train = config_from(TRAINERS[run.variant.model][1], settings, run.title)
        assert isinstance(train, LMTrainConfig)
        flops = end["tokens"] * training_flops(cfg, train) + end["step"] * optimizer_flops(cfg, train)
        measured = read_json(run.folder / "evaluation.json")[run.variant.model]
        curve.append([end["tokens"], round(seconds, 1), end.get("nats_per_token")])
        row |= {**measured, "k": cfg.k, "backbone_steps_per_token": backbone_steps(cfg)}
        row |= {"curve": [point for point in curve if point[2] is not None], "evaluation": run.grid.evaluation}
    needed = [rows[needed.variant.name, needed.seed] for needed in run.needs.values()]
    row["train_flops"] = flops
    row["inherited_flops"] = sum(r["train_flops"] + r["inherited_flops"] for r in needed)  # of checkpoints it began with
    row["environment"] = read_json(run.folder / "environment.json")
    row["threads"] = row["environment"]["threads"]  # the training's; it may be evaluated on others
    return {**row, "identity": identity, "checkpoint": digest(run.checkpoint)}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class Job:
    """A run in progress on some cores: its training, then its evaluation."""

    run: Run
    identity: dict[str, Any]
    cores: list[int]
    lock: IO[str]
    commands: list[list[str]]
    process: Popen[bytes] | None = None

    @property
    def threads(self) -> int:
        return min(len(self.cores), asked_threads(len(self.cores)))

    def begin_next(self) -> bool:
        """Begin the next command; False where there is none left."""
        if not self.commands:
            return False
        pin = (lambda: os.sched_setaffinity(0, self.cores)) if hasattr(os, "sched_setaffinity") else None
        with open(self.run.folder / "output.txt", "ab") as out:
            self.process = Popen(
                [sys.executable, *self.commands.pop(0)], stdout=out, stderr=out, preexec_fn=pin,
                pass_fds=[self.lock.fileno()],  # a child left behind still holds its run
                start_new_session=True,  # Ctrl-C reaches it once, from here
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONWARNINGS": "ignore"},
            )  # fmt: skip
        return True


def is_trained(run: Run) -> bool:
    return run.checkpoint.exists() and training_ended(run.folder)


def prepare(run: Run, identity: dict[str, Any]) -> list[list[str]]:
    """Make the run's folder ready; returns the commands that are left to run."""
    record, before = run.folder / "run.json", None
    if record.exists():
        before = read_json(record)
    if not same(before, identity):
        shutil.rmtree(run.folder, ignore_errors=True)
    for key, needed in run.needs.items():
        if not needed.checkpoint.exists():
            raise UserError(
                f"{run.title}: {key}: the checkpoint of {needed.title} is gone ({needed.checkpoint}); "
                f"remove its line from {run.grid.output / 'results.jsonl'} to train it again"
            )
    run.folder.mkdir(parents=True, exist_ok=True)
    replace_text(record, json.dumps(identity))
    told = run.folder / "settings.yaml"
    told.write_text(yaml.safe_dump(run.settings, sort_keys=False), encoding="utf-8")
    commands = []
    if not is_trained(run):
        script = str(ROOT / TRAINERS[run.variant.model][0])
        commands.append([script, "--config", str(told), *(["--resume"] if saved_states(run.state) else [])])
    if run.variant.model != "ae":
        flag = "--student" if run.variant.model == "student" else "--baseline"
        evaluate = [str(ROOT / "tools" / "evaluate.py"), flag, str(run.checkpoint), "--data", run.grid.data]
        evaluate += ["--first", str(run.grid.first), "--output", str(run.folder / "evaluation.json")]
        evaluate += ["--max_windows", str(run.grid.max_windows)] if run.grid.max_windows else []
        commands.append(evaluate)
    return commands


def end_of(job: Job) -> str | None:
    """What a finished command means: None to go on, else why the run failed."""
    assert job.process is not None
    if job.process.returncode:
        lines = (job.run.folder / "output.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.split("\r")[-1] for line in reversed(lines) if line.strip()), "")
        return f"exit code {job.process.returncode}: {last}"
    return None if is_trained(job.run) else "its training was stopped; the same command goes on from there"


def execute(runs: list[Run], jobs: int) -> dict[str, str]:
    """Run what is not there yet, `jobs` at a time; returns the runs that failed, with the reason."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if not 1 <= jobs <= len(cores):
        raise UserError(f"--jobs: expected 1 to {len(cores)}, the cores this process may use, got {jobs}")
    free = [cores[i * len(cores) // jobs : (i + 1) * len(cores) // jobs] for i in range(jobs)]
    waiting, active, failed, told = list(runs), list[Job](), dict[str, str](), set[str]()
    try:
        while waiting or active:
            rows = read_rows(runs[0].grid.output) if free else {}
            for run in list(waiting) if free else []:
                if broken := [needed.title for needed in run.needs.values() if needed.title in failed]:
                    failed[run.title] = f"it needs {', '.join(broken)}"
                    waiting.remove(run)
                elif current(run, rows):
                    waiting.remove(run)
                    say(f"{run.title}: done")
                elif free and (identity := run.identity(rows)):
                    lock = lock_of(run)
                    if lock is None:
                        if run.title not in told:
                            say(f"{run.title}: another process is at it; waiting for its end")
                        told.add(run.title)
                        continue
                    waiting.remove(run)
                    try:
                        job = Job(run, identity, free[0], lock, prepare(run, identity))
                    except UserError as error:
                        failed[run.title] = str(error)
                        lock.close()
                        continue
                    active.append(job)
                    del free[0]
                    job.begin_next()
                    say(f"{run.title}: on core {', '.join(map(str, job.cores))}; see {run.folder / 'output.txt'}")
            for job in list(active):
                if job.process is not None and job.process.poll() is None:
                    continue
                reason = end_of(job) if job.process else None
                if reason is None and job.begin_next():
                    continue
                active.remove(job)
                free.append(job.cores)
                if reason is None:
                    row = finish(job.run, job.identity, read_rows(job.run.grid.output))
                    write_row(job.run.grid.output, row)
                    for state in saved_states(job.run.state):  # six sevenths of its folder, and of no more use
                        state.unlink()
                    nats = row.get("nats_per_token")
                    say(f"{job.run.title}: {row['train_seconds']:.0f} s" + (f", {nats:.4f} nats per token" if nats else ""))
                else:
                    failed[job.run.title] = reason
                    say(f"{job.run.title}: failed: {reason}")
                job.lock.close()
            time.sleep(0.5)
    finally:  # asked to stop, or broken: let the trainings save
        for job in active:
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()  # the trainers save at it, and a background shell cannot switch it off
        for job in active:
            if job.process is not None:
                job.process.wait()
            job.lock.close()
    return failed


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", required=True, help="YAML file, see above")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants, and those they start from [all]")
    parser.add_argument("--docs", default="docs", help="folder of quality.md, quality.json and the plots [docs]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its own cores [1]")
    parser.add_argument("--report", action="store_true", help="run nothing: write the tables from what is there")
    args = parser.parse_args()
    grid = load_grid(args.grid)
    chosen = grid.runs(args.only)
    grid.check_files()
    for number in (signal.SIGINT, signal.SIGTERM):  # a background shell may have switched the first off
        signal.signal(number, _interrupt)
    told = read_page(args.docs).get("rows", [])
    kept = [row for run in grid.runs() if (row := published(run, told))]
    if other := sum(row["grid"] == grid.name and row not in kept for row in told):
        say(f"{args.docs}/quality.json: {other} rows of {grid.name} have other data or settings and give way")
    failed = {} if args.report else execute(chosen, args.jobs)
    rows = read_rows(grid.output)
    made, missing = [], []
    for run in grid.runs():
        if row := current(run, rows) or published(run, told):
            made.append(row)
        else:
            missing.append(run.title)
    print(write_quality(args.docs, grid, made, missing))
    if failed:
        raise UserError("; ".join(f"{title} failed ({reason})" for title, reason in failed.items()))


if __name__ == "__main__":
    run_cli(main)
