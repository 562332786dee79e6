"""From a text to its decision tree with a pointing model: one pass over the text, and no phrase that does not stand in it.

    extractor = PointingExtractor.load("runs/mdt-pointing/adapter")
    found = extractor(["adults with gout@For an acute flare, give colchicine."])[0]
    print(found.tree.to_outline(), found.confidence)

It is asked as :class:`gatewise_mdt.Extractor` is, which writes trees, and gives the same. What is extracted needs review by a
clinician.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.losses import base_of
from gatewise.models.loading import most_tokens
from gatewise_mdt.evaluation.metrics import plain_tree
from gatewise_mdt.extraction.extractor import Asked, Extraction, Progress, as_asked, each, made_with, named
from gatewise_mdt.pointing import decoding
from gatewise_mdt.pointing.calibration import Calibration
from gatewise_mdt.pointing.decoding import Found
from gatewise_mdt.pointing.heads import HeadSettings, PointingHeads, UnitPlaces, UnitStates
from gatewise_mdt.pointing.model import PointingCollator, PointingModel, encode_texts, exact
from gatewise_mdt.pointing.targets import NOTHING, Pointed, nodes_at, preorder, tree_of, triple_of, unplaced
from gatewise_mdt.pointing.units import Units
from gatewise_mdt.records import DOUBTFUL, TreeRecord
from gatewise_mdt.relations import Language, relation_in
from gatewise_mdt.spans import absent_triples
from gatewise_mdt.tree import Node, Triple

MOST_PHRASES = 64
"""Of a text; time and memory grow with their square and more. No published passage has half as many."""
MOST_TOKENS = 8192
"""Of the texts of one pass, with padding, unless it is one text: the scores of all their phrases are in memory at once."""


@dataclass(frozen=True)
class PointingExtractor:
    """A pointing model, ready for texts.

    Attributes:
        model: a :class:`PointingModel`, with or without an adapter.
        batch_size: texts in one pass.
        calibration: how the heads' probabilities become confidence; None: there is none.
        base, adapter: what the model is, see :class:`gatewise_mdt.Extractor`.

    Raises:
        GatewiseError: the batch size is below one.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 16
    calibration: Calibration | None = None
    base: str = ""
    adapter: Mapping[str, str] | None = None
    candidates: ClassVar[int] = 1
    most_tokens: ClassVar[int] = 0
    stage_models: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise GatewiseError(f"batch_size is {self.batch_size}: expected at least 1")

    @classmethod
    def load(
        cls,
        adapter: str | Path,
        *,
        base: str | None = None,
        device: str = "auto",
        say: Callable[[str], None] | None = None,
        batch_size: int = 16,
    ) -> "PointingExtractor":
        """The adapter of a run with ``task: text2mdt``, on its base model.

        Args:
            base: the base model, if not the one that the adapter names.
            device: "auto", "cpu", "cuda", "cuda:1" or "mps".
            say: told in a line what happens now.

        Raises:
            GatewiseError: the adapter or its base cannot be read, or it is no adapter of this kind.
        """
        from gatewise.adapters.files import NOTE_FILE, read_note
        from gatewise.adapters.loading import load_as_trained

        note = read_note(Path(adapter))
        if note.get("task") != "text2mdt":
            raise GatewiseError(f"{adapter} does not point at the text: expected an adapter of a run with task: text2mdt")
        try:
            settings = HeadSettings(**note["heads"])
            calibration = Calibration.from_json(note["calibration"]) if note.get("calibration") else None
        except (KeyError, TypeError, GatewiseError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise GatewiseError(f"{Path(adapter) / NOTE_FILE} is damaged ({what}): copy it from where it was trained") from error
        model, tokenizer, loaded = load_as_trained(
            adapter, base=base, device=device, say=say, around=lambda encoder: PointingModel(encoder, settings)
        )
        return cls(model, tokenizer, batch_size, calibration, loaded, named(adapter))

    def made_with(self) -> dict[str, Any]:
        """What a tree is made with that is made now, see :attr:`gatewise_mdt.Extraction.made_with`."""
        return made_with(self.model, self.base, self.adapter, {"pointing": True})

    def __call__(
        self,
        texts: Sequence[str],
        *,
        language: Language | Sequence[Language | None] | None = None,
        progress: Progress | None = None,
    ) -> list[Extraction | GatewiseError]:
        """The tree of each text, or why there is none; arguments and errors are those of ``Extractor.__call__``."""
        return each(as_asked(texts, language), lambda asked: self._read(asked, [None] * len(asked), progress, self._trees))

    # ---- stages, from what is given ----

    def triples(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[Asked | GatewiseError]:
        """The triples of each text."""
        return self._read(asked, [None] * len(asked), progress, self._triples)

    def nodes(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[Asked | GatewiseError]:
        """The nodes of each text with triples; a triple whose phrases do not stand in the text is lost."""
        given = [nodes_at(one.text, Units.of(one.text), _both(one.triples)) for one in asked]
        bare = [replace(one, nodes=(), own=(), joins=()) for one in given]
        return self._read(asked, bare, progress, self._nodes)

    def trees(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[Extraction | GatewiseError]:
        """The tree of each text with nodes; a node none of whose phrases stands in the text is lost."""
        given = [nodes_at(one.text, Units.of(one.text), one.nodes) for one in asked]
        return self._read(asked, given, progress, self._trees)

    def judged(self, records: Sequence[TreeRecord]) -> tuple[list[tuple[float, float, float, float]], list[bool]]:
        """What the heads say of every node that is found in the records' texts (``Found.of_node``), and whether it is one of the
        gold tree's."""
        asked = [Asked(record.text, record.tree.language) for record in records]

        def judge(one: Asked, units: Units, found: Found) -> list[tuple[tuple[float, float, float, float], Any]]:
            tree = tree_of(found.pointed, units, one.language) if found.groups else None
            nodes = [] if tree is None else zip(preorder(found.pointed), plain_tree(tree, False)[0], strict=True)
            return [(found.of_node(number), node) for number, node in nodes if number >= 0]

        logs: list[tuple[float, float, float, float]] = []
        right: list[bool] = []
        for record, made in zip(records, self._read(asked, [None] * len(asked), None, judge), strict=True):
            if isinstance(made, list):
                gold = set(plain_tree(record.tree, False)[0])
                logs += [one for one, _ in made]
                right += [node in gold for _, node in made]
        return logs, right

    # ---- the model ----

    @torch.no_grad()
    def _read(
        self,
        asked: Sequence[Asked],
        given: Sequence[Pointed | None],
        progress: Progress | None,
        make: Callable[[Asked, Units, Found], Any],
    ) -> list[Any]:
        """What the heads find in each text, from what is given of it, or why nothing can be found."""
        heads: PointingHeads = base_of(self.model).heads
        collate, device = PointingCollator(self.tokenizer), next(self.model.parameters()).device
        longest = most_tokens(base_of(self.model), self.tokenizer)
        made: list[Any] = [None] * len(asked)
        rows: dict[int, dict[str, Any]] = {}
        for i, one in enumerate(asked):
            try:
                (rows[i],) = encode_texts([one.text], self.tokenizer)
                if len(rows[i]["input_ids"]) > longest:
                    count = len(rows.pop(i)["input_ids"])
                    raise GatewiseError(f"the text has {count} tokens, but the model reads at most {longest}: cut it into passages")
            except GatewiseError as error:
                made[i] = error
        self.model.eval()
        done = 0
        for now in self._batches({i: len(row["input_ids"]) for i, row in rows.items()}):
            batch = {key: value.to(device) for key, value in collate([rows[i] for i in now]).items()}
            states = self.model(**batch).states
            with exact(states):
                found = _found(heads, heads.units(states, UnitPlaces.of(batch["units"])), [given[i] for i in now])
            for i, its in zip(now, found, strict=True):
                made[i] = its if isinstance(its, GatewiseError) else make(asked[i], Units.of(asked[i].text), its)
            done += len(now)
            if progress:
                progress("trees", done, len(asked))
        return made

    def _batches(self, lengths: Mapping[int, int]) -> list[list[int]]:
        """Texts of like length, by their numbers."""
        made: list[list[int]] = []
        for i in sorted(lengths, key=lambda i: lengths[i]):
            if made and len(made[-1]) < self.batch_size and (len(made[-1]) + 1) * lengths[i] <= MOST_TOKENS:
                made[-1].append(i)
            else:
                made.append([i])
        return made

    # ---- what was found, as it is given back ----

    def _trees(self, asked: Asked, units: Units, found: Found) -> Extraction:
        one = found.pointed
        tree = tree_of(one, units, asked.language)
        confidence, warnings = None, list(asked.warnings)
        if left := unplaced(one):
            warnings.append(f"{left} of the {len(one.nodes)} nodes found have no place in the tree")
        if self.calibration is not None and found.groups:
            sure = self.calibration.confidence
            # As many digits as records have, so that all count the same nodes as doubtful.
            confidence = tuple(None if node < 0 else round(sure(found.of_node(node)), 3) for node in preorder(one))
            known = [value for value in confidence if value is not None]
            if unsure := sum(value < DOUBTFUL for value in known):
                are = "is" if unsure == 1 else "are"
                warnings.append(f"{unsure} of the {len(known)} nodes {are} more likely wrong than right")
        absent = absent_triples(asked.text, tree)
        return Extraction(
            asked.text, tree, asked.language, absent, tuple(warnings), made_with=self.made_with(), confidence=confidence
        )

    def _triples(self, asked: Asked, units: Units, found: Found) -> Asked:
        told = [triple_of(found.pointed, i, units, asked.language) for i in range(len(found.pointed.mentions))]
        return replace(asked, triples=tuple(dict.fromkeys(Triple.model_validate(one) for one in told if one)))

    def _nodes(self, asked: Asked, units: Units, found: Found) -> Asked:
        nodes = [node for node in tree_of(found.pointed, units, asked.language).nodes if not node.is_empty]
        return replace(asked, nodes=tuple(nodes))


def _found(heads: PointingHeads, units: UnitStates, given: Sequence[Pointed | None]) -> list[Found | GatewiseError]:
    found = [Found(one) for one in given if one is not None] or decoding.phrases(heads, units)
    counts = [len(one.pointed.mentions) for one in found]
    found = [Found(NOTHING) if count > MOST_PHRASES else one for one, count in zip(found, counts, strict=True)]
    if not any(one.pointed.nodes for one in found):
        found = decoding.nodes(heads, units, found)
    made = decoding.trees(heads, units, found)
    return [_too_many(count) if count > MOST_PHRASES else one for one, count in zip(made, counts, strict=True)]


def _too_many(count: int) -> GatewiseError:
    return GatewiseError(
        f"{count} phrases of the text would go into its tree, and at most {MOST_PHRASES} can: cut it into passages, or train the "
        "model longer"
    )


_OF_CONDITIONS = ("clinical manifestation", "basic condition")


def _both(triples: Sequence[Triple]) -> list[Node]:
    """Triples as two nodes: conditions hold findings and what a patient is, decisions all else."""
    made = []
    for role, wanted in (("C", True), ("D", False)):
        held = [one for one in triples if (relation_in(one.relation, "en") in _OF_CONDITIONS) == wanted]
        if held:
            made.append(Node(role=role, triples=tuple(held), logical_rel="and" if len(held) > 1 else "null"))  # type: ignore[arg-type]
    return made
