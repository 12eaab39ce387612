"""Requests and answers, as the OpenAPI document states them: OpenAI's dialect, and /generate.

Numbers are strict ("5" is no integer). Fields of OpenAI's and vLLM's servers that bind what is written and that this one cannot
follow, are refused unless they ask for nothing; other unknown fields are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from student.sampler import SamplingParams

LARGEST_ID = 2**31 - 1
LARGEST_SEED = 2**53  # exact in every client's JSON; row i of a request adds i
SMALLEST_TOP_P = 1e-4  # 0 means the likeliest token, as everywhere; it must not become 0 in a sum of float32
# A whole number, also where it is written 37.0: JSON knows one kind of number.
WHOLE = BeforeValidator(lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)
Count = Annotated[int, Field(ge=0, le=LARGEST_ID), WHOLE]
Positive = Annotated[int, Field(ge=1, le=LARGEST_ID), WHOLE]
Few = Annotated[int, Field(ge=1, le=128), WHOLE]
One = Annotated[int, Field(ge=1, le=1), WHOLE]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
PROMPTS = Field(min_length=1, max_length=1024, fail_fast=True)  # far more than are answered at once, and quickly looked at
MANY = Field(min_length=1, fail_fast=True)  # lists: else each of a million wrong elements is an error of its own to collect
Nothing = Annotated[float | None, Field(ge=0, le=0)]
NoList = Annotated[list[Any], Field(max_length=0)] | None


class Refused(Exception):
    """A request that gets an error answer: HTTP status, message, and the parameter at fault."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


# ----------------------------------------------------------------------------------------------------- requests
class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Sampling(Body):
    """What all requests share. A field that is left out, or null, takes the endpoint's default."""

    default_temperature: ClassVar[float] = 1.0
    default_top_p: ClassVar[float] = 1.0
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False, description="0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: Annotated[int, Field(ge=-1, le=LARGEST_ID), WHOLE] | None = Field(None, description="0 and -1 are off")
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED), WHOLE] | None = Field(None, description="unset: a random one")
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = False

    def field(self, name: str) -> str:
        """What the request calls this parameter: prompt, max_tokens or logprobs."""
        return name

    def params(self, max_new_tokens: int, seed: int) -> SamplingParams:
        """For the sampler."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.default_temperature if self.temperature is None else self.temperature,
            top_p=max(SMALLEST_TOP_P, self.default_top_p if self.top_p is None else self.top_p),
            top_k=max(0, self.top_k or 0),
            seed=seed,
            stop=tuple(stop),
        )


class GenerateRequest(Sampling):
    model_config = ConfigDict(extra="forbid")  # this dialect is ours alone: what is not known here is a mistake
    default_temperature: ClassVar[float] = 0.8
    default_top_p: ClassVar[float] = 0.95
    prompt: str
    max_new_tokens: Positive = 128
    temperature: float | None = Field(default_temperature, ge=0, le=100, allow_inf_nan=False, description="0 is greedy")
    top_p: float | None = Field(default_top_p, ge=0, le=1, allow_inf_nan=False)

    def field(self, name: str) -> str:
        return "max_new_tokens" if name == "max_tokens" else name


class StreamOptions(Body):
    include_usage: bool | None = False


class OpenAIRequest(Sampling):
    model: str | None = Field(None, description="as in /v1/models; unset: the only one there is")
    n: Few | None = 1
    stream_options: StreamOptions | None = None
    frequency_penalty: Nothing = Field(None, description="not supported: only 0")
    presence_penalty: Nothing = Field(None, description="not supported: only 0")
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = Field(None, description="not supported: only {}")
    min_p: Nothing = Field(None, description="not supported: only 0")
    min_tokens: Nothing = Field(None, description="not supported: only 0")
    repetition_penalty: Annotated[float | None, Field(ge=1, le=1)] = Field(None, description="not supported: only 1")
    stop_token_ids: NoList = Field(None, description="not supported: only []")


Ids = Annotated[list[Count], MANY]


class CompletionRequest(OpenAIRequest):
    prompt: str | Ids | Annotated[list[str], PROMPTS] | Annotated[list[Ids], PROMPTS]
    max_tokens: Count | None = Field(16, description="0 only with echo")
    echo: bool | None = False
    logprobs: Count | None = None
    best_of: One | None = Field(None, description="not supported: only 1")
    suffix: Annotated[str, StringConstraints(max_length=0)] | None = Field(None, description="not supported: only empty")


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class AnyText(Body):
    type: Literal["text"]


class ChatRequest(OpenAIRequest):
    messages: Annotated[list[Message], MANY]
    max_tokens: Positive | None = Field(None, description="unset: as many as there is room for")
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = False
    top_logprobs: Count | None = None
    tools: NoList = Field(None, description="not supported: only []")
    functions: NoList = Field(None, description="not supported: only []")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="there are no tools to choose")
    response_format: AnyText | None = Field(None, description="not supported: only text")

    def field(self, name: str) -> str:
        if name == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return {"prompt": "messages", "logprobs": "top_logprobs"}.get(name, name)


# ------------------------------------------------------------------------------------------------------ answers
class ErrorContent(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str


class ErrorAnswer(BaseModel):
    error: ErrorContent


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timing(BaseModel):
    """Seconds since the request was taken; tokens_per_s from the first chunk's start on."""

    queued_s: float
    first_chunk_s: float
    total_s: float
    tokens_per_s: float


class GenerateAnswer(BaseModel):
    text: str
    token_ids: list[int] = Field(description="all that was written, what a stop string cut from the text included")
    usage: Usage
    latent_steps: int = Field(description="calls of the backbone; a token-level model needs one a token")
    finish_reason: Literal["stop", "length"]
    timing: Timing


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatTop(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ChatTop):
    top_logprobs: list[ChatTop]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="tokens of prompt and continuation")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "starting", "closing", "failed"]
    running: int = Field(description="rows in slots")
    waiting: int


class Version(BaseModel):
    name: str
    version: str
    model: str
    k: int = Field(description="tokens a latent step")
    context: int
    parameters: int
    torch: str
    python: str
