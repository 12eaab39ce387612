"""The fast path: the eager sampler's tokens from static shapes, slots that come and go, the screen, and the compiled step."""

from __future__ import annotations

import copy
import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_student, make_token_model
from test_sampler import GREEDY, PROMPTS, TINY, Letters, full_logits
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from configs.errors import UserError
from configs.run import wants_compile
from student.compiled import CompiledStep, keep_for_later
from student.drawing import Int8, Screen, Vocabulary, draw
from student.fast import Draws, FastSampler, filters_of
from student.fast_token import FastTokenModel
from student.race import linear_scores
from student.sampler import Sampler, SamplingParams, pick
from student.static import StaticBackbone
from student.student_model import Student


def fast(model: Student, slots: int = 4, **options: Any) -> FastSampler:
    options = {"dtype": torch.float32, "compile": False, **options}
    return FastSampler(model, Letters(), slots=slots, **options)  # type: ignore[arg-type]


def eager(model: Student) -> Sampler:
    return Sampler(model, Letters())  # type: ignore[arg-type]


HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
compiles = pytest.mark.skipif(
    not (wants_compile(None, torch.device("cpu")) and HEADERS), reason="needs a C++ compiler and the headers of Python"
)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile frozen and unguarded as always, but without the C++ wrapper and product templates, whose compilation takes a
    minute; what is made stays for the next run of the tests, outside the user's home."""
    monkeypatch.setattr("student.compiled.cpu_settings", lambda rows: {"freezing": True})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir() + "_latentforge_tests")


MEMORIES: list[dict[str, Any]] = [{}, {"k": 1}, {"k": 8}, {"local_layers": 1}, {"local_layers": 3}]
VARIANTS: list[dict[str, Any]] = [
    {"local_qk_norm": True}, {"latent_bypass": True}, *({"local_memory": True, **more} for more in MEMORIES),
    {"local_tokens": 3, "local_ffn_dim": 24}, {"local_tokens": 4, "k": 1, "local_memory": True},
    {}, {"local_decoder": "none"}, {"k": 1}, {"k": 8}, {"local_window": 2, "local_layers": 3},
    *({"local_window": window} for window in (1, 3, 4, 6, 9, 13)),  # less than a chunk of 4, one, and more
]  # fmt: skip
MIXED = [
    SamplingParams(20, temperature=0, ignore_eot=True),
    SamplingParams(20, seed=3, top_p=0.7),
    SamplingParams(20, seed=4, top_p=1, temperature=1.3),
    SamplingParams(20, seed=5, top_k=20),
]


@pytest.mark.parametrize("change", VARIANTS)
def test_greedy_tokens_are_the_eager_samplers(change: dict[str, Any]) -> None:
    """Unequal prompts in one batch, and more prompts than slots; in float32 only a tie could tell the two apart."""
    model = make_student(seq_len=48, **change)
    expected = eager(model).generate(PROMPTS, GREEDY)
    assert fast(model).generate(PROMPTS, GREEDY) == expected
    assert fast(model, slots=2).generate(PROMPTS, GREEDY) == expected


def recorded(sampler: FastSampler, params: SamplingParams) -> tuple[list[list[int]], torch.Tensor]:
    """What each of PROMPTS was continued with, and the logits it was drawn from: (prompts, steps, V)."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("student.fast.draw", lambda logits, *rest: (seen.append(logits.clone()), draw(logits, *rest))[1])
        out = [row.token_ids for row in sampler.generate(PROMPTS, params)]
    return out, torch.stack(seen, dim=1)


@pytest.mark.parametrize("change", VARIANTS)
def test_logits_are_the_full_passes(change: dict[str, Any]) -> None:
    """In float32 to some 3e-6. In bfloat16, which is what the server uses where the processor has it, off by 0.1 to 0.2, with
    a total variation of 0.01: a fault in the order of the numbers moves both by more.
    """
    model = make_student(seq_len=48, **change)
    exact = eager(copy.deepcopy(model))
    for dtype in (torch.float32, torch.bfloat16):
        out, logits = recorded(fast(model, dtype=dtype), GREEDY)
        for prompt, ids, row in zip(PROMPTS, out, logits, strict=True):
            truth, known = full_logits(exact, prompt, ids), ~exact.never
            error = (row[:18] - truth)[:, known].abs().max()
            variation = (row[:18].softmax(-1) - truth.softmax(-1)).abs().sum(-1).mean() / 2
            assert (row[:, ~known] == -torch.inf).all()
            if dtype == torch.float32:
                assert error < 1e-4
            else:
                assert error < 0.4 and variation < 0.03


@pytest.mark.parametrize(("window", "memory"), [(1, False), (3, False), (7, False), (3, True)])
def test_a_long_text_is_the_eager_samplers(window: int, memory: bool) -> None:
    """Many windows long, with a row that leaves and another that takes its slot on the way: as each row alone."""
    model = make_student(seq_len=24, local_window=window, local_memory=memory)
    long, short = SamplingParams(75, temperature=0, ignore_eot=True), SamplingParams(20, temperature=0, ignore_eot=True)
    params = [long, short, short, short, long]
    prompts = [*PROMPTS, [7, 3, 5]]
    sampler, out = fast(model, slots=2), {i: [] for i in range(5)}  # type: dict[int, list[int]]
    waiting = list(range(5))
    while waiting or sampler.active:
        now = [waiting.pop(0) for _ in range(min(len(waiting), sampler.free))]
        sampler.add([prompts[i] for i in now], [params[i] for i in now], now)
        for chunk in sampler.step():
            out[chunk.row] += chunk.token_ids
    assert [out[i] for i in range(5)] == [
        eager(model).generate([p], q)[0].token_ids for p, q in zip(prompts, params, strict=True)
    ]


def test_the_same_seed_draws_the_same_tokens() -> None:
    """Thresholds are found to 5e-4 nats and sums are rounded in another order: a draw within that of a border may differ.

    With about 1e-4 of the distribution so near a border, 4 rows of 20 tokens differ once in some ten seeds; a fault
    would make all of them differ.
    """
    model = make_student(seq_len=48)
    for params in MIXED:
        expected, got = eager(model).generate(PROMPTS, params), fast(model).generate(PROMPTS, params)
        assert sum(a == b for a, b in zip(expected, got, strict=True)) >= 3


@pytest.mark.parametrize("params", TINY)
def test_what_is_nearly_0_is_greedy(params: dict[str, Any]) -> None:
    model = make_student(seq_len=48)
    tiny = SamplingParams(**{**vars(GREEDY), "temperature": 1.0, **params})
    assert fast(model).generate(PROMPTS, tiny) == eager(model).generate(PROMPTS, GREEDY)


def test_company_does_not_matter() -> None:
    """A row among others, with other parameters, joining late, is the row alone."""
    model = make_student(seq_len=48)
    alone = [eager(model).generate([p], params)[0].token_ids for p, params in zip(PROMPTS, MIXED, strict=True)]
    sampler, out = fast(model), {i: [] for i in range(4)}  # type: dict[int, list[int]]
    waiting = list(zip(range(4), PROMPTS, MIXED, strict=True))
    steps = 0
    while waiting or sampler.active:
        if waiting and steps % 2 == 0:  # one joins every second step
            i, prompt, params = waiting.pop(0)
            sampler.add([prompt], [params], [i])
        for chunk in sampler.step():
            out[chunk.row] += chunk.token_ids
        steps += 1
    assert [out[i] for i in range(4)] == alone


def test_slots_are_given_back() -> None:
    model = make_student(seq_len=48)
    sampler, params = fast(model, slots=2), SamplingParams(12, seed=7)
    first, second = sampler.add(PROMPTS[:2], [params, params])
    assert (sampler.active, sampler.free) == (2, 0)
    with pytest.raises(UserError, match="1 prompts for 0 free slots"):
        sampler.add([PROMPTS[2]], [params])
    sampler.step()
    sampler.remove(first)
    sampler.remove(first)  # twice is once
    assert sampler.free == 1
    (third,) = sampler.add([PROMPTS[2]], [params])  # into the used slot: nothing of the row before is left
    assert third == first
    out: dict[int, list[int]] = {second: [], third: []}
    while sampler.active:
        for chunk in sampler.step():
            out[chunk.row] += chunk.token_ids
    assert out[third] == eager(model).generate([PROMPTS[2]], params)[0].token_ids
    with pytest.raises(UserError, match="the prompt is empty"):
        sampler.add([[]], [params])
    assert sampler.free == 2 and sampler.add([], []) == []


def test_what_it_refuses() -> None:
    for change in ({"latents": "none"}, {"head": "energy"}, {"local_decoder": "restart"}):
        ((name, value),) = change.items()
        with pytest.raises(
            UserError, match=f"the server takes .* no student of --{name} {value}; use infer.py without --compile"
        ):
            fast(make_student(**change))
    model = make_student()
    model.backbone.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UserError, match="sliding_attention"):
        StaticBackbone(model.backbone, 8)
    sampler = fast(make_student(seq_len=48), positions=8)
    with pytest.raises(UserError, match="room for a prompt of 12"):
        sampler.add([[5] * 13], [SamplingParams(20)])
    sampler.add([[5]], [SamplingParams(20)])
    with pytest.raises(UserError, match="slots are in use"):
        next(iter(sampler.stream([[5]], SamplingParams(4))))
    with pytest.raises(UserError, match="1 <= rank <= 16"):
        fast(make_student(), words=4, rank=17)


# ------------------------------------------------------------------------------------------------------------- draws
def distribution(logits: torch.Tensor, params: SamplingParams, how: str) -> torch.Tensor:
    """Shares of the ids that 20,000 evenly spread uniforms draw."""
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    rows = logits.expand(n, -1)
    if how == "pick":
        ids = pick(rows, params, uniform)
    else:
        each = [torch.full((n,), float(x)) for x in (params.temperature, params.top_p)] + [torch.full((n,), params.top_k)]
        ids = draw(rows, *each, uniform, filters_of([params]))
    return ids.bincount(minlength=logits.shape[-1]) / n


@pytest.mark.parametrize(
    "params",
    [{}, {"top_p": 1.0}, {"top_k": 5, "top_p": 1.0}, {"top_k": 30, "top_p": 0.6}, {"top_p": 0.01}, {"temperature": 0.0}],
)
def test_draw_has_the_distribution_of_pick(params: dict[str, Any]) -> None:
    """Inverting a CDF at n even points gives each word's share to 1/n; the two differ by 2/n at most, plus rounding."""
    settings = SamplingParams(**{"temperature": 0.9, **params})
    logits = 2 * torch.randn(50)
    assert torch.allclose(distribution(logits, settings, "draw"), distribution(logits, settings, "pick"), atol=1.5e-4)


def test_rows_have_their_own_parameters() -> None:
    logits = torch.randn(4, 50)
    uniform = torch.tensor([0.3, 0.9, 0.6, 1 - 2**-24])
    each = [torch.tensor([getattr(p, name) for p in MIXED]) for name in ("temperature", "top_p", "top_k")]
    got = draw(logits, *each, uniform, filters_of(MIXED))
    assert got.tolist() == [pick(row[None], p, u[None]).item() for row, p, u in zip(logits, MIXED, uniform, strict=True)]


def test_of_equal_words_the_first_is_the_only_one_kept() -> None:
    """Logits in bfloat16 are often equal: top_k 1 must not draw among them."""
    params = [SamplingParams(top_k=1), SamplingParams(temperature=0), SamplingParams(top_k=1, temperature=3.0)]
    draws, logits = Draws.empty(3, torch.device("cpu")), torch.tensor([[1.0, 5, 5, 0]]).expand(3, -1)
    for row, own in enumerate(params):
        draws.set(row, own)
    told = draws.temperature, draws.top_p, draws.top_k
    assert draw(logits, *told, torch.full((3,), 0.9), filters_of(params)).tolist() == [1, 1, 1]


def test_masked_words_are_never_drawn() -> None:
    logits = torch.randn(64, 50)
    logits[:, [0, 3, 49]] = -torch.inf
    ones = torch.ones(64)
    for u in (0.0, 0.5, 1 - 2**-24):
        ids = draw(logits, 50 * ones, ones, torch.zeros(64, dtype=torch.long), u * ones, (False, False))
        assert not set(ids.tolist()) & {0, 3, 49}


# ------------------------------------------------------------------------------------------------------------ screen
def test_a_screen_of_all_words_is_exact() -> None:
    """Whatever its rank: it then chooses nothing."""
    table, never = torch.randn(301, 16), torch.zeros(301, dtype=torch.bool)
    never[[1, 300]] = True
    hidden = torch.randn(5, 16)
    assert torch.allclose(Screen(table, never, words=301, rank=2)(hidden), Vocabulary(table, never)(hidden), atol=1e-5)


def test_a_screen_of_full_rank_is_exact() -> None:
    """Whatever its words: the factor is then the table. And a screen's best words are exact at any rank."""
    table, never = torch.randn(400, 16), torch.zeros(400, dtype=torch.bool)
    hidden = torch.randn(20, 16)
    exact = Vocabulary(table, never)(hidden)
    assert torch.allclose(Screen(table, never, words=8, rank=16)(hidden), exact, atol=1e-4)
    screen = Screen(table, never, words=50, rank=4)
    logits, factor = screen(hidden), linear_scores(screen, hidden)
    same = (logits - exact).abs() < 1e-4
    assert (same.sum(-1) >= 50).all() and same.gather(1, factor.topk(screen.groups).indices).all()


def test_the_screen_in_the_sampler() -> None:
    """Greedy text through a screen that holds the best word is the exact text."""
    model = make_student(seq_len=48)
    expected = eager(model).generate(PROMPTS, GREEDY)
    assert fast(model, words=160, rank=16).generate(PROMPTS, GREEDY) == expected
    ids = [i for out in fast(model, words=16, rank=4).generate(PROMPTS, MIXED[2]) for i in out.token_ids]
    assert not set(ids) & {1, *range(300, 320)}  # what the tokenizer lacks is not drawn


# -------------------------------------------------------------------------------------------------------------- int8
def hidden_and_tables(dtype: torch.dtype) -> tuple[torch.Tensor, Vocabulary, Int8]:
    """Hidden vectors whose logits differ as a trained model's do, by some 3 nats, and both products with one table."""
    table, never = torch.randn(320, 64), torch.zeros(320, dtype=torch.bool)
    never[[1, 300]] = True
    table[7] = 0  # what no update ever reached
    hidden, table = (0.4 * torch.randn(64, 64)).to(dtype), table.to(dtype)
    return hidden, Vocabulary(table, never), Int8(table, never)


def test_int8_logits_are_near_the_exact_ones() -> None:
    """No entry of the table is further off than half a scale, so no logit than half a scale times the sum of |hidden|; and
    the logits are rounded to bfloat16, by 2^-9 of themselves at most."""
    hidden, exact, int8 = hidden_and_tables(torch.float32)
    hidden = hidden.bfloat16().float()  # as it is multiplied: nothing is lost there
    (true, near), known = (product(hidden) for product in (exact, int8)), exact.bias == 0
    bound = int8.scale.float() / 2 * hidden.abs().sum(-1, keepdim=True) + 1e-5
    bound += 2**-9 * near.abs()
    error = (true - near).abs()[:, known]
    assert (error <= bound[:, known]).all() and error[:, known.nonzero()[:, 0] != 7].mean() > 1e-4  # it is not the same product
    assert (near[:, ~known] == -torch.inf).all() and near[:, known].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_draws_from_nearly_the_same_distribution(dtype: torch.dtype) -> None:
    """Logits off by 0.02 nats, 1/150 of what they differ by, move about 1 % of the distribution; bfloat16 adds as much."""
    hidden, exact, int8 = hidden_and_tables(dtype)
    variation = (exact(hidden).softmax(-1) - int8(hidden).softmax(-1)).abs().sum(-1) / 2
    assert variation.mean() < 0.02 and variation.max() < 0.05
    params = SamplingParams(8, temperature=0.9, top_p=0.9)
    shares = [distribution(product(hidden)[0], params, "draw") for product in (exact, int8)]
    assert (shares[0] - shares[1]).abs().sum() / 2 < 0.05 and not shares[1][[1, 300]].any()


def test_int8_multiplies_as_bfloat16_whatever_the_type() -> None:
    """torch's kernel for float32 is four times slower than the exact product."""
    hidden, _, int8 = hidden_and_tables(torch.float32)
    assert torch.equal(int8(hidden), int8(hidden.bfloat16())) and int8.scale.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("width", [20, 24, 32])
def test_int8_of_any_width(width: int, rows: int) -> None:
    """A table of whole numbers, whose largest is 127 in each row, loses nothing in 8 bits."""
    table = torch.randint(-127, 128, (51, width))
    table[:, width - 1] = 127
    hidden = torch.randn(rows, width, dtype=torch.bfloat16)
    int8 = Int8(table.bfloat16(), torch.zeros(51, dtype=torch.bool))
    exact = hidden.double() @ table.double().T
    assert torch.allclose(int8(hidden).double(), exact, rtol=2**-8, atol=1e-2)
    assert int8.bytes_read(rows) == 51 * (32 + 2)


@compiles
def test_compiled_int8_equals_eager(light: None) -> None:
    hidden, _, int8 = hidden_and_tables(torch.float32)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.int8 = int8

        def forward(self, x: torch.Tensor, constant: None) -> torch.Tensor:
            return self.int8(x)

    assert torch.allclose(CompiledStep(Step().eval(), 64)(hidden, None), int8(hidden), atol=1e-5)


class RoundedTable(Vocabulary):
    """What Int8 computes, as one float32 product and two roundings."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.bfloat16().float(), self.table).bfloat16().float() + self.bias


def test_int8_in_the_samplers() -> None:
    """Greedy text is that of a model with the rounded table in its vocabulary product."""
    model = make_student(seq_len=48)
    sampler = fast(model, int8=True)
    ids = [i for out in sampler.generate(PROMPTS, MIXED[2]) for i in out.token_ids]
    assert not set(ids) & {1, *range(300, 320)}
    rounded, int8 = fast(model), sampler.token_step.vocabulary
    assert isinstance(int8, Int8)
    rounded.token_step.vocabulary = RoundedTable(int8.rows * int8.scale.float()[:, None], int8.bias != 0)
    assert sampler.generate(PROMPTS, GREEDY) == rounded.generate(PROMPTS, GREEDY)
    quick = FastTokenModel(make_token_model(), slots=1, positions=32, dtype=torch.float32, int8=True, compile=False)
    assert isinstance(quick.program.vocabulary, Int8)
    with pytest.raises(UserError, match="a screen or int8, got both"):
        fast(model, words=16, rank=4, int8=True)
    with pytest.raises(UserError, match="on the CPU, got one on meta"):
        Int8(torch.empty(8, 4, device="meta"), torch.zeros(8, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------------- token model
def test_the_token_model_equals_its_full_forward() -> None:
    """Greedy continuations of unequal prompts are the arg max of the stock model's forward pass."""
    model, prompts = make_token_model(), [[5, 6, 7], [9] * 10, [3]]
    quick = FastTokenModel(model, slots=3, positions=32, dtype=torch.float32, compile=False)
    quick.start(prompts, SamplingParams(12, temperature=0))
    out = [quick.advance(filters_of([])).tolist() for _ in range(12)]
    for i, prompt in enumerate(prompts):
        text = prompt + [step[i] for step in out]
        logits = model.lm(torch.tensor([text])).logits[0]
        top = logits[len(prompt) - 1 : -1].topk(2).values
        said = logits[torch.arange(len(prompt) - 1, len(text) - 1), text[len(prompt) :]]
        assert torch.allclose(said, top[:, 0], atol=1e-3)
    with pytest.raises(UserError, match="expected 3 prompts"):
        quick.start(prompts[:2], SamplingParams(12))


# ---------------------------------------------------------------------------------------------------------- compiled
@compiles
def test_compiled_equals_eager(light: None) -> None:
    """In float32 the compiled step gives the uncompiled one's text, of a greedy row and of one drawn from a nucleus."""
    params = [GREEDY, SamplingParams(16, temperature=0.9, top_p=0.8, seed=9)]

    def written(model: Student, compile: bool) -> dict[int, list[int]]:
        sampler, out = fast(model, slots=2, compile=compile), {0: [], 1: []}  # type: dict[int, list[int]]
        sampler.add(PROMPTS[:2], params)
        while sampler.active:
            for chunk in sampler.step():
                out[chunk.row] += chunk.token_ids
        return out

    for _ in range(2):  # the second time the same generated code with other weights
        model = make_student(local_memory=True, seq_len=16, local_layers=1, num_layers=1)
        assert written(model, compile=True) == written(model, compile=False)


@compiles
def test_compiled_in_bfloat16_moves_the_windows_as_uncompiled(light: None) -> None:
    """Of the sizes that real models have, for which the compiler makes other code than for small ones (docs/log.md)."""

    def moved(compile: bool) -> list[torch.Tensor]:
        sampler = fast(model, slots=2, compile=compile, dtype=torch.bfloat16)
        sampler.add([list(range(5, 85)), list(range(9, 80))], [GREEDY, GREEDY])
        sampler.step()
        assert sampler.window is not None
        return [x.float() for x in (*sampler.window.turned, *(keys[..., :64] for keys in sampler.window.keys))]

    model = make_student(embed_dim=128, k=8, seq_len=16, local_layers=1, num_layers=1, local_window=64, local_qk_norm=True)
    for got, expected in zip(moved(compile=True), moved(compile=False), strict=True):
        torch.testing.assert_close(got[..., :64], expected[..., :64], atol=0.05, rtol=0.02)


def test_a_failing_prefill_costs_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = fast(make_student(), 2, compile=False)
    monkeypatch.setattr(sampler, "_prefill_slots", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        sampler.add([[5, 6]], [SamplingParams(4)])
    monkeypatch.undo()
    assert sampler.free == 2 and sampler.add([[5, 6]] * 2, [SamplingParams(4)] * 2) == [0, 1]


def test_compiled_steps_are_kept_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the temporary folder that torch names as soon as it is imported - unless the user says where."""
    place = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(place, "")  # so that what is there, or that nothing is, comes back when the test ends
    monkeypatch.delenv(place)
    chosen_by_torch = cache_dir()
    assert os.environ[place] == chosen_by_torch
    keep_for_later()
    assert cache_dir() == str(tmp_path / ".cache" / "latentforge" / "inductor")
    monkeypatch.setenv(place, str(tmp_path / "elsewhere"))
    keep_for_later()
    assert cache_dir() == str(tmp_path / "elsewhere")
    monkeypatch.delenv(place)
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(UserError, match="set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"):
        keep_for_later()


@pytest.mark.parametrize("k", [1, 4])
def test_a_prompt_of_many_blocks(k: int) -> None:
    model = make_student(seq_len=160 // k, k=k, local_memory=True)
    prompts = [torch.randint(2, 300, (100,)).tolist(), [20, 21]]
    assert fast(model, slots=2).generate(prompts, GREEDY) == eager(model).generate(prompts, GREEDY)


def test_a_long_tail_is_drawn_from() -> None:
    logits, one = torch.full((1, 1 << 17), -13.0), torch.ones(1)
    logits[0, 7] = 0.0  # 0.77 of the distribution; the rest is spread over 131,071 words
    assert draw(logits, one, one, torch.zeros(1, dtype=torch.long), 0.9 * one, (False, False)).item() > 7


def test_thresholds_are_as_fine_as_they_say() -> None:
    logits, ones = -1e-3 * torch.arange(50.0), torch.ones(400)
    uniform = (torch.arange(400) + 0.5) / 400
    kept = draw(logits.expand(400, -1), ones, ones, torch.full((400,), 20), uniform, (False, True))
    assert set(kept.tolist()) == set(range(20))
    kept = draw(logits.expand(400, -1), ones, 0.4 * ones, torch.zeros(400, dtype=torch.long), uniform, (True, False))
    assert set(kept.tolist()) == set(range(20))
