"""Exports opened by transformers: a student's without this repository, in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_AE, World, make_student, run_script
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from ae import train_ae
from configs.errors import UserError
from configs.run import load_checkpoint, save_checkpoint
from student.baseline import load_token_model
from student.hf_model import LatentForgeForCausalLM
from student.sampler import Sampler, SamplingParams, load_sampler
from student.student_model import Student, load_student
from tools import export_hf
from tools.bundle import bundle

TEXTS = ["def f(x):\n    return x\n", "import", "class A:"]
TEACHER = {"kind": "token-level", "k": 20, "teacher": ["big-model"], "tokens": 12345, "scored_tokens": 12000}
STUDENTS: dict[str, dict[str, Any]] = {
    "windowed": {},
    "remembering": {"local_memory": True, "latent_bypass": True, "local_tokens": 3, "local_ffn_dim": 24},
    "alone": {"latents": "none"},
    "restarting": {"local_decoder": "restart"},
    "independent": {"local_decoder": "none"},
    "energy": {"head": "energy"},
}

# Runs where no module of the project can be imported; its argument is a list of {"folder", "texts"}.
PROBE = """
import json, re, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ae", "configs", "kd", "student", "tools", "web"}:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocked())
try:
    import student
    raise SystemExit("the repository can be imported here: this would prove nothing")
except ModuleNotFoundError:
    pass

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

out = {}
for folder, texts in json.loads(sys.argv[1]).items():
    energy = AutoConfig.from_pretrained(folder, trust_remote_code=True).student["head"] == "energy"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    seen = out[folder] = {"ids": tokenizer(texts)["input_ids"]}
    new = lambda **settings: model.generate(**batch, max_new_tokens=9, **settings)[:, batch["input_ids"].shape[1]:]
    seen["sampled"] = new(seed=5).tolist()
    if energy:
        try:
            model(**batch)
        except ValueError as error:
            seen["refused"] = str(error)
        continue
    seen["greedy"] = new(do_sample=False).tolist()
    seen["greedy_text"] = tokenizer.batch_decode(new(do_sample=False), skip_special_tokens=True)
    seen["logprobs"] = [
        model(torch.tensor([ids])).logits.log_softmax(-1)[0, :-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0].tolist()
        for ids in seen["ids"]
    ]
    seen["loss"] = model(**batch, labels=batch["input_ids"]).loss.item()
    seen["same_class"] = type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == type(model).__name__
    seen["module"] = type(model).__module__

folder = next(iter(out))
writer = pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu")
out["pipeline"] = writer("import", max_new_tokens=9, do_sample=False)[0]["generated_text"]
exec(re.search(r"```python\\n(.*?)```", open(folder + "/README.md").read(), re.S)[1], snippet := {"print": lambda *args: None})
out["snippet"] = snippet["texts"].tolist()
print(json.dumps(out))
"""


def checkpoint(world: World, path: Path, model: Student) -> Path:
    """`model` as a checkpoint beside the world's tokenizer, with a teacher and figures."""
    content = load_checkpoint(world.student, "student")
    record = {**content["tokenizer"], "path": str(world.student.parent / content["tokenizer"]["path"])}
    figures = {"energy": 0.25} if model.cfg.head == "energy" else {"nats_per_token": 2.0, "kl_to_teacher": 0.125}
    changed = {"config": asdict(model.cfg), "tokenizer": record, "distillation": TEACHER, "figures": figures}
    save_checkpoint(path, "student", {**content, **changed, "state": model.state_dict()})
    return path


@pytest.fixture(scope="module")
def samplers(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sampler]:
    """Of each export, by its name: the repository's own sampler, its model's checkpoint at `checkpoints/NAME.pt`."""
    folder = tmp_path_factory.mktemp("exports")
    pad_id = load_student(world.student)[0].cfg.pad_id
    torch.manual_seed(1)
    paths = {
        name: checkpoint(world, folder / "checkpoints" / f"{name}.pt", make_student(pad_id=pad_id, **changes))
        for name, changes in STUDENTS.items()
    }
    paths["trained"] = world.student
    for name, path in paths.items():
        ae = ["--ae", world.ae] if name == "trained" else []
        assert run_script(export_hf, "--student", path, *ae, "--output", folder / name, "--data", "a small text") == 0
    return {str(folder / name): load_sampler(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def opened(samplers: dict[str, Sampler], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What PROBE saw of every export."""
    folder = Path(next(iter(samplers))).parent
    quiet = {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | quiet
    job = json.dumps({Path(name).name: TEXTS for name in samplers})
    command = [sys.executable, "-I", "-c", PROBE, job]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def closed(sampler: Sampler, params: SamplingParams) -> list[list[int]]:
    """The new tokens of TEXTS as `generate` returns them: closed by the end of text where they end early, then pads."""
    prompts = [sampler.tokenizer.encode(text) for text in TEXTS]
    rows = [
        row.token_ids
        + [sampler.tokenizer.eot_id] * (row.finish_reason == "stop" and len(row.token_ids) < params.max_new_tokens)
        for row in sampler.generate(prompts, params)
    ]
    longest = max(map(len, rows))
    return [row + [sampler.tokenizer.pad_id] * (longest - len(row)) for row in rows]


def likelihoods(model: Student, ids: Sequence[int]) -> list[float]:
    """log p of tokens 1.. of one text whose chunks begin at its first token."""
    k = model.cfg.k
    tokens = torch.tensor([[*ids, *[model.cfg.pad_id] * (-len(ids) % k)]])
    with torch.no_grad():
        return (-model.nll(tokens, 1)[0, : len(ids) - 1]).tolist()


def test_an_export_writes_and_scores_as_the_repository_does(samplers: dict[str, Sampler], opened: dict[str, Any]) -> None:
    for path, sampler in samplers.items():
        seen, energy = opened[Path(path).name], sampler.cfg.head == "energy"
        assert seen["ids"] == [sampler.tokenizer.encode(text) for text in TEXTS], path
        drawn = SamplingParams(9, 1, 1, seed=5) if energy else SamplingParams(9, seed=5)
        assert seen["sampled"] == closed(sampler, drawn), path
        if energy:
            assert "no likelihood" in seen["refused"]
            continue
        greedy = closed(sampler, SamplingParams(9, 0))
        assert seen["greedy"] == greedy, path
        assert seen["greedy_text"] == [sampler.tokenizer.decode(row) for row in greedy], path
        wanted = [likelihoods(sampler.model, ids) for ids in seen["ids"]]
        for got, row in zip(seen["logprobs"], wanted, strict=True):
            assert got == pytest.approx(row, abs=1e-4), path
        flat = [-value for row in wanted for value in row]
        assert seen["loss"] == pytest.approx(sum(flat) / len(flat), abs=1e-4), path  # of the left-padded batch
        assert seen["same_class"] and seen["module"].startswith("transformers_modules."), path


def test_pipeline_and_the_cards_snippet(samplers: dict[str, Sampler], opened: dict[str, Any]) -> None:
    sampler = next(iter(samplers.values()))
    ids = sampler.tokenizer.encode("import")
    assert opened["pipeline"] == "import" + sampler.generate([ids], SamplingParams(9, 0))[0].text
    prompts = [sampler.tokenizer.encode(text) for text in ("def main():", "import os")]
    rows = sampler.generate(prompts, SamplingParams(sampler.cfg.context // 2, seed=0))
    width = max(map(len, prompts))
    for got, row in zip(opened["snippet"], rows, strict=True):
        assert got[width : width + len(row.token_ids)] == row.token_ids


def test_cards(samplers: dict[str, Sampler], world: World) -> None:
    cards = {Path(path).name: (Path(path) / "README.md").read_text(encoding="utf-8") for path in samplers}
    figures = load_checkpoint(world.student, "student")["figures"] | load_checkpoint(world.ae, "ae")["figures"]
    trained = cards["trained"]
    for said in (
        "license: mit",
        "writes **4 tokens a step**",
        "none: trained on the text alone",
        "a small text",
        "| 384 |",
        "random weights",
    ):
        assert said in trained, said  # 3 steps of 4 windows of 32 tokens
    assert f"{figures['nats_per_token']:.4f}" in trained and f"{figures['chunk_exact']:.3%}" in trained
    assert "A control" not in trained
    for said in ("big-model: token-level distillation from 12,345 tokens", "| 2.0000 |", "| 0.1250 |", "| 7.39 |"):
        assert said in cards["windowed"], said
    assert "reads the last 3 tokens at each step, memory of all chunks but the last" in cards["remembering"]
    assert "at each step" not in cards["windowed"]
    assert "A control" in cards["alone"] and "| backbone | none |" in cards["alone"]
    assert "no likelihood" in cards["energy"] and "labels" not in cards["energy"] and "| 0.2500 |" in cards["energy"]


def test_the_code_that_is_shipped_needs_torch_and_transformers_only(samplers: dict[str, Sampler]) -> None:
    files = sorted(Path(next(iter(samplers))).glob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (file.parent / f"{node.module}.py").is_file(), f"{file}: {node.module}"
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}, f"{file}: {name}"
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    assert "class Student(" in code and "def load_student(" not in code and "def fit(" not in code


def test_bundle_takes_no_more_than_is_used_and_refuses_what_it_cannot_take() -> None:
    files = bundle({"block": ("ae.layers", ["SwiGLU"])})
    assert list(files) == ["block.py"] and "class SwiGLU" in files["block.py"]
    with pytest.raises(ValueError, match="does not define nothing"):
        bundle({"block": ("ae.layers", ["nothing"])})
    with pytest.raises(ValueError, match="imports from the project inside"):
        bundle({"token_model": ("student.baseline", ["main"])})


@pytest.fixture
def model(samplers: dict[str, Sampler]) -> LatentForgeForCausalLM:
    """The windowed student, in this process."""
    return export_hf.wrapped(next(iter(samplers.values())))


def test_padding_changes_no_score(model: LatentForgeForCausalLM) -> None:
    ids, pad = torch.randint(2, 300, (1, 10)), torch.zeros(1, 3, dtype=torch.long)
    alone = model(ids, labels=ids)
    for row, mask in (
        ([pad, ids], [0] * 3 + [1] * 10),
        ([ids, pad], [1] * 10 + [0] * 3),
        ([pad, ids, pad], [0] * 3 + [1] * 10 + [0] * 3),
    ):
        tokens, first = torch.cat(row, 1), mask.index(1)
        padded = model(tokens, attention_mask=torch.tensor([mask]), labels=tokens)
        torch.testing.assert_close(padded.logits[:, first : first + 10], alone.logits)
        torch.testing.assert_close(padded.loss, alone.loss)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, alone.logits[:, -2:])
    assert model(ids, return_dict=False)[0].shape == (1, 10, model.config.vocab_size)


def test_pads_in_front_give_the_distribution_that_generate_drew_from(model: LatentForgeForCausalLM) -> None:
    pad, k = model.config.pad_token_id, model.student.cfg.k
    prompt = torch.randint(2, 300, (1, 2 * k - 1))
    written = model.generate(prompt, max_new_tokens=2 * k, do_sample=False)
    logits = model(torch.cat([torch.full((1, 1), pad), written], 1)).logits[0, 2 * k - 1 : -1]
    logits[:, [pad, *range(model.config.tokenizer_size, model.config.vocab_size)]] = -torch.inf  # generate never writes these
    got = written[0, prompt.shape[1] :]
    assert logits.argmax(-1)[: len(got)].tolist() == got.tolist()


def test_loss_trains(model: LatentForgeForCausalLM) -> None:
    ids = torch.randint(2, 300, (2, 9))
    labels = ids.clone()
    labels[0, 4:] = -100
    loss = model(ids, labels=labels).loss
    nll = [-value for row, n in zip(ids, (4, 9), strict=True) for value in likelihoods(model.student, row.tolist())[: n - 1]]
    assert loss.item() == pytest.approx(sum(nll) / len(nll), abs=1e-5)
    loss.backward()
    assert model.get_input_embeddings().weight.grad.norm() > 0
    model.zero_grad()


def test_generate_follows_lengths_copies_ends_and_the_global_seed(model: LatentForgeForCausalLM) -> None:
    ids = torch.randint(2, 300, (1, 5))
    assert model.generate(ids, max_length=12, eos_token_id=0, do_sample=False).shape == (1, 12)
    two = model.generate(ids, max_new_tokens=6, num_return_sequences=2, seed=3)
    assert two.shape[0] == 2 and two[1].tolist() == model.generate(ids, max_new_tokens=6, seed=4)[0, : two.shape[1]].tolist()
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist()
    end = plain[7]
    cut = model.generate(ids.repeat(2, 1), max_new_tokens=6, do_sample=False, eos_token_id=end)
    assert cut[0].tolist() == plain[: plain.index(end, 5) + 1]
    unused = next(id for id in range(2, 300) if id not in plain)
    either = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=[unused, end])
    assert either[0].tolist() == cut[0].tolist()  # closed by the one that it met
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(model.generate(ids, max_new_tokens=6).tolist())
    assert draws[0] == draws[1]


class Collector:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = False

    def put(self, ids: torch.Tensor) -> None:
        self.puts.append(ids.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streams_a_chunk_at_a_time(model: LatentForgeForCausalLM) -> None:
    ids, streamer, k = torch.randint(2, 300, (1, 5)), Collector(), model.student.cfg.k
    written = model.generate(ids, max_new_tokens=3 * k, do_sample=False, eos_token_id=0, streamer=streamer)
    assert [len(part) for part in streamer.puts] == [5, k, k, k] and streamer.ended
    assert [i for part in streamer.puts for i in part] == written[0].tolist()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 4}, "does not support num_beams"),
        ({"repetition_penalty": 1.2}, "does not support repetition_penalty"),
        ({"token_type_ids": torch.zeros(1, 4)}, "does not support token_type_ids"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "padding on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "one run of ones"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0]])}, "one run of ones"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10_000}, "the model's context is"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_generate_refuses(model: LatentForgeForCausalLM, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model.generate(torch.tensor([[5, 6, 7, 8]]), **settings)


def test_harmless_settings_are_no_error(model: LatentForgeForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    model.generate(ids, max_new_tokens=2, num_beams=1, use_cache=True, repetition_penalty=1.0, top_k=None)
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    assert torch.equal(model.generate(inputs=ids, **settings), model.generate(ids, **settings))
    assert torch.equal(model(ids, use_cache=False).logits, model(ids).logits)
    with pytest.raises(UserError, match="expected input_ids"):
        model.generate()


def test_forward_refuses_what_is_longer_than_the_context(model: LatentForgeForCausalLM) -> None:
    with pytest.raises(UserError, match="the context, got"):
        model(torch.ones(1, model.student.cfg.context + 1, dtype=torch.long))


def test_bad_input_ends_in_one_line_and_writes_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = [*SMALL_AE, "--latent_dim", 8, "--max_steps", 1]
    assert run_script(train_ae, *world.train_flags(tmp_path), *shape) == 0
    damaged, output = tmp_path / "damaged.pt", tmp_path / "out"
    damaged.write_bytes(world.student.read_bytes()[:-2000])
    capsys.readouterr()
    for flags, said in (
        (("--student", world.student, "--ae", tmp_path / "checkpoints" / "ae.pt"), "another shape"),
        (("--student", damaged), "damaged"),
        (("--student", world.token_model), "expected 'student'"),
        (("--student", tmp_path / "none.pt"), "does not exist"),
        (("--baseline", world.token_model, "--ae", world.ae), "leave --ae"),
        (("--student", world.student, "--baseline", world.token_model), "not allowed with"),
    ):
        assert run_script(export_hf, *flags, "--output", output) == 2
        assert said in capsys.readouterr().err and not output.exists()
    (tmp_path / "file").touch()
    assert run_script(export_hf, "--student", world.student, "--output", tmp_path / "file") == 2
    assert "file is a file; name a folder" in capsys.readouterr().err
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "README.md").write_text("mine")
    assert run_script(export_hf, "--student", world.student, "--output", theirs) == 2
    assert "theirs holds other files" in capsys.readouterr().err
    assert [path.name for path in theirs.iterdir()] == ["README.md"] and (theirs / "README.md").read_text() == "mine"


def test_an_export_replaces_one_of_its_own_kind_only(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--baseline", world.token_model, "--output", tmp_path / "hf")
    assert run_script(export_hf, *flags) == 0 and run_script(export_hf, *flags) == 0
    assert run_script(export_hf, "--student", world.student, "--output", tmp_path / "hf") == 2
    assert "hf holds other files" in capsys.readouterr().err


def test_a_full_disk_is_one_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its writer has an error type of its own."""

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(LatentForgeForCausalLM, "save_pretrained", full)
    assert run_script(export_hf, "--student", world.student, "--output", tmp_path / "out") == 2
    assert "out cannot be written (No space left on device (os error 28)); free some" in capsys.readouterr().err


def test_baseline_is_a_stock_model(world: World, tmp_path: Path) -> None:
    assert run_script(export_hf, "--baseline", world.token_model, "--output", tmp_path / "hf") == 0
    tokens = torch.randint(2, 300, (1, 12))
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(lm(tokens).logits, load_token_model(world.token_model)[0].lm(tokens).logits)
