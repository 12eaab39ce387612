"""Starting from a trained language model: what is copied, what is said, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_AE, SMALL_LM, World, make_ae, make_student, run_script
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ae import train_ae
from ae.ae_model import load_ae
from ae.initialise import copy_embedding
from configs.errors import UserError
from student import train_student
from student.baseline import load_token_model
from student.initialise import copy_backbone, spread
from student.student_model import load_student

STORIES = Path(__file__).parents[2] / "shared" / "teachers" / "stories260k"


def qwen3(folder: Path, **changes: Any) -> Path:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 24,
    }
    shape |= {"num_hidden_layers": 5, "vocab_size": 320}
    Qwen3ForCausalLM(Qwen3Config(**shape, **changes, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


FITTING = {"hidden_dim": 32, "num_heads": 2, "num_kv_heads": 2, "ffn_dim": 48, "head_dim": 24}


def test_layers_are_spread_evenly() -> None:
    assert spread(3, 5) == [0, 2, 4] and spread(2, 12) == [0, 11] and spread(1, 4) == [0]
    assert spread(4, 4) == [0, 1, 2, 3] and spread(6, 2) == [0, 1]


def test_the_backbone_becomes_the_source(tmp_path: Path) -> None:
    """Every second layer of a deeper one, the final norm, and inputs of the size that its layers were trained on."""
    source = AutoModelForCausalLM.from_pretrained(qwen3(tmp_path))
    student = make_student(num_layers=3, **FITTING)
    said = copy_backbone(student, tmp_path)
    for ours, theirs in zip(student.backbone.layers, (0, 2, 4), strict=True):
        for key, value in source.model.layers[theirs].state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key
    assert torch.equal(student.backbone.norm.weight, source.model.norm.weight)
    size = student.backbone_input(torch.randint(320, (9, 4))).square().mean().sqrt().item()
    assert size == pytest.approx(source.model.embed_tokens.weight.square().mean().sqrt().item(), rel=1e-3)
    count = sum(p.numel() for p in student.backbone.parameters())
    assert f"{count:,} of the backbone's {count:,} parameters, layers 0, 2, 4" in said and "not copied" not in said


def test_a_llama_has_no_norms_of_queries_and_keys(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=320)).save_pretrained(tmp_path)
    student = make_student(num_layers=2, **{**FITTING, "num_kv_heads": 1, "head_dim": 16})
    assert "not copied: self_attn.k_norm.weight, self_attn.q_norm.weight" in copy_backbone(student, tmp_path)


def test_another_rotary_base_is_refused_with_the_flag_to_set(tmp_path: Path) -> None:
    copy_backbone(make_student(num_layers=3, **FITTING), qwen3(tmp_path / "near"))
    far = qwen3(tmp_path / "far", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    with pytest.raises(UserError, match=r"set --rope_theta 1000000\.0 \(not 10000\.0\)"):
        copy_backbone(make_student(num_layers=3, **FITTING), far)
    copy_backbone(make_student(num_layers=3, rope_theta=1e6, **FITTING), far)


def test_the_table_becomes_the_embedding(tmp_path: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(qwen3(tmp_path)).model.embed_tokens.weight
    ae = make_ae(vocab_size=320, embed_dim=32)
    assert "the embedding, 10,240 parameters" in copy_embedding(ae, tmp_path, "any")
    table = ae.embedding.weight
    assert table.norm(dim=1).mean().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(torch.cosine_similarity(table, source, dim=1), torch.ones(320), atol=1e-5)


def test_a_real_teacher() -> None:
    if not STORIES.exists():
        pytest.skip(f"no model in {STORIES}")
    shape = {"hidden_dim": 64, "num_heads": 8, "num_kv_heads": 4, "ffn_dim": 172, "vocab_size": 512, "num_layers": 5}
    assert "layers 0, 1, 2, 3, 4" in copy_backbone(make_student(**shape), STORIES)
    assert "32,768 parameters" in copy_embedding(make_ae(vocab_size=512, embed_dim=64), STORIES, "any")


def test_scripts_say_what_they_copied(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*world.train_flags(tmp_path), "--max_steps", 1, "--init_from", world.token_model]
    ours = ["--hidden_dim", 32, "--num_layers", 1, "--num_heads", 2, "--seq_len", 8, "--batch_size", 2]
    assert run_script(train_student, *flags, *ours, "--ae_ckpt", world.ae, "--ffn_dim", 999) == 2
    assert "other layers than this backbone; set --" in capsys.readouterr().err
    assert run_script(train_ae, *flags, "--latent_dim", 16, "--embed_dim", 48) == 2
    assert "its embedding is (" in capsys.readouterr().err
    token_model, log = load_token_model(world.token_model)[0], tmp_path / "run" / "log.txt"
    fitting = [*SMALL_LM, "--ffn_dim", token_model.lm.config.intermediate_size, "--lr", 0, "--ae_ckpt", world.ae]
    assert run_script(train_student, *flags, *fitting) == 0
    assert f"student: init from {world.token_model}: " in log.read_text() and "layers 0, 1" in log.read_text()
    student = load_student(tmp_path / "checkpoints" / "student.pt")[0]
    assert torch.equal(student.backbone.layers[1].mlp.up_proj.weight, token_model.lm.model.layers[1].mlp.up_proj.weight)
    assert run_script(train_ae, *flags, *SMALL_AE, "--lr", 0) == 0
    assert f"ae: init from {world.token_model}: the embedding, 10,240 parameters" in log.read_text()
    table, given = load_ae(tmp_path / "checkpoints" / "ae.pt")[0].embedding.weight, token_model.lm.model.embed_tokens.weight
    torch.testing.assert_close(table, given / given.norm(dim=1).mean())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "does not exist"),
        ("family", "is of family 'gpt2'"),
        ("damaged", "cannot be read"),
        ("empty", "cannot be read"),
    ],
)
def test_what_is_no_source_is_refused(what: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / what
    if what == "family":
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    elif what == "damaged":
        qwen3(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "empty":
        folder.mkdir()
    with pytest.raises(UserError, match=message):
        copy_backbone(make_student(**FITTING), folder)


def test_without_latents_there_is_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no backbone"):
        copy_backbone(make_student(latents="none"), tmp_path)


def test_a_checkpoint_of_another_tokenizer_gives_no_embedding(world: World) -> None:
    with pytest.raises(UserError, match="was made with another tokenizer"):
        copy_embedding(make_ae(vocab_size=320), world.token_model, "another")
