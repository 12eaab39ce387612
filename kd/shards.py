"""A harvest over several machines: which prompts are a machine's own, and how the stores become one.

    python kd/harvest.py --shard 1/2 --store one.sqlite ...        # on one machine
    python kd/harvest.py --shard 2/2 --store two.sqlite ...        # on another, every other setting alike
    python kd/shards.py one.sqlite two.sqlite --output all.sqlite

A prompt belongs to the shard that a hash of its document names, in every pass over the documents. So the n shards of a
harvest ask for exactly what the harvest without --shard asks for, and no two of them for the same. --n_tokens is the
whole harvest's, of which each machine asks for the n-th part; --budget_usd is each machine's own.

The stores of one teacher are merged; an answer that several hold is kept once. The result is written beside --output
and renamed at the end: an interrupted merge leaves no --output, and is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError, run_cli
from kd.store import Store, canonical


@dataclass(frozen=True)
class Shard:
    """Shard `index` (from 1) of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """ "2/4" -> the second of four. Raises UserError."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise UserError(f"--shard {text}: expected i/n with i from 1 to n, such as 2/4")
        return cls(int(index), int(count))

    def takes(self, document: Mapping[str, Any]) -> bool:
        """Whether a document is this shard's."""
        digest = hashlib.blake2b(canonical(document), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.index - 1

    def share(self, n_tokens: int) -> int:
        """This shard's part of `n_tokens`, rounded up."""
        return -(-n_tokens // self.count)


def merge(paths: Sequence[Path], output: Path) -> dict[str, Any]:
    """Merge the stores in `paths` into the new store `output`; returns counts, of which `in_several` are answers left out.

    Raises UserError where a store is missing or damaged, where the teachers differ, and where `output` exists.
    """
    if output.exists():
        raise UserError(f"--output {output} exists already; choose another name, or move it away")
    models: set[str] = set()
    for path in paths:
        with Store(path, must_exist=True) as store:
            store.check()
            models |= store.models()
    if len(models) > 1:
        raise UserError(f"these stores are of different teachers ({', '.join(sorted(models))}); merge those of one")
    unfinished = output.with_name(f".{output.name}.tmp")
    for leftover in output.parent.glob(f"{unfinished.name}*"):  # of an interrupted merge, SQLite's own files included
        leftover.unlink()
    read = 0
    with Store(unfinished) as merged:
        for path in paths:
            with Store(path, must_exist=True) as store:
                read += len(store)
                merged.merge(store)
        totals = merged.totals()
        merged.settle()  # closing would try the same, and tell nobody where it fails
    unfinished.replace(output)
    return {"output": str(output), "models": sorted(models), "in_several": read - totals.answers, **vars(totals)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, help="SQLite files written by kd/harvest.py")
    parser.add_argument("--output", required=True, type=Path, help="the new store")
    args = parser.parse_args()
    done = merge(args.stores, args.output)
    print(
        f"{args.output}: {done['answers']:,} answers of {', '.join(done['models']) or 'no teacher'}, "
        f"{done['completion_tokens']:,} tokens, ${done['cost']:.4f}; {done['in_several']:,} were in several stores",
        file=sys.stderr,
    )
    print(json.dumps(done))


if __name__ == "__main__":
    run_cli(main)
