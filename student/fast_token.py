"""The token-level model on the fast path's parts: the strongest baseline that we know how to write, for the race.

Same backbone step, same static cache, same compiler settings, same draws on the device as the student's; one token a step.

Legend: `B` slots, `T` tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.run import has_fast_bf16
from student.baseline import TokenModel
from student.compiled import CompiledStep, Replayed
from student.drawing import Vocabulary, draw, make_vocabulary
from student.fast import Draws
from student.sampler import SamplingParams
from student.static import Cache, StaticBackbone, in_dtype


class NextToken(nn.Module):
    """The token before -> the next token, with the cache moved on in place."""

    def __init__(self, model: TokenModel, vocabulary: Vocabulary, positions: int) -> None:
        super().__init__()
        self.vocabulary, self.backbone = vocabulary, StaticBackbone(model.lm.model, positions)

    def forward(
        self, token: Tensor, cache: Cache, length: Tensor, draws: Draws, uniform: Tensor, filters: tuple[bool, bool]
    ) -> Tensor:
        h = self.backbone.step(self.vocabulary.table[token], cache, length)  # (B, H)
        return draw(self.vocabulary(h), draws.temperature, draws.top_p, draws.top_k, uniform, filters)


class FastTokenModel:
    """`slots` rows of a token-level model with room for `positions` tokens each."""

    def __init__(
        self, model: TokenModel, *, slots: int, positions: int, dtype: torch.dtype | None = None, compile: bool = True,
        words: int = 0, rank: int = 64, int8: bool = False,
    ) -> None:  # fmt: skip
        device = model.table.device
        dtype = dtype or (torch.bfloat16 if has_fast_bf16(device) else torch.float32)
        model = in_dtype(model, dtype).requires_grad_(False)
        self.slots, self.positions, self.backbone_steps = slots, positions, 0
        never = torch.zeros(len(model.table), dtype=torch.bool)
        vocabulary = make_vocabulary(model.table, never, words, rank, int8)
        self.program = NextToken(model, vocabulary, positions).eval()
        self._step = CompiledStep(self.program, slots) if compile else self.program
        self.cache = self.program.backbone.new_cache(slots)
        self.length = torch.zeros(slots, dtype=torch.long, device=device)
        self.token = torch.zeros(slots, dtype=torch.long, device=device)
        self.draws, self.uniform = Draws.empty(slots, device), torch.zeros(slots, device=device)
        self.generator = torch.Generator()
        # not the cache: it is written from `length` on only, and nothing reads what lies there before it is written anew
        self._write = Replayed(self._write_token, device, [self.length, self.token])

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """Fill all slots, in one pass: all but each prompt's last token, which is the next step's input."""
        if len(prompts) != self.slots or max(map(len, prompts)) + params.max_new_tokens > self.positions:
            raise UserError(f"expected {self.slots} prompts that leave room in {self.positions} positions")
        device, longest = self.length.device, max(map(len, prompts))
        tokens = torch.tensor([list(p) + [0] * (longest - len(p)) for p in prompts], device=device)  # (B, T)
        self.length.copy_(torch.tensor([len(p) - 1 for p in prompts]))
        if longest > 1:
            x = self.program.vocabulary.table[tokens[:, :-1]]
            self.program.backbone.prefill(x, self.cache, torch.arange(self.slots, device=device))
            self.backbone_steps += 1
        self.token.copy_(tokens[torch.arange(self.slots, device=device), self.length])
        self.draws.set(slice(None), params)
        self.generator.manual_seed(params.seed)

    @torch.no_grad()
    def advance(self, filters: tuple[bool, bool] = (True, False)) -> Tensor:
        """Every slot's next token, (slots,), still on the device; overwritten by the next call."""
        self.backbone_steps += 1
        self.uniform.copy_(torch.rand(self.slots, generator=self.generator), non_blocking=True)
        return self._write(filters)

    def _write_token(self, filters: tuple[bool, bool]) -> Tensor:
        self.token.copy_(self._step(self.token, self.cache, self.length, self.draws, self.uniform, filters))
        self.length.add_(1)
        return self.token
