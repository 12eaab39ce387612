"""Continue a prompt with a trained student. The text goes to standard output, the figures to standard error.

python infer.py --ae checkpoints/ae.pt --student checkpoints/student.pt --prompt "def main():" --max_new_tokens 128
"""

from __future__ import annotations

import argparse
import io
import sys
import time

from configs.errors import UserError, run_cli
from configs.run import pick_device, tune_process, wants_compile
from student.fast import FastSampler
from student.sampler import SamplingParams, load_sampler


def standard_input() -> str:
    """All of it, as UTF-8 whatever the locale. Raises UserError for what is not."""
    try:
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", newline="").read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt -: expected UTF-8 on standard input, got byte {error.object[error.start]:#04x}; convert it, for example "
            "with iconv -t UTF-8"
        ) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="checkpoints/student.pt", help="student checkpoint [checkpoints/student.pt]")
    parser.add_argument(
        "--ae", help="autoencoder checkpoint it was trained from: checked to fit (the student carries its own copy)"
    )
    parser.add_argument("--prompt", required=True, help="text to continue; - reads standard input")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy [0.8]")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--top_k", type=int, default=0, help="0 is off [0]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="stop before this string; may be given again")
    parser.add_argument("--stream", action="store_true", help="print each chunk as it comes")
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    parser.add_argument(
        "--truncate_prompt", action="store_true", help="keep the end of a prompt that is too long instead of refusing it"
    )
    parser.add_argument(
        "--compile", action="store_true", help="the fast path: compiles for a minute or two the first time, and is kept on disk"
    )
    parser.add_argument("--words", type=int, default=0, help="with --compile: words of the vocabulary screen, 0 is exact [0]")
    parser.add_argument("--rank", type=int, help="with --words: rank of the screen [64]")
    parser.add_argument(
        "--int8", action="store_true", help="with --compile: the vocabulary in 8 bits; on a CPU faster, and not quite exact"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto [auto]")
    args = parser.parse_args()
    if not args.compile and (args.int8 or args.words):
        raise UserError(f"{'--int8' if args.int8 else '--words'} belongs to the fast path; add --compile")
    if args.rank is not None and not args.words:
        raise UserError("--rank belongs to the vocabulary screen; add --compile --words N")
    params = SamplingParams(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed, tuple(args.stop))
    text = standard_input() if args.prompt == "-" else args.prompt
    threads = tune_process()
    device = pick_device(args.device)
    sampler = load_sampler(args.student, args.ae, device)
    if args.compile:
        wants_compile(True, device)
        sampler = FastSampler(sampler.model, sampler.tokenizer, words=args.words, rank=args.rank, int8=args.int8)
    prompt = sampler.tokenizer.encode(text)
    if args.truncate_prompt and len(prompt) > (room := sampler.room(params.max_new_tokens)) > 0:
        print(f"the prompt's last {room} of {len(prompt)} tokens are used", file=sys.stderr)
        prompt = prompt[-room:]
    if isinstance(sampler, FastSampler):
        sampler.check(prompt, params.max_new_tokens)  # before the minute or two that compiling takes
        sampler.warm_up([params])
    if args.echo:
        print(sampler.tokenizer.decode(prompt), end="", flush=True)
    start = time.perf_counter()
    pieces, tokens, steps, first, reason = [], 0, 0, 0.0, None
    for chunk in sampler.stream([prompt], params):
        first = first or time.perf_counter() - start
        pieces.append(chunk.text)
        if args.stream:
            print(chunk.text, end="", flush=True)
        tokens, steps, reason = tokens + len(chunk.token_ids), steps + 1, chunk.finish_reason
    seconds = time.perf_counter() - start
    print("" if args.stream else "".join(pieces))
    print(
        f"{steps} latent steps, {tokens} tokens ({len(prompt)} in the prompt), {tokens / seconds:.1f} tokens/s, "
        f"first chunk after {first * 1000:.0f} ms, finished by {reason}; {sampler.never.device}, {threads} threads",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_cli(main)
