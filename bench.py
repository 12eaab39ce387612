"""Race the student against the token-level model of the same backbone, both eager.

    python bench.py --student checkpoints/student.pt --baseline checkpoints/token_model.pt --max_new_tokens 128

Same prompts, same number of new tokens, same threads and dtype; warmed up, then alternating A B A B. Backbone steps are
counted by a hook on each backbone, not derived. Peak memory is that of a process of its own for each model. Prints a
table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.generation.streamers import BaseStreamer

from configs.errors import UserError, run_cli
from configs.run import environment, pick_device, tune_process
from student.baseline import TokenModel, load_token_model
from student.sampler import Sampler, SamplingParams, checkpoint_tokenizer, load_sampler

PROMPTS = ("import os\nimport sys\n\n\ndef main():\n", "class Node:\n    def __init__(self, ", "def test_", '"""Utilities for ')


class Racer(Protocol):
    """A model that continues one prompt: returns the number of new tokens and the seconds to the first of them."""

    @property
    def backbone(self) -> torch.nn.Module: ...

    def run(self, prompt: Sequence[int], new_tokens: int, seed: int) -> tuple[int, float]: ...


class _FirstToken(BaseStreamer):
    """Notes when `generate` hands out its first new token (the prompt comes first)."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None: ...


class TokenRacer:
    """The token-level model through transformers' `generate`."""

    def __init__(self, model: TokenModel) -> None:
        self.model: Any = model.lm
        self.backbone: torch.nn.Module = model.lm.model

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], new_tokens: int, seed: int) -> tuple[int, float]:
        torch.manual_seed(seed)
        ids = torch.tensor([list(prompt)], device=self.model.device)
        streamer, start = _FirstToken(), time.perf_counter()
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=True,
            temperature=0.8, top_p=0.95, top_k=0, eos_token_id=None, pad_token_id=0, streamer=streamer,
        )  # fmt: skip
        return out.shape[1] - len(prompt), streamer.at - start


class StudentRacer:
    """The student through its sampler."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.backbone: torch.nn.Module = sampler.model.backbone

    def run(self, prompt: Sequence[int], new_tokens: int, seed: int) -> tuple[int, float]:
        start, first, tokens = time.perf_counter(), 0.0, 0
        for chunk in self.sampler.stream([prompt], SamplingParams(new_tokens, seed=seed, ignore_eot=True)):
            first = first or time.perf_counter() - start
            tokens += len(chunk.token_ids)
        return tokens, first


def count_calls(module: torch.nn.Module, run: Callable[[], Any]) -> int:
    """How often `module` is called while `run` runs."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = module.register_forward_hook(hook)
    try:
        run()
    finally:
        handle.remove()
    return calls


def load(name: str, path: str, device: torch.device) -> tuple[Racer, Any]:
    """A racer and its tokenizer."""
    if name == "student":
        sampler = load_sampler(path, device=device)
        if sampler.cfg.latents == "none":
            raise UserError(f"{path} was trained with --latents none: it has no backbone to race")
        return StudentRacer(sampler), sampler.tokenizer
    model, content = load_token_model(path)
    return TokenRacer(model.to(device)), checkpoint_tokenizer(content["tokenizer"], path)


def peak_mb(name: str, path: str, prompt: str, new_tokens: int, device: str) -> float:
    """Peak memory, MiB, of a fresh process that loads one model and continues one prompt."""
    command = [sys.executable, __file__, "--peak_of", name, "--student" if name == "student" else "--baseline", path]
    command += ["--prompts", prompt, "--max_new_tokens", str(new_tokens), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="checkpoints/student.pt")
    parser.add_argument("--baseline", default="checkpoints/token_model.pt", help="token-level model checkpoint")
    parser.add_argument("--ae", help="autoencoder checkpoint: checked to fit the student")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), metavar="TEXT")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes over the prompts [3]")
    parser.add_argument("--output", help="write the JSON there too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak_of", choices=("student", "token_model"), help=argparse.SUPPRESS)  # what peak_mb starts
    args = parser.parse_args()
    if args.max_new_tokens < 1 or args.repeats < 1:
        raise UserError("--max_new_tokens and --repeats: expected at least 1")
    threads, device = tune_process(), pick_device(args.device)
    paths = {"token_model": args.baseline, "student": args.student}
    if args.peak_of:
        racer, tokenizer = load(args.peak_of, paths[args.peak_of], device)
        racer.run(tokenizer.encode(args.prompts[0]), args.max_new_tokens, 0)
        gpu = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
        print(gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    if args.ae:
        load_sampler(args.student, args.ae)
    loaded = {name: load(name, path, device) for name, path in paths.items()}
    racers = {name: racer for name, (racer, _) in loaded.items()}
    if len({tokenizer.fingerprint for _, tokenizer in loaded.values()}) > 1:
        raise UserError("the two models use different tokenizers; their tokens/s cannot be compared")
    prompts = [loaded["student"][1].encode(text) for text in args.prompts]
    sampler = racers["student"].sampler  # type: ignore[attr-defined]
    for prompt in prompts:
        sampler.check(prompt, args.max_new_tokens)

    rates: dict[str, list[float]] = {name: [] for name in racers}
    firsts: dict[str, list[float]] = {name: [] for name in racers}
    steps = {}
    for name, racer in racers.items():  # warm-up, and the count
        steps[name] = count_calls(racer.backbone, partial(racer.run, prompts[0], args.max_new_tokens, 0))
    for repeat in range(args.repeats):
        for prompt in prompts:
            for name, racer in racers.items():
                start = time.perf_counter()
                tokens, first = racer.run(prompt, args.max_new_tokens, repeat)
                rates[name].append(tokens / (time.perf_counter() - start))
                firsts[name].append(first)
                assert tokens == args.max_new_tokens
    result: dict[str, Any] = {}
    for name in racers:
        result[name] = {
            "backbone_steps": steps[name],
            "tokens": args.max_new_tokens,
            "tokens_per_s": statistics.median(rates[name]),
            "tokens_per_s_range": [min(rates[name]), max(rates[name])],
            "ttft_s": statistics.median(firsts[name]),
            "peak_mb": peak_mb(name, paths[name], args.prompts[0], args.max_new_tokens, args.device),
        }
    where = environment()
    print(
        f"{args.max_new_tokens} new tokens after each of {len(prompts)} prompts, {args.repeats} times, batch 1, float32, "
        f"eager; {threads} threads,"
    )
    print(
        f"{where['gpu'] if device.type == 'cuda' else where['processor']}, torch {where['torch']}, "
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
    line = json.dumps(result)
    if args.output:
        Path(args.output).write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    run_cli(main)
