"""The bodies of OpenAI's requests: what of them is served, and what is refused, each in a sentence."""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from gatewise.checks import is_whole

# Settings that are not served, with the values that change nothing. What is neither here nor below is refused whatever its value.
_ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "bad_words": ([],),
    "stop_token_ids": ([],),
    "logits_processors": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "documents": ([],),
    "priority": (0,),
}
# These change no answer here, whatever they say: who asks, what OpenAI keeps or caches, how tools are called where there are none.
_HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "parallel_tool_calls", "request_id", "session_id", "cache_salt", "include_reasoning",
    }
)  # fmt: skip

MOST_COPIES = 128
"""Answers to one prompt."""


class RefusedError(Exception):
    """An error that the client is shown.

    Args:
        status: of HTTP; 503 where it helps to ask again.
        param: the field of the request that it is about.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class StreamOptions(BaseModel):
    """What a stream has more: ``include_usage``, at the end, how many tokens were read and written."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False
    include_obfuscation: bool = False  # texts of a random length beside the answer, which nobody here adds
    continuous_usage_stats: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                raise RefusedError(f"stream_options: {name[:80]} is not served here: leave it out", param="stream_options")
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class Asked(BaseModel):
    """A body. A field that is null is one that was left out.

    Attributes:
        only: fields that are not served, with the values that change nothing.
    """

    model_config = ConfigDict(strict=True, extra="ignore")  # ``read`` refuses what is not known
    only: ClassVar[dict[str, tuple[Any, ...]]] = {}


class Body(Asked):
    """What requests for texts and for chats have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    n: int = Field(1, ge=1, le=MOST_COPIES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], FailFast()] = Field([], max_length=16)
    ignore_eos: bool = False
    vllm_xargs: dict[str, Any] = {}

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _check(self) -> "Body":
        if "" in self.stop:
            raise RefusedError("stop has an empty text: leave it out", param="stop")
        if "stream_options" in self.model_fields_set and not self.stream:
            raise RefusedError("stream_options goes with stream as true: leave it out", param="stream_options")
        return self


class Completion(Body):
    """The body of ``/v1/completions``."""

    only = _ONLY | {"add_special_tokens": (True,)}

    prompt: Any

    @model_validator(mode="after")
    def _check_prompt(self) -> "Completion":
        given = self.prompt
        prompts = given if isinstance(given, list) and given and set(map(type, given)) != {int} else [given]
        if not all(isinstance(one, str) or (isinstance(one, list) and set(map(type, one)) == {int}) for one in prompts):
            said = "prompt: expected a text, a list of texts, token ids or a list of token ids, none of them empty"
            raise RefusedError(said, param="prompt")
        self.prompt = prompts
        return self


class Message(BaseModel):
    """A message of a chat. Content may come in parts, if all of them are texts. Other fields have to be null or empty."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str
    name: str | None = None  # of who speaks, which chat templates do not write

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        if not all(isinstance(one, dict) and one.get("type") == "text" and isinstance(one.get("text"), str) for one in content):
            raise RefusedError("messages: content has parts that are no text, which is not served here", param="messages")
        return "\n".join(one["text"] for one in content)

    @model_validator(mode="after")
    def _check(self) -> "Message":
        for name, given in (self.model_extra or {}).items():
            if given not in (None, "", [], {}):
                raise RefusedError(f"messages: {name[:80]} is not served here: leave it out", param="messages")
        return self


class Chat(Body):
    """The body of ``/v1/chat/completions``."""

    only = _ONLY | {"add_special_tokens": (False,)}  # a chat template writes special tokens itself

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)

    @model_validator(mode="after")
    def _check_chat(self) -> "Chat":
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self


class Tokenize(Asked):
    """The body of ``/tokenize``: a text, or the messages of a chat. Without a model it is the base model's tokenizer."""

    only = {name: _ONLY[name] for name in ("tools", "chat_template_kwargs", "mm_processor_kwargs", "continue_final_message")} | {
        "add_generation_prompt": (True,)
    }

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FailFast()] = []
    add_special_tokens: bool | None = None  # of the tokenizer: by default with a text, and not with a chat, whose template has them
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Tokenize":
        if (self.prompt is None) == (not self.messages):
            raise RefusedError("expected either prompt, a text, or messages", param="prompt")
        if self.messages and self.add_special_tokens:
            said = "add_special_tokens is not served here with messages, whose chat template has them: leave it out"
            raise RefusedError(said, param="add_special_tokens")
        return self


class Detokenize(Asked):
    """The body of ``/detokenize``."""

    model: str | None = None
    tokens: Annotated[list[int], FailFast()]


AnyBody = TypeVar("AnyBody", bound=Asked)


def read(kind: type[AnyBody], content: bytes, most_answers: int = 2**31, most_tokens: int = 2**31) -> AnyBody:
    """A body of JSON.

    Args:
        most_answers: that may be asked for at once.
        most_tokens: of a prompt. A chat of more messages cannot fit.

    Raises:
        RefusedError: it makes no sense, or is not served. Of a body with a million faults the first is told, and nothing is made of
            the others.
    """
    try:
        given = from_json(content)
    except ValueError as error:
        raise RefusedError(f"the body: Invalid JSON: {error}") from None
    if not isinstance(given, dict):
        raise RefusedError("the body: expected an object of JSON")
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name in kind.model_fields or name in _HARMLESS:
            continue
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in kind.only.get(name, ())):
            raise RefusedError(f"{name[:80]} is not served here, or not with this value: leave it out", param=name[:80])
    prompts, copies, messages = given.get("prompt"), given.get("n", 1), given.get("messages")
    count = len(prompts) if isinstance(prompts, list) and prompts and not is_whole(prompts[0]) else 1
    count *= copies if is_whole(copies) and copies <= MOST_COPIES else 1
    if count > most_answers:
        raise RefusedError(f"{count} answers were asked for at once: expected at most {most_answers}", param="n")
    if isinstance(messages, list) and len(messages) > most_tokens:
        said = f"there are {len(messages)} messages, more than the {most_tokens} tokens of this model's maximum context length"
        raise RefusedError(said, param="messages")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(one)[:80] for one in first["loc"])
        raise RefusedError(f"{place or 'the body'}: {first['msg']}", param=str(first["loc"][0]) if place else None) from None
