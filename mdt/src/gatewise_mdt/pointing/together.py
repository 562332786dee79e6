"""Two models together: one points at the text, one writes, and each judges the trees of both.

    extractor = TogetherExtractor.load("runs/mdt-pointing/adapter", "runs/mdt-lora/adapter")
    found = extractor(["adults with gout@For an acute flare, give colchicine."])[0]

The candidates for a text are the pointing model's tree and those that the writing model writes: the first of the most probable
tokens, the others drawn. A candidate's score is what the pointing model says of it (minus the loss that it would have as a gold
tree) and ``weight`` times the log-probability of its text in the writing model, both in nats; the highest is kept. Our own. What
it gains is in mdt/docs/text2mdt.md (``mdt/benchmarks/mdt_both.py``); it takes as long as writing does.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from gatewise.checks import is_number, is_whole
from gatewise.errors import GatewiseError
from gatewise.losses import IGNORED, base_of, row_losses
from gatewise.tasks.encoding import PadCollator, encode
from gatewise.tasks.metrics import measuring, most_positions
from gatewise.tasks.records import Records
from gatewise_mdt.extraction.extractor import Asked, Extraction, Extractor, Progress, as_asked, each
from gatewise_mdt.extraction.prompts import prompt
from gatewise_mdt.pointing.extractor import PointingExtractor
from gatewise_mdt.pointing.model import PointingCollator, encode_records
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.relations import Language
from gatewise_mdt.training.rows import completion
from gatewise_mdt.tree import DecisionTree

WEIGHT = 0.5
"""Of the writing model's judgement: the commonest of those that were best on four fifths of the English dev passages."""
CANDIDATES = 5
_AT_ONCE = 8  # candidates in one pass of a judge


@dataclass(frozen=True)
class TogetherExtractor:
    """A pointing model and a writing one; asked as either is.

    Attributes:
        writer: how it writes; its ``level`` is 0, and it is asked for ``written`` trees of each text.
        written: trees that the writing model writes for a text, at least one.
        weight: of its judgement, at least 0.

    Raises:
        GatewiseError: a setting is out of range, or the writing model is to write in another way than one tree at once.
    """

    pointer: PointingExtractor
    writer: Extractor
    written: int = CANDIDATES
    weight: float = WEIGHT
    candidates: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not is_whole(self.written) or self.written < 1:
            raise GatewiseError(f"written is {self.written!r}: expected at least one tree of the writing model")
        if not is_number(self.weight) or not 0 <= self.weight < float("inf"):
            raise GatewiseError(f"weight is {self.weight!r}: expected a number of at least 0, such as {WEIGHT}")
        if self.writer.level not in (None, 0) or self.writer.pipeline or self.writer.candidates != 1:
            raise GatewiseError(
                "the writing model has a chain of thought, a pipeline or candidates of its own: expected one that writes a tree"
            )

    @classmethod
    def load(
        cls,
        pointing: str | Path,
        writing: str | Path,
        *,
        device: str = "auto",
        say: Callable[[str], None] | None = None,
        written: int = CANDIDATES,
        weight: float = WEIGHT,
        **settings: Any,
    ) -> "TogetherExtractor":
        """Two adapters, each on its own base model.

        Args:
            settings: attributes of the writing :class:`gatewise_mdt.Extractor`; phrases are verbatim unless they say otherwise.
            Others: see the class, and :meth:`gatewise_mdt.Extractor.load`.

        Raises:
            GatewiseError: an adapter cannot be read, or is not of its kind.
        """
        pointer = PointingExtractor.load(pointing, device=device, say=say)
        writer = Extractor.load(writing, device=device, say=say, **{"verbatim": True, "level": 0, **settings})
        return cls(pointer, writer, written, weight)

    @property
    def batch_size(self) -> int:
        """Texts at once."""
        return self.writer.batch_size

    @property
    def most_tokens(self) -> int:
        """That are written for a text at most, one after another."""
        return self.writer.max_new_tokens * (1 if self.written == 1 else 2)

    @property
    def model(self) -> Any:
        """The writing model."""
        return self.writer.model

    @property
    def stage_models(self) -> Mapping[str, Any]:
        """The pointing model."""
        return {"pointing": self.pointer.model}

    def __call__(
        self,
        texts: Sequence[str],
        *,
        language: Language | Sequence[Language | None] | None = None,
        progress: Progress | None = None,
    ) -> list[Extraction | GatewiseError]:
        """The tree of each text, or why there is none; arguments and errors are those of ``Extractor.__call__``.

        Only a tree of the pointing model has confidence. Where one of the two fails, the other's tree is taken.
        """
        return each(as_asked(texts, language), lambda asked: self._whole(asked, progress))

    def _whole(self, asked: Sequence[Asked], progress: Progress | None) -> list[Extraction | GatewiseError]:
        pointed = self.pointer([one.text for one in asked], language=[one.language for one in asked])
        written = self.writer.several(asked, self.written, progress)
        return [self._kept(one, first, more) for one, first, more in zip(asked, pointed, written, strict=True)]

    def _kept(
        self, asked: Asked, pointed: Extraction | GatewiseError, written: Sequence[Extraction | GatewiseError]
    ) -> Extraction | GatewiseError:
        found: dict[DecisionTree, Extraction] = {}
        for one in (pointed, *written):
            if isinstance(one, Extraction):
                found.setdefault(one.tree, one)  # of the same tree twice, the pointing model's, which has confidence
        if not isinstance(pointed, Extraction) or len(found) == 1:
            # Without the pointing model nothing judges; a single tree needs no judge.
            kept = next((one for one in (pointed, *written) if isinstance(one, Extraction)), pointed)
        else:
            trees, scores = list(found), {}
            with suppress(GatewiseError):  # trees so long that the writing model cannot read them
                both = zip(trees, self.said_by_pointer(asked, trees), self.said_by_writer(asked, trees), strict=True)
                scores = {tree: points + self.weight * writes for tree, points, writes in both if points is not None}
            kept = found[max(scores, key=lambda tree: scores[tree])] if scores else pointed
        if isinstance(kept, GatewiseError):
            return kept
        made = dict(kept.made_with or {})
        other = self.writer.adapter if kept is pointed else self.pointer.adapter
        together = {**(other or {}), "written": self.written, "weight": self.weight}
        made["settings"] = {**made.get("settings", {}), "together": together}
        return replace(kept, made_with=made)

    def said_by_pointer(self, asked: Asked, trees: Sequence[DecisionTree]) -> list[float | None]:
        """Minus the loss of each tree, in nats; None for one that cannot be said by places in the text."""
        longest = base_of(self.pointer.model).heads.settings.longest
        rows, pointed = encode_records([TreeRecord(asked.text, tree) for tree in trees], self.pointer.tokenizer, longest)
        can = [i for i, one in enumerate(pointed) if one.has_tree and not one.left_out]
        sums = _losses(self.pointer.model, [rows[i] for i in can], PointingCollator(self.pointer.tokenizer))
        made: list[float | None] = [None] * len(trees)
        for i, value in zip(can, sums, strict=True):
            made[i] = -value
        return made

    def said_by_writer(self, asked: Asked, trees: Sequence[DecisionTree]) -> list[float]:
        """The log-probability of each tree's text after the prompt, in nats.

        Raises:
            GatewiseError: the longest leaves no room for the prompt.
        """
        source = prompt(asked.text, asked.language)
        rows: list[dict[str, Any]] = [{"source": source, "target": completion(TreeRecord(asked.text, tree))} for tree in trees]
        told = Records("generation", rows, None, "the candidates")
        tokenizer, template = self.writer.tokenizer, self.writer.template
        features, longest = encode(told, tokenizer, template, max_length=2**20), most_positions(self.writer.model)
        if max(len(one["input_ids"]) for one in features) > longest:
            # A prompt that is cut is cut alike for all, or they would not be compared.
            answers = [sum(label != IGNORED for label in one["labels"]) for one in features]
            room = longest - max(answers)
            parts = zip(rows, answers, strict=True)
            features = [
                encode(replace(told, rows=[row]), tokenizer, template, max_length=room + answer)[0] for row, answer in parts
            ]
        return [-value for value in _losses(self.writer.model, features, PadCollator(self.writer.tokenizer))]

    # ---- stages, which are the pointing model's ----

    def triples(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[Asked | GatewiseError]:
        """The triples of each text, of the pointing model alone."""
        return self.pointer.triples(asked, progress)

    def nodes(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[Asked | GatewiseError]:
        """The nodes of each text with triples, of the pointing model alone."""
        return self.pointer.nodes(asked, progress)

    def trees(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[Extraction | GatewiseError]:
        """The tree of each text with nodes, of the pointing model alone."""
        return self.pointer.trees(asked, progress)


@torch.no_grad()
def _losses(model: Any, rows: Sequence[Any], collate: Callable[[Any], Mapping[str, Any]]) -> list[float]:
    """The summed loss of each row, in nats."""
    device, made = next(model.parameters()).device, []
    with measuring(model):
        for start in range(0, len(rows), _AT_ONCE):
            batch = {name: value.to(device) for name, value in collate(rows[start : start + _AT_ONCE]).items()}
            made += row_losses(model, batch)[0].tolist()
    return made
