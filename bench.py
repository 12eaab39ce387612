"""Race the student against the token-level model of the same backbone, or time training.

    python bench.py --student checkpoints/student.pt --baseline checkpoints/token_model.pt --max_new_tokens 128
    python bench.py --race --scale cpu-100m --batch 1 32 --prompt_tokens 32 2048
    python bench.py --parts --scale cpu-100m --batch 32 --prompt_tokens 32 2048
    python bench.py --screen --student checkpoints/student.pt --data data/packed
    python bench.py --train --scale cpu-100m

The first compares both eager, at batch 1, in float32. `--race` runs both eager and compiled, in the machine's best dtype,
at every batch and prompt length asked for, and writes runs/race/race.json and a plot; `--parts` times the parts of the
compiled student's chunk; `--screen` measures what the vocabulary screen costs in quality; `--train` times training steps.
Same prompts, new tokens, threads and dtype for all; warmed up, alternating, medians with their range. Backbone steps, the
pass over the prompt among them, are counted by hooks and counters, not derived (but for transformers' compiled `generate`,
where a hook would be compiled away: one for each new token). Peak memory is that of a process of its own for each model.
Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ae.chunks import PackedData
from configs.errors import UserError, run_cli
from configs.run import check_fingerprint, environment, has_fast_bf16, pick_device, tune_process
from student import race, speed
from student.baseline import BackboneConfig, TokenModel, load_token_model
from student.compiled import FEW_ROWS
from student.drawing import Int8, Screen, Vocabulary
from student.fast import FastSampler
from student.parts import chunk_parts
from student.race import Ids, Lap
from student.sampler import Sampler, checkpoint_tokenizer, load_sampler
from student.student_model import Student, StudentConfig

EAGER = "the eager comparison"
READ_BY = {  # flags that only some of the modes read
    "prompts": (EAGER,),
    "scale": ("--race", "--parts", "--train"),
    **dict.fromkeys(("batch", "prompt_tokens", "words", "rank", "int8"), ("--race", "--parts")),
    **dict.fromkeys(("racers", "evaluate", "cell_seconds", "memory"), ("--race",)),
    **dict.fromkeys(("data", "windows", "ranks", "word_counts"), ("--screen",)),
}
PROMPTS = ("import os\nimport sys\n\n\ndef main():\n", "class Node:\n    def __init__(self, ", "def test_", '"""Utilities for ')


def finish(result: dict[str, Any], output: str | None) -> None:
    """The last line of what is printed, JSON, and the same in the file that was asked for."""
    line = json.dumps(result)
    print(line)  # first: writing may fail
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(line + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Shape:
    """An untrained pair of models: the backbone that both share, the token-level model's table, the student's own parts."""

    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    latent_dim: int
    embed_dim: int


SHAPES = {
    # 99 M parameters in the backbone; E : H about as in student_default.yaml (768 of 2048), in heads of 64
    "cpu-100m": Shape(768, 12, 6, 3, 2816, 32768, latent_dim=256, embed_dim=320),
    # Qwen3-0.6B but for the heads' width (64 here, 128 there)
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 3072, 151936, latent_dim=256, embed_dim=512),
    "tiny": Shape(32, 2, 2, 1, 64, 320, latent_dim=16, embed_dim=32),  # for the tests
}


@dataclass
class Pair:
    """What races: a student and a token-level model with the same tokens, and bits per byte where they are trained."""

    student: Student
    token_model: TokenModel
    tokenizer: Any
    trained: bool
    bits_per_byte: dict[str, float]

    def model(self, racer: str) -> Student | TokenModel:
        return self.student if racer.startswith("student") else self.token_model


def load_trained(args: argparse.Namespace, kind: str, device: torch.device) -> tuple[Any, Any]:
    """The student or the token-level model that the flags name, and its tokenizer."""
    if kind == "student":
        sampler = load_sampler(args.student, args.ae, device)
        return sampler.model, sampler.tokenizer
    model, content = load_token_model(args.baseline)
    return model.to(device), checkpoint_tokenizer(content["tokenizer"], args.baseline)


def make_untrained(args: argparse.Namespace, kind: str, device: torch.device, positions: int) -> Student | TokenModel:
    """A model of --scale with random weights and room for `positions` chunks."""
    shape, k = vars(SHAPES[args.scale]).copy(), 8
    own = {name: shape.pop(name) for name in ("latent_dim", "embed_dim")}
    torch.manual_seed(0)
    base = {**shape, "seq_len": positions, "k": k}
    with device:
        if kind == "token":
            return TokenModel(BackboneConfig(**base)).eval()
        student = Student(StudentConfig(**base, **own, ae_layers=4, pad_id=1, **speed.recipe(own["embed_dim"]))).eval()
    for name, parameter in student.named_parameters():
        if name in ("exit.weight", "bypass.weight", "local.exit.weight", "local.memory.out.weight"):  # they start at zero
            nn.init.normal_(parameter, std=0.02)
    return student


def make_pair(args: argparse.Namespace, device: torch.device, positions: int) -> Pair:
    """The models of --scale. Raises UserError for trained ones whose quality is not told: speed alone says nothing."""
    if args.scale != "demo":
        student, model = (make_untrained(args, kind, device, positions) for kind in ("student", "token"))
        assert isinstance(student, Student) and isinstance(model, TokenModel)
        return Pair(student, model, Ids(SHAPES[args.scale].vocab_size), False, {})
    (student, tokenizer), (model, other) = (load_trained(args, kind, device) for kind in ("student", "token"))
    check_fingerprint(other.fingerprint, tokenizer.fingerprint, args.baseline, args.student)
    path = Path(args.evaluate or Path(args.student).parent.parent / "evaluate.json")
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        bits = {name: figures[key]["bits_per_byte"] for name, key in (("token", "token_model"), ("student", "student"))}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--race needs the models' bits per byte, from {path}: write it with tools/evaluate.py --student "
            f"{args.student} --baseline {args.baseline} --data DIR --output FILE, and give --evaluate FILE"
        ) from None
    return Pair(student, model, tokenizer, True, bits)


def prompts_of(tokenizer: Any, rows: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of one length: random ids, since what is written does not matter here."""
    ids = torch.randint(2, tokenizer.size, (rows, length), generator=torch.Generator().manual_seed(seed))
    stop = set(tokenizer.stop_ids) | {tokenizer.pad_id}
    return [[2 if i in stop else i for i in row] for row in ids.tolist()]


# ------------------------------------------------------------------------------------------------------------ race
def run_race(args: argparse.Namespace, device: torch.device) -> None:
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    cells = [(p, b) for p in args.prompt_tokens for b in args.batch]
    new = {b: min(args.max_new_tokens, max(32, 2048 // b)) for b in args.batch}
    most = max(race.positions_for(prompt, new[batch], 8) for prompt, batch in cells)
    pair = make_pair(args, device, most + 1)
    k = pair.student.cfg.k
    new = {b: n // k * k for b, n in new.items()}  # whole chunks: the last one takes as long whatever is asked of it
    if min(new.values()) <= k:
        raise UserError(f"--max_new_tokens: expected at least two chunks of {k}, got {args.max_new_tokens}")
    speeds, where = race.bandwidth(device), environment()
    rows: list[dict[str, Any]] = []
    result = {"rows": rows, "bandwidth_bytes_per_s": speeds, "dtype": str(dtype), "rank": args.rank, "environment": where}
    folder = Path(args.output or "runs/race/race.json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for prompt, batch in cells:
        if race.positions_for(prompt, new[batch], k) > pair.student.cfg.seq_len:
            race.say(f"left out: {prompt} prompt tokens and {new[batch]} new ones, the context is {pair.student.cfg.context}")
            continue
        rows += race_cell(args, pair, dtype, prompt, batch, new[batch], speeds)
        folder.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")  # later cells may fail
    race.plot(rows, folder.with_suffix(".png"))
    kind = "trained" if pair.trained else "untrained shapes: speed only"
    screens = "" if args.int8 or args.words == 0 else f"screens of rank {args.rank}, "
    print(
        f"{args.scale} ({kind}), {dtype}, {screens}{where['threads']} threads, "
        f"{where['gpu'] if device.type == 'cuda' else where['processor']}, torch {where['torch']}; "
        f"copies {speeds['copy'] / 1e9:.1f} GB/s, reads {speeds['read'] / 1e9:.1f} GB/s"
    )
    race.table(rows)
    print(json.dumps(result))


def run_parts(args: argparse.Namespace, device: torch.device) -> None:
    """Where the time of the compiled student's chunk goes, at every batch and prompt length."""
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    where = environment()
    if args.scale == "demo":
        student, tokenizer = load_trained(args, "student", device)
    else:
        longest = race.positions_for(max(args.prompt_tokens), 8, 8)
        student, tokenizer = make_untrained(args, "student", device, longest), Ids(SHAPES[args.scale].vocab_size)
    k = student.cfg.k
    rows: list[dict[str, Any]] = []
    for prompt, batch in itertools.product(args.prompt_tokens, args.batch):
        positions = race.positions_for(prompt, k, k)
        sampler = FastSampler(student, tokenizer, slots=batch, positions=positions, dtype=dtype, **vocabulary_for(args, batch))
        made = chunk_parts(sampler, prompts_of(tokenizer, batch, prompt, 0), race.settings(k, 0), 10 * args.repeats)
        rows += [{"scale": args.scale, "batch": batch, "prompt_tokens": prompt, **vars(part)} for part in made]
    print(f"{args.scale}, {dtype}, {where['threads']} threads, {where['processor']}, torch {where['torch']}")
    print(f"{'batch':>6}{'prompt':>8}  {'part':22}{'ms':>9}{'times':>7}{'ms a chunk':>12}")
    for r in rows:
        print(
            f"{r['batch']:>6}{r['prompt_tokens']:>8}  {r['name']:22}{r['ms']:>9.3f}{r['times']:>7}{r['ms'] * r['times']:>12.2f}"
        )
    finish({"rows": rows, "dtype": str(dtype), "environment": where}, args.output)


def vocabulary_for(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Words and rank of the screen, or int8, which in large batches is slower than the exact product."""
    return {"int8": batch <= FEW_ROWS} if args.int8 else {"words": args.words, "rank": args.rank}


def race_cell(
    args: argparse.Namespace, pair: Pair, dtype: torch.dtype, prompt: int, batch: int, new: int, speeds: dict[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one batch size and prompt length."""
    prompts, k, vocabulary = prompts_of(pair.tokenizer, batch, prompt, 0), pair.student.cfg.k, vocabulary_for(args, batch)
    torch._dynamo.reset()
    let_go()
    shape: dict[str, Any] = {"rows": batch, "prompt": prompt, "new": new, "dtype": dtype}
    racers = {  # all of them before one is compiled: what cannot race is refused at once
        name: race.make_racer(name, pair.model(name), pair.tokenizer, **shape, **vocabulary) for name in args.racers
    }
    for name, racer in racers.items():
        start = time.perf_counter()
        racer.run(prompts, new, 0)  # transformers' static cache is as long as was asked for first
        race.say(f"{args.scale}, batch {batch}, {prompt} prompt tokens: {name} warm after {time.perf_counter() - start:.0f} s")
    laps: dict[str, list[Lap]] = {name: [] for name in racers}
    start = time.perf_counter()
    for repeat in range(args.repeats):
        for name, racer in racers.items():
            laps[name].append(racer.run(prompts, new, repeat))
        if time.perf_counter() - start > args.cell_seconds:
            break
    rates = {name: statistics.median(lap.tokens_per_s(batch) for lap in runs) for name, runs in laps.items()}
    tables = {name: vocabulary_of(racer) for name, racer in racers.items()}
    racers.clear()  # the children that `peak_of` starts need the room
    del racer
    let_go()
    out = []
    for name, runs in laps.items():
        student = name.startswith("student")
        fast = tables[name]
        cfg = pair.student.cfg if student else pair.token_model.cfg
        flops, read = race.cost(cfg, fast, batch, prompt + new // 2, dtype.itemsize)
        rate, written = rates[name], [lap.tokens_per_s(batch) for lap in runs]
        steps = runs[0].backbone_steps
        out.append({
            "scale": args.scale, "racer": name, "words": fast.words if isinstance(fast, Screen) else 0,
            "int8": isinstance(fast, Int8), "batch": batch, "prompt_tokens": prompt, "new_tokens": new,
            "tokens_per_s": rate, "tokens_per_s_range": [min(written), max(written)], "repeats": len(runs),
            "ms_per_step": 1000 * batch * (k if student else 1) / rate,
            "ttft_s": statistics.median(lap.first_s for lap in runs), "peak_mb": peak_of(args, name, prompt, batch, new),
            "backbone_steps": steps, "flops_per_token": flops, "bytes_per_token": read,
            "bandwidth_share": read * rate / speeds["copy"] if batch == 1 else None,
            "bits_per_byte": pair.bits_per_byte.get(name.split("-")[0]),
            "ratio_to_compiled_token_model": rate / rates["token-compiled"] if "token-compiled" in rates else None,
        })  # fmt: skip
    return out


def let_go() -> None:
    """Free what earlier racers held: they are cycles, and a GPU's allocator keeps what it has."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def vocabulary_of(racer: Any) -> Vocabulary | None:
    """What a racer on the fast path multiplies by; None for transformers' own product."""
    step = getattr(getattr(racer, "sampler", None), "token_step", None) or getattr(
        getattr(racer, "model", None), "program", None
    )
    return getattr(step, "vocabulary", None)


def peak_of(args: argparse.Namespace, name: str, prompt: int, batch: int, new: int) -> float | None:
    """Peak memory, MiB, of a fresh process that runs one racer of a cell; None where --memory leaves it out, or that fails."""
    first = (prompt, batch) == (args.prompt_tokens[0], args.batch[0])
    if args.memory == "none" or (args.memory == "first" and not first):
        return None
    flags = {"scale": args.scale, "student": args.student, "baseline": args.baseline, "device": args.device}
    flags |= {"batch": batch, "prompt_tokens": prompt, "max_new_tokens": new, "rank": args.rank, "words": args.words}
    try:
        return peak_in_child(name, ["--race", *(["--int8"] if args.int8 else [])], flags)
    except UserError as error:  # for want of memory, say: the cell's rates are measured by then
        race.say(str(error))
        return None


def peak_in_child(name: str, mode: Sequence[str], flags: dict[str, Any]) -> float:
    """Peak memory, MiB, of a fresh process that runs one racer. Raises UserError where that fails, for want of memory say."""
    command = [sys.executable, __file__, *mode, "--peak_of", name]
    command += [str(x) for flag, value in flags.items() for x in (f"--{flag}", value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]  # one that the system ends says nothing
        raise UserError(f"measuring the memory of {name} failed: {said[-1]}; free some, or --race with --memory none")
    return float(done.stdout.splitlines()[-1])


def print_peak(args: argparse.Namespace, device: torch.device) -> None:
    """What `peak_in_child` starts: load one model, continue once, print the peak."""
    if args.race:
        dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
        batch, prompt, new = args.batch[0], args.prompt_tokens[0], args.max_new_tokens
        kind = args.peak_of.split("-")[0]
        if args.scale == "demo":
            model, words_of = load_trained(args, kind, device)
        else:
            positions = race.positions_for(prompt, new, 8) + 1
            model, words_of = make_untrained(args, kind, device, positions), Ids(SHAPES[args.scale].vocab_size)
        vocabulary = vocabulary_for(args, batch)
        racer = race.make_racer(args.peak_of, model, words_of, rows=batch, prompt=prompt, new=new, dtype=dtype, **vocabulary)
        del model  # a racer on the fast path has weights of its own: what is told is the running's, not the loading's
        let_go()
        forget_peak(device)
        racer.run(prompts_of(words_of, batch, prompt, 0), new, 0)
    else:
        racer, tokenizer = eager_racer(args.peak_of, args, device)
        racer.run([tokenizer.encode(args.prompts[0])], args.max_new_tokens, 0)
    gpu = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
    print(gpu or own_peak())


def forget_peak(device: torch.device) -> None:
    """Begin the peak anew: of the GPU's memory, or of this process's where it runs Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a kernel or a C library without it: the peak holds the loading's
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is kept otherwise (`tune_process`)
            Path("/proc/self/clear_refs").write_text("5")


def own_peak() -> float:
    """The largest resident memory of this process, MiB. (The system's ru_maxrss begins with that of the parent.)"""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ----------------------------------------------------------------------------------------------------------- eager
def eager_racer(name: str, args: argparse.Namespace, device: torch.device) -> tuple[race.Racer, Any]:
    """A checkpoint's eager racer in float32, and its tokenizer."""
    if name == "student":
        sampler = load_sampler(args.student, args.ae, device)
        return race.StudentEager(sampler), sampler.tokenizer
    model, content = load_token_model(args.baseline)
    return race.TokenEager(model.to(device)), checkpoint_tokenizer(content["tokenizer"], args.baseline)


def run_eager(args: argparse.Namespace, device: torch.device, threads: int) -> None:
    """Both checkpoints, eager, batch 1, on given prompts."""
    loaded = {name: eager_racer(name, args, device) for name in ("token_model", "student")}
    if len({tokenizer.fingerprint for _, tokenizer in loaded.values()}) > 1:
        raise UserError("the two models use different tokenizers; their tokens/s cannot be compared")
    prompts = [loaded["student"][1].encode(text) for text in args.prompts]
    sampler: Sampler = loaded["student"][0].sampler  # type: ignore[attr-defined]
    for prompt in prompts:
        sampler.check(prompt, args.max_new_tokens)
    laps: dict[str, list[Lap]] = {name: [] for name in loaded}
    for racer, _ in loaded.values():  # warm-up
        racer.run([prompts[0]], args.max_new_tokens, 0)
    for repeat in range(args.repeats):
        for prompt in prompts:
            for name, (racer, _) in loaded.items():
                laps[name].append(racer.run([prompt], args.max_new_tokens, repeat))
    result: dict[str, Any] = {}
    for name, runs in laps.items():
        rates = [lap.tokens / lap.seconds for lap in runs]
        assert {lap.tokens for lap in runs} == {args.max_new_tokens}
        flags = {"student": args.student, "baseline": args.baseline, "prompts": args.prompts[0], "device": args.device}
        peak = peak_in_child(name, [], {**flags, "max_new_tokens": args.max_new_tokens})
        result[name] = {
            "backbone_steps": runs[0].backbone_steps, "tokens": args.max_new_tokens, "tokens_per_s": statistics.median(rates),
            "tokens_per_s_range": [min(rates), max(rates)], "ttft_s": statistics.median(lap.first_s for lap in runs),
            "peak_mb": peak,
        }  # fmt: skip
    where = environment()
    print(
        f"{args.max_new_tokens} new tokens after each of {len(prompts)} prompts, {args.repeats} times, batch 1, float32, "
        f"eager; {threads} threads,\n{where['gpu'] if device.type == 'cuda' else where['processor']}, torch {where['torch']}, "
        f"transformers {where['transformers']}"
    )
    print(f"{'':14}{'backbone steps':>16}{'tokens/s':>12}{'(min .. max)':>20}{'first token':>14}{'peak memory':>14}")
    for name, r in result.items():
        spread = "({:.0f} .. {:.0f})".format(*r["tokens_per_s_range"])
        print(
            f"{name:14}{r['backbone_steps']:>16}{r['tokens_per_s']:>12.1f}{spread:>20}{r['ttft_s'] * 1000:>11.1f} ms"
            f"{r['peak_mb']:>10.0f} MiB"
        )
    result["speedup"] = result["student"]["tokens_per_s"] / result["token_model"]["tokens_per_s"]
    print(f"the student writes {result['speedup']:.2f}x as many tokens a second")
    result["environment"] = where
    finish(result, args.output)


# ---------------------------------------------------------------------------------------------------------- screen
def run_screen(args: argparse.Namespace, device: torch.device) -> None:
    """Quality of the vocabulary screen on validation text, by rank and words, and of the table in 8 bits."""
    sampler = load_sampler(args.student, args.ae, device)
    data = PackedData.pair(args.data)[1]
    check_fingerprint(data.fingerprint, sampler.tokenizer.fingerprint, args.data, args.student)
    batches = data.batches(sampler.cfg.context, 4, args.windows)
    rows = race.screen_quality(sampler.model, sampler.never, [b.to(device) for b in batches], args.ranks, args.word_counts)
    names = ("total_variation", "cut", "nucleus", "max_missed", "nats")
    print(f"{'table':>20}" + "".join(f"{name:>16}" for name in names))
    for row in rows:
        print(f"{row['table']:>20}" + "".join(f"{row[name]:>16.5g}" if name in row else f"{'-':>16}" for name in names))
    finish({"rows": rows, "environment": environment()}, args.output)


def refuse_stray_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise UserError for a flag that the mode does not read, where it is not what it would be anyway."""
    mode = next((f"--{name}" for name in ("race", "parts", "screen", "train") if getattr(args, name)), EAGER)
    for flag, modes in READ_BY.items():
        if mode not in modes and getattr(args, flag) != parser.get_default(flag):
            raise UserError(f"--{flag} is read by {' and '.join(modes)} alone, and this is {mode}; leave it out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--race", action="store_true", help="eager and compiled, at every batch and prompt length")
    mode.add_argument("--parts", action="store_true", help="where the time of the compiled student's chunk goes (CPU)")
    mode.add_argument("--screen", action="store_true", help="the vocabulary screen's quality on --data")
    mode.add_argument("--train", action="store_true", help="training steps: what each setting buys")
    parser.add_argument("--student", default="checkpoints/student.pt")
    parser.add_argument("--baseline", default="checkpoints/token_model.pt", help="token-level model checkpoint")
    parser.add_argument("--ae", help="autoencoder checkpoint: checked to fit the student")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="[128; --race: fewer in large batches]")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), metavar="TEXT")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes over the prompts [3]; --parts: ten times as many")
    parser.add_argument("--output", help="write the JSON there too [--race: runs/race/race.json]")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--scale", default="demo", choices=("demo", *SHAPES), help="--race, --parts, --train; demo: --student, --baseline"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="--race, --parts [1]")
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[32], help="--race, --parts [32]")
    parser.add_argument("--racers", nargs="+", default=list(race.RACERS), choices=(*race.RACERS, *race.EXTRA), metavar="NAME")
    parser.add_argument(
        "--words", type=int, default=0, help="--race, --parts: words of the vocabulary screen; 0: the exact product [0]"
    )
    parser.add_argument("--rank", type=int, default=64, help="--race, --parts: rank of the screen [64]")
    parser.add_argument(
        "--int8", action="store_true", help=f"--race, --parts: vocabulary in 8 bits up to batch {FEW_ROWS}, no screen"
    )
    parser.add_argument("--evaluate", help="--race: tools/evaluate.py's JSON [beside the checkpoints' folder]")
    parser.add_argument("--cell_seconds", type=float, default=300, help="--race: repeat a cell no further after that [300]")
    parser.add_argument("--memory", default="first", choices=("none", "first", "all"), help="--race: cells to measure it in")
    parser.add_argument("--data", default="data/packed", help="--screen: packed data")
    parser.add_argument("--windows", type=int, default=16, help="--screen: validation windows [16]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 128, 256], help="--screen")
    parser.add_argument("--word_counts", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="--screen")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # what --train starts
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)  # what peak_in_child starts
    args = parser.parse_args()
    if min(args.max_new_tokens, args.repeats, *args.batch, *args.prompt_tokens) < 1:
        raise UserError("--max_new_tokens, --repeats, --batch and --prompt_tokens: expected at least 1")
    if args.int8 and args.words:
        raise UserError(f"expected --int8 or --words, got both ({args.words} words); leave one out")
    refuse_stray_flags(args, parser)
    if args.train:
        shape = None if args.scale == "demo" else vars(SHAPES[args.scale])
        return finish(speed.main(args.variant, args.device, args.repeats, args.scale, shape), args.output)
    threads, device = tune_process(), pick_device(args.device)
    if args.parts and device.type != "cpu":
        raise UserError(f"--parts: expected the CPU, got {device}; torch.profiler shows a GPU's kernels")
    if args.int8 and device.type != "cpu":
        raise UserError(f"--int8: expected the CPU, got {device}; leave it out there, or give --device cpu")
    if args.peak_of:
        print_peak(args, device)
    elif args.race:
        run_race(args, device)
    elif args.parts:
        run_parts(args, device)
    elif args.screen:
        run_screen(args, device)
    else:
        run_eager(args, device, threads)


if __name__ == "__main__":
    run_cli(main)
