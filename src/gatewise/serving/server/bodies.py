"""The bodies of OpenAI's requests: what of them is served, and what is refused, each in a sentence."""

from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gatewise.checks import is_whole

# Settings that are not served, with the values that change nothing.
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
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "guided_choice": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_grammar": (),
    "structural_tag": (),
    "logits_processors": ([],),
    "thinking_token_budget": (),
    "reasoning_effort": (),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "documents": ([],),
}


class RefusedError(Exception):
    """An error that the client is shown.

    Args:
        status: of HTTP; 503 where it helps to ask again.
        param: the field of the request that it is about.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class Body(BaseModel):
    """What requests for texts and for chats have in common. A field that is null is one that was left out."""

    model_config = ConfigDict(strict=True, extra="allow")
    only: ClassVar[dict[str, tuple[Any, ...]]]

    model: str
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: dict[str, bool] = {}  # include_usage: at the end, how many tokens were read and written
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field([], max_length=16)
    ignore_eos: bool = False
    vllm_xargs: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _check(self) -> "Body":
        if "" in self.stop:
            raise RefusedError("stop has an empty text: leave it out", param="stop")
        if self.stream_options and not self.stream:
            raise RefusedError("stream_options goes with stream as true: leave it out", param="stream_options")
        for name, given in (self.model_extra or {}).items():
            neutral = self.only.get(name, (given,))
            if not any(given == one and isinstance(given, bool) == isinstance(one, bool) for one in neutral):
                raise RefusedError(f"{name} is not served here, or not with this value: leave it out", param=name)
        return self


class Completion(Body):
    """The body of ``/v1/completions``."""

    only = _ONLY | {"add_special_tokens": (True,), "max_completion_tokens": ()}

    prompt: Any

    @model_validator(mode="after")
    def _check_prompt(self) -> "Completion":
        given = self.prompt
        prompts = given if isinstance(given, list) and given and not all(map(is_whole, given)) else [given]
        if not all(isinstance(one, str) or (isinstance(one, list) and one and all(map(is_whole, one))) for one in prompts):
            said = "prompt: expected a text, a list of texts, token ids or a list of token ids, none of them empty"
            raise RefusedError(said, param="prompt")
        self.prompt = prompts
        return self


class Message(BaseModel):
    """A message of a chat. Content may come in parts, if all of them are texts."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str
    tool_calls: Literal[None] = None
    function_call: Literal[None] = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        if not all(isinstance(one, dict) and one.get("type") == "text" and isinstance(one.get("text"), str) for one in content):
            raise RefusedError("messages: content has parts that are no text, which is not served here", param="messages")
        return "\n".join(one["text"] for one in content)


class Chat(Body):
    """The body of ``/v1/chat/completions``."""

    only = _ONLY | {"add_special_tokens": (False,)}  # a chat template writes special tokens itself

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)

    @model_validator(mode="after")
    def _check_chat(self) -> "Chat":
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self


AnyBody = TypeVar("AnyBody", bound=Body)


def read(kind: type[AnyBody], content: bytes) -> AnyBody:
    """A body of JSON.

    Raises:
        RefusedError: it makes no sense, or is not served.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RefusedError(f"{place or 'the body'}: {first['msg']}", param=str(first["loc"][0]) if place else None) from None
