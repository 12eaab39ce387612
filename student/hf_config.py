"""The student's configuration as transformers knows it: what config.json of an exported folder holds."""

from __future__ import annotations

from transformers import PreTrainedConfig


class LatentForgeConfig(PreTrainedConfig):
    """`student` holds the fields of `StudentConfig`, `tokenizer_size` the tokenizer's entries: the model's table may have
    more rows. Beside them stand transformers' own names, for programs that look for those; `max_position_embeddings` is the
    context in tokens."""

    model_type = "latentforge"
