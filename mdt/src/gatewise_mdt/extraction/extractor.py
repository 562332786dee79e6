"""From a text to its decision tree with a causal model, which writes it as lines of text.

    extractor = Extractor.load("runs/mdt-pi-lora/adapter")
    found = extractor(["adults with gout@For an acute flare, give colchicine."])[0]
    print(found.tree.to_outline(), found.absent, found.warnings)

What is extracted needs review by a clinician.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from gatewise import __version__
from gatewise.adapters import fingerprint, load_as_trained, read_note
from gatewise.checks import HALF_A_PAIR, has_half_a_pair, writable
from gatewise.errors import GatewiseError
from gatewise.tasks import Records, Template, end_ids, generate_ids, measuring, most_positions, prompt_ids
from gatewise_mdt.documents.language import detect_language
from gatewise_mdt.evaluation.intervals import intervals
from gatewise_mdt.evaluation.metrics import count_trees, metrics_of
from gatewise_mdt.evaluation.mistakes import count_mistakes
from gatewise_mdt.extraction.constraint import TreeConstraint, check_available
from gatewise_mdt.extraction.course import Course
from gatewise_mdt.extraction.prompts import parted, prompt
from gatewise_mdt.formats.lines import parse_lenient
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.relations import Language, check_language
from gatewise_mdt.spans import TripleSpans, absent_triples, locate_tree
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
        """Whether nothing was found: a tree that only says "no recommendation"."""
        return not self.tree.triples

    @property
    def spans(self) -> list[list[TripleSpans]]:
        """For each node, for each of its triples, where subject and object stand in ``text``; None where they do not."""
        return locate_tree(self.text, self.tree)

    def record(self, number: int = 1, more: Mapping[str, Any] | None = None) -> TreeRecord:
        """As a record for files and views, with what has to be known of it beside the tree."""
        said: dict[str, Any] = {"absent": [list(triple) for triple in self.absent], "warnings": list(self.warnings)}
        if self.confidence is not None:
            said["confidence"] = [one if one is None else round(one, 3) for one in self.confidence]
        if self.made_with is not None:
            said["extraction"] = dict(self.made_with)
        return TreeRecord(self.text, self.tree, number, {**(more or {}), **said})


class Extracts(Protocol):
    """What gives trees of texts: :class:`Extractor`, which writes them, or ``pointing.extractor.PointingExtractor``.

    Attributes:
        batch_size: texts at once.
        most_tokens: that are written for a text at most; 0 where nothing is written.
        model: what is run.
    """

    @property
    def batch_size(self) -> int: ...
    @property
    def most_tokens(self) -> int: ...
    @property
    def model(self) -> Any: ...

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
        ...


@dataclass(frozen=True)
class Extractor:
    """A model and how it is asked.

    Attributes:
        template: how prompts were written in training; the adapter's note has it.
        constrained: allow only tokens with which the output becomes a valid tree.
        verbatim: with ``constrained``, allow only subjects and objects that are whole words of the text.
        max_new_tokens: the most that is written for a text.
        batch_size: texts at once.
        base, adapter: what the model is, for :attr:`Extraction.made_with`: the base's hub id or folder, and "name" and "sha256" of
            the adapter. :meth:`load` knows them; without a base, the one that the model names.

    Raises:
        GatewiseError: the settings contradict each other, or llguidance is missing.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: Template = PLAIN
    constrained: bool = True
    verbatim: bool = False
    max_new_tokens: int = 512
    batch_size: int = 8
    base: str = ""
    adapter: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.verbatim and not self.constrained:
            raise GatewiseError("verbatim phrases were asked for without constraint: leave one of the two out")
        for name in ("max_new_tokens", "batch_size"):
            if (number := getattr(self, name)) < 1:
                raise GatewiseError(f"{name} is {number}: expected at least 1")
        if self.constrained:
            check_available()

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
            GatewiseError: the adapter or its base cannot be read, the adapter was trained for something else, or the settings
                contradict each other.
        """
        if settings.get("constrained", True):
            check_available()
        note = read_note(Path(adapter))
        if note.get("task", "causal") != "causal":
            what = "points at the text" if note["task"] == "text2mdt" else "is a classifier"
            raise GatewiseError(f"{adapter} {what}: expected an adapter that was trained to write trees")
        model, tokenizer, loaded = load_as_trained(adapter, base=base, device=device, say=say)
        template = Template(note.get("template") or PLAIN.prompt)
        _refuse_chain_of_thought(model, tokenizer, template, adapter)
        known = {"base": loaded, "adapter": adapter_identity(adapter)}
        return cls(model, tokenizer, template, **{**known, **settings})

    @property
    def most_tokens(self) -> int:
        """That are written for a text at most."""
        return self.max_new_tokens

    def made_with(self) -> dict[str, Any]:
        """What a tree is made with that is written now, see :attr:`Extraction.made_with`."""
        settings = {name: getattr(self, name) for name in ("constrained", "verbatim", "max_new_tokens")}
        return made_with(self.model, self.base, self.adapter, settings)

    def __call__(
        self,
        texts: Sequence[str],
        *,
        language: Language | Sequence[Language | None] | None = None,
        progress: Progress | None = None,
    ) -> list[Extraction | GatewiseError]:
        """The tree of each text, or why there is none; see :class:`Extracts`."""
        return extract_sound(checked_texts(texts, language), lambda sound: self._trees(sound, progress))

    def _trees(self, texts: "Sequence[Text]", progress: Progress | None) -> list[Extraction | GatewiseError]:
        return [self._tree(one, output) for one, output in zip(texts, self._write(texts, progress), strict=True)]

    def _write(self, texts: "Sequence[Text]", progress: Progress | None) -> "list[Written | GatewiseError]":
        return write(
            self.model,
            self.tokenizer,
            [prompt(one.text, one.language) for one in texts],
            [Course(**self.course_of(one)) for one in texts] if self.constrained else None,
            template=self.template,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            progress=progress,
        )

    def course_of(self, one: "Text") -> dict[str, Any]:
        """The arguments of a text's :class:`Course`, as JSON has them."""
        return {"language": one.language, "within": one.text if self.verbatim else None}

    def _tree(self, one: "Text", output: "Written | GatewiseError") -> Extraction | GatewiseError:
        if isinstance(output, GatewiseError):
            return output
        tree, notes = parse_lenient(output.text)
        if output.hurried and output.ended:
            notes = ("the output was brought to a close before its end: allow more new tokens", *notes)
        elif not output.ended:
            notes = ("the output ended before it was whole: allow more new tokens", *notes)
        if tree is None and not self.constrained:
            reason = notes[-1].removeprefix("no tree: ")
            return GatewiseError(
                f"what the model wrote is no tree ({reason}): train the model longer, or let its writing be constrained"
            )
        if tree is None:
            notes = (*notes[:-1], "nothing was found before the tokens ran out")
            tree = DecisionTree.from_preorder(_EMPTY_LEAF)
        return Extraction(one.text, tree, one.language, absent_triples(one.text, tree), notes, output.text, self.made_with())


def extract(
    model: Any, tokenizer: PreTrainedTokenizerBase, text: str, *, language: Language | None = None, **settings: Any
) -> Extraction:
    """The tree of one text.

    Args:
        text: "population@passage"; without an "@" all of it is the passage.
        language: None finds it out.
        settings: attributes of :class:`Extractor`, such as ``verbatim=True``.

    Raises:
        GatewiseError: the text is empty, too long, or in neither English nor Chinese; what was written is no tree (only without
            constraint); or the settings contradict each other.
    """
    found = Extractor(model, tokenizer, **settings)([text], language=language)[0]
    if isinstance(found, GatewiseError):
        raise found
    return found


# ---- texts ----


class Text(NamedTuple):
    """A text that can be read, and its language."""

    text: str
    language: Language


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


def extract_sound(
    texts: Sequence[Text | GatewiseError], run: Callable[[list[Text]], Sequence[Extraction | GatewiseError]]
) -> list[Extraction | GatewiseError]:
    """Runs on the texts that can be read; what is wrong with the others stays in its place."""
    found = iter(run([one for one in texts if isinstance(one, Text)]))
    return [next(found) if isinstance(one, Text) else one for one in texts]


# ---- writing ----


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    Attributes:
        ended: it came to its end by itself; otherwise the tokens ran out, and a piece that was not whole is left out.
        hurried: the constraint brought it to a close because tokens were running out.
    """

    text: str
    ended: bool = True
    hurried: bool = False


def write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    courses: Sequence[Course] | None = None,
    *,
    template: Template,
    max_new_tokens: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Written | GatewiseError]:
    """What the model writes after each prompt, the most probable tokens.

    Args:
        courses: what may be written after each prompt; None leaves it free.
        template: how a prompt, as the row's ``source``, was written in training.

    Returns:
        For each prompt what was written, or why it could not be: a prompt that is too long, or a course that leads nowhere, does
        not stop the others.

    Raises:
        GatewiseError: the template does not show ``{source}``, or the constraint cannot be had.
    """
    if not prompts:
        return []
    if "{source}" not in template.prompt:
        raise GatewiseError(
            f"the adapter's prompt is {template.prompt!r}, without {{source}}: expected one that was trained on rows from"
            " `gatewise mdt prepare`"
        )
    if not (ends := end_ids(model, tokenizer)):
        raise GatewiseError("the tokenizer has no end-of-text token (eos_token), with which a tree has to end")
    rows = Records("generation", [{"source": text, "target": "D"} for text in prompts], None, "the prompts")
    ids = prompt_ids(rows, tokenizer, template, [2**40] * len(prompts), 2**40)
    positions = most_positions(model)
    written: list[Any] = [
        GatewiseError(
            f"the passage takes {len(row)} tokens of the {positions} that the model can read and write: give a shorter one"
        )
        if positions - len(row) < _LEAST_ROOM
        else None
        for row in ids
    ]
    order = sorted((i for i, fault in enumerate(written) if fault is None), key=lambda i: -len(ids[i]))
    with measuring(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = len(ids[batch[0]])
            most = min(max_new_tokens, positions - longest)
            constraint = None
            if courses is not None:
                own = [courses[i] for i in batch]
                constraint = TreeConstraint(tokenizer, own, ends=ends, prompt_tokens=longest, max_new_tokens=most)
            found = generate_ids(model, tokenizer, [ids[i] for i in batch], most, constraint)
            if constraint is not None:
                constraint.read(found)
                made = [row.fault or Written(row.course.written, row.course.finished, row.hurried) for row in constraint.rows]
            else:
                made = [_read_freely(tokens, tokenizer, ends) for tokens in found.tolist()]
            for i, one in zip(batch, made, strict=True):
                written[i] = one
            if progress:
                progress(start + len(batch), len(order))
    return written


def _read_freely(tokens: list[int], tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> Written:
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    return Written(str(tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip(), end is not None)


def _refuse_chain_of_thought(model: Any, tokenizer: PreTrainedTokenizerBase, template: Template, adapter: str | Path) -> None:
    """An adapter that learnt to write triples first would be forced into trees that it never learnt to write.

    Raises:
        GatewiseError: left to itself, that is how it begins.
    """
    most = len(tokenizer(" triples:", add_special_tokens=False)["input_ids"])
    (begun,) = write(model, tokenizer, [prompt("adults@For a flare, give rest.", "en")], template=template, max_new_tokens=most)
    if isinstance(begun, Written) and begun.text.startswith("triples:"):
        raise GatewiseError(
            f"{adapter} was trained to write a chain of thought (level 1 or 2), which is no longer read: train it anew on rows of"
            " `gatewise mdt prepare`"
        )


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
    folder = Path(model).expanduser()
    if re.fullmatch(r"\w[\w.-]*(?:/\w[\w.-]*)?", str(model)) and not folder.exists():
        return str(model)
    return str(writable(re.split(r"[/\\]", str(folder.resolve()))[-1]))  # a name of another encoding than UTF-8 is in no file


# ---- how good its trees are ----


def measure(
    extractor: Extracts, records: Sequence[TreeRecord], progress: Progress | None = None, *, mistakes: bool = False
) -> dict[str, Any]:
    """The metrics of an extractor on gold records. What fails counts as nothing found.

    Args:
        mistakes: count them by kind, too, see :mod:`gatewise_mdt.evaluation.mistakes`.

    Returns:
        Metrics by name, with ``n``, the number of records, ``failed``, for how many of them nothing could be read, and
        ``intervals``, see :mod:`gatewise_mdt.evaluation.intervals`; with ``mistakes``, also what
        :func:`gatewise_mdt.count_mistakes` counts.

    Raises:
        GatewiseError: there are no records.
    """
    if not records:
        raise GatewiseError("there are no gold trees, expected at least one")
    # A tree without a triple names no relation, and so has no language of its own: as in training, its text says it.
    languages = [record.tree.language if record.tree.triples else None for record in records]
    found = extractor([record.text for record in records], language=languages, progress=progress)
    trees: list[Any] = [one.tree if isinstance(one, Extraction) else [] for one in found]
    gold = [record.tree for record in records]
    counts = count_trees(gold, trees)
    failed = sum(isinstance(one, GatewiseError) for one in found)
    metrics = {**metrics_of(counts).to_json(), "failed": failed, "intervals": intervals(counts)}
    return {**metrics, "mistakes": count_mistakes(gold, trees)} if mistakes else metrics
