"""The HTTP side of a server: OpenAI's addresses, answers and errors, as vLLM has them. A Starlette app.

    GET  /v1/models, /v1/models/NAME        GET /health, /metrics, /version
    POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize

Who may ask is settled before, by guard.py. A POST has to come as JSON, which no form of another page can send. Bodies are read, and
prompts encoded, by threads beside that of the connections.
"""

import asyncio
import json
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

import gatewise
from gatewise.errors import GatewiseError
from gatewise.serving.server.bodies import Body, Chat, Completion, Detokenize, Message, RefusedError, Tokenize, read
from gatewise.serving.server.catalogue import Version
from gatewise.serving.server.engine import Answer, Limit, Piece
from gatewise.serving.server.guard import Guard
from gatewise.serving.server.log import TOLD, RequestLog
from gatewise.serving.server.text import chat_ids

if TYPE_CHECKING:
    from gatewise.serving.server.running import AdapterServer

_TYPES = {404: "NotFoundError", 415: "UnsupportedMediaTypeError", 500: "InternalServerError", 503: "ServiceUnavailableError"}
_Made = TypeVar("_Made")
_LONG = 2**16  # bytes of a body. One with more keeps only its like waiting while it is read and encoded


def app(server: "AdapterServer") -> ASGIApp:
    """The app of a server whose engine runs."""
    created = int(time.time())

    def card(name: str, version: Version | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created if version is None else version.created,
            "owned_by": "gatewise",
            "root": name,
            "parent": None if version is None else server.name,
            "max_model_len": server.length,
        }

    async def health(request: Request) -> Response:
        return Response(status_code=200 if server.engine.is_alive else 503)

    async def metrics(request: Request) -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(request: Request) -> Response:
        rows = [card(server.name, None), *(card(one.name, one) for one in server.catalogue.versions.values())]
        return _json({"object": "list", "data": rows})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        return _json(card(name, server.version_of(name)))

    async def version(request: Request) -> Response:
        return _json({"version": gatewise.__version__})

    async def in_thread(request: Request, call: Callable[[bytes], _Made]) -> _Made:
        """What a call makes of a body, in a thread; nothing, if the client is gone before its turn."""
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError("expected a body of type application/json", 415)
        content = await request.body()
        threads = server.long_bodies if len(content) > _LONG else server.bodies
        return await _while_connected(request, asyncio.get_running_loop().run_in_executor(threads, call, content))

    async def tokenize(request: Request) -> Response:
        return _json(await in_thread(request, partial(_tokens, server)))

    async def detokenize(request: Request) -> Response:
        return _json(await in_thread(request, partial(_text, server)))

    async def answer_request(request: Request, kind: type[Chat] | type[Completion]) -> Response:
        loop, told = asyncio.get_running_loop(), request.scope[TOLD]
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

        def send_piece(number: int, piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

        def end() -> None:
            server.open.discard(pieces)
            server.engine.cancel(answers)
            told.update(generated_tokens=writing.tokens, finish=writing.finish)

        body, answers = await in_thread(request, partial(_asked, server, kind, told, send_piece))
        if server.is_over:  # its body came late
            raise RefusedError("the server is ending", 503)
        writing = _Writing(body, answers, pieces, told["id"])
        told["prompt_tokens"] = writing.read
        server.engine.ask(answers)
        server.open.add(pieces)
        try:
            if not body.stream:
                answer = _json(await _while_connected(request, writing.whole()))
                end()
                return answer
            events = writing.events()
            first = await _while_connected(request, anext(events))  # an error until then is an answer with its own status
        except BaseException:
            end()
            raise
        return _Stream(_lines(first, events), end)

    made = Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/version", version, methods=["GET"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", model, methods=["GET"]),
            Route("/v1/completions", partial(answer_request, kind=Completion), methods=["POST"]),
            Route("/v1/chat/completions", partial(answer_request, kind=Chat), methods=["POST"]),
        ],
        middleware=[Middleware(Guard, hosts=server.hosts, keys=server.keys)],
        exception_handlers={HTTPException: _known_error, RefusedError: _known_error, Exception: _unknown_error},
    )
    made.router.redirect_slashes = False
    return RequestLog(made, server.log)


# ---- what is asked ----


def _asked(
    server: "AdapterServer", kind: type[Chat] | type[Completion], told: dict[str, Any], send_piece: Any, content: bytes
) -> tuple[Chat | Completion, list[Answer]]:
    """A request for answers, and these.

    Args:
        told: gets what the log is to say of it.
        send_piece: called with the number of an answer, and a piece of it.
    """
    body: Chat | Completion = read(kind, content, server.engine.most_waiting, server.length)
    told["model"] = body.model
    version = server.version_of(body.model)
    return body, _answers(server, body, version, send_piece)


def _tokenizer_of(server: "AdapterServer", name: str, version: Version | None) -> PreTrainedTokenizerBase:
    said = RefusedError(f"the tokenizer of {name!r} cannot be loaded: see the server's log", 500, "model")
    if version is not None and version.has_no_tokenizer:
        raise said
    try:
        return server.tokenizers.of(version)
    except GatewiseError as error:
        if version is not None:
            version.tokenizer_failed = time.monotonic()
            server.catalogue.tell({version.folder: str(error)})
        raise said from error


def _tokens(server: "AdapterServer", content: bytes) -> dict[str, Any]:
    """The answer to /tokenize."""
    body = read(Tokenize, content, most_tokens=server.length)
    name = body.model or server.name
    version = server.version_of(name)
    tokenizer = _tokenizer_of(server, name, version)
    if body.prompt is None:
        ids = _chat_ids(tokenizer, name, body.messages, version, server)
    else:
        ids = _text_ids(tokenizer, body.prompt, server, body.add_special_tokens is not False)
    strings = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": server.length, "tokens": ids, "token_strs": strings}


def _text(server: "AdapterServer", content: bytes) -> dict[str, Any]:
    """The answer to /detokenize."""
    body = read(Detokenize, content)
    name = body.model or server.name
    tokenizer = _tokenizer_of(server, name, server.version_of(name))
    if len(body.tokens) > server.length:
        raise RefusedError(f"there are {len(body.tokens)} tokens, more than {server.length}: send fewer", param="tokens")
    _check_ids(body.tokens, server, "tokens")
    return {"prompt": tokenizer.decode(body.tokens)}


def _answers(server: "AdapterServer", body: Chat | Completion, version: Version | None, send_piece: Any) -> list[Answer]:
    """The answers that a request asks for."""
    tokenizer = _tokenizer_of(server, body.model, version)
    prompts: list[Any] = (
        [_chat_ids(tokenizer, body.model, body.messages, version, server)] if isinstance(body, Chat) else body.prompt
    )
    chat = version.chat if isinstance(body, Chat) and version is not None else None
    before = "" if chat is None else chat.before_answer
    answers: list[Answer] = []
    for prompt in prompts:
        ids = _text_ids(tokenizer, prompt, server) if isinstance(prompt, str) else prompt
        if not ids:
            raise RefusedError("prompt has no token: expected a text that is not empty", param="prompt")
        most = _most_tokens(ids, body, server)
        for copy in range(body.n):
            send = partial(send_piece, len(answers))
            limit = _limit(body, server, tokenizer, most)
            seed = secrets.randbits(63) if body.seed is None else (body.seed + copy) % 2**63
            answers.append(Answer(body, version, ids, most, seed, tokenizer, send, limit, before))
    return answers


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str, server: "AdapterServer", special_tokens: bool = True) -> list[int]:
    server.tokenizers.check_length(tokenizer, len(text), server.length, "prompt")
    return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase, name: str, chat: Sequence[Message], version: Version | None, server: "AdapterServer"
) -> list[int]:
    server.tokenizers.check_length(tokenizer, sum(len(one.role) + len(one.content) for one in chat), server.length, "messages")
    messages = [one.model_dump(include={"role", "content"}) for one in chat]
    try:
        return chat_ids(tokenizer, messages, None if version is None else version.chat)
    except GatewiseError as error:
        raise RefusedError(f"{name!r}: {error}", param="messages") from error


def _check_ids(ids: Sequence[int], server: "AdapterServer", param: str) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < server.vocabulary:
        raise RefusedError(f"{param} has token ids outside of the model's vocabulary of {server.vocabulary}", param=param)


def _most_tokens(ids: Sequence[int], body: Chat | Completion, server: "AdapterServer") -> int:
    """The most tokens of the answer to a prompt, which has to fit."""
    _check_ids(ids, server, "prompt")
    room = server.length - len(ids)
    asked = body.max_tokens
    if room < (asked or 1):
        wanted = "" if asked is None else f" and max_tokens is {asked}"
        raise RefusedError(
            f"This model's maximum context length is {server.length} tokens, but the prompt has {len(ids)} tokens{wanted}: shorten "
            "either",
            param="prompt" if room < 1 else "max_tokens",
        )
    return asked if asked is not None else room if isinstance(body, Chat) else min(room, 16)


def _limit(body: Body, server: "AdapterServer", tokenizer: PreTrainedTokenizerBase, most: int) -> Limit | None:
    """What keeps an answer to what was asked for."""
    if not body.vllm_xargs:
        return None
    (name, value), *others = body.vllm_xargs.items()
    if others or name not in server.constraints:
        known = ", ".join(server.constraints) or "nothing"
        raise RefusedError(f"vllm_xargs has {', '.join(body.vllm_xargs)}: this server serves one of {known}", param="vllm_xargs")
    ends = sorted(server.engine.ends_of(tokenizer))
    try:
        return server.constraints[name].limit(str(value), tokenizer, ends, most, server.vocabulary)
    except GatewiseError as error:
        raise RefusedError(f"vllm_xargs, {name}: {error}", param="vllm_xargs") from error


# ---- answers ----


class _Writing:
    """The answers to one request as OpenAI writes them.

    Attributes:
        read, tokens: of the prompts, and of the answers until now.
        finish: how all of it ended.
    """

    def __init__(
        self, body: Chat | Completion, answers: Sequence[Answer], pieces: "asyncio.Queue[tuple[int, Piece]]", name: str
    ) -> None:
        self._body, self._pieces, self._left = body, pieces, len(answers)
        self._is_chat = isinstance(body, Chat)
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{name}"
        self._created = int(time.time())
        self.read, self.tokens, self.finish = sum(len(one.prompt) for one in answers) // body.n, 0, "cancelled"

    async def _each(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers, to the last one.

        Raises:
            Exception: what ended an answer before its time.
        """
        left, ends = self._left, set[str]()
        while left:
            number, piece = await self._pieces.get()
            if piece.problem is not None:
                self.finish = "failed"
                raise piece.problem
            self.tokens += piece.tokens
            if piece.finish is not None:
                left -= 1
                ends.add(piece.finish)
                self.finish = self.finish if left else "+".join(sorted(ends))
            yield number, piece

    async def whole(self) -> dict[str, Any]:
        """The answer to a request that is no stream."""
        texts, ends = [""] * self._left, [""] * self._left
        async for number, piece in self._each():
            texts[number] += piece.text
            ends[number] = piece.finish or ""
        choices = []
        for number, text in enumerate(texts):
            content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            choices.append({"index": number, **content, "logprobs": None, "finish_reason": ends[number]})
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        usage = self._body.stream_options.include_usage
        started: set[int] = set()
        async for number, piece in self._each():
            content: dict[str, Any] = {"text": piece.text}
            if self._is_chat:
                content = {"delta": {**({} if number in started else {"role": "assistant"}), "content": piece.text}}
            is_news = piece.text or piece.finish or (self._is_chat and number not in started)
            started.add(number)
            if is_news:
                choice = {"index": number, **content, "logprobs": None, "finish_reason": piece.finish}
                yield {**self._head(kind), "choices": [choice], **({"usage": None} if usage else {})}
        if usage:
            yield {**self._head(kind), "choices": [], "usage": self._usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._body.model}

    def _usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.read, "completion_tokens": self.tokens, "total_tokens": self.read + self.tokens}


async def _while_connected(request: Request, made: Awaitable[_Made]) -> _Made:
    """The result of an awaitable, which is cancelled when the client disconnects.

    Raises:
        RefusedError: it went.
    """
    making = asyncio.ensure_future(made)
    going = asyncio.ensure_future(request.receive())  # after the body comes nothing but that the client is gone
    try:
        await asyncio.wait((making, going), return_when=asyncio.FIRST_COMPLETED)
        if not making.done():
            raise RefusedError("the client is gone", 499)
        return making.result()
    finally:
        going.cancel()
        making.cancel()


class _Stream(StreamingResponse):
    """Server-sent events.

    Args:
        end: called when they have been sent, or the client is gone.
    """

    def __init__(self, lines: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _lines(first: dict[str, Any], events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The lines of a stream. An error after the first event is sent as an event of its own, before [DONE]."""
    try:
        yield _event(first)
        async for event in events:
            yield _event(event)
    except Exception as error:
        yield _event(_error_of(error, getattr(error, "status", 500)))
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value).encode(), status, media_type="application/json")


# ---- errors ----


def _error_of(error: Exception, status: int, param: str | None = None) -> dict[str, Any]:
    message = f"a fault in gatewise ({type(error).__name__}): see the server's log"
    if isinstance(error, GatewiseError | RefusedError):
        message = str(error)
    elif isinstance(error, HTTPException):
        message = error.detail
    return {"error": {"message": message, "type": _TYPES.get(status, "BadRequestError"), "param": param, "code": status}}


def _known_error(request: Request, error: Any) -> Response:
    """What the client can put right, or has to wait for."""
    status = getattr(error, "status", None) or error.status_code
    answer = _json(_error_of(error, status, getattr(error, "param", None)), status)
    if status == 503:
        answer.headers["Retry-After"] = "2"
    return answer


def _unknown_error(request: Request, error: Exception) -> Response:
    """A fault of ours, which must not look like one of the client's."""
    traceback.print_exception(error, file=sys.stderr)
    return _json(_error_of(error, 500), 500)
