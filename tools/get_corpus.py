"""The corpus that is always there: the standard library of the running Python, one document a file (about 31 MB).

    python tools/get_corpus.py --output data/corpus.jsonl [--max_files N]

Writes JSON lines {"text", "path"}, sorted by path. Files that are not UTF-8 (the library's own test cases) are counted
and left out, and so are installed packages.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from configs.errors import UserError, run_cli

LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


def library_files(root: Path) -> Iterator[Path]:
    """Python sources below `root`, relative to it, in an order that does not depend on the file system."""
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return iter(sorted((file for file in files if not LEFT_OUT & set(file.parts)), key=lambda file: file.as_posix()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="data/corpus.jsonl", help="JSON lines to write [%(default)s]")
    parser.add_argument("--max_files", type=int, help="only so many, by path [all]")
    args = parser.parse_args()
    output, root = Path(args.output), Path(sysconfig.get_paths()["stdlib"])
    if args.max_files is not None and args.max_files < 1:
        raise UserError(f"--max_files: expected at least 1, got {args.max_files}")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; expected a file name such as {output / 'corpus.jsonl'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    written = skipped = size = 0
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for path in islice(library_files(root), args.max_files):
                raw = (root / path).read_bytes()
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:
                    skipped += 1
                    continue
                if text.strip():
                    file.write(json.dumps({"text": text, "path": path.as_posix()}, ensure_ascii=False) + "\n")
                    written, size = written + 1, size + len(raw)
        if not written:
            raise UserError(f"this Python has no library sources in {root}; give tools/data_packing.py a text of your own")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{output}: {written:,} files, {size / 1e6:.1f} MB of text; {skipped} files that are not UTF-8 left out")


if __name__ == "__main__":
    run_cli(main)
