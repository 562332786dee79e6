"""Tokens to text while they come: no half characters, no spaces lost, and nothing of what may turn out to be a stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

_MOST_TOKENS = 4  # of a character
_HALF = "\ufffd"  # what a tokenizer writes for bytes that are no character yet


class Writing:
    """The text of one answer as it grows. Half a character at its end is left out.

    Args:
        prompt: the token ids before it; they may end within a character, which is then the first of the answer.
        stop: texts that end the answer and are no part of it.

    Attributes:
        stopped: one of ``stop`` was written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer: Any = tokenizer.backend_tokenizer
        self._stop, self._held = list(stop), ""
        self.stopped = False
        cuts = range(len(prompt), max(len(prompt) - _MOST_TOKENS, -1), -1)
        whole = next((cut for cut in cuts if not self._tokenizer.decode(prompt[:cut]).endswith(_HALF)), len(prompt))
        self._stream = DecodeStream(ids=list(prompt[:whole]), skip_special_tokens=True)
        for token in prompt[whole:]:
            self._stream.step(self._tokenizer, token)

    def add(self, token: int) -> str:
        """What can be given out once this token is written."""
        self._held += self._stream.step(self._tokenizer, token) or ""
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
