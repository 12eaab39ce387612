"""The autoencoder: shapes for every K, its loss against a slow one, reconstruction counted by hand, real vocabularies."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_AE, World, make_ae, run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ae import losses, train_ae
from ae.ae_model import AEConfig, load_ae
from ae.chunks import PackedData, PackedWriter
from ae.losses import ae_loss, token_nll, weighted_nll
from ae.train_ae import reconstruction
from configs.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16, 32])
def test_every_k_trains(k: int) -> None:
    """From chance to exact on eight fixed chunks."""
    model = make_ae(k=k, latent_dim=32)
    chunks = torch.randint(50, (8, k))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _ = ae_loss(model, chunks, kl_weight=1e-3, free_bits=0.5, latent_dropout=0.0, token_mask=0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mean, log_std = model.encode(chunks)
    assert mean.shape == log_std.shape == (8, 32)
    assert model.decode(mean).shape == (8, k, 32)
    assert torch.equal(model.logits(model.decode(mean)).argmax(-1), chunks)


def test_loss_against_a_slow_one() -> None:
    model, chunks = make_ae(), torch.randint(50, (5, 4))
    torch.manual_seed(1)
    total, parts = ae_loss(model, chunks, kl_weight=0.1, free_bits=0.3, l2_weight=0.01, latent_dropout=0.0, token_mask=0.0)
    mean, log_std = model.encode(chunks)
    torch.manual_seed(1)
    noise = torch.randn_like(mean)
    expected = []
    for b in range(5):
        z = mean[b] + log_std[b].exp() * noise[b]
        logits = model.logits(model.decode(z))
        ce = sum(F.cross_entropy(logits[i], chunks[b, i]).item() for i in range(4))  # K * mean
        kl = 0.0
        for d in range(16):
            q = torch.distributions.Normal(mean[b, d], log_std[b, d].exp())
            kl += max(0.3, torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).item())
        expected.append(ce + 0.1 * kl + 0.01 * mean[b].square().sum().item())
    assert total.item() == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert set(parts) == {"ce", "kl", "posterior_std"}


def test_token_masking_gives_the_zero_vector_not_token_zero() -> None:
    model, chunks = make_ae(), torch.randint(1, 50, (3, 4))
    masked, _ = model.encode(chunks, token_mask=1.0)
    expected, _ = model.encoder(torch.zeros(3, 4, 32))
    assert torch.equal(masked, expected)
    assert not torch.allclose(masked, model.encode(torch.zeros_like(chunks))[0])


def test_token_nll_in_slices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, table = torch.randn(23, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets, weights = torch.randint(50, (23,)), torch.randn(23)
    results = []
    for limit in (1 << 27, 50 * 4):  # all at once, four rows at a time
        monkeypatch.setattr(losses, "MAX_LOGITS", limit)
        hidden.grad = table.grad = None
        nll = token_nll(hidden, table, targets)
        (nll * weights).sum().backward()
        with torch.no_grad():
            results.append((nll.detach(), token_nll(hidden, table, targets), hidden.grad, table.grad))
    slow = -(hidden @ table.T).log_softmax(-1)[torch.arange(23), targets].detach()
    assert torch.allclose(results[0][0], slow, atol=1e-5)
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "mean"])
def test_weighted_nll_is_the_sum_and_its_gradients(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    monkeypatch.setattr(losses, "MAX_LOGITS", 50 * 4)
    hidden, table = torch.randn(23, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets, weights = torch.randint(50, (23,)), torch.randn(23) if weighted else None
    slow = F.cross_entropy(hidden @ table.T, targets, reduction="none")
    (3 * (slow.mean() if weights is None else (slow * weights).sum())).backward()
    expected = hidden.grad, table.grad
    hidden.grad = table.grad = None
    total, nll = weighted_nll(hidden, table, targets, weights)
    (3 * total).backward()
    assert torch.allclose(nll, slow, atol=1e-5) and not nll.requires_grad
    for made, right in zip((hidden.grad, table.grad), expected, strict=True):
        assert made is not None and right is not None and torch.allclose(made, right, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(weighted_nll(hidden, table, targets, weights)[0], total)


@pytest.mark.parametrize("run", [weighted_nll, torch.compile(weighted_nll, backend="aot_eager")], ids=["eager", "compiled"])
@pytest.mark.parametrize("frozen", ["table", "hidden"])
def test_weighted_nll_makes_only_the_gradients_that_are_asked_for(run: Any, frozen: str) -> None:
    inputs = {"hidden": torch.randn(23, 2), "table": torch.randn(50, 2)}
    (moving,) = set(inputs) - {frozen}
    inputs[moving].requires_grad_()
    targets = torch.randint(50, (23,))
    total, nll = run(**inputs, targets=targets)
    slow = F.cross_entropy(inputs["hidden"] @ inputs["table"].T, targets, reduction="none")
    made, right = (torch.autograd.grad(x, inputs[moving])[0] for x in (total, slow.mean()))
    assert torch.allclose(made, right, atol=1e-6) and torch.allclose(nll, slow)
    with Shapes() as seen:
        weighted_nll(**inputs, targets=targets)
    assert seen.made[frozen] == 0 < seen.made[moving]
    quiet, nll = run(**inputs, targets=targets, learn=False)
    assert torch.allclose(quiet, total) and torch.allclose(nll, slow) and not quiet.requires_grad


class Shapes(TorchDispatchMode):
    """How many products had the shape of `hidden` (23, 2) and of `table` (50, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.made = {"hidden": 0, "table": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for name, shape in (("hidden", (23, 2)), ("table", (50, 2))):
            self.made[name] += func is torch.ops.aten.mm.default and out.shape == shape
        return out


def test_weighted_nll_in_bfloat16_is_near() -> None:
    """Confident rows, as an autoencoder's: 1 - p must not be lost to rounding."""
    table, grads = torch.eye(8, requires_grad=True), list[torch.Tensor]()
    for bf16 in (False, True):
        hidden = (9 * torch.eye(8)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total, _ = weighted_nll(hidden, table, torch.arange(8))
        grads += torch.autograd.grad(total, hidden)
    assert torch.allclose(grads[0], grads[1], rtol=0.02)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize(
    ("most", "cached", "least", "rows"), [(800, 0, 512, 8), (6400, 0, 5, 5), (6400, 1600, 5, 16), (99, 0, 5, 1)]
)
def test_the_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch, most: int, cached: int, least: int, rows: int) -> None:
    """64 rows of 100 words, in slices of `rows`."""
    for name, value in (("MAX_LOGITS", most), ("CACHED_LOGITS", cached), ("MIN_ROWS", least)):
        monkeypatch.setattr(losses, name, value)
    hidden, table = torch.randn(64, 1, requires_grad=True), torch.randn(100, 1, requires_grad=True)
    targets = torch.randint(100, (64,))
    with Largest() as seen:
        weighted_nll(hidden, table, targets)[0].backward()
    assert seen.elements == max(100 * rows, len(table))
    with Largest() as seen:
        token_nll(hidden, table, targets).mean().backward()
    assert seen.elements <= max(most, len(table))


def test_reconstruction_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 chunks, of which the model is made to miss 3 tokens in 2 chunks."""
    writer = PackedWriter(tmp_path, 50)
    tokens = np.random.default_rng(0).integers(1, 50, 43)
    writer.add(tokens)
    writer.close(tokenizer_fingerprint="f", tokenizer="x", eot_id=0, pad_id=1)
    model = make_ae()
    truth = torch.from_numpy(tokens[:40].reshape(10, 4))
    said = truth.clone()
    said[2, 0], said[7, 1], said[7, 3] = 0, 0, 0
    monkeypatch.setattr(model, "logits", lambda g: F.one_hot(said, 50).float())
    figures = reconstruction(model, PackedData(tmp_path), CPU, bf16=False)
    assert figures["chunks"] == 10
    assert figures["chunk_exact"] == pytest.approx(0.8)
    assert figures["token_exact"] == pytest.approx(37 / 40)


def test_dead_dimensions_and_posterior_scale(tmp_path: Path) -> None:
    writer = PackedWriter(tmp_path, 50)
    writer.add(np.random.default_rng(0).integers(0, 50, 400))
    writer.close(tokenizer_fingerprint="f", tokenizer="x", eot_id=0, pad_id=1)
    model = make_ae()
    with torch.no_grad():
        model.encoder.head.weight[:3] = 0  # these means do not depend on the chunk
        model.encoder.head.weight[16:] = 0
        model.encoder.head.bias[16:] = math.log(0.25)
    figures = reconstruction(model, PackedData(tmp_path), CPU, bf16=False)
    assert figures["dead_dims"] == 3
    assert figures["posterior_std"] == pytest.approx(0.25)


def test_the_script_writes_what_it_says(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        run_script(train_ae, *world.train_flags(tmp_path), *SMALL_AE, "--max_steps", 25, "--log_every", 10, "--eval_every", 10)
        == 0
    )
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [10, 10, 20, 20, 25, 25]
    assert [m["loss"] for m in lines if "loss" in m][-1] < lines[0]["loss"]
    assert lines[-1]["final"] and lines[-1]["chunk_exact"] == figures["chunk_exact"]
    model, content = load_ae(tmp_path / "checkpoints/ae.pt")
    data = PackedData(world.data / "val")
    assert content["figures"] == figures == reconstruction(model, data, CPU, bf16=lines_bf16(tmp_path))
    assert figures["chunks"] == data.n_tokens // 4
    assert content["tokenizer"]["fingerprint"] == data.fingerprint
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.yaml", "environment.json", "metrics.jsonl", "log.txt"}


def test_a_width_that_no_local_decoder_can_use_is_told_before_training(packed: World, tmp_path: Path) -> None:
    flags = [*packed.train_flags(tmp_path), *SMALL_AE, "--embed_dim", 130, "--max_steps", 1]
    assert run_script(train_ae, *flags) == 0
    log = (tmp_path / "run/log.txt").read_text()
    assert 0 < log.find("--embed_dim 130 is no multiple of 4: no student") < log.find("parameters")


def lines_bf16(folder: Path) -> bool:
    """Whether that run used bfloat16 (it depends on the processor)."""
    return "bfloat16" in (folder / "run/log.txt").read_text()


@pytest.mark.parametrize("change", [{"num_layers": 6}, {"k": 0}, {"latent_dim": -1}])
def test_impossible_shapes(change: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        AEConfig(**{"vocab_size": 50, "k": 4, "latent_dim": 16, "embed_dim": 32, "num_layers": 4, **change})


def test_a_real_vocabulary_fits_in_8_gb(tmp_path: Path) -> None:
    """A step of the card's default autoencoder (157 M parameters) with 151,936 words, in a process of its own."""
    for split, size in (("train", 2048), ("val", 256)):
        writer = PackedWriter(tmp_path / "data" / split, 151_936)
        writer.add(np.random.default_rng(0).integers(0, 151_669, size))
        writer.close(tokenizer_fingerprint="q", tokenizer="Qwen/Qwen3-0.6B", eot_id=0, pad_id=1)
    flags = [
        "--data",
        str(tmp_path / "data"),
        "--checkpoint_dir",
        str(tmp_path),
        "--run_dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    code = (
        "import resource\nfrom ae import train_ae\nfrom configs import loop\n"
        "loop.save_checkpoint = lambda *_: None  # it would be 1.9 GB of disk\n"
        "train_ae.main()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    command = [sys.executable, "-c", code, *flags, "--max_steps", "1", "--batch_size", "128"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    gib = float(done.stdout.splitlines()[-1])
    assert 2.3 < gib < 8, f"{gib:.1f} GiB"  # weights, gradients and both moments alone take 2.3


def test_memory_unit() -> None:
    """ru_maxrss is in KiB on Linux, which the test above relies on."""
    assert 50 << 10 < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 50 << 20
