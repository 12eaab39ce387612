"""Defaults < YAML < --set < flags; an unknown key names the nearest one; every shipped YAML loads."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from ae import train_ae
from configs.errors import UserError
from configs.loop import learning_rate, total_steps
from configs.run import asked_threads
from configs.schema import AETrainConfig, LMTrainConfig, StudentTrainConfig, TrainConfig, config_from, parse_config, read_yaml
from kd.harvest import HarvestConfig
from student import baseline, train_student

FOLDER = Path(__file__).parents[1] / "configs"
OTHERS = ("ablate_", "inference")  # grids (test_ablate.py) and the server's settings (test_server_load.py)
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith(OTHERS))


def class_of(path: Path) -> type[TrainConfig]:
    return AETrainConfig if "ae" in path.stem.split("_") else StudentTrainConfig if "student" in path.stem else LMTrainConfig


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    assert isinstance(config_from(class_of(path), read_yaml(path), str(path)), TrainConfig)


@pytest.mark.parametrize(
    ("script", "kind"), [(train_ae, AETrainConfig), (baseline, LMTrainConfig), (train_student, StudentTrainConfig)]
)
def test_the_command_in_a_trainers_docstring_is_read(
    script: ModuleType, kind: type[TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER.parent)
    _, path, *flags = next(line.split() for line in (script.__doc__ or "").splitlines() if "--config" in line)
    assert Path(path).samefile(script.__file__ or "") and isinstance(parse_config(kind, None, flags), kind)


@pytest.mark.parametrize("flag", ["--budget_usd", "--rpm"])
def test_a_number_left_empty_is_no_number(flag: str) -> None:
    """Above all not the wish for no limit, as of `--budget_usd "$UNSET"`."""
    with pytest.raises(UserError, match=rf"{flag[2:]}: expected float, got ''"):
        parse_config(HarvestConfig, None, [flag, ""])
    assert parse_config(HarvestConfig, None, [flag, "none"]).budget_usd is None


@pytest.mark.parametrize("kind", ["demo", ""])
def test_token_model_and_student_share_the_backbone(kind: str) -> None:
    names = ("token_model", "student")
    shared = (
        "hidden_dim",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "ffn_dim",
        "seq_len",
        "batch_size",
        "max_steps",
        "epochs",
    )
    files = [f"demo_{n}.yaml" if kind else f"{n}_default.yaml" for n in names]
    one, two = (config_from(class_of(Path(f)), read_yaml(CONFIGS[0].parent / f), f) for f in files)
    assert {key: getattr(one, key) for key in shared} == {key: getattr(two, key) for key in shared}


def test_the_cards_defaults() -> None:
    ae, student = AETrainConfig(), StudentTrainConfig()
    assert (ae.k, ae.latent_dim, ae.embed_dim, ae.num_layers) == (8, 1024, 768, 4)
    assert (student.hidden_dim, student.num_layers, student.seq_len) == (2048, 12, 64)


def test_precedence(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lr: 3e-4\nk: 2\nseed: 5\nbf16: auto\ncompile: true\nmax_steps: 7\n")
    cfg = parse_config(
        AETrainConfig, None, ["--config", str(path), "--set", "k=4", "--set", "seed=6", "--seed", "9", "--no-compile"]
    )
    assert (cfg.lr, cfg.k, cfg.seed, cfg.bf16, cfg.compile, cfg.max_steps, cfg.embed_dim) == (3e-4, 4, 9, None, False, 7, 768)
    assert parse_config(AETrainConfig, None, ["--bf16"]).bf16 is True
    cfg = parse_config(AETrainConfig, None, ["--config", str(path), "--epochs", "3"])
    assert (cfg.epochs, cfg.max_steps) == (3, None)  # a flag wins over the file, whichever of the two it is
    both = ["--config", str(path), "--epochs", "3", "--max_steps", "9"]
    assert parse_config(AETrainConfig, None, both).max_steps == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("laten_dim: 3", "did you mean 'latent_dim'"),
        ("k: many", "k: expected int, got 'many'"),
        ("k: 2.5", "k: expected int, got 2.5"),
        ("lr: [1]", "lr: expected float"),
        ("resume: maybe", "resume: expected bool"),
        ("k: 0", "k: expected at least 1, got 0"),
        ("latent_dropout: 1.5", "latent_dropout: expected 0 to 1, got 1.5"),
        ("lr: .nan", "lr: expected at least 0, got nan"),
        ("seed: -1", "seed: expected 0 to 2147483647, got -1"),
        ("weight_decay: -1", "weight_decay: expected at least 0, got -1"),
        ("checkpoint_dir:", "checkpoint_dir: expected str, got None"),
        ("- 1", "expected `key: value` lines"),
        ("a: b: c", "not valid YAML"),
        ("lr: 1\nk: 2\nlr: 3", "c.yaml:3: lr stands there for the second time"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml") as error:
        parse_config(AETrainConfig, None, ["--config", str(path)])
    assert message in str(error.value)


def test_bad_flags() -> None:
    for argv, message in (
        (["--set", "k"], "KEY=VALUE"),
        (["--set", "kl=3"], "did you mean 'k'"),
        (["--config", "/nowhere.yaml"], "cannot read config /nowhere.yaml"),
        (["--head", "tail"], "expected one of direct, energy"),
    ):
        with pytest.raises(UserError) as error:
            parse_config(StudentTrainConfig, None, argv)
        assert message in str(error.value)


def test_learning_rate() -> None:
    cfg = TrainConfig(lr=1.0, warmup_steps=4, lr_decay=0.5)
    rates = [learning_rate(step, 20, cfg) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:11] == [1.0] * 7
    assert rates[11:] == pytest.approx([0.9 - 0.1 * i for i in range(9)])
    cfg.lr_decay = 0.0  # independent of the total, so that a run can be prolonged
    assert [learning_rate(s, 5, cfg) for s in range(5)] == [learning_rate(s, 500, cfg) for s in range(5)]


def test_threads_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, threads in (("", 5), ("3", 3), ("4,2", 4), (" 2 ", 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert asked_threads(5) == threads
    for value in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        with pytest.raises(UserError, match=f"OMP_NUM_THREADS={value}: expected"):
            asked_threads(5)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert asked_threads(5) == 5


def test_steps_of_so_many_epochs() -> None:
    assert (total_steps(TrainConfig(epochs=0.5), 5), total_steps(TrainConfig(epochs=2), 5)) == (3, 10)
