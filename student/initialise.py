"""Start the student's backbone from a trained token-level model: its layers, its final norm, its scale.

The source is a checkpoint of `student/baseline.py`, or a local folder in transformers' format of the Llama or Qwen3 family.
A backbone position is a chunk here and a token there, so the copy is a start, not the same function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ae.initialise import read_folder
from configs.errors import UserError
from student.baseline import load_token_model
from student.student_model import Student


def load_source(path: str | Path) -> Any:
    """The causal model at `path`. Raises UserError for a missing, damaged or foreign one."""
    return load_token_model(path)[0].lm if Path(path).is_file() else read_folder(path)


def spread(layers: int, of: int) -> list[int]:
    """Which of `of` layers stand for `layers` ones: evenly, first and last included; the first ones where there are fewer."""
    if layers >= of or layers == 1:
        return list(range(min(layers, of)))
    return [round(i * (of - 1) / (layers - 1)) for i in range(layers)]


@torch.no_grad()
def copy_backbone(student: Student, name: str | Path) -> str:
    """Layers and final norm of the model at `name` into the student's backbone, its embeddings' scale into the norm before.

    A deeper source gives layers spread evenly over it. Returns what was copied. Raises UserError where the shapes differ.
    """
    if student.cfg.latents == "none":
        raise UserError("--init_from has no backbone to fill with --latents none; leave one of them out")
    source = load_source(name)
    ours, theirs, config = student.backbone, source.model, source.config
    shape = {
        "hidden_dim": config.hidden_size, "num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads,
        "head_dim": theirs.layers[0].self_attn.head_dim, "ffn_dim": config.intermediate_size,
        "rope_theta": config.rope_parameters["rope_theta"],
    }  # fmt: skip
    own = {**vars(student.cfg), "head_dim": student.cfg.head_width}
    if differ := [f"--{key} {value} (not {own[key]})" for key, value in shape.items() if own[key] != value]:
        raise UserError(f"--init_from {name} has other layers than this backbone; set {', '.join(differ)}")
    chosen = spread(len(ours.layers), len(theirs.layers))
    pairs = [(ours.norm, theirs.norm)] + [(ours.layers[i], theirs.layers[j]) for i, j in enumerate(chosen)]
    copied, total, left = 0, sum(p.numel() for p in ours.parameters()), set()
    for target, origin in pairs:
        given = dict(origin.named_parameters())
        for key, parameter in target.named_parameters():
            if key in given:
                parameter.copy_(given[key])
                copied += parameter.numel()
            else:
                left.add(key)
    scale = source.get_input_embeddings().weight.float().square().mean().sqrt()
    student.enter_norm.weight.fill_(scale)  # the layers expect inputs of the size of its embeddings
    student.start.mul_(scale)
    if (kind := config.rope_parameters["rope_type"]) != "default":
        left.add(f"the {kind} scaling of its rotary embedding")
    said = f"init from {name}: {copied:,} of the backbone's {total:,} parameters, layers {', '.join(map(str, chosen))}"
    return said + (f"; not copied: {', '.join(sorted(left))}" if left else "")
