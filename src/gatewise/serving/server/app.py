"""The HTTP side of a server: OpenAI's addresses, answers and errors, as vLLM has them. A Starlette app.

    GET  /v1/models, /v1/models/NAME        GET /health    GET /metrics
    POST /v1/completions, /v1/chat/completions

Other pages in the browser of the same machine can reach the port too. So without a key it answers on a loopback address only, under
that address's names (against DNS rebinding), and a POST has to come as JSON, which no form of another page can send.
"""

import asyncio
import json
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError, reason_of
from gatewise.internals.http import read_body
from gatewise.serving.server.asked import Asked, BadRequestError, chat, completion
from gatewise.serving.server.catalogue import Catalogue, ReplacedError, Version
from gatewise.serving.server.engine import Answer, BusyError, EndedError, Engine, Limit, NotLoadedError, Piece, Told
from gatewise.serving.server.metrics import Metrics
from gatewise.serving.server.vllm_server import MOST_BYTES, NO_KEY, NOT_HERE, has_key, host_of
from gatewise.serving.server.vocabularies import Tokenizers

MOST_LOGITS = 2**29  # of a prompt whose log-probabilities are asked for, which are all in memory at once
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


Limits = Mapping[str, Callable[[str, PreTrainedTokenizerBase, Sequence[int], int, int], Limit]]
"""Name -> what makes a limit of a request's value, the tokenizer, the tokens that end a text, the most tokens of the answer and the
size of the vocabulary."""


@dataclass(frozen=True)
class Served:
    """What an app answers with.

    Attributes:
        base: the base model's name.
        length: the most tokens of prompt and answer together.
        vocabulary: token ids are below it.
        key: without which nothing but /health is answered; None: everybody may ask.
        hosts: what may stand in ``Host``, None for anything.
        limits: what a request can ask for that limits what is written, by its name in ``vllm_xargs``.
    """

    base: str
    engine: Engine
    catalogue: Catalogue
    tokenizers: Tokenizers
    metrics: Metrics
    length: int
    vocabulary: int
    key: str | None = None
    hosts: frozenset[str] | None = None
    limits: Limits = field(default_factory=dict)


def app(served: Served) -> Starlette:
    """The app of a server whose engine runs."""
    created = int(time.time())
    # Tokenizers are not for several threads, and a long prompt must not keep others from being heard.
    encoding = ThreadPoolExecutor(1, thread_name_prefix="gatewise-encode")

    def card(name: str, version: Version | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created if version is None else version.created,
            "owned_by": "gatewise",
            "root": name,
            "parent": None if version is None else served.base,
            "max_model_len": served.length,
        }

    def version_of(name: str) -> Version | None:
        if name == served.base:
            return None
        try:
            return served.catalogue[name]
        except KeyError:
            raise HTTPException(404, f"The model `{name}` does not exist.") from None

    async def health(request: Request) -> Response:
        if not served.engine.is_alive:
            return _json(_error("the engine has ended", 503), 503)
        return Response()

    async def metrics(request: Request) -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(request: Request) -> Response:
        rows = [card(served.base, None), *(card(one.name, one) for one in served.catalogue.all())]
        return _json({"object": "list", "data": rows})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        return _json(card(name, version_of(name)))

    async def completions(request: Request) -> ASGIApp:
        return await answered(request, is_chat=False)

    async def chats(request: Request) -> ASGIApp:
        return await answered(request, is_chat=True)

    async def answered(request: Request, is_chat: bool) -> ASGIApp:
        body = await _object(request)
        asked = chat(body) if is_chat else completion(body)
        version = version_of(asked.model)
        loop = asyncio.get_running_loop()

        def encoded() -> tuple[PreTrainedTokenizerBase, list[list[int]], list[str | None]]:
            try:
                tokenizer = served.tokenizers.of(version)
            except GatewiseError as error:
                if version is None or version.is_news(str(error)):
                    print(f"error: {error}", file=sys.stderr)
                raise NotLoadedError(f"the tokenizer of {asked.model!r} cannot be loaded: see the server's log") from error
            if is_chat:
                return tokenizer, [_chat_ids(tokenizer, asked)], [None]
            ids = [_text_ids(tokenizer, one) if isinstance(one, str) else list(one) for one in asked.prompts]
            return tokenizer, ids, [_echoed(tokenizer, one) if asked.echo else None for one in asked.prompts]

        tokenizer, prompts, echoes = await loop.run_in_executor(encoding, encoded)
        most = [_check(ids, asked, served, 16 if not is_chat else None) for ids in prompts]
        limits: list[Limit | None] = [None] * (len(prompts) * asked.count)
        if asked.extra:  # which reads the tokenizer
            limits = await loop.run_in_executor(
                encoding, lambda: [_limit(asked, served, tokenizer, one) for one in most for _ in range(asked.count)]
            )
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

        def teller(number: int) -> Any:
            def tell(piece: Piece) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

            return tell

        answers = [
            Answer(
                asked.model,
                version,
                ids,
                asked.sampling(limit, copy),
                tokenizer,
                teller(place * asked.count + copy),
                limits[place * asked.count + copy],
                echoes[place],
            )
            for place, (ids, limit) in enumerate(zip(prompts, most, strict=True))
            for copy in range(asked.count)
        ]
        if len(answers) > served.engine.most_waiting:
            raise BadRequestError(
                f"{len(answers)} answers were asked for at once: expected at most {served.engine.most_waiting}", "n"
            )
        served.engine.ask(answers)
        writing = _Writing(asked, is_chat, answers, pieces, served.engine, sum(map(len, prompts)))
        if asked.stream:
            return _Stream(writing)
        async with _until_gone(request, writing):
            return _json(await writing.whole())

    made = Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", model, methods=["GET"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chats, methods=["POST"]),
        ],
        middleware=[Middleware(_Guard, served=served)],
        exception_handlers={
            HTTPException: _told,
            ClientDisconnect: _told,
            BadRequestError: _told,
            BusyError: _told,
            EndedError: _told,
            ReplacedError: _told,
            NotLoadedError: _told,
            Exception: _fault,
        },
    )
    made.router.redirect_slashes = False
    made.state.encoding = encoding  # whoever ends the server ends its thread
    return made


class _Guard:
    """Lets through who has the key, under a name of the server."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self.app, self.served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if self.served.hosts is not None and host_of(headers.get("host", "")) not in self.served.hosts:
                answer = _json(_error(NOT_HERE, 403), 403)
            elif scope["path"] != "/health" and not has_key(headers.get("authorization", ""), self.served.key):
                answer = _json(_error(NO_KEY, 401), 401)
                answer.headers["WWW-Authenticate"] = "Bearer"
        await answer(scope, receive, send)


async def _object(request: Request) -> dict[str, Any]:
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected a body of type application/json")
    content = await read_body(request, MOST_BYTES, f"the body is too large: expected at most {MOST_BYTES // 2**20} MiB")
    try:
        asked = json.loads(content)
    except (ValueError, RecursionError):
        raise BadRequestError("the body is not valid JSON") from None
    if not isinstance(asked, dict):
        raise BadRequestError("the body is not a JSON object")
    return asked


# ---- prompts ----


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise BadRequestError("prompt has no token: expected a text that is not empty", "prompt")
    return ids


def _echoed(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int]) -> str:
    """What echo gives back; of token ids that are not the model's nothing, for they are refused next."""
    if isinstance(prompt, str):
        return prompt
    known = [one for one in prompt if 0 <= one < len(tokenizer)]
    return str(tokenizer.decode(known, clean_up_tokenization_spaces=False))


def _chat_ids(tokenizer: PreTrainedTokenizerBase, asked: Asked) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise BadRequestError(f"the tokenizer of {asked.model!r} has no chat template: ask /v1/completions", "messages")
    try:
        text: Any = tokenizer.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise BadRequestError(f"the chat template does not take these messages: {reason_of(error)}", "messages") from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check(ids: Sequence[int], asked: Asked, served: Served, default: int | None) -> int:
    """The most tokens of the answer to a prompt, which has to fit."""
    if not all(0 <= one < served.vocabulary for one in ids):
        raise BadRequestError(f"prompt has token ids outside of the model's vocabulary of {served.vocabulary}", "prompt")
    if asked.echo and asked.logprobs is not None and len(ids) * served.vocabulary > MOST_LOGITS:
        raise BadRequestError(
            f"echo with logprobs takes prompts of at most {MOST_LOGITS // served.vocabulary} tokens with this model, but this one "
            f"has {len(ids)}: shorten it",
            "echo",
        )
    room = served.length - len(ids)
    least = 0 if asked.most == 0 else 1
    if room < least or (asked.most is not None and asked.most > room):
        wanted = "" if asked.most is None else f" and max_tokens is {asked.most}"
        raise BadRequestError(
            f"This model's maximum context length is {served.length} tokens, but the prompt has {len(ids)} tokens{wanted}: shorten "
            "either",
            "prompt" if room < least else "max_tokens",
        )
    return asked.most if asked.most is not None else min(room, default or room)


def _limit(asked: Asked, served: Served, tokenizer: PreTrainedTokenizerBase, most: int) -> Limit:
    """What limits an answer of a request."""
    if unknown := asked.extra.keys() - served.limits.keys():
        known = ", ".join(served.limits) or "none"
        raise BadRequestError(f"vllm_xargs has {', '.join(sorted(unknown))}, which is not served: expected {known}", "vllm_xargs")
    if len(asked.extra) > 1:
        raise BadRequestError(f"vllm_xargs has {', '.join(asked.extra)}: expected one of them", "vllm_xargs")
    ((name, value),) = asked.extra.items()
    try:
        return served.limits[name](str(value), tokenizer, sorted(served.engine.ends), most, served.vocabulary)
    except GatewiseError as error:
        raise BadRequestError(f"vllm_xargs, {name}: {error}", "vllm_xargs") from error


# ---- answers ----


class _Writing:
    """The answers to one request as OpenAI writes them."""

    def __init__(
        self,
        asked: Asked,
        is_chat: bool,
        answers: Sequence[Answer],
        pieces: "asyncio.Queue[tuple[int, Piece]]",
        engine: Engine,
        prompt_tokens: int,
    ) -> None:
        self._asked, self._is_chat, self._answers, self._pieces, self._engine = asked, is_chat, answers, pieces, engine
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._prompt_tokens, self._tokens = prompt_tokens, 0
        self._offsets = [0] * len(answers)

    def cancel(self) -> None:
        self._engine.cancel(self._answers)

    async def _each(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers, to the last one.

        Raises:
            Exception: what ended an answer before its time.
        """
        left = len(self._answers)
        try:
            while left:
                number, piece = await self._pieces.get()
                if piece.problem is not None:
                    raise piece.problem
                self._tokens += piece.tokens
                left -= piece.finish is not None
                yield number, piece
        finally:
            if left:
                self.cancel()

    async def whole(self) -> dict[str, Any]:
        texts, told, ends = ([[] for _ in self._answers], [[] for _ in self._answers], [""] * len(self._answers))  # type: ignore[var-annotated]
        async for number, piece in self._each():
            texts[number].append(piece.text)
            told[number] += piece.told
            ends[number] = piece.finish or ""
        choices = []
        for number, end in enumerate(ends):
            text, logprobs = "".join(texts[number]), self._logprobs(number, told[number])
            content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            choices.append({"index": number, **content, "logprobs": logprobs, "finish_reason": end})
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        started: set[int] = set()
        async for number, piece in self._each():
            content: dict[str, Any] = {"text": piece.text}
            if self._is_chat:
                delta = {} if number in started else {"role": "assistant"}
                started.add(number)
                content = {"delta": {**delta, "content": piece.text}}
            choice = {"index": number, **content, "logprobs": self._logprobs(number, piece.told), "finish_reason": piece.finish}
            event = {**self._head(kind), "choices": [choice]}
            if self._asked.usage:
                event["usage"] = self._usage() if self._asked.every_usage else None
            if piece.text or piece.finish or piece.told or "role" in content.get("delta", {}):
                yield event
        if self._asked.usage:
            yield {**self._head(kind), "choices": [], "usage": self._usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    def _usage(self) -> dict[str, int]:
        total = self._prompt_tokens + self._tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._tokens, "total_tokens": total}

    def _logprobs(self, number: int, told: Sequence[Told]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        tokenizer = self._answers[number].tokenizer

        def shown(token: int) -> str:
            return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))

        if self._is_chat:

            def entry(token: int, logprob: float | None) -> dict[str, Any]:
                text = shown(token)
                return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

            rows = [{**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]} for one in told]
            return {"content": rows}
        tokens = [shown(one.token) for one in told]
        offsets = []
        for text in tokens:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(one.logprob) for one in told],
            # The first token of a prompt has none.
            "top_logprobs": [
                None if one.logprob is None else {shown(token): _finite(logprob) for token, logprob in one.top} for one in told
            ],
            "text_offset": offsets,
        }


class _until_gone:  # noqa: N801 (a context manager)
    """Cancels the answers when the client goes before they are written."""

    def __init__(self, request: Request, writing: _Writing) -> None:
        self._request, self._writing = request, writing

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._was_gone = task, False

        async def watch() -> None:
            await _gone(self._request.receive)
            self._was_gone = True
            task.cancel()

        self._watching = asyncio.create_task(watch())

    async def __aexit__(self, kind: type | None, *_: object) -> None:
        self._watching.cancel()
        if kind is asyncio.CancelledError and self._was_gone:
            self._writing.cancel()
            self._task.uncancel()
            raise ClientDisconnect


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Stream:
    """Server-sent events. What goes wrong after the first of them is an event too, and the last but [DONE]."""

    def __init__(self, writing: _Writing) -> None:
        self._writing = writing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((writing, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not writing.done():
                writing.cancel()
                self._writing.cancel()
        if writing.done() and not writing.cancelled() and (error := writing.exception()) is not None:
            raise error

    async def _write(self, send: Send) -> None:
        events = self._writing.events()
        first = await anext(events, None)  # an error until then is an answer with its own status
        head = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        if first is not None:
            await send({"type": "http.response.body", "body": _event(first), "more_body": True})
        try:
            async for event in events:
                await send({"type": "http.response.body", "body": _event(event), "more_body": True})
        except (GatewiseError, BusyError, EndedError, ReplacedError, NotLoadedError) as error:
            await send({"type": "http.response.body", "body": _event(_error(str(error), 500)), "more_body": True})
        except Exception as error:
            said = f"a fault in gatewise ({type(error).__name__}): see the server's log"
            await send({"type": "http.response.body", "body": _event(_error(said, 500)), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _finite(value: float | None) -> float | None:
    return value if value is None or value > -9999.0 else -9999.0  # as vLLM; JSON has no infinity


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value).encode(), status, media_type="application/json")


def _error(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": _TYPES.get(status, "BadRequestError"), "param": param, "code": status}}


def unreadable() -> Response:
    """The answer to what is no HTTP."""
    return _json(_error("this is no HTTP request that can be read", 400), 400)


def _told(request: Request, error: Exception) -> Response:
    """What the client can put right, or has to wait for."""
    if isinstance(error, BusyError | ReplacedError):
        answer = _json(_error(str(error), 503), 503)
        answer.headers["Retry-After"] = "2"
        return answer
    if isinstance(error, EndedError):
        return _json(_error(str(error), 503), 503)
    if isinstance(error, NotLoadedError):
        return _json(_error(str(error), 500, "model"), 500)
    if isinstance(error, BadRequestError):
        return _json(_error(str(error), 400, error.param), 400)
    if isinstance(error, ClientDisconnect):
        return _json(_error("the client went away", 400), 400)
    assert isinstance(error, HTTPException)
    known = error.detail if error.status_code not in (404, 405) or error.detail.startswith("The model") else "nothing is here"
    param = "model" if error.detail.startswith("The model") else None
    return _json(_error(known, error.status_code, param), error.status_code)


def _fault(request: Request, error: Exception) -> Response:
    """A fault of ours, which must not look like one of the client's."""
    traceback.print_exception(error, file=sys.stderr)
    return _json(_error(f"a fault in gatewise ({type(error).__name__}): see the server's log", 500), 500)
