"""Constrained decoding: at each step of ``generate`` only tokens with which the output can still become a valid tree.

:mod:`gatewise_mdt.extraction.course` says what may be written next, ``llguidance`` which tokens that leaves.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gatewise.errors import GatewiseError, reason_of
from gatewise_mdt.extraction.course import Course

_MISSING = "llguidance, which constrains what the model writes, is not installed: install gatewise-mdt, or write without constraint"
_TOKENS_A_LINE = 3  # a bare line costs a token and its line break; one more where a tokenizer splits it
_TOKENS_A_PIECE = 40  # what a piece under way may still take


def check_available() -> None:
    """Refuses where llguidance is missing, without which writing cannot be constrained.

    Raises:
        GatewiseError: llguidance is not installed.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise GatewiseError(_MISSING) from None


class TreeConstraint(LogitsProcessor):
    """Leaves each row of a batch only the tokens that its course allows. For one call of ``generate``, without beams.

    Args:
        courses: one for each row.
        ends: ids of the end-of-text tokens.
        prompt_tokens: tokens of the padded prompts.
        max_new_tokens: as given to ``generate``; near the end, the tree is brought to a close.

    Raises:
        GatewiseError: llguidance is missing, or cannot read the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        courses: Sequence[Course],
        *,
        ends: Iterable[int],
        prompt_tokens: int,
        max_new_tokens: int,
    ) -> None:
        check_available()
        self.ends = tuple(sorted(set(ends)))
        self.rows = [TreeRow(course, self.ends) for course in courses]
        self.tokenizer, self.start, self.most, self.seen = tokenizer, prompt_tokens, max_new_tokens, 0

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (b, V) with -inf for tokens that are not allowed after prompts and what was written (b, t)."""
        self.read(input_ids[:, self.start :])
        allowed = np.zeros(scores.shape, dtype=bool)
        known = llguidance_tokenizer(self.tokenizer, self.ends, scores.shape[1])
        for row, mask in zip(self.rows, allowed, strict=True):
            row.allow(known, mask, self.most - self.seen)
        return scores.masked_fill(torch.from_numpy(~allowed).to(scores.device), -torch.inf)

    def read(self, written: Tensor) -> None:
        """Takes note of the tokens (b, n) chosen since the last step; to be called after ``generate``, too, for the last ones."""
        for tokens in written[:, self.seen :].T.tolist():
            for row, token in zip(self.rows, tokens, strict=True):
                row.add_token(int(token))
        self.seen = written.shape[1]


class TreeRow:
    """One row: its course, and the matcher of the piece under way.

    Attributes:
        hurried: the course was cut short, because tokens were running out.
        fault: why nothing more can be written; the row then ends at once, so that the others of its batch go on.
    """

    def __init__(self, course: Course, ends: Sequence[int]) -> None:
        self.course, self.ends = course, tuple(ends)
        self.hurried = False
        self.fault: GatewiseError | None = None
        self.matcher: Any = None
        self.known: Any = None
        self.tokens: list[int] = []

    def allow(self, known: Any, mask: np.ndarray, left: int) -> None:
        """Sets the tokens that are allowed, in a mask (V,) without any.

        Args:
            known: the tokenizer, see :func:`llguidance_tokenizer`.
            left: tokens that may still be written.
        """
        self.open(known, left)
        if not self.course.finished:
            bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
            if self._is_sound():
                held = np.unpackbits(bits, bitorder="little")[: len(mask)]
                mask[: len(held)] = held
                return
        mask[list(self.ends)] = True

    def open(self, known: Any, left: int) -> None:
        """Begins the next piece, where none is under way. Before every token that is taken, if it was not asked what is allowed."""
        if self.course.finished or self.matcher is not None:
            return
        from llguidance import LLMatcher

        self.known = known
        self.hurried = self.hurried or self.is_short(left)
        self.matcher = LLMatcher(known, LLMatcher.grammar_from_lark(self.course.grammar(self.hurried)), log_level=0)
        self._is_sound()

    def add_token(self, token: int) -> None:
        """Takes note of the token that was chosen; what comes after the end is padding."""
        if self.course.finished or self.matcher is None:
            return
        if token in self.ends:
            self.end()
            return
        self.matcher.consume_token(token)
        self.tokens.append(token)
        if self._is_sound() and self.matcher.is_stopped():
            self.end_piece()

    def add_if_allowed(self, token: int) -> bool:
        """Takes a token, no end, if the piece under way can go on with it; whether it can."""
        if self.matcher is None or not self.matcher.try_consume_tokens([token]):
            return False
        self.tokens.append(token)
        if self.matcher.is_stopped():
            self.end_piece()
        return True

    def is_short(self, left: int) -> bool:
        """Whether so many tokens are too few for anything but to come to an end."""
        return left <= _TOKENS_A_LINE * self.course.lines_to_close + _TOKENS_A_PIECE

    @property
    def may_pause(self) -> bool:
        """Whether the piece under way is whole as it is."""
        return self.matcher is not None and bool(self.matcher.is_accepting())

    def end(self) -> None:
        """Takes note that the output ended here."""
        self.end_piece()
        self.course.finished = True

    def end_piece(self) -> None:
        """Takes note that the piece under way is whole."""
        self.course.add_piece(self.known.decode_bytes(self.tokens).decode())
        self.matcher, self.tokens = None, []

    def _is_sound(self) -> bool:
        """Whether the matcher can go on; if not, the row is at its end."""
        if self.matcher.is_error():
            reason = (str(self.matcher.get_error()).strip().splitlines() or ["no reason given"])[0]
            self.fault = GatewiseError(
                f"what the model may write cannot be worked out ({reason[:200]}): write without constraint, or not verbatim"
            )
            self.course.finished = True
        return self.fault is None


class TreeScores:
    """What one answer may go on with, for engines that choose tokens by themselves: called with what was written and the scores.

    Args:
        told: the course, see :meth:`Course.from_json`.
        ends: ids of the end-of-text tokens.
        most: tokens of the answer.
        size: of the vocabulary; with it, the tokenizer is read now and not in the first call.

    Raises:
        GatewiseError: there is no such course, or llguidance is missing, or cannot read the tokenizer.
    """

    def __init__(
        self, told: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], most: int, size: int | None = None
    ) -> None:
        check_available()
        self.tokenizer, self.ends, self.most = tokenizer, tuple(sorted(set(ends))), most
        self.row, self.seen = TreeRow(Course.from_json(told), self.ends), 0
        if size is not None:
            llguidance_tokenizer(self.tokenizer, self.ends, size)

    def __call__(self, written: Sequence[int], scores: Tensor) -> Tensor:
        """Scores (V,) with -inf for tokens that are not allowed after these. Those that it has not seen yet are read first."""
        known = llguidance_tokenizer(self.tokenizer, self.ends, len(scores))
        for token in written[self.seen :]:
            self.row.open(known, self.most - self.seen)
            self.row.add_token(int(token))
            self.seen += 1
        mask = np.zeros(len(scores), dtype=bool)
        self.row.allow(known, mask, self.most - self.seen)
        return scores.masked_fill(torch.from_numpy(~mask).to(scores.device), -torch.inf)


class TreeConstraintOfServers:
    """What `gatewise serve` keeps answers to trees with: the entry point "gatewise_tree" of ``gatewise.constraints``."""

    logits_processor = "gatewise_mdt.extraction.in_vllm:TreeLogits"

    def limit(
        self, text: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], max_tokens: int, vocabulary: int
    ) -> TreeScores:
        """See :class:`TreeScores`."""
        return TreeScores(text, tokenizer, ends, max_tokens, vocabulary)


IN_SERVERS = TreeConstraintOfServers()


@lru_cache(maxsize=16)
def llguidance_tokenizer(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], size: int) -> Any:
    """The tokenizer as llguidance reads it, which takes about a second.

    Args:
        ends: ids of the end-of-text tokens.
        size: of the vocabulary that the model has scores for.

    Raises:
        GatewiseError: llguidance cannot read it.
    """
    import llguidance.hf

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise GatewiseError(
            f"the tokenizer ({type(tokenizer).__name__}) is none of the tokenizers library, which constrained writing needs:"
            " write without constraint"
        )
    try:
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(size, len(tokenizer)), eos_token=list(ends))
    except Exception as error:  # the library's own errors have no common kind
        raise GatewiseError(f"llguidance cannot read the tokenizer ({reason_of(error, 200)}): write without constraint") from error
