"""A small world for the tests: packed data of this repository's own sources, and models trained on it for a few steps.

The scripts are run in this process, as the command line would run them; tests/test_cli.py runs some for real.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ae import train_ae
from ae.ae_model import AEConfig, Autoencoder
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import run_cli
from student import baseline, train_student
from student.baseline import BackboneConfig, TokenModel
from student.student_model import Student, StudentConfig
from tools import data_packing, train_tokenizer

ROOT = Path(__file__).parents[1]
SMALL_AE = ["--k", "4", "--latent_dim", "16", "--embed_dim", "32", "--batch_size", "64"]
SMALL_LM = ["--hidden_dim", "32", "--num_layers", "2", "--num_heads", "2", "--seq_len", "8", "--batch_size", "4"]


def run_script(module: object, *argv: object) -> int:
    """A script's exit code when called with `argv`, in this process."""
    before = sys.argv
    sys.argv = [str(getattr(module, "__file__", "script")), *map(str, argv)]
    try:
        run_cli(module.main)  # type: ignore[attr-defined]
    except SystemExit as done:
        return int(done.code or 0)
    finally:
        sys.argv = before
    return 0


@dataclass
class World:
    """Where the small world's files are."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "packed"

    @property
    def ae(self) -> Path:
        return self.root / "checkpoints" / "ae.pt"

    @property
    def student(self) -> Path:
        return self.root / "checkpoints" / "student.pt"

    @property
    def token_model(self) -> Path:
        return self.root / "checkpoints" / "token_model.pt"

    def train_flags(self, folder: Path | None = None) -> list[str]:
        folder = folder or self.root
        return [
            "--data",
            str(self.data),
            "--checkpoint_dir",
            str(folder / "checkpoints"),
            "--run_dir",
            str(folder / "run"),
            "--device",
            "cpu",
        ]


def pack(world: World, *inputs: Path) -> World:
    """A tokenizer of these texts, and these packed with it."""
    tokenizer = world.root / "tokenizer"
    assert run_script(train_tokenizer, "--input", *inputs, "--output", tokenizer, "--vocab_size", 320) == 0
    flags = ["--tokenizer", tokenizer, "--seq_len", 32, "--k", 4, "--val_split", 0.3]
    assert run_script(data_packing, "--input", *inputs, "--output", world.data, *flags) == 0
    return world


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Packed data without models."""
    return pack(World(tmp_path_factory.mktemp("world")), ROOT / "ae", ROOT / "student")


@pytest.fixture(scope="session")
def world(packed: World) -> World:
    """Packed data, and an autoencoder, a token-level model and a student of a few steps."""
    assert run_script(train_ae, *packed.train_flags(), *SMALL_AE, "--max_steps", 20) == 0
    assert run_script(baseline, *packed.train_flags(), *SMALL_LM, "--k", 4, "--max_steps", 3) == 0
    student = [*SMALL_LM, "--ae_ckpt", packed.ae, "--local_memory", "--max_steps", 3]
    assert run_script(train_student, *packed.train_flags(), *student) == 0
    return packed


@pytest.fixture(scope="session")
def tokenizer(packed: World) -> TokenizerAdapter:
    return TokenizerAdapter.load(packed.root / "tokenizer")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def student_config(**changes: object) -> StudentConfig:
    """A student small enough to enumerate, with `changes`."""
    values = {
        "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 32, "seq_len": 16, "k": 4,
        "vocab_size": 320, "latent_dim": 8, "embed_dim": 16, "ae_layers": 4, "local_layers": 2, "local_window": 5, "pad_id": 1,
    }  # fmt: skip
    return StudentConfig(**{**values, **changes})  # type: ignore[arg-type]


def make_student(**changes: object) -> Student:
    """A student with random weights, the projections that start at zero included."""
    model = Student(student_config(**changes))
    if model.local is not None:
        torch.nn.init.normal_(model.local.exit.weight, std=0.5)
        if model.local.memory is not None:
            torch.nn.init.normal_(model.local.memory.out.weight, std=2.0)
    if isinstance(getattr(model, "exit", None), torch.nn.Linear):
        torch.nn.init.normal_(model.exit.weight, std=0.3)
    if model.bypass is not None:
        torch.nn.init.normal_(model.bypass.weight, std=0.3)
    return model.eval()


def make_token_model(**changes: int) -> TokenModel:
    values = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 32, "seq_len": 16, "k": 4}
    model = TokenModel(BackboneConfig(**{"vocab_size": 320, **values, **changes})).eval()
    for parameter in model.parameters():  # away from the near-uniform start
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def make_ae(**changes: int) -> Autoencoder:
    values = {"vocab_size": 50, "k": 4, "latent_dim": 16, "embed_dim": 32, "num_layers": 4}
    return Autoencoder(AEConfig(**{**values, **changes}))


@pytest.fixture
def endless(tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row ends before its last token."""
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset())
