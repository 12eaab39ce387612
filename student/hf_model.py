"""The student as a transformers model: `generate` writes K tokens a step, `forward` gives exact logits and loss.

tools/export_hf.py puts this module, and what it needs of the others, beside the weights; from there
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs it without this repository.

Legend: `B` rows, `T` tokens, `K` tokens a chunk, `E` embedding width, `V` vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.generic import can_return_tuple

from ae.losses import token_nll
from configs.errors import UserError
from student.hf_config import LatentForgeConfig
from student.sampler import Sampler, SamplingParams
from student.student_model import Student, StudentConfig

IGNORED = -100  # transformers' label of a token that is not scored
# Fields of a GenerationConfig that `generate` follows; eos_token_id is where a row ends.
FOLLOWED = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k", "num_return_sequences", "eos_token_id",
    "pad_token_id",
}  # fmt: skip
# Fields that change nothing: at these values, or (None) at any.
NEUTRAL = {
    "num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1.0, "bos_token_id": None,
    "transformers_version": None, "use_cache": None,
}  # fmt: skip


@dataclass
class _Vocabulary:
    """What the sampler asks of a tokenizer. Text is not its business here: who calls `generate` decodes."""

    size: int
    pad_id: int
    eot_id: int
    stop_ids: frozenset[int]

    def token_bytes(self, id: int) -> bytes:
        return b""


def own_span(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask (B, T) -> (first, count), (B,) each: where each row's own tokens begin, and how many they are.

    Raises UserError for rows that are empty or interrupted.
    """
    mask = mask.bool()
    first, count = mask.int().argmax(1), mask.sum(1)  # argmax: the first of equals
    at = torch.arange(mask.shape[1], device=mask.device) - first[:, None]
    if not (count > 0).all() or not ((at >= 0) & (at < count[:, None]) == mask).all():
        raise UserError("attention_mask: expected one run of ones in each row, padding before or behind it; pad the rows again")
    return first, count


class LatentForgeForCausalLM(PreTrainedModel, GenerationMixin):
    """`Student` behind transformers' interface."""

    config_class = LatentForgeConfig
    _supports_sdpa = True

    def __init__(self, config: LatentForgeConfig) -> None:
        super().__init__(config)
        self.student = Student(StudentConfig(**config.student))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.student.ae.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.student.ae.embedding = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
    ) -> CausalLMOutput:
        """Logits (B, T, V), where row t predicts token t + 1, and with labels (B, T) the mean NLL in nats of those that are
        neither -100, nor masked, nor first in their row.

        A row's chunks begin at its first own token, whatever padding the mask (B, T) hides before or behind it. A prompt that
        `generate` continued was filled up to whole chunks with pads in front; to score its continuation under the very
        distribution that wrote it, put those pads in front as tokens of the row. logits_to_keep: only the last so many
        logits, 0 for all, or these positions. use_cache: no cache comes back, whatever it says. Raises UserError for what is
        longer than the context, and for an energy head, which has no likelihood.
        """
        cfg, length = self.student.cfg, input_ids.shape[1]
        if not 0 < length <= cfg.context:
            raise UserError(f"input_ids: expected 1 to {cfg.context} tokens, the context, got {length}; cut or split the text")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        first, count = own_span(mask)
        # Every row moved to the left, and filled with pads to whole chunks and at least one token more: what to predict last.
        at = torch.arange((length // cfg.k + 1) * cfg.k, device=input_ids.device)
        moved = F.pad(input_ids, (0, len(at) - length)).gather(1, (at + first[:, None]).clamp(max=len(at) - 1))
        tokens = moved.masked_fill(at >= count[:, None], cfg.pad_id)
        states = self.student.hidden(tokens)  # (B, ceil, E), row t predicts token t
        back = (at[1 : length + 1] - first[:, None]).clamp(min=0)  # (B, T)
        states = states.gather(1, back[..., None].expand(-1, -1, states.shape[-1]))  # (B, T, E), row t predicts token t + 1
        loss = None
        if labels is not None:
            scored = mask[:, 1:].bool() & mask[:, :-1].bool()
            targets = labels[:, 1:].masked_fill(~scored, IGNORED)
            nll = token_nll(states[:, :-1].flatten(0, 1), self.student.table, targets.flatten())  # 0 where ignored
            loss = nll.sum() / (targets != IGNORED).sum()
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutput(loss=loss, logits=self.student.ae.logits(states[:, kept]))

    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        seed: int | None = None,
        streamer: Any = None,
        inputs: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Continue prompts (B, T), padded on the left where they differ in length, K tokens a step -> (B, T + new).

        settings: fields of a GenerationConfig, of which sampling (do_sample, temperature, top_p, top_k), lengths
        (max_new_tokens, max_length), eos_token_id, pad_token_id and num_return_sequences are followed; any other that is set
        raises UserError. Row i draws from `seed` + i, as in this model's own repository; without one, from a seed that
        torch's generator gives. A row that ends early is closed by its eos_token_id, and filled with pads.
        streamer: gets the new tokens of each step.
        """
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            raise UserError("generate: expected input_ids (B, T), the prompts")
        config = self._settings(generation_config, settings)
        stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        pad = self.config.pad_token_id
        words = _Vocabulary(self.config.tokenizer_size, pad, self.config.eos_token_id, frozenset(stops))
        sampler = Sampler(self.student, words)  # type: ignore[arg-type]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids) if pad in stops else input_ids != pad
        first, count = own_span(attention_mask)
        if (first + count != input_ids.shape[1]).any():
            raise UserError("prompts of unequal length: expected padding on the left; set tokenizer.padding_side = 'left'")
        copies = config.num_return_sequences or 1
        prompts = [row[start:] for row, start in zip(input_ids.tolist(), first.tolist(), strict=True) for _ in range(copies)]
        new = config.max_new_tokens
        if new is None:
            new = SamplingParams.max_new_tokens if config.max_length is None else config.max_length - input_ids.shape[1]
        params = SamplingParams(
            max_new_tokens=new,
            temperature=(1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=config.top_k or 0,
            seed=int(torch.randint(1 << 62, ())) if seed is None else seed,
        )
        if streamer is not None:
            streamer.put(input_ids.cpu())
        written: list[list[int]] = [[] for _ in prompts]
        for chunk in sampler.stream(prompts, params):
            ids = chunk.token_ids if chunk.ended is None else [*chunk.token_ids, chunk.ended]
            written[chunk.row] += ids
            if streamer is not None:
                streamer.put(torch.tensor(ids))
        if streamer is not None:
            streamer.end()
        longest, fill = max(map(len, written)), pad if config.pad_token_id is None else config.pad_token_id
        filled = torch.tensor([row + [fill] * (longest - len(row)) for row in written], device=input_ids.device)
        return torch.cat([input_ids.repeat_interleave(copies, 0), filled], dim=1)

    def _settings(self, given: GenerationConfig | None, settings: dict[str, Any]) -> GenerationConfig:
        """The model's generation config, then what is `given`, then `settings`. Raises UserError for what is not followed."""
        config = copy.deepcopy(self.generation_config)
        unknown = config.update(**({} if given is None else given.to_diff_dict())) | config.update(**settings)
        asked = {name: value for name, value in {**config.to_diff_dict(), **unknown}.items() if name not in FOLLOWED}
        refused = [name for name, value in asked.items() if value is not None and value is not False]
        refused = [name for name in refused if name not in NEUTRAL or NEUTRAL[name] not in (None, asked[name])]
        if refused:
            raise UserError(
                f"generate does not support {', '.join(sorted(refused))}: this model writes {self.student.cfg.k} tokens a step "
                f"and follows {', '.join(sorted(FOLLOWED))}; leave the others out"
            )
        return config
