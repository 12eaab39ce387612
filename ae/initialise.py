"""Start the autoencoder's table from a trained language model's embedding; how a model in transformers' format is read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ae.ae_model import Autoencoder
from configs.errors import UserError
from configs.run import check_fingerprint, load_checkpoint

FAMILIES = ("llama", "qwen3")


def read_folder(path: str | Path) -> PreTrainedModel:
    """The causal model in a local folder (safetensors), float32. Raises UserError for a missing, damaged or foreign one."""
    if not Path(path).is_dir():
        raise UserError(f"--init_from {path} does not exist: expected a token_model.pt or a folder in transformers' format")
    try:
        family = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).model_type
        if family not in FAMILIES:
            raise UserError(f"--init_from {path} is of family {family!r}, expected one of {', '.join(FAMILIES)}")
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"--init_from {path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _embedding(path: str | Path, fingerprint: str) -> Tensor:
    """(words, width) of a token-level model's checkpoint or of a folder."""
    if Path(path).is_file():
        content = load_checkpoint(path, "token_model")
        check_fingerprint(content["tokenizer"]["fingerprint"], fingerprint, f"--init_from {path}", "--data")
        return content["state"]["lm.model.embed_tokens.weight"]
    return read_folder(path).get_parameter("model.embed_tokens.weight")


@torch.no_grad()
def copy_embedding(ae: Autoencoder, path: str | Path, fingerprint: str) -> str:
    """The embedding of the model at `path` into the autoencoder's table, scaled to rows of unit length on average.

    fingerprint: of the data's tokenizer. Returns what was copied. Raises UserError where the shapes differ, or a checkpoint is
    of another tokenizer (a folder in transformers' format does not say).
    """
    table, given = ae.embedding.weight, _embedding(path, fingerprint)
    if given.shape != table.shape:
        raise UserError(
            f"--init_from {path}: its embedding is {tuple(given.shape)} (words, width), the table {tuple(table.shape)}; "
            f"set --embed_dim {given.shape[1]} and use data packed with its tokenizer, or leave --init_from out"
        )
    table.copy_(given / given.float().norm(dim=1).mean())
    return f"init from {path}: the embedding, {given.numel():,} parameters"
