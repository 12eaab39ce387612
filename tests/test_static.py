"""The backbone as a decoding step, in the dtype that it runs in."""

from __future__ import annotations

import pytest
import torch
from conftest import make_student, make_token_model

from student.static import StaticBackbone, in_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_turned_as_in_training_whatever_the_weights_are(dtype: torch.dtype) -> None:
    """Frequencies rounded to bfloat16 turn position 2,047 by 2.5 rad too far or too little."""
    model, token_model = make_student(hidden_dim=64), make_token_model()
    made, stock = in_dtype(model, dtype), in_dtype(token_model, dtype)
    assert {p.dtype for p in made.parameters()} == {dtype} and {p.dtype for p in model.parameters()} == {torch.float32}
    ours, theirs = StaticBackbone(made.backbone, 2048), StaticBackbone(model.backbone, 2048)
    assert torch.equal(ours.cos, theirs.cos) and torch.equal(ours.sin, theirs.sin)
    told, own = (x.lm.model.rotary_emb.inv_freq for x in (stock, token_model))
    assert told.dtype == torch.float32 and torch.equal(told, own)
