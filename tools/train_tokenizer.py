"""Train a byte-level BPE tokenizer on the documents that tools/data_packing.py would read.

    python tools/train_tokenizer.py --input data/corpus.jsonl --output data/tokenizer --vocab_size 4096

Writes a folder that the tokenizer adapter and transformers' AutoTokenizer load. Every byte has a token, so any text
survives a round trip; <|endoftext|> is id 0 and <|pad|> id 1. The same input gives the same tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from ae.tokenizer_adapter import END_OF_TEXT, PAD, TokenizerAdapter
from configs.errors import UserError, run_cli
from tools.data_packing import Corpus, add_corpus_arguments

SMALLEST = 256 + 2  # all bytes and the special tokens
LONGEST_TOKEN = 32  # bytes; longer ones are rulers of dashes and the like


def train(corpus: Corpus, vocab_size: int) -> TokenizerAdapter:
    """A tokenizer with exactly `vocab_size` entries. Raises UserError when the text is too little for that."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        with tqdm(total=corpus.bytes_total, unit="B", unit_scale=True, desc="reading", mininterval=0.5) as bar:
            for document in corpus:
                yield document.text
                bar.update(corpus.bytes_read - bar.n)

    tokenizer.train_from_iterator(texts(), trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        problems = corpus.problems.report()  # a wrong field's name may be why
        raise UserError(
            f"this text yields only {size} tokens: lower --vocab_size (from {vocab_size}) or bring more text"
            + (f"\n{problems}" if problems else "")
        )
    return TokenizerAdapter(tokenizer, {"eos_token": END_OF_TEXT, "pad_token": PAD}, None, None, "trained here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_arguments(parser)
    parser.add_argument("--output", default="data/tokenizer", metavar="DIR", help="folder to write [%(default)s]")
    parser.add_argument("--vocab_size", type=int, default=4096, help="entries, special tokens included [%(default)s]")
    args = parser.parse_args()
    if args.vocab_size < SMALLEST:
        raise UserError(f"--vocab_size must be at least {SMALLEST} (every byte, {END_OF_TEXT}, {PAD}), got {args.vocab_size}")
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is a file; expected a folder")
    corpus = Corpus(args.input, args.format, args.strict)
    tokenizer = train(corpus, args.vocab_size)
    tokenizer.save(args.output)
    print(f"{args.output}: {tokenizer.size:,} tokens, fingerprint {tokenizer.fingerprint}")
    if problems := corpus.problems.report():
        print(problems)


if __name__ == "__main__":
    run_cli(main)
