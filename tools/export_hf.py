"""Write a token-level model as a folder that transformers loads, tokenizer included, so that it can be served as a teacher.

python tools/export_hf.py --baseline checkpoints/token_model.pt --output checkpoints/token_model-hf
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError, run_cli
from student.baseline import load_token_model
from student.sampler import checkpoint_tokenizer


def export_token_model(path: str | Path, output: str | Path) -> TokenizerAdapter:
    """`path`, a token-level model's checkpoint, as a folder in transformers' format (safetensors); returns its tokenizer."""
    model, content = load_token_model(path)
    tokenizer = checkpoint_tokenizer(content["tokenizer"], path)
    model.lm.config.eos_token_id = model.lm.generation_config.eos_token_id = tokenizer.eot_id  # type: ignore[union-attr]
    model.lm.config.pad_token_id = model.lm.generation_config.pad_token_id = tokenizer.pad_id  # type: ignore[union-attr]
    model.lm.save_pretrained(output)
    tokenizer.save(output)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", required=True, help="token-level model checkpoint")
    parser.add_argument("--output", required=True, help="folder to write")
    args = parser.parse_args()
    if Path(args.output).is_file():
        raise UserError(f"--output {args.output} is a file; name a folder")
    export_token_model(args.baseline, args.output)
    print(f"{args.output}: config.json, model.safetensors, tokenizer.json")


if __name__ == "__main__":
    run_cli(main)
