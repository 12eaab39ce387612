"""The sampler: equal to the full forward, to itself in any company, and to the distribution it says it draws from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import World, make_student

from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from student.sampler import Sampler, SamplingParams, load_sampler, pick
from student.student_model import Student

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21], [30] * 17, [9] * 8]
GREEDY = SamplingParams(max_new_tokens=18, temperature=0, ignore_eot=True)


class Letters:
    """A stand-in tokenizer: id i is one byte, id 0 ends the text, id 1 pads."""

    size, pad_id, eot_id, stop_ids = 300, 1, 0, frozenset({0})

    def __init__(self, pieces: dict[int, bytes] | None = None) -> None:
        self.pieces = pieces or {}

    def token_bytes(self, id: int) -> bytes:
        return self.pieces.get(id, bytes([97 + id % 26]) if id > 1 else b"")


def sampler(model: Student, **pieces: Any) -> Sampler:
    return Sampler(model, Letters(**pieces))  # type: ignore[arg-type]


def full_logits(sample: Sampler, prompt: list[int], written: list[int]) -> torch.Tensor:
    """What one full pass over a prompt and what was written after it says of the latter: logits (tokens written, V)."""
    k, model = sample.cfg.k, sample.model
    text = [1] * (-len(prompt) % k) + prompt + written
    known, whole = len(text) - len(written), text + [1] * (-len(text) % k)
    with torch.no_grad():
        logits = model.ae.logits(model.hidden(torch.tensor([whole])))[0]
    return logits[known : len(text)].masked_fill(sample.never, -torch.inf)


class Scripted(Sampler):
    """Writes given tokens instead of the model's."""

    def __init__(self, ids: list[int], pieces: dict[int, bytes] | None = None) -> None:
        super().__init__(make_student(seq_len=64), Letters(pieces))  # type: ignore[arg-type]
        self.ids = ids

    def _write_chunk(self, state: Any, rows: Any, params: Any) -> torch.Tensor:
        now, self.ids = self.ids[:4], self.ids[4:] + [9] * 4
        return torch.tensor([now] * len(rows))


@pytest.mark.parametrize(
    "change",
    [
        {"local_qk_norm": True},
        {},
        {"latents": "none"},
        {"local_decoder": "none"},
        {"local_decoder": "restart"},
        {"k": 1},
        {"k": 8},
        {"local_window": 2, "local_layers": 3},
        {"local_memory": True},
        {"local_memory": True, "k": 1, "local_layers": 1},
        {"local_memory": True, "k": 2, "local_qk_norm": True},
        {"local_memory": True, "k": 8},
        {"local_memory": True, "latents": "none"},
        {"latent_bypass": True},
        {"local_tokens": 3},
        {"local_tokens": 4, "k": 2, "local_memory": True, "local_layers": 1},
        {"local_tokens": 4, "local_decoder": "restart"},
    ],
)
def test_steps_equal_the_full_forward(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of every step, for unequal prompts, are those of one full pass over prompt and continuation.

    In float32 the two differ by some 3e-6; the arg max alone would hide far greater faults.
    """
    model, seen = make_student(seq_len=48, **change), []
    sample, k = sampler(model), model.cfg.k
    monkeypatch.setattr("student.sampler.pick", lambda logits, *rest: (seen.append(logits), pick(logits, *rest))[1])
    for i, (prompt, out) in enumerate(zip(PROMPTS, sample.generate(PROMPTS, GREEDY), strict=True)):
        assert len(out.token_ids) == 18 and out.latent_steps == -(-18 // k) and out.finish_reason == "length"
        exact = full_logits(sample, prompt, out.token_ids)
        assert out.token_ids == torch.stack(seen)[:18, i].argmax(-1).tolist()
        torch.testing.assert_close(torch.stack(seen)[:18, i], exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", [{}, {"local_memory": True}, {"local_memory": True, "k": 1, "latents": "none"}])
def test_company_does_not_matter(change: dict[str, Any]) -> None:
    """Row i of a batch, drawn with seed s, is the same text as its prompt alone with seed s + i, whenever others end."""
    sample = sampler(make_student(seq_len=48, **change))
    params = SamplingParams(max_new_tokens=24, seed=7, stop=("q", "x"))
    together = sample.generate(PROMPTS, params)
    assert len({len(row.token_ids) for row in together}) > 1
    for i, prompt in enumerate(PROMPTS):
        alone = sample.generate([prompt], replace(params, seed=7 + i))[0]
        assert alone == together[i]
    assert sample.generate(PROMPTS, params) == together
    assert sample.generate(PROMPTS, replace(params, seed=8)) != together


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 13])
def test_backbone_steps_are_counted(n: int) -> None:
    """ceil(n / K) calls of the backbone for n tokens, the pass over the prompt included."""
    model, calls = make_student(), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    out = sampler(model).generate([PROMPTS[0]], SamplingParams(max_new_tokens=n, ignore_eot=True))[0]
    assert len(out.token_ids) == n
    assert len(calls) == out.latent_steps == -(-n // 4)


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.4, -1.0, -3.0])


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.6}, {"temperature": 0.5}, {"top_p": 0.01}]
)
def test_pick_draws_from_the_filtered_distribution(params: dict[str, Any]) -> None:
    """Over evenly spread uniforms every token's share is its probability."""
    settings = SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **params})
    probs = (LOGITS / settings.temperature).softmax(0)
    kept, mass = [], 0.0
    for i in range(settings.top_k or 6):  # LOGITS fall, so this is the order of likelihood
        if mass >= settings.top_p * probs[: settings.top_k or 6].sum():
            break
        kept.append(i)
        mass += probs[i].item()
    n = 4000
    drawn = pick(LOGITS.expand(n, -1), settings, (torch.arange(n) + 0.5) / n).bincount(minlength=6) / n
    expected = torch.zeros(6)
    expected[kept] = probs[kept] / probs[kept].sum()
    assert torch.allclose(drawn, expected, atol=2 / n)


TINY: list[dict[str, float]] = [
    *({"temperature": t, "top_p": 1.0} for t in (5e-324, 1e-46, 1e-40, 1e-38, 1e-30)),
    *({"top_p": p} for p in (5e-324, 1e-46, 1e-40, 1e-30)),
]


@pytest.mark.parametrize("params", TINY)
def test_what_is_nearly_0_leaves_the_likeliest_token(params: dict[str, float]) -> None:
    """Also where float32 has no such number, or a quotient by it is beyond its range."""
    for uniform in (0.0, 0.5, 1 - 2**-24):
        for logits in (LOGITS, LOGITS.flip(0), LOGITS * 1e4):
            assert pick(logits[None], SamplingParams(**params), torch.tensor([uniform])).item() == logits.argmax()


def test_greedy_and_masked_tokens() -> None:
    assert pick(LOGITS[None], SamplingParams(temperature=0), torch.zeros(1)).tolist() == [0]
    masked = LOGITS.clone()
    masked[0] = -torch.inf
    for u in (0.0, 0.5, 1 - 1e-7):
        assert pick(masked[None], SamplingParams(), torch.tensor([u])).item() != 0
    sample = sampler(make_student())
    assert sample.never.nonzero()[:, 0].tolist() == [1, *range(300, 320)]  # the pad, and rows past the tokenizer
    ids = [
        i
        for out in sample.generate(PROMPTS * 4, SamplingParams(max_new_tokens=28, temperature=5, top_p=1))
        for i in out.token_ids
    ]
    assert not set(ids) & {1, *range(300, 320)} and len(set(ids)) > 100


def test_end_of_text() -> None:
    out = Scripted([5, 6, 7, 8, 9, 0, 11, 12]).generate([[3]], SamplingParams(max_new_tokens=40))[0]
    assert (out.token_ids, out.finish_reason, out.latent_steps) == ([5, 6, 7, 8, 9], "stop", 2)
    out = Scripted([0, 6, 7, 8]).generate([[3]], SamplingParams(max_new_tokens=40))[0]
    assert (out.token_ids, out.text, out.finish_reason) == ([], "", "stop")
    out = Scripted([5, 0, 7, 8]).generate([[3]], SamplingParams(max_new_tokens=3, ignore_eot=True))[0]
    assert (out.token_ids, out.finish_reason) == ([5, 0, 7], "length")


@pytest.mark.parametrize(
    ("ids", "params", "ended"),
    [
        ([5, 6, 7, 4, 5, 0], SamplingParams(40), 4),
        ([5, 6, 7, 8, 0, 4], SamplingParams(40), 0),
        ([5, 6, 7, 4], SamplingParams(3), None),  # it would be a fourth token
        ([5, 6, 4, 7], SamplingParams(40, stop=("g",)), None),  # id 6: the text ends before the token could end it
        ([5, 6, 4, 7], SamplingParams(4, ignore_eot=True), None),
    ],
)
def test_a_chunk_tells_which_token_ended_its_row(ids: list[int], params: SamplingParams, ended: int | None) -> None:
    sampler = Scripted(ids)
    sampler.tokenizer.stop_ids = frozenset({0, 4})
    *others, last = sampler.stream([[3]], params)
    assert last.ended == ended and {chunk.ended for chunk in others} <= {None}


def test_stop_strings_never_show() -> None:
    pieces = {2: b"abc", 3: b"d\n", 4: b"\nde", 5: b"f", 6: b"\n"}
    ids = [2, 3, 5, 6, 5, 6, 6, 5]  # abcd\nf\nf\n\nf
    out = Scripted(ids, pieces).generate([[9]], SamplingParams(max_new_tokens=40, stop=("\n\n",)))[0]
    assert (out.text, out.finish_reason) == ("abcd\nf\nf", "stop")
    chunks = [c.text for c in Scripted(ids, pieces).stream([[9]], SamplingParams(max_new_tokens=40, stop=("\n\n", "zzz")))]
    assert chunks == ["abcd\nf", "\nf"]  # the line end that may begin a stop string is held back until it is known not to
    out = Scripted([2, 3, 4, 5], pieces).generate([[9]], SamplingParams(max_new_tokens=4, stop=("cd", "bc")))[0]
    assert out.text == "a"
    out = Scripted([5, 5, 5, 6], pieces).generate([[9]], SamplingParams(max_new_tokens=4, stop=("\n\n",)))[0]
    assert out.text == "fff\n"  # held back, then let go at the end


def test_the_stream_gives_whole_characters() -> None:
    snake = "🐍".encode()
    pieces = {2: snake[:1], 3: snake[1:3], 4: snake[3:], 5: b"x"}
    chunks = [
        c.text for c in Scripted([5, 2, 3, 3, 5, 5, 2, 3, 4, 5, 2, 3], pieces).stream([[9]], SamplingParams(max_new_tokens=12))
    ]
    assert "".join(chunks) == (b"x" + snake[:3] + snake[1:3] + b"xx" + snake + b"x" + snake[:3]).decode(errors="replace")
    assert chunks[1].endswith("xx") and chunks[2].startswith("🐍x")


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [([], 4, "the prompt is empty"), ([3] * 65, 1, "the prompt has 65 tokens"), ([3], 65, "context is 64")],
)
def test_prompts_that_do_not_fit(prompt: list[int], new: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler(make_student()).generate([prompt], SamplingParams(max_new_tokens=new))


def test_the_whole_context_can_be_used() -> None:
    sample = sampler(make_student())
    assert sample.room(5) == 56
    assert len(sample.generate([[3] * 56], SamplingParams(max_new_tokens=8, ignore_eot=True))[0].token_ids) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"stop": ("",)},
        {"seed": -1},
    ],
)
def test_impossible_settings(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        SamplingParams(**change)


def test_the_energy_head_samples_at_temperature_one_over_n() -> None:
    sample = sampler(make_student(head="energy"))
    params = SamplingParams(max_new_tokens=8, temperature=1, ignore_eot=True)
    one, two = (
        sample.generate(PROMPTS, params),
        sample.generate([PROMPTS[1]], SamplingParams(max_new_tokens=8, temperature=1, seed=1, ignore_eot=True)),
    )
    assert [len(out.token_ids) for out in one] == [8] * 4 and one[1] == two[0]
    half = SamplingParams(max_new_tokens=8, temperature=0.5, ignore_eot=True)
    assert sample.generate(PROMPTS, half) == sample.generate(PROMPTS, half)
    for temperature in (0.0, 5e-324, 0.8, 1.5):
        with pytest.raises(UserError, match=r"expected temperature 1, 0\.5, 0\.33"):
            sample.generate(PROMPTS, SamplingParams(max_new_tokens=8, temperature=temperature))


def test_from_a_checkpoint(world: World) -> None:
    sample = load_sampler(world.student, world.ae)
    assert isinstance(sample.tokenizer, TokenizerAdapter)
    out = sample.generate([sample.tokenizer.encode("import ")], SamplingParams(max_new_tokens=8))[0]
    assert out.text == sample.tokenizer.decode(out.token_ids)
