"""Requests that are wrong in many places, and texts that are surely too long, cost little to refuse."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from served import serve

from ae.tokenizer_adapter import TokenizerAdapter
from web.protocol import ChatRequest, CompletionRequest, Refused

MANY = 5000


@pytest.mark.parametrize("element", [0.5, [], [0.5], {}, None])
def test_a_list_of_wrong_elements_is_one_error(element: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": [element] * MANY})
    assert caught.value.error_count() < 8
    for body in ({"messages": [element] * MANY}, {"messages": [{"role": "user", "content": [element] * MANY}]}):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate(body)
        assert caught.value.error_count() < 8


@pytest.mark.parametrize("prompt", ["a", [1, 2], ["a", "b"], [[1], [2, 3]]])
def test_each_form_of_a_prompt_is_taken(prompt: Any) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompt == prompt


def test_a_chat_that_is_surely_too_long_is_not_encoded(tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_chat(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("encoded")

    served = serve(tokenizer)
    try:
        monkeypatch.setattr(type(tokenizer), "has_chat_template", property(lambda self: True))
        monkeypatch.setattr(type(tokenizer), "encode_chat", encode_chat)
        messages = [{"role": "user", "content": "x" * 100_000}] * 2
        with pytest.raises(Refused, match="messages: 200000 characters; the context of 256 tokens holds less"):
            served.service.encode_chat(ChatRequest.model_validate({"messages": messages}))
    finally:
        served.close()
