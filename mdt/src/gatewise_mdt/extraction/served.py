"""Trees from a model that runs elsewhere, behind an OpenAI-compatible server: many passages at a time, with the same constraint.

    extractor = ServedExtractor.connect("http://127.0.0.1:8000", "mdt-lora")
    for number, found in extractor.as_they_come(texts): ...

What may be written depends on all before it, which no grammar says that a server would take. So the server runs the constraint
itself: ``gatewise serve --constraint gatewise_tree``, or vLLM with
``--logits-processors gatewise_mdt.extraction.in_vllm:TreeLogits``. A request says in ``vllm_xargs`` what its course is. A server
that does not know this would write freely and say nothing. So what comes has to be a tree, and is a fault of its passage otherwise.
"""

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

from gatewise.errors import GatewiseError, reason_of
from gatewise_mdt.extraction.course import ARGUMENT
from gatewise_mdt.extraction.extractor import Extraction, Extracts, Text, made_with, tree_written
from gatewise_mdt.extraction.prompts import prompt

_NEAR_THE_END = 100  # tokens, from which on the constraint may have brought a tree to a close


@dataclass(frozen=True)
class ServedExtractor(Extracts):
    """An adapter behind an OpenAI-compatible server. Its prompts are the passages' own (the template of ``gatewise mdt prepare``).

    It makes the same trees as the adapter in this process does, as far as the engine's rounding allows. Made by :meth:`connect`.

    Attributes:
        url: such as "http://127.0.0.1:8000", with or without "/v1".
        name: of the adapter there.
        api_key: if the server wants one.
        batch_size: how many requests are under way at a time.
        base: the base model's name as the server tells it; "" where it does not.
        timeout: seconds to wait for an answer.
    """

    url: str
    name: str
    api_key: str | None = None
    verbatim: bool = False
    max_new_tokens: int = 512
    batch_size: int = 16
    base: str = ""
    timeout: float = 600.0

    @classmethod
    def connect(cls, url: str, name: str, **settings: Any) -> "ServedExtractor":
        """The adapter of this name on a server.

        Args:
            settings: other attributes.

        Raises:
            GatewiseError: the server cannot be reached or has no such model.
        """
        if not url.startswith(("http://", "https://")):
            raise GatewiseError(f"the server is {url!r}: expected an address such as http://127.0.0.1:8000")
        listed = cls(url, name, **settings)._asked("GET", "models", None).get("data")
        cards = {str(card["id"]): card for card in listed or () if isinstance(card, dict) and "id" in card}
        if name not in cards:
            names = ", ".join(sorted(cards)[:20]) or "none"
            raise GatewiseError(f"the server at {url} has no model {name!r}: expected one of {names}")
        return cls(url, name, **{"base": str(cards[name].get("parent") or ""), **settings})

    def _extracted(self, texts: Mapping[int, Text]) -> Iterator[tuple[int, Extraction | GatewiseError]]:
        """Many under way at a time, each as it comes."""
        todo: SimpleQueue[int] = SimpleQueue()
        done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        for number in texts:
            todo.put(number)
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                try:
                    number = todo.get_nowait()
                except Empty:
                    return
                try:
                    done.put((number, self.extract([texts[number]])[0]))
                except BaseException as error:  # raised where it is waited for; until then nobody asks for more
                    over.set()
                    done.put((-1, error))

        # Nobody waits for them when the command is stopped while they wait for the server.
        for _ in range(min(self.batch_size, len(texts))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in texts:
                number, made = done.get()
                if number < 0:
                    raise made
                yield number, made
        finally:
            over.set()

    def extract(self, texts: Sequence[Text]) -> list[Extraction | GatewiseError]:
        """The tree of each text, or why the server refuses it.

        Raises:
            GatewiseError: the server cannot be reached any more, or refuses the key or the model.
        """
        return [self._tree(one) for one in texts]

    def _tree(self, one: Text) -> Extraction | GatewiseError:
        course = json.dumps({"language": one.language, "within": one.text if self.verbatim else None}, ensure_ascii=False)
        asked = {"model": self.name, "prompt": prompt(one.text, one.language), "max_tokens": self.max_new_tokens}
        try:
            answer = self._asked("POST", "completions", {**asked, "temperature": 0.0, "vllm_xargs": {ARGUMENT: course}})
        except _RefusedError as error:
            return GatewiseError(str(error))
        try:
            choice = answer["choices"][0]
            text, ended = str(choice["text"]).strip(), choice["finish_reason"] == "stop"
            tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise GatewiseError(
                f"the answer of the server at {self.url} is no completion ({reason_of(error)}): expected OpenAI's API"
            ) from error
        if not ended:  # what the tokens cut off is left out
            text = text[: max(text.rfind("\n"), text.rfind(";")) + 1]
        settings = {"verbatim": self.verbatim, "max_new_tokens": self.max_new_tokens, "served": True}
        told = made_with(None, self.base, {"name": self.name}, settings)
        made = tree_written(one, text, told, ended=ended, hurried=False)
        if ended and (made.warnings or (self.verbatim and made.absent)):
            return GatewiseError(
                f"the server at {self.url} wrote no tree: start it with `gatewise serve --constraint gatewise_tree`, or vLLM with"
                " --logits-processors gatewise_mdt.extraction.in_vllm:TreeLogits; if it was, the passage is too large for it"
            )
        if ended and tokens > self.max_new_tokens - _NEAR_THE_END:
            note = "the output may have been brought to a close before its end: allow more new tokens"
            return replace(made, warnings=(note, *made.warnings))
        return made

    def _asked(self, method: str, path: str, body: Any) -> dict[str, Any]:
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})
        content = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(url, content, headers, method=method)
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            fault = str(error.code)
            with suppress(OSError, http.client.HTTPException), error:
                fault += f": {' '.join(error.read().decode(errors='replace').split())[:300]}"
            if error.code in (400, 413, 422) and body is not None:
                raise _RefusedError(f"the server refused the passage ({fault})") from error
            advice = ": give the right key in GATEWISE_API_KEY" if error.code in (401, 403) else ""
            raise GatewiseError(f"the server at {self.url} refused ({fault}){advice}") from error
        except (OSError, http.client.HTTPException) as error:
            raise GatewiseError(
                f"the server at {self.url} gave no answer ({reason_of(error)}): start it, or look at its log, and give the command"
                " again"
            ) from error
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise GatewiseError(f"the answer of the server at {self.url} is no JSON object: expected OpenAI's API")
        return found


class _RefusedError(GatewiseError):
    """Of one request."""
