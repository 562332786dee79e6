"""The bodies of OpenAI's requests: what of them is served, and what is refused, each in a sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gatewise.checks import has_half_a_pair, is_number, is_whole
from gatewise.serving.server.engine import Sampling

MOST_LOGPROBS = 20
MOST_ANSWERS = 128
MOST_STOPS = 16

# Settings that are not served, with the values that change nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
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
_ONLY_COMPLETIONS: dict[str, tuple[Any, ...]] = {"add_special_tokens": (True,)}
_ONLY_CHAT: dict[str, tuple[Any, ...]] = {"add_special_tokens": (False,)}  # a chat template writes them itself


class BadRequestError(Exception):
    """What the client can put right.

    Args:
        param: the field that it is about.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        prompts: each a text, or token ids; of a chat one, whose messages are ``messages``.
        most: max_tokens as it was given.
        count: answers to each prompt.
        logprobs: as ``Sampling`` has it.
        echo: the prompt comes before the answer.
        extra: what is asked for beside OpenAI's fields (``vllm_xargs``), by name.
        usage: in a stream, whether it ends with what was used.
        every_usage: and each piece says what was used so far.
    """

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    messages: list[dict[str, Any]]
    most: int | None
    count: int
    stream: bool
    usage: bool
    every_usage: bool
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    logprobs: int | None
    echo: bool
    extra: Mapping[str, Any]

    def sampling(self, most: int, number: int) -> Sampling:
        """Of the answer of this number, with at most so many tokens."""
        seed = None if self.seed is None else self.seed + number
        return Sampling(most, self.temperature, self.top_p, seed, self.stop, self.ignore_eos, self.logprobs)


def completion(body: Mapping[str, Any]) -> Asked:
    """What the body of ``/v1/completions`` asks for.

    Raises:
        BadRequestError: it makes no sense, or is not served.
    """
    logprobs = body.get("logprobs")
    if logprobs is not None and not (is_whole(logprobs) and 0 <= logprobs <= MOST_LOGPROBS):
        raise BadRequestError(f"logprobs is {_shown(logprobs)}: expected a whole number from 0 to {MOST_LOGPROBS}", "logprobs")
    for name, own, neutral in (("max_completion_tokens", "max_tokens", None), ("top_logprobs", "logprobs", 0)):
        if body.get(name) not in (None, neutral):
            raise BadRequestError(f"{name} is served by /v1/chat/completions alone: give {own}", name)
    echo = _flag(body, "echo")
    return _asked(body, _ONLY_COMPLETIONS, prompts=_prompts(body.get("prompt")), logprobs=logprobs, most="max_tokens", echo=echo)


def chat(body: Mapping[str, Any]) -> Asked:
    """What the body of ``/v1/chat/completions`` asks for. Errors are those of ``completion``."""
    if _flag(body, "echo"):
        raise BadRequestError("echo is served by /v1/completions alone: leave it out", "echo")
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if wanted not in (None, True, False):
        raise BadRequestError(f"logprobs is {_shown(wanted)}: expected true or false", "logprobs")
    if top is not None and not (is_whole(top) and 0 <= top <= MOST_LOGPROBS):
        raise BadRequestError(f"top_logprobs is {_shown(top)}: expected a whole number from 0 to {MOST_LOGPROBS}", "top_logprobs")
    if top and not wanted:
        raise BadRequestError("top_logprobs was given without logprobs: give logprobs as true", "top_logprobs")
    most = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return _asked(body, _ONLY_CHAT, messages=_messages(body.get("messages")), logprobs=(top or 0) if wanted else None, most=most)


def _asked(
    body: Mapping[str, Any],
    only: Mapping[str, tuple[Any, ...]],
    *,
    most: str,
    logprobs: int | None,
    prompts: tuple[str | tuple[int, ...], ...] = (),
    messages: Sequence[dict[str, Any]] = (),
    echo: bool = False,
) -> Asked:
    model = body.get("model")
    if not isinstance(model, str) or has_half_a_pair(model):
        raise BadRequestError(f"model is {_shown(model)}: expected the name of a model that /v1/models lists", "model")
    for name, neutral in {**_ONLY, **only}.items():
        given = body.get(name)
        if given is not None and not any(given == one and isinstance(given, bool) == isinstance(one, bool) for one in neutral):
            raise BadRequestError(f"{name} is {_shown(given)}, which this server does not serve: leave it out", name)
    stream, options = _flag(body, "stream"), body.get("stream_options")
    if options is not None and not (isinstance(options, dict) and stream):
        raise BadRequestError("stream_options is an object that goes with stream as true: leave it out", "stream_options")
    options = options or {}
    every = _flag(options, "continuous_usage_stats")
    extra = body.get("vllm_xargs") or {}
    if not isinstance(extra, dict):
        raise BadRequestError(f"vllm_xargs is {_shown(extra)}: expected an object", "vllm_xargs")
    seed = body.get("seed")
    if seed is not None and not (is_whole(seed) and -(2**63) <= seed < 2**63):
        raise BadRequestError(f"seed is {_shown(seed)}: expected a whole number of 64 bits", "seed")
    return Asked(
        model=model,
        prompts=prompts,
        messages=list(messages),
        most=_whole(body, most, 0 if echo else 1, 2**31),
        count=_whole(body, "n", 1, MOST_ANSWERS) or 1,
        stream=stream,
        usage=_flag(options, "include_usage") or every,
        every_usage=every,
        temperature=_number(body, "temperature", 0.0, 2.0, 1.0),
        top_p=_number(body, "top_p", 0.0, 1.0, 1.0, above=True),
        seed=seed,
        stop=_stops(body.get("stop")),
        ignore_eos=_flag(body, "ignore_eos"),
        logprobs=logprobs,
        echo=echo,
        extra=extra,
    )


def _prompts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    """One text, several, the token ids of one, or of several."""
    wrong = BadRequestError(
        "prompt: expected a text, a list of texts, token ids or a list of token ids, none of them empty", "prompt"
    )
    if isinstance(given, str) or (isinstance(given, list) and given and all(map(is_whole, given))):
        given = [given]
    if not isinstance(given, list) or not given:
        raise wrong
    made: list[str | tuple[int, ...]] = []
    for one in given:
        if isinstance(one, str):
            made.append(_text(one, "prompt"))
        elif isinstance(one, list) and one and all(map(is_whole, one)):
            made.append(tuple(one))
        else:
            raise wrong
    return tuple(made)


def _messages(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise BadRequestError("messages: expected a list of messages with role and content", "messages")
    made = []
    for number, one in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise BadRequestError(f"{where}: expected an object with role and content", "messages")
        if one.get("tool_calls") or one.get("function_call"):
            raise BadRequestError(f"{where} has calls of tools, which this server does not serve", "messages")
        content = one.get("content")
        if isinstance(content, list):
            if not all(
                isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
            ):
                raise BadRequestError(f"{where}.content has parts that are no text, which this server does not serve", "messages")
            content = "\n".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise BadRequestError(f"{where}.content is {_shown(content)}: expected a text", "messages")
        made.append({"role": _text(one["role"], "messages"), "content": _text(content, "messages")})
    return made


def _stops(given: Any) -> tuple[str, ...]:
    given = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(given, list) or len(given) > MOST_STOPS or not all(isinstance(one, str) and one for one in given):
        raise BadRequestError(f"stop: expected a text or at most {MOST_STOPS} of them, none of them empty", "stop")
    return tuple(_text(one, "stop") for one in given)


def _text(given: str, name: str) -> str:
    if has_half_a_pair(given):
        raise BadRequestError(f"{name} has half of a surrogate pair, which is no character", name)
    return given


def _flag(body: Mapping[str, Any], name: str) -> bool:
    given = body.get(name)
    if given not in (None, True, False) or (isinstance(given, int | float) and not isinstance(given, bool)):
        raise BadRequestError(f"{name} is {_shown(given)}: expected true or false", name)
    return bool(given)


def _whole(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    given = body.get(name)
    if given is not None and not (is_whole(given) and least <= given <= most):
        raise BadRequestError(f"{name} is {_shown(given)}: expected a whole number from {least} to {most}", name)
    return given


def _number(body: Mapping[str, Any], name: str, least: float, most: float, default: float, above: bool = False) -> float:
    given = body.get(name)
    if given is None:
        return default
    if not is_number(given) or not least <= given <= most or (above and given == least):
        raise BadRequestError(
            f"{name} is {_shown(given)}: expected a number {'above' if above else 'from'} {least:g} to {most:g}", name
        )
    return float(given)


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
