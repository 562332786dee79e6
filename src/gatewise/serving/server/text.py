"""Tokens to text while they come: no half characters, no spaces lost, and nothing of what may turn out to be a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BEFORE = 6  # tokens of the prompt by which a tokenizer knows whether a space stands before the first new one
_MOST_BYTES = 4  # of a character
_HALF = "�"  # what a tokenizer writes for bytes that are no character yet


class Writing:
    """The text of one answer as it grows.

    Args:
        prompt: the token ids before it.
        stop: texts that end the answer and are no part of it.

    Attributes:
        stopped: one of ``stop`` was written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, list(stop)
        self._ids = self._last_tokens(prompt)
        self._from, self._read = 0, len(self._ids)  # text is read from the first on, and known up to the second
        self._known = self._decode(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be given out once this token is written."""
        self._ids.append(token)
        return self._give(self._new())

    def end(self) -> str:
        """What is left at the end of an answer that no stop string ended."""
        self._held += self._unknown(self._decode(self._ids[self._from :]))
        self._cut()
        return self._out(len(self._held))

    def _new(self) -> str:
        text = self._decode(self._ids[self._from :])
        new = self._unknown(text)
        if not new or text.endswith(_HALF):
            return ""
        if text.startswith(self._known):  # or a text from there on would begin within a character
            self._from = self._read  # the tokens that were new are the context of the next ones
        self._read = len(self._ids)
        self._known = self._decode(self._ids[self._from :])
        return new

    def _unknown(self, text: str) -> str:
        """The part of a text that is new; all of a character within which the prompt ended, once it is whole."""
        known = self._known
        if not text.startswith(known):
            while known.endswith(_HALF) and not text.startswith(known):
                known = known[:-1]
            # Of a byte a token, as Llama 2 has it, one that is no character makes marks of the whole ones before it too.
            fewer = [self._decode(self._ids[self._from : self._read - count]) for count in range(1, _MOST_BYTES)]
            known = max([known, *(one for one in fewer if text.startswith(one))], key=len)
        return text[len(known) :]

    def _last_tokens(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, from where a character begins; the prompt may end within one."""
        for count in range(_BEFORE, _BEFORE + _MOST_BYTES):
            ids = list(prompt[-count:])
            if any(not self._decode(ids[: len(ids) - less]).startswith(_HALF) for less in range(_MOST_BYTES)):
                return ids
        return list(prompt[-_BEFORE:])

    def _give(self, new: str) -> str:
        self._held += new
        if self._cut():
            return self._out(len(self._held))
        most = max((len(one) for one in self._stop), default=1) - 1
        for length in range(min(most, len(self._held)), 0, -1):
            if any(one.startswith(self._held[-length:]) for one in self._stop):
                return self._out(len(self._held) - length)
        return self._out(len(self._held))

    def _cut(self) -> bool:
        """Takes the first stop string, and what follows, off the text that is held."""
        places = [place for one in self._stop if (place := self._held.find(one)) >= 0]
        if places:
            self._held, self.stopped = self._held[: min(places)], True
        return bool(places)

    def _out(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        return given

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
