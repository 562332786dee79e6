"""Trees from a model that runs elsewhere, behind an OpenAI-compatible server: many passages at a time, with the same constraint.

    extractor = ServedExtractor.connect("http://127.0.0.1:8000", "mdt-lora")
    for number, found in extractor.as_they_come(texts): ...

What may be written depends on all before it, which no grammar says that a server would take. So the server runs the constraint
itself: ``gatewise serve --constraint gatewise_tree``, or vLLM with
``--logits-processors gatewise_mdt.extraction.in_vllm:TreeLogits``. A request says in ``vllm_xargs`` what its course is. A server
that does not know this would write freely and say nothing. So what comes is held against the course once more, and a server that
did not keep to it is named.
"""

import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gatewise.errors import GatewiseError, reason_of
from gatewise_mdt.extraction.constraint import TreeRow, check_available
from gatewise_mdt.extraction.course import ARGUMENT, Course
from gatewise_mdt.extraction.extractor import Extraction, Extractor, Progress, Text, Written, checked_texts, made_with
from gatewise_mdt.extraction.prompts import prompt
from gatewise_mdt.relations import Language

_TRIES = 5
_ENOUGH = 10**9
_BUSY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server, and one of its models.

    Args:
        url: such as "http://127.0.0.1:8000", with or without "/v1".
        name: of the adapter there.
        api_key: if it wants one.
        timeout: seconds to wait for an answer.
    """

    url: str
    name: str
    api_key: str | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise GatewiseError(f"the server is {self.url!r}: expected an address such as http://127.0.0.1:8000")

    def base_model(self) -> str:
        """The base model's name as the server tells it; "" where it does not.

        Raises:
            GatewiseError: there is no such server, or it has no model of this name.
        """
        listed = self._asked("GET", "models", None).get("data")
        cards = {str(card["id"]): card for card in listed or () if isinstance(card, dict) and "id" in card}
        if self.name not in cards:
            names = ", ".join(sorted(cards)[:20]) or "none"
            raise GatewiseError(f"the server at {self.url} has no model {self.name!r}: expected one of {names}")
        return str(cards[self.name].get("parent") or "")

    def write(self, text: str, course: str | None, most: int) -> Written | GatewiseError:
        """What the model writes after a prompt, or why this prompt has no answer.

        Args:
            course: as :meth:`Course.from_json` reads it; None leaves the model free.
            most: tokens.

        Raises:
            GatewiseError: the server cannot be reached any more, refuses the key or the model, or does not keep to the course.
        """
        asked: dict[str, Any] = {"model": self.name, "prompt": text, "max_tokens": most, "temperature": 0.0}
        if course is not None:
            asked["vllm_xargs"] = {ARGUMENT: course}
        try:
            answer = self._asked("POST", "completions", asked)
        except _RefusedError as error:
            return GatewiseError(str(error))
        try:
            choice = answer["choices"][0]
            written, ended = str(choice["text"]), choice["finish_reason"] == "stop"
            tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise GatewiseError(
                f"the server at {self.url} answered what is no completion ({reason_of(error)}): expected an OpenAI-compatible one"
            ) from error
        if course is None:
            return Written(written.strip(), ended)
        read = _read_again(Course.from_json(course), written, ended, tokens, most)
        if read is None:
            raise GatewiseError(
                f"the server at {self.url} does not keep to what may be written in a tree: start it with `gatewise serve"
                " --constraint gatewise_tree`, or vLLM with --logits-processors gatewise_mdt.extraction.in_vllm:TreeLogits, or"
                " write without constraint"
            )
        return read

    def _asked(self, method: str, path: str, body: Any) -> dict[str, Any]:
        """The answer, after some patience with a server that is busy."""
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})
        content = None if body is None else json.dumps(body).encode()
        fault = ""
        for number in range(_TRIES):
            if number:
                time.sleep(2.0 ** (number - 1))
            try:
                request = urllib.request.Request(url, content, headers, method=method)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    given = answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    fault = f"{error.code}: {_error_message(error)}"
                if error.code in _BUSY:
                    continue
                if error.code in (400, 413, 422) and body is not None:
                    raise _RefusedError(f"the server refused the passage ({fault})") from error
                advice = ": give the right key in GATEWISE_API_KEY" if error.code in (401, 403) else ""
                raise GatewiseError(f"the server at {self.url} refused ({fault}){advice}") from error
            except (OSError, http.client.HTTPException) as error:
                fault = reason_of(error)
                continue
            except ValueError as error:
                raise GatewiseError(f"the server's address {self.url!r} cannot be read ({reason_of(error)})") from error
            try:
                found = json.loads(given)
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise GatewiseError(f"the server at {self.url} answered what is no JSON object: is it an OpenAI-compatible one?")
            return found
        raise GatewiseError(
            f"the server at {self.url} gave no answer ({fault}): start it, or look at its log, and give the command again"
        )


def _read_again(course: Course, text: str, ended: bool, tokens: int, most: int) -> Written | GatewiseError | None:
    """What was written elsewhere under a course, read by the course anew.

    Args:
        ended: it came to its end by itself.
        tokens: that it took, of ``most``.

    Returns:
        What was written; why nothing more could be, where it ended too early; None where it did not keep to the course.
    """
    from llguidance import LLTokenizer

    if not ended:
        text = text.rstrip("\ufffd")  # half a sign, a mark for each of its bytes
    row, known, hurried = TreeRow(course, ()), LLTokenizer("byte"), False
    content = text.encode()
    for at, byte in enumerate(content):
        if row.matcher is None:
            hurried = hurried or row.is_short(most - tokens * at // len(content))
        row.open(known, _ENOUGH)
        if not row.add_if_allowed(byte):
            # In a hurry a piece ends that could have gone on; what is written so may be written without one, too.
            if not row.may_pause:
                return None
            row.end_piece()
            row.open(known, _ENOUGH)
            if not row.add_if_allowed(byte):
                return None
    if ended and not row.course.finished:
        if not row.may_pause:
            return GatewiseError(
                "the server could not work out what the model may write: write without constraint, or not verbatim"
            )
        row.end()
    elif hurried and row.tokens:  # what may go on was the end of a tree in a hurry
        row.tokens, again, row.matcher, row.hurried = [], row.tokens, None, True
        row.open(known, 0)
        for byte in again:
            row.add_if_allowed(byte)
    return Written(row.course.written, row.course.finished, hurried)


class _RefusedError(GatewiseError):
    """Of one request."""


def _error_message(answer: urllib.error.HTTPError) -> str:
    """What an answer says of a fault, in a line."""
    try:
        content = answer.read()
    except (OSError, http.client.HTTPException) as broken:
        return reason_of(broken)
    try:
        error = json.loads(content)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError, RecursionError):
        message = content.decode(errors="replace")
    return " ".join(str(message).split())[:300]


@dataclass(frozen=True)
class ServedExtractor(Extractor):
    """An :class:`Extractor` whose model is behind a server; ``batch_size`` is how many requests are under way at a time.

    It makes the same trees as the adapter in this process does, as far as the engine's rounding allows. Made by :meth:`connect`.
    """

    @classmethod
    def connect(cls, url: str, name: str, *, api_key: str | None = None, **settings: Any) -> "ServedExtractor":
        """The adapter of this name on a server.

        Args:
            url: of the server, such as "http://127.0.0.1:8000".
            api_key: if it wants one.
            settings: attributes of :class:`Extractor`. Prompts are the passages' own (the template of ``gatewise mdt prepare``).

        Raises:
            GatewiseError: the server cannot be reached or has no such model, or the settings contradict each other.
        """
        if settings.get("constrained", True):
            check_available()
        server = Server(url, name, api_key)
        return cls(
            server, cast(Any, None), **{"batch_size": 16, **settings, "base": server.base_model(), "adapter": {"name": name}}
        )

    def made_with(self) -> dict[str, Any]:
        """What a tree is made with; the server does not say which weights its adapter has."""
        settings = {name: getattr(self, name) for name in ("constrained", "verbatim", "max_new_tokens")}
        return made_with(None, self.base, self.adapter, {**settings, "served": True})

    def __call__(
        self,
        texts: Sequence[str],
        *,
        language: Language | Sequence[Language | None] | None = None,
        progress: Progress | None = None,
    ) -> list[Extraction | GatewiseError]:
        """The tree of each text, or why there is none; arguments and errors are those of :meth:`Extractor.__call__`."""
        made: list[Any] = [None] * len(texts)
        for number, one in self.as_they_come(texts, language=language, progress=progress):
            made[number] = one
        return made

    def as_they_come(
        self,
        texts: Sequence[str],
        *,
        language: Language | Sequence[Language | None] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, Extraction | GatewiseError]]:
        """The number of each text, and its tree or why there is none, in the order in which they are done."""
        todo: queue.SimpleQueue[tuple[int, Text]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Extraction | GatewiseError | BaseException]] = queue.SimpleQueue()
        for number, one in enumerate(checked_texts(texts, language)):
            if isinstance(one, Text):
                todo.put((number, one))
            else:
                done.put((number, one))
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                try:
                    number, one = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((number, self._trees([one], None)[0]))
                except BaseException as error:  # raised where it is waited for; until then nobody asks for more
                    over.set()
                    done.put((-1, error))

        # Nobody waits for them when the command is stopped while they wait for the server.
        for _ in range(min(self.batch_size, len(texts))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for count in range(1, len(texts) + 1):
                number, made = done.get()
                if number < 0:
                    raise cast(BaseException, made)
                if progress:
                    progress(count, len(texts))
                yield number, cast("Extraction | GatewiseError", made)
        finally:
            over.set()

    def _write(self, texts: Sequence[Text], progress: Progress | None) -> list[Written | GatewiseError]:
        server = cast(Server, self.model)
        courses = [json.dumps(self.course_of(one), ensure_ascii=False) if self.constrained else None for one in texts]
        return [
            server.write(prompt(one.text, one.language), course, self.max_new_tokens)
            for one, course in zip(texts, courses, strict=True)
        ]
