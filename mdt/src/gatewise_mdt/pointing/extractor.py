"""From a text to its decision tree with a pointing model: one pass over the text, and no phrase that does not stand in it.

    extractor = PointingExtractor.load("runs/mdt-pointing/adapter")
    found = extractor(["adults with gout@For an acute flare, give colchicine."])[0]
    print(found.tree.to_outline(), found.confidence)

It is asked as :class:`gatewise_mdt.Extractor` is, which writes trees, and gives the same. What is extracted needs review by a
clinician.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gatewise.adapters import NOTE_FILE, load_as_trained, read_note
from gatewise.errors import GatewiseError
from gatewise.losses import base_of
from gatewise.models import most_tokens
from gatewise_mdt.evaluation.metrics import plain_tree
from gatewise_mdt.extraction.extractor import (
    Extraction,
    Extractor,
    Extracts,
    Text,
    adapter_identity,
    made_with,
)
from gatewise_mdt.pointing import decoding
from gatewise_mdt.pointing.calibration import Calibration
from gatewise_mdt.pointing.decoding import Found
from gatewise_mdt.pointing.heads import HeadSettings, PointingHeads, UnitPlaces
from gatewise_mdt.pointing.model import PointingCollator, PointingModel, encode_texts, without_autocast
from gatewise_mdt.pointing.targets import NOBODY, NOTHING, SUBJECT, preorder, tree_of, unplaced
from gatewise_mdt.pointing.units import Units
from gatewise_mdt.records import DOUBTFUL, TreeRecord
from gatewise_mdt.spans import absent_triples

MOST_PHRASES = 64
"""Of a text; time and memory grow with their square and more. No published passage has half as many."""


@dataclass(frozen=True)
class PointingExtractor(Extracts):
    """A pointing model, ready for texts.

    Attributes:
        model: a :class:`PointingModel`, with or without an adapter.
        batch_size: texts in one pass.
        calibration: how the heads' probabilities become confidence; None: there is none.
        base, adapter: what the model is, see :class:`gatewise_mdt.Extractor`.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 16
    calibration: Calibration | None = None
    base: str = ""
    adapter: Mapping[str, str] | None = None

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
        note = read_note(Path(adapter))
        if note.get("task") != "text2mdt":
            raise GatewiseError(f"{adapter} does not point at the text: expected an adapter of a run with task: text2mdt")
        try:
            settings = HeadSettings(**note["heads"])
            calibration = Calibration(**note["calibration"]) if note.get("calibration") else None
        except (KeyError, TypeError, ValueError) as error:
            raise GatewiseError(f"{Path(adapter) / NOTE_FILE} is damaged: copy it from where it was trained") from error
        model, tokenizer, loaded = load_as_trained(
            adapter, base=base, device=device, say=say, around=lambda encoder: PointingModel(encoder, settings)
        )
        return cls(model, tokenizer, batch_size, calibration, loaded, adapter_identity(adapter))

    def extract(self, texts: Sequence[Text]) -> list[Extraction | GatewiseError]:
        """The tree of each text of one batch, or why there is none."""
        return self._read(texts, self._tree)

    def judged(self, records: Sequence[TreeRecord]) -> tuple[list[tuple[float, float, float, float]], list[bool]]:
        """What the heads say of every node that is found in the records' texts (``Found.of_node``), and whether it is one of the
        gold tree's."""

        def judge(one: Text, units: Units, found: Found) -> list[tuple[tuple[float, float, float, float], Any]]:
            tree = tree_of(found.pointed, units, one.language) if found.groups else None
            nodes = [] if tree is None else zip(preorder(found.pointed), plain_tree(tree, False)[0], strict=True)
            return [(found.of_node(number), node) for number, node in nodes if number >= 0]

        logs: list[tuple[float, float, float, float]] = []
        right: list[bool] = []
        for start in range(0, len(records), self.batch_size):
            batch = records[start : start + self.batch_size]
            for record, made in zip(batch, self._read([Text(one.text, one.tree.language) for one in batch], judge), strict=True):
                if isinstance(made, list):
                    gold = set(plain_tree(record.tree, False)[0])
                    logs += [one for one, _ in made]
                    right += [node in gold for _, node in made]
        return logs, right

    @torch.no_grad()
    def _read(self, texts: Sequence[Text], make: Callable[[Text, Units, Found], Any]) -> list[Any]:
        """What is made of what the heads find in each text of one batch, or why nothing can be found."""
        heads: PointingHeads = base_of(self.model).heads
        collate, device = PointingCollator(self.tokenizer), next(self.model.parameters()).device
        longest = most_tokens(base_of(self.model), self.tokenizer)
        made: list[Any] = [None] * len(texts)
        rows: dict[int, dict[str, Any]] = {}
        for i, one in enumerate(texts):
            try:
                (row,) = encode_texts([one.text], self.tokenizer)
                if (count := len(row["input_ids"])) > longest:
                    raise GatewiseError(f"the text has {count} tokens, but the model reads at most {longest}: cut it into passages")
                rows[i] = row
            except GatewiseError as error:
                made[i] = error
        if not rows:
            return made
        self.model.eval()
        batch = {key: value.to(device) for key, value in collate(list(rows.values())).items()}
        states = self.model(**batch).states
        with without_autocast(states):
            unit_states = heads.units(states, UnitPlaces.of(batch["units"]))
            phrases = decoding.phrases(heads, unit_states)
            few = [Found(NOTHING) if len(one.pointed.mentions) > MOST_PHRASES else one for one in phrases]
            found = decoding.trees(heads, unit_states, decoding.nodes(heads, unit_states, few))
        said = f"phrases of the text would go into its tree, and at most {MOST_PHRASES} can: cut it into passages"
        for i, its, before in zip(rows, found, phrases, strict=True):
            count = len(before.pointed.mentions)
            made[i] = make(texts[i], Units.of(texts[i].text), its) if count <= MOST_PHRASES else GatewiseError(f"{count} {said}")
        return made

    def _tree(self, text: Text, units: Units, found: Found) -> Extraction:
        one = found.pointed
        tree = tree_of(one, units, text.language)
        confidence, warnings = None, []
        if left := unplaced(one):
            warnings.append(f"{left} of the {len(one.nodes)} nodes found have no place in the tree")
        linked = zip(one.mentions, one.subjects, one.own, strict=False)
        if lost := sum(it.kind != SUBJECT and who == NOBODY and node < 0 for it, who, node in linked):
            warnings.append(f"{lost} of the phrases found have no subject and are left out: give the text as population@passage")
        if self.calibration is not None and found.groups:
            sure = self.calibration.confidence
            # As many digits as records have, so that all count the same nodes as doubtful.
            confidence = tuple(None if node < 0 else round(sure(found.of_node(node)), 3) for node in preorder(one))
            known = [value for value in confidence if value is not None]
            if unsure := sum(value < DOUBTFUL for value in known):
                are = "is" if unsure == 1 else "are"
                warnings.append(f"{unsure} of the {len(known)} nodes {are} more likely wrong than right")
        absent, told = absent_triples(text.text, tree), made_with(self.model, self.base, self.adapter, {"pointing": True})
        return Extraction(text.text, tree, text.language, absent, tuple(warnings), made_with=told, confidence=confidence)


def load_extractor(
    adapter: str | Path,
    *,
    base: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Extracts:
    """The adapter with its base model, ready for texts, by what it was trained for: to point at the text, or to write trees.

    Args:
        settings: attributes of :class:`Extractor`. Of a model that points, which writes nothing, only ``batch_size`` means
            something.
        Others: as for :meth:`Extractor.load`.

    Raises:
        GatewiseError: adapter or base cannot be read, or the settings do not go with it.
    """
    if read_note(Path(adapter)).get("task") != "text2mdt":
        return Extractor.load(adapter, base=base, device=device, say=say, **settings)
    sizes = {name: value for name, value in settings.items() if name == "batch_size"}
    return PointingExtractor.load(adapter, base=base, device=device, say=say, **sizes)
