"""Constrained decoding: at each step only tokens with which the output can still become a valid tree.

:mod:`gatewise_mdt.extraction.course` says what may be written next, ``llguidance`` which tokens that leaves.
:class:`TreeConstraint` is for ``generate``, :class:`TreeScores` for engines that choose tokens by themselves.
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

_TOKENS_A_LINE = 3  # a bare line costs a token and its line break; one more where a tokenizer splits it
_TOKENS_A_PIECE = 40  # what a piece under way may still take


class TreeScores:
    """What one output may go on with: called with what was written and the scores.

    Args:
        ends: ids of the end-of-text tokens.
        most: tokens of the output; near the end, the tree is brought to a close.
        size: of the vocabulary; with it, the tokenizer is read now and not in the first call.

    Attributes:
        hurried: the course was cut short, because tokens were running out.
        fault: why nothing more can be written; the output then ends at once.

    Raises:
        GatewiseError: llguidance cannot read the tokenizer.
    """

    def __init__(
        self, course: Course, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], most: int, size: int | None = None
    ) -> None:
        self.course, self.tokenizer, self.ends, self.most = course, tokenizer, tuple(sorted(set(ends))), most
        self.seen, self.hurried = 0, False
        self.fault: GatewiseError | None = None
        self.known: Any = None if size is None else llguidance_tokenizer(tokenizer, self.ends, size)
        self.matcher: Any = None
        self.tokens: list[int] = []  # of the piece under way

    @torch.no_grad()
    def __call__(self, written: Sequence[int], scores: Tensor) -> Tensor:
        """Scores (V,) with -inf for tokens that are not allowed after these."""
        self.known = llguidance_tokenizer(self.tokenizer, self.ends, len(scores))
        self.read(written)
        self._open()
        mask = np.zeros(len(scores), dtype=bool)
        if not self.course.finished:
            bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
            if self._is_sound():
                held = np.unpackbits(bits, bitorder="little")[: len(mask)]
                mask[: len(held)] = held
        if self.course.finished:
            mask[list(self.ends)] = True
        return scores.masked_fill(torch.from_numpy(~mask).to(scores.device), -torch.inf)

    def read(self, written: Sequence[int]) -> None:
        """Takes note of the tokens that it has not seen yet. What comes after the end is padding."""
        for token in written[self.seen :]:
            self._open()
            self.seen += 1
            if self.course.finished:
                continue
            if token in self.ends:
                self._end_piece()
                self.course.finished = True
                continue
            self.matcher.consume_token(token)
            self.tokens.append(token)
            if self._is_sound() and self.matcher.is_stopped():
                self._end_piece()

    def _open(self) -> None:
        """Begins the next piece, where none is under way."""
        if self.course.finished or self.matcher is not None:
            return
        from llguidance import LLMatcher

        short = self.most - self.seen <= _TOKENS_A_LINE * self.course.lines_to_close + _TOKENS_A_PIECE
        self.hurried = self.hurried or short
        self.matcher = LLMatcher(self.known, LLMatcher.grammar_from_lark(self.course.grammar(self.hurried)), log_level=0)
        self._is_sound()

    def _end_piece(self) -> None:
        self.course.add_piece(self.known.decode_bytes(self.tokens).decode())
        self.matcher, self.tokens = None, []

    def _is_sound(self) -> bool:
        """False if the matcher cannot go on; the output is then at its end."""
        if self.matcher.is_error():
            reason = (str(self.matcher.get_error()).strip().splitlines() or ["no reason given"])[0]
            self.fault = GatewiseError(f"the constraint for this passage cannot be built ({reason[:200]}): try without --verbatim")
            self.course.finished = True
        return self.fault is None


class TreeConstraint(LogitsProcessor):
    """Leaves each row of a batch only the tokens that its course allows. For one call of ``generate``, without beams.

    Args:
        courses: one for each row.
        ends: ids of the end-of-text tokens.
        prompt_tokens: tokens of the padded prompts.
        max_new_tokens: as given to ``generate``.

    Raises:
        GatewiseError: llguidance cannot read the tokenizer.
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
        self.start, ends = prompt_tokens, tuple(ends)
        self.rows = [TreeScores(course, tokenizer, ends, max_new_tokens) for course in courses]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (b, V) with -inf for tokens that are not allowed after prompts and what was written (b, t)."""
        written = input_ids[:, self.start :].tolist()
        return torch.stack([row(tokens, own) for row, tokens, own in zip(self.rows, written, scores, strict=True)])

    def read(self, written: Tensor) -> None:
        """Takes note of the last tokens (b, n), after ``generate``."""
        for row, tokens in zip(self.rows, written.tolist(), strict=True):
            row.read(tokens)


class TreeConstraintOfServers:
    """What `gatewise serve` keeps answers to trees with: the entry point "gatewise_tree" of ``gatewise.constraints``."""

    logits_processor = "gatewise_mdt.extraction.in_vllm:TreeLogits"

    def limit(
        self, text: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], max_tokens: int, vocabulary: int
    ) -> TreeScores:
        """See :class:`TreeScores` and :meth:`Course.from_json`."""
        return TreeScores(Course.from_json(text), tokenizer, ends, max_tokens, vocabulary)


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
            f"the tokenizer ({type(tokenizer).__name__}) is none of the tokenizers library, which constrained writing needs"
        )
    try:
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(size, len(tokenizer)), eos_token=list(ends))
    except Exception as error:  # the library's own errors have no common kind
        raise GatewiseError(f"llguidance cannot read the tokenizer ({reason_of(error, 200)})") from error
