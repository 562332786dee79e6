"""From a text to its decision tree with a causal model, which writes it as lines of text.

    extractor = Extractor.load("runs/mdt-pi-lora/adapter")
    found = extractor(["adults with gout@For an acute flare, give colchicine."])[0]
    print(found.tree.to_outline(), found.absent, found.warnings)

What is extracted needs review by a clinician.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from gatewise import __version__
from gatewise.adapters import fingerprint, load_as_trained, read_note
from gatewise.checks import HALF_A_PAIR, has_half_a_pair, writable
from gatewise.errors import GatewiseError
from gatewise.tasks import Records, Template, end_ids, generate_ids, measuring, most_positions, prompt_ids
from gatewise_mdt.documents.language import detect_language
from gatewise_mdt.evaluation.intervals import intervals
from gatewise_mdt.evaluation.metrics import count_trees, metrics_of, rates
from gatewise_mdt.evaluation.mistakes import count_mistakes
from gatewise_mdt.extraction.constraint import TreeConstraint
from gatewise_mdt.extraction.course import Course
from gatewise_mdt.extraction.prompts import parted, prompt
from gatewise_mdt.formats.lines import parse_lenient
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.relations import Language, check_language
from gatewise_mdt.spans import absent_triples
from gatewise_mdt.tree import DecisionTree, Triple

Progress = Callable[[int, int], None]
"""Called with how many texts are done, and how many there are."""
PLAIN = Template("{source}")
_LEAST_ROOM = 16
_EMPTY_LEAF = [{"role": "D", "triples": [], "logical_rel": "null"}]


@dataclass(frozen=True)
class Extraction:
    """A text and what was found in it. Needs review by a clinician.

    Attributes:
        text: as it was given, "population@passage".
        absent: the triples whose subject or object does not stand in the text.
        warnings: what was put right or left out in the model's output, a sentence each.
        written: what the model wrote, as it wrote it; empty of one that points.
        made_with: what the tree was made with, as records have it under "extraction": the "base" model, the "adapter" ("name",
            "sha256" of weights and configuration), gatewise's version ("gatewise"), the "settings" of the extractor, and the
            "date" (UTC). Of models that were given as folders only the folders' own names. None where it is not known.
        confidence: for each node of the tree, in pre-order, how likely it is right, in [0, 1]; None for an empty leaf, and as a
            whole where the model does not say.
    """

    text: str
    tree: DecisionTree
    language: Language
    absent: tuple[Triple, ...] = ()
    warnings: tuple[str, ...] = ()
    written: str = ""
    made_with: Mapping[str, Any] | None = None
    confidence: tuple[float | None, ...] | None = None

    @property
    def is_empty(self) -> bool:
        """True if nothing was found: a tree that only says "no recommendation"."""
        return not self.tree.triples

    def record(self, number: int = 1, more: Mapping[str, Any] | None = None) -> TreeRecord:
        """As a record for files and views, with what has to be known of it beside the tree."""
        said: dict[str, Any] = {
            "absent": [list(triple) for triple in self.absent],
            "warnings": list(self.warnings),
            "confidence": self.confidence and [one if one is None else round(one, 3) for one in self.confidence],
            "extraction": None if self.made_with is None else dict(self.made_with),
        }
        known = {name: value for name, value in said.items() if value is not None}
        return TreeRecord(self.text, self.tree, number, {**(more or {}), **known})


class Text(NamedTuple):
    """A text that can be read, and its language."""

    text: str
    language: Language


class Extracts:
    """What gives trees of texts: :class:`Extractor`, which writes them, ``ServedExtractor``, which asks a server to, or
    ``PointingExtractor``.

    Attributes:
        batch_size: texts at once.
    """

    batch_size: int

    def extract(self, texts: Sequence[Text]) -> "list[Extraction | GatewiseError]":
        """The tree of each text of one batch, or why there is none."""
        raise NotImplementedError

    def __call__(
        self,
        texts: Sequence[str],
        *,
        language: Language | Sequence[Language | None] | None = None,
        progress: Progress | None = None,
    ) -> "list[Extraction | GatewiseError]":
        """The tree of each text, or why there is none: a text with a fault does not stop the others.

        Args:
            texts: "population@passage"; without an "@" all of it is the passage.
            language: of all texts, or one for each; None finds it out for each.

        Raises:
            GatewiseError: something is wrong that is no single text's fault.
        """
        found = dict(self.as_they_come(texts, language=language, progress=progress))
        return [found[number] for number in range(len(texts))]

    def as_they_come(
        self,
        texts: Sequence[str],
        *,
        language: Language | Sequence[Language | None] | None = None,
        progress: Progress | None = None,
    ) -> "Iterator[tuple[int, Extraction | GatewiseError]]":
        """The number of each text, and its tree or why there is none, in the order in which they are done."""
        checked = dict(enumerate(checked_texts(texts, language)))
        sound = {number: one for number, one in checked.items() if isinstance(one, Text)}
        yield from ((number, one) for number, one in checked.items() if isinstance(one, GatewiseError))
        done = len(texts) - len(sound)
        for number, one in self._extracted(sound):
            done += 1
            if progress:
                progress(done, len(texts))
            yield number, one

    def _extracted(self, texts: Mapping[int, Text]) -> "Iterator[tuple[int, Extraction | GatewiseError]]":
        """In batches of like length, the longest first."""
        order = sorted(texts, key=lambda number: -len(texts[number].text))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            yield from zip(batch, self.extract([texts[number] for number in batch]), strict=True)


@dataclass(frozen=True)
class Extractor(Extracts):
    """A model and how it is asked. It writes only tokens with which the output becomes a valid tree.

    Attributes:
        template: how prompts were written in training; the adapter's note has it.
        verbatim: allow only subjects and objects that are whole words of the text.
        max_new_tokens: the most that is written for a text.
        batch_size: texts at once.
        base, adapter: what the model is, for :attr:`Extraction.made_with`: the base's hub id or folder, and "name" and "sha256" of
            the adapter. :meth:`load` knows them; without a base, the one that the model names.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: Template = PLAIN
    verbatim: bool = False
    max_new_tokens: int = 512
    batch_size: int = 8
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
        **settings: Any,
    ) -> "Extractor":
        """The adapter of a run with its base model, asked as it was trained.

        Args:
            base: the base model, if not the one that the adapter names.
            device: "auto", "cpu", "cuda", "cuda:1" or "mps".
            say: told in a line what happens now.
            settings: attributes of the extractor.

        Raises:
            GatewiseError: the adapter or its base cannot be read, or the adapter was trained for something else.
        """
        note = read_note(Path(adapter))
        if note.get("task", "causal") != "causal":
            what = "points at the text" if note["task"] == "text2mdt" else "is a classifier"
            raise GatewiseError(f"{adapter} {what}: expected an adapter that was trained to write trees")
        model, tokenizer, loaded = load_as_trained(adapter, base=base, device=device, say=say)
        template = Template(note.get("template") or PLAIN.prompt)
        return cls(model, tokenizer, template, **{"base": loaded, "adapter": adapter_identity(adapter), **settings})

    def extract(self, texts: Sequence[Text]) -> list[Extraction | GatewiseError]:
        """The tree of each text of one batch, or why there is none: a text that is too long does not stop the others.

        Raises:
            GatewiseError: the template does not show ``{source}``, or the constraint cannot be had.
        """
        if "{source}" not in self.template.prompt:
            raise GatewiseError(
                f"the adapter's prompt is {self.template.prompt!r}, without {{source}}: expected one that was trained on rows from"
                " `gatewise mdt prepare`"
            )
        if not (ends := end_ids(self.model, self.tokenizer)):
            raise GatewiseError(
                "the tokenizer has no end-of-text token (eos_token), which ends a tree: set one, or give another model"
            )
        prompts = [{"source": prompt(one.text, one.language), "target": "D"} for one in texts]
        rows = Records("generation", prompts, None, "the prompts")
        ids, positions = prompt_ids(rows, self.tokenizer, self.template, [2**40] * len(texts), 2**40), most_positions(self.model)
        made: list[Any] = [
            GatewiseError(
                f"the passage takes {len(row)} tokens of the {positions} that the model can read and write: give a shorter one"
            )
            for row in ids
        ]
        fitting = [i for i, row in enumerate(ids) if positions - len(row) >= _LEAST_ROOM]
        if not fitting:
            return made
        longest = max(len(ids[i]) for i in fitting)
        most = min(self.max_new_tokens, positions - longest)
        courses = [Course(texts[i].language, within=texts[i].text if self.verbatim else None) for i in fitting]
        constraint = TreeConstraint(self.tokenizer, courses, ends=ends, prompt_tokens=longest, max_new_tokens=most)
        with measuring(self.model):
            constraint.read(generate_ids(self.model, self.tokenizer, [ids[i] for i in fitting], most, constraint))
        settings = {"verbatim": self.verbatim, "max_new_tokens": self.max_new_tokens}
        told = made_with(self.model, self.base, self.adapter, settings)
        for i, row in zip(fitting, constraint.rows, strict=True):
            course = row.course
            made[i] = row.fault or tree_written(texts[i], course.written, told, ended=course.finished, hurried=row.hurried)
        return made


def tree_written(one: Text, output: str, made_with: Mapping[str, Any], *, ended: bool, hurried: bool) -> Extraction:
    """The tree in what a model wrote for a text.

    Args:
        ended: it came to its end; otherwise the tokens ran out, and a piece that was not whole is left out.
        hurried: the constraint brought it to a close because tokens were running out.
    """
    tree, notes = parse_lenient(output)
    if hurried and ended:
        notes = ("the output was brought to a close before its end: allow more new tokens", *notes)
    elif not ended:
        notes = ("the output ended before it was whole: allow more new tokens", *notes)
    if tree is None:
        notes = (*notes[:-1], "nothing was found before the tokens ran out")
        tree = DecisionTree.from_preorder(_EMPTY_LEAF)
    return Extraction(one.text, tree, one.language, absent_triples(one.text, tree), notes, output, made_with)


def checked_texts(texts: Sequence[str], language: Language | Sequence[Language | None] | None) -> list[Text | GatewiseError]:
    """Texts with their languages, or what is wrong with them; arguments and errors are those of :class:`Extracts`."""
    languages = [language] * len(texts) if language is None or isinstance(language, str) else list(language)
    checked: list[Text | GatewiseError] = []
    for text, its in zip(texts, languages, strict=True):
        if its is not None:
            check_language(its)
        try:
            if not "".join(parted(text)):
                raise GatewiseError("the text is empty, expected a passage of a guideline in English or Chinese")
            if not parted(text)[1]:
                raise GatewiseError(f'the text {text[:60]!r} has a population before the "@" and no passage after it')
            if has_half_a_pair(text):
                raise GatewiseError(f"the text {HALF_A_PAIR}")
            checked.append(Text(text, its or detect_language(text)))
        except GatewiseError as error:
            checked.append(error)
    return checked


# ---- what a tree is made with ----


def made_with(model: Any, base: str, adapter: Mapping[str, str] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a tree is made with that is made now, see :attr:`Extraction.made_with`.

    Args:
        model: None where it is not in this process.
        base: the name of the base model; if it is empty, the one that the model names.
        settings: what the output depends on beside the models and the text.
    """
    base = base or getattr(getattr(model, "config", None), "name_or_path", "")
    made: dict[str, Any] = {"base": _name_of(base)} if base else {}
    if adapter is not None:
        made["adapter"] = dict(adapter)
    weights = None if model is None else next((one for one in model.parameters() if one.is_floating_point()), None)
    where = {} if weights is None else {"dtype": str(weights.dtype).removeprefix("torch."), "device": weights.device.type}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**made, "gatewise": __version__, "settings": {**settings, **where}, "date": date}


def adapter_identity(adapter: str | Path) -> dict[str, str]:
    """Which adapter it is, for :func:`made_with`: "name" and "sha256". Errors are those of ``fingerprint``."""
    return {"name": _name_of(adapter), "sha256": fingerprint(adapter)}


def _name_of(model: str | Path) -> str:
    """Returns a hub id unchanged, and only the last part of a folder's path."""
    folder = Path(os.path.expanduser(model))
    if re.fullmatch(r"\w[\w.-]*(?:/\w[\w.-]*)?", str(model)) and not folder.exists():
        return str(model)
    return str(writable(re.split(r"[/\\]", str(folder.resolve()))[-1]))  # a name of another encoding than UTF-8 is in no file


# ---- how good its trees are ----


def measure(
    extractor: Extracts,
    records: Sequence[TreeRecord],
    progress: Progress | None = None,
    *,
    mistakes: bool = False,
    each: list[float] | None = None,
    faults: list[str] | None = None,
) -> dict[str, Any]:
    """The metrics of an extractor on gold records. What fails counts as nothing found.

    Args:
        mistakes: count them by kind, too, see :mod:`gatewise_mdt.evaluation.mistakes`.
        each: a list to which the F1 of each record's triples is added.
        faults: a list to which is added why nothing could be read, of each record of which that is so.

    Returns:
        Metrics by name, with ``n``, the number of records, ``failed``, for how many of them nothing could be read, and
        ``intervals``, see :mod:`gatewise_mdt.evaluation.intervals`; with ``mistakes``, also what
        :func:`gatewise_mdt.count_mistakes` counts.

    Raises:
        GatewiseError: there are no records.
    """
    # A tree without a triple names no relation, and so has no language of its own: as in training, its text says it.
    languages = [record.tree.language if record.tree.triples else None for record in records]
    found = extractor([record.text for record in records], language=languages, progress=progress)
    trees: list[Any] = [one.tree if isinstance(one, Extraction) else [] for one in found]
    gold = [record.tree for record in records]
    counts = count_trees(gold, trees)
    if each is not None:
        each += rates(counts)["triplet_f1"].tolist()
    failed = [str(one) for one in found if isinstance(one, GatewiseError)]
    if faults is not None:
        faults += failed
    metrics = {**metrics_of(counts).to_json(), "failed": len(failed), "intervals": intervals(counts)}
    return {**metrics, "mistakes": count_mistakes(gold, trees)} if mistakes else metrics
