"""Texts to tokens and back: the tokenizer of each adapter, and the text of an answer while its tokens come."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from gatewise.adapters.files import ChatTemplate
from gatewise.errors import GatewiseError, reason_of
from gatewise.models.loading import load_tokenizer
from gatewise.serving.server.bodies import RefusedError
from gatewise.serving.server.catalogue import Version
from gatewise.tasks.encoding import text_prefix

_MOST_TOKENS = 4  # of a character
_HALF = "\ufffd"  # what a tokenizer writes for bytes that are no character yet


class Tokenizers:
    """The tokenizer of each adapter: its own where its folder has one, else the base model's. Equal ones are kept once.

    For several threads at a time: a tokenizer that has encoded a first text changes nothing of itself when it encodes and decodes.

    Args:
        base: the base model's tokenizer.

    Raises:
        GatewiseError: it is none of the tokenizers library.
    """

    def __init__(self, base: PreTrainedTokenizerBase) -> None:
        self._base = _warmed_up(base)
        self._by_content: WeakValueDictionary[bytes, PreTrainedTokenizerBase] = WeakValueDictionary()
        self._longest: WeakKeyDictionary[PreTrainedTokenizerBase, int] = WeakKeyDictionary()
        self._loading = threading.Lock()

    def of(self, version: Version | None) -> PreTrainedTokenizerBase:
        """A version's, None for the base model's.

        Raises:
            ReplacedError: its folder is being replaced.
            GatewiseError: it cannot be read.
        """
        if version is None or not {"tokenizer.json", "tokenizer_config.json"} <= {name for name, *_ in version.signature}:
            return self._base
        with self._loading:
            if version.tokenizer is None:
                with version.copy() as folder:
                    files = sorted([*folder.glob("*token*.json"), *folder.glob("chat_template.*")])
                    content = hashlib.sha256(b"".join(hashlib.sha256(one.read_bytes()).digest() for one in files)).digest()
                    version.tokenizer = self._by_content.get(content) or _warmed_up(load_tokenizer(folder))
                self._by_content[content] = version.tokenizer
            return version.tokenizer

    def check_length(self, tokenizer: PreTrainedTokenizerBase, characters: int, tokens: int, param: str) -> None:
        """Refuses a text that cannot fit, before it is encoded: a token stands for as many characters as its name has, at most.

        Some tokenizers leave characters out, blanks for instance: no text of more is taken there either.

        Raises:
            RefusedError: it has too many characters.
        """
        if tokenizer not in self._longest:
            self._longest[tokenizer] = max(map(len, tokenizer.get_vocab()))
        most = tokens * self._longest[tokenizer]
        if characters > most:
            raise RefusedError(
                f"This model's maximum context length is {tokens} tokens of at most {self._longest[tokenizer]} characters, but the "
                f"{param} has {characters} characters, more than {most}: shorten it",
                param=param,
            )


def _warmed_up(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Encodes a first text, by which a tokenizer may change its own settings: later, another thread may be decoding with it."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        name = type(tokenizer).__name__
        raise GatewiseError(
            f"the tokenizer ({name}) is none of the tokenizers library, which this engine needs: take --engine vllm"
        )
    tokenizer("a", verbose=False)
    return tokenizer


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], chat: ChatTemplate | None) -> list[int]:
    """The token ids of the prompt that the messages of a chat make, as an adapter was trained on it.

    Args:
        messages: with ``role`` and ``content``.
        chat: how it was; None takes the tokenizer's own template.

    Raises:
        GatewiseError: there is no template, or it does not take these messages.
    """
    if chat is None and not getattr(tokenizer, "chat_template", None):
        raise GatewiseError("its tokenizer has no chat template: ask /v1/completions")
    template = None if chat is None else chat.text
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(one) for one in messages], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise GatewiseError(f"the chat template does not take these messages: {reason_of(error)}") from error
    first = text_prefix(tokenizer) if chat is not None and chat.special_tokens else []
    return [*first, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


class Writing:
    """The text of one answer as it grows. Half a character at its end is held back, and so is what may become a stop text.

    Args:
        prompt: the token ids before it; they may end within a character, which is then the first of the answer.
        stop: texts that end the answer and are no part of it.
        before: what is left out where the answer begins with it, so that no stop text is found there.

    Attributes:
        stopped: one of ``stop`` was written.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = (), before: str = ""
    ) -> None:
        self._tokenizer: Any = tokenizer.backend_tokenizer
        self._stop, self._before, self._held = list(stop), before, ""
        self.stopped = False
        cuts = range(len(prompt), max(len(prompt) - _MOST_TOKENS, -1), -1)
        whole = next((cut for cut in cuts if not self._tokenizer.decode(prompt[:cut]).endswith(_HALF)), len(prompt))
        self._stream = DecodeStream(ids=list(prompt[:whole]), skip_special_tokens=True)
        for token in prompt[whole:]:
            self._step(token)

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception as error:  # bytes that are no character came right after those of one, and took it along
            if "prefix" not in str(error):
                raise
            self._stream = DecodeStream(ids=[token], skip_special_tokens=True)  # or the blank before a first word is taken off
            return self._stream.step(self._tokenizer, token) or ""

    def add(self, token: int) -> str:
        """What can be given out once this token is written."""
        self._held += self._step(token)
        if self._before:
            if len(self._held) < len(self._before) and self._before.startswith(self._held):
                return ""
            self._held, self._before = self._held.removeprefix(self._before), ""
        places = [place for one in self._stop if (place := self._held.find(one)) >= 0]
        if places:
            self._held, self.stopped = self._held[: min(places)], True
            return self.end()
        most = max((len(one) for one in self._stop), default=1) - 1
        lengths = range(min(most, len(self._held)), 0, -1)
        kept = next((length for length in lengths if any(one.startswith(self._held[-length:]) for one in self._stop)), 0)
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return text

    def end(self) -> str:
        """What is left at the end of an answer."""
        text, self._held = self._held, ""
        return text
