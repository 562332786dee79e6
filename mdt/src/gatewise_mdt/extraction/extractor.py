"""From a text to its decision tree with a causal model: end to end, or in the three stages of the pipeline.

    extractor = Extractor.load("runs/mdt-pi-lora/adapter")
    found = extractor(["adults with gout@For an acute flare, give colchicine."])[0]
    print(found.tree.to_outline(), found.absent, found.warnings)

End to end, one output holds the tree, after triples and nodes if the adapter was trained at chain-of-thought level 1 or 2 (Zhu et
al., arXiv 2401.02034). The pipeline asks for triples, nodes and tree in turn, each with a prompt of its own. Prompts, text form and
parser are the same. What is extracted needs review by a clinician.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from gatewise.checks import HALF_A_PAIR, has_half_a_pair, writable
from gatewise.errors import GatewiseError
from gatewise.tasks.encoding import Template
from gatewise_mdt.documents.language import detect_language
from gatewise_mdt.evaluation.metrics import tree_edit_ratio
from gatewise_mdt.extraction.constraint import check_available
from gatewise_mdt.extraction.course import Course
from gatewise_mdt.extraction.prompts import Stage, parted, prompt
from gatewise_mdt.extraction.writing import Written, write
from gatewise_mdt.formats.lines import LEVELS, Level, Parsed, node_lines, parse_lenient, triple_lines
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.relations import Language, check_language
from gatewise_mdt.spans import TripleSpans, absent_triples, locate_tree
from gatewise_mdt.tree import DecisionTree, Node, Triple

Progress = Callable[[str, int, int], None]
_Found = TypeVar("_Found")
PLAIN = Template("{source}")
DOUBTFUL = 0.85
"""Below this agreement, that of about half of all texts, next to no tree is right (``mdt/benchmarks/mdt_candidates.py``)."""
_NOTHING = DecisionTree.from_preorder([{"role": "D", "triples": [], "logical_rel": "null"}])


@dataclass(frozen=True)
class Extraction:
    """A text and what was found in it. Needs review by a clinician.

    Attributes:
        text: as it was given, "population@passage".
        absent: the triples whose subject or object does not stand in the text.
        warnings: what was put right or left out in the model's output, and that candidates differ much, a sentence each.
        written: what the model wrote, as it wrote it; in the pipeline one text a stage.
        agreement: of several candidates how alike the others are to the one that was kept, in [0, 1], 1 for all the same; None
            where there was but one.
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
    written: tuple[str, ...] = ()
    agreement: float | None = None
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
        if self.agreement is not None:
            said["agreement"] = round(self.agreement, 3)
        if self.confidence is not None:
            said["confidence"] = [one if one is None else round(one, 3) for one in self.confidence]
        if self.made_with is not None:
            said["extraction"] = dict(self.made_with)
        return TreeRecord(self.text, self.tree, number, {**(more or {}), **said})


class Extracts(Protocol):
    """What gives trees of texts: :class:`Extractor`, which writes them, or ``pointing.extractor.PointingExtractor``.

    Attributes:
        batch_size: texts at once.
        candidates: trees that are made for a text.
        most_tokens: that are written for a text at most, one after another; 0 where nothing is written.
        model: what is run, and ``stage_models`` what else is.
    """

    @property
    def batch_size(self) -> int: ...
    @property
    def candidates(self) -> int: ...
    @property
    def most_tokens(self) -> int: ...
    @property
    def model(self) -> Any: ...
    @property
    def stage_models(self) -> Mapping[Any, Any]: ...

    def __call__(
        self,
        texts: Sequence[str],
        *,
        language: Language | Sequence[Language | None] | None = None,
        progress: Progress | None = None,
    ) -> "list[Extraction | GatewiseError]":
        """The tree of each text, or why there is none."""
        ...

    def triples(self, asked: "Sequence[Asked]", progress: Progress | None = None) -> "list[Asked | GatewiseError]":
        """The triples of each text."""
        ...

    def nodes(self, asked: "Sequence[Asked]", progress: Progress | None = None) -> "list[Asked | GatewiseError]":
        """The nodes of each text with triples."""
        ...

    def trees(self, asked: "Sequence[Asked]", progress: Progress | None = None) -> "list[Extraction | GatewiseError]":
        """The tree of each text with nodes."""
        ...


@dataclass(frozen=True)
class Extractor:
    """A model and how it is asked.

    Attributes:
        template: how prompts were written in training; the adapter's note has it.
        level: the chain-of-thought level; None leaves it to the model, which begins as it was trained to.
        pipeline: ask for triples, nodes and tree in turn.
        constrained: allow only tokens with which the output becomes a valid tree (needs the extra ``mdt``).
        verbatim: with ``constrained``, allow only subjects and objects that are whole words of the text.
        candidates: how many trees are written for a text, the first of the most probable tokens and the others drawn; kept is the
            one most like the others (:func:`most_alike`).
        temperature, seed: of the draws.
        max_new_tokens: the most that is written in one output.
        stage_models: of stages of the pipeline, where they differ from ``model``; of the same tokenizer.
        base, adapter: what the model is, for :attr:`Extraction.made_with`: the base's hub id or folder, and "name" and "sha256" of
            the adapter. :meth:`load` knows them; without a base, the one that the model names.

    Raises:
        GatewiseError: the settings contradict each other, or llguidance is missing.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: Template = PLAIN
    level: Level | None = None
    pipeline: bool = False
    constrained: bool = True
    verbatim: bool = False
    candidates: int = 1
    temperature: float = 0.7
    seed: int = 0
    max_new_tokens: int = 512
    batch_size: int = 8
    stage_models: Mapping[Stage, Any] = field(default_factory=dict)
    base: str = ""
    adapter: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.level not in (None, *LEVELS):
            raise GatewiseError(f"the level is {self.level!r}: expected 0 (tree), 1 (triples, tree) or 2 (triples, nodes, tree)")
        if self.level is not None and self.pipeline:
            raise GatewiseError("a level was given with the pipeline, which has no levels: leave one of the two out")
        if self.verbatim and not self.constrained:
            raise GatewiseError("verbatim phrases were asked for without constraint: leave one of the two out")
        for name in ("max_new_tokens", "batch_size", "candidates"):
            if (number := getattr(self, name)) < 1:
                raise GatewiseError(f"{name} is {number}: expected at least 1")
        if self.candidates == 2:
            raise GatewiseError("candidates is 2, of which neither is more like the others: expected 1, or at least 3")
        if self.candidates > 1 and self.pipeline:
            raise GatewiseError("several candidates were asked for with the pipeline, which writes one: leave one of the two out")
        if not 0 < self.temperature < math.inf:
            raise GatewiseError(f"temperature is {self.temperature}: expected a number above 0, such as 0.7")
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
            GatewiseError: the adapter or its base cannot be read, or the settings contradict each other.
        """
        from gatewise.adapters.files import read_note
        from gatewise.adapters.loading import load_as_trained

        if settings.get("constrained", True):
            check_available()
        note = read_note(Path(adapter))
        if note.get("task", "causal") != "causal":
            what = "points at the text" if note["task"] == "text2mdt" else "is a classifier"
            raise GatewiseError(f"{adapter} {what}: expected an adapter that was trained to write trees")
        model, tokenizer, loaded = load_as_trained(adapter, base=base, device=device, say=say)
        known = {"base": loaded, "adapter": named(adapter)}
        return cls(model, tokenizer, Template(note.get("template") or PLAIN.prompt), **{**known, **settings})

    @property
    def most_tokens(self) -> int:
        """That are written for a text at most, one after another: the first candidate is written alone, the others together."""
        return self.max_new_tokens * (1 if self.candidates == 1 else 2)

    def made_with(self) -> dict[str, Any]:
        """What a tree is made with that is written now, see :attr:`Extraction.made_with`."""
        return made_with(self.model, self.base, self.adapter, self._told())

    def _told(self) -> dict[str, Any]:
        names = ("level", "pipeline", "constrained", "verbatim", "candidates", "max_new_tokens")
        drawn = ("temperature", "seed") if self.candidates > 1 else ()
        return {name: getattr(self, name) for name in (*names, *drawn)}

    def __call__(
        self,
        texts: Sequence[str],
        *,
        language: Language | Sequence[Language | None] | None = None,
        progress: Progress | None = None,
    ) -> list[Extraction | GatewiseError]:
        """The tree of each text, or why there is none: a text with a fault does not stop the others.

        Args:
            texts: "population@passage"; without an "@" all of it is the passage.
            language: of all texts, or one for each; None finds it out for each.
            progress: called with what is written now, how many texts are done, and how many there are.

        Raises:
            GatewiseError: something is wrong that is no single text's fault.
        """
        asked = as_asked(texts, language)
        if not self.pipeline:
            return each(asked, lambda sound: self._whole(sound, progress))
        listed = each(asked, lambda sound: self.triples(sound, progress))
        grouped = each(listed, lambda sound: self.nodes(sound, progress))
        return each(grouped, lambda sound: self.trees(sound, progress))

    # ---- the ways to a tree ----

    def _whole(self, asked: "Sequence[Asked]", progress: Progress | None) -> list[Extraction | GatewiseError]:
        found = self.several(asked, self.candidates, progress)
        return [one[0] if self.candidates == 1 else _kept(one) for one in found]

    def several(
        self, asked: "Sequence[Asked]", count: int, progress: Progress | None = None
    ) -> list[list[Extraction | GatewiseError]]:
        """So many trees of each text: the first of the most probable tokens, the others drawn."""
        outputs = self._write(asked, None, progress)
        first = [self._tree(one, output, _text(output)) for one, output in zip(asked, outputs, strict=True)]
        more = count - 1
        if not more:
            return [[one] for one in first]
        repeated = [one for one in asked for _ in range(more)]
        drawn = [self._tree(one, out, _text(out)) for one, out in zip(repeated, self._draw(repeated, progress), strict=True)]
        return [[one, *drawn[i * more : (i + 1) * more]] for i, one in enumerate(first)]

    def _draw(self, asked: "Sequence[Asked]", progress: Progress | None) -> list[Written | GatewiseError]:
        """Like ``_write``, each token drawn; leaves the caller's random numbers as they were."""
        import torch

        from gatewise.models.device import random_state_kept

        with random_state_kept(next(self.model.parameters()).device):
            torch.manual_seed(self.seed)
            return self._write(asked, None, progress, self.temperature)

    def triples(self, asked: "Sequence[Asked]", progress: Progress | None = None) -> "list[Asked | GatewiseError]":
        """The first stage of the pipeline for each text: its triples. A text's fault is given back in its place."""
        found: list[Asked | GatewiseError] = []
        for one, output in zip(asked, self._write(asked, "triples", progress), strict=True):
            parsed = parse_lenient(f"triples:\n{_text(output)}")
            found.append(_known(one, output, parsed, triples=parsed.triples))
        return found

    def nodes(self, asked: "Sequence[Asked]", progress: Progress | None = None) -> "list[Asked | GatewiseError]":
        """The second stage for each text with triples: its nodes."""
        found: list[Asked | GatewiseError] = []
        for one, output in zip(asked, self._write(asked, "nodes", progress), strict=True):
            parsed = parse_lenient("\n".join(["triples:", *triple_lines(one.triples), "nodes:", _text(output)]))
            found.append(_known(one, output, parsed, nodes=parsed.nodes))
        return found

    def trees(self, asked: "Sequence[Asked]", progress: Progress | None = None) -> list[Extraction | GatewiseError]:
        """The third stage for each text with nodes: its tree."""
        outputs = self._write(asked, "tree", progress)
        heads = ["\n".join(["nodes:", *node_lines(one.nodes), "tree:\n"]) for one in asked]
        return [self._tree(one, output, head + _text(output)) for one, output, head in zip(asked, outputs, heads, strict=True)]

    def _write(
        self, asked: "Sequence[Asked]", stage: Stage | None, progress: Progress | None, temperature: float | None = None
    ) -> list[Written | GatewiseError]:
        prompts = [prompt(one.text, one.language, stage, triples=one.triples, nodes=one.nodes) for one in asked]
        courses = [Course(**self._course(one, stage)) for one in asked] if self.constrained else None
        what = {None: "trees", "triples": "triples", "nodes": "nodes", "tree": "trees"}[stage]
        return write(
            self.stage_models.get(stage, self.model) if stage else self.model,
            self.tokenizer,
            prompts,
            courses,
            template=self.template,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            temperature=temperature,
            progress=(lambda done, total: progress(what, done, total)) if progress else None,
        )

    def _course(self, one: "Asked", stage: Stage | None) -> dict[str, Any]:
        """The arguments of its :class:`Course`, as JSON has them."""
        return {
            "language": one.language,
            "stage": stage,
            "levels": list(LEVELS if self.level is None else (self.level,)),
            "within": one.text if self.verbatim else None,
            "triples": len(one.triples),
            "roles": [node.role for node in one.nodes],
        }

    def _tree(self, one: "Asked", output: Written | GatewiseError, whole: str) -> Extraction | GatewiseError:
        """What an output holds; ``whole`` is the output with what it refers to."""
        if isinstance(output, GatewiseError):
            return output
        parsed = parse_lenient(whole)
        notes = [*one.warnings, *_haste(output), *parsed.notes]
        tree = parsed.tree
        if tree is None:
            reason = notes.pop().removeprefix("no tree: ")
            if not self.constrained:
                advice = "train the model longer, or let its writing be constrained"
                return GatewiseError(f"what the model wrote is no tree ({reason}): {advice}")
            notes.append("nothing was found before the tokens ran out")
            tree = _NOTHING
        if left := [node for node in one.nodes if node not in tree.nodes]:
            notes.append(f"{len(left)} of the {len(one.nodes)} nodes found have no place in the tree")
        absent, written = absent_triples(one.text, tree), (*one.written, output.text)
        return Extraction(one.text, tree, one.language, absent, tuple(notes), written, made_with=self.made_with())


@dataclass(frozen=True)
class Asked:
    """A text on its way through the pipeline, with what is known of it by now."""

    text: str
    language: Language
    triples: tuple[Triple, ...] = ()
    nodes: tuple[Node, ...] = ()
    warnings: tuple[str, ...] = ()
    written: tuple[str, ...] = ()


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


def _kept(candidates: Sequence[Extraction | GatewiseError]) -> Extraction | GatewiseError:
    """The candidate that is most like the others; what is no tree is like none."""
    trees = [one for one in candidates if isinstance(one, Extraction)]
    if not trees:
        return candidates[0]
    best, agreement = most_alike([one.tree for one in trees], len(candidates))
    doubts = []
    if len(trees) < len(candidates):
        doubts.append(
            f"{len(candidates) - len(trees)} of the {len(candidates)} outputs that were written for this text are no tree"
        )
    if agreement < DOUBTFUL:
        doubts.append(
            f"the {len(candidates)} outputs that were written for this text differ much: they agree by {agreement:.2f} of 1"
        )
    return replace(trees[best], agreement=agreement, warnings=(*trees[best].warnings, *doubts))


def as_asked(texts: Sequence[str], language: Language | Sequence[Language | None] | None) -> list[Asked | GatewiseError]:
    """Texts with their languages, or what is wrong with them; arguments and errors are those of :meth:`Extractor.__call__`."""
    languages = [language] * len(texts) if language is None or isinstance(language, str) else list(language)
    asked: list[Asked | GatewiseError] = []
    for text, its in zip(texts, languages, strict=True):
        if its is not None:
            check_language(its)
        try:
            _check_text(text)
            asked.append(Asked(text, its or detect_language(text)))
        except GatewiseError as error:
            asked.append(error)
    return asked


def each(
    states: Sequence[Asked | GatewiseError], run: Callable[[list[Asked]], Sequence[_Found | GatewiseError]]
) -> list[_Found | GatewiseError]:
    """A stage for all that have come so far; a fault stays in its place."""
    found = iter(run([one for one in states if isinstance(one, Asked)]))
    return [next(found) if isinstance(one, Asked) else one for one in states]


def _known(
    one: Asked,
    output: Written | GatewiseError,
    parsed: Parsed,
    *,
    triples: tuple[Triple, ...] | None = None,
    nodes: tuple[Node, ...] | None = None,
) -> Asked | GatewiseError:
    """A text with what a stage found in it."""
    if isinstance(output, GatewiseError):
        return output
    if not (triples or nodes):
        what = "triple" if nodes is None else "node"
        return GatewiseError(f"the model found no {what} in the text: give one that says what to do and when, or train it longer")
    # The lines after the stage's are still to come, so that the tree is missing says nothing.
    notes = tuple(note for note in parsed.notes if not note.startswith("no tree: "))
    return replace(
        one,
        triples=one.triples if triples is None else triples,
        nodes=nodes or (),
        warnings=(*one.warnings, *_haste(output), *notes),
        written=(*one.written, output.text),
    )


def made_with(model: Any, base: str, adapter: Mapping[str, str] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a tree is made with that is made now, see :attr:`Extraction.made_with`.

    Args:
        model: None where it is not in this process.
        base: the name of the base model; if it is empty, the one that the model names.
        settings: what the output depends on beside the models and the text.
    """
    from gatewise import __version__

    base = base or getattr(getattr(model, "config", None), "name_or_path", "")
    made: dict[str, Any] = {"base": _name_of(base)} if base else {}
    if adapter is not None:
        made["adapter"] = dict(adapter)
    weights = None if model is None else next((one for one in model.parameters() if one.is_floating_point()), None)
    where = {} if weights is None else {"dtype": str(weights.dtype).removeprefix("torch."), "device": weights.device.type}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**made, "gatewise": __version__, "settings": {**settings, **where}, "date": date}


def named(adapter: str | Path) -> dict[str, str]:
    """Which adapter it is, for :func:`made_with`: "name" and "sha256". Errors are those of ``fingerprint``."""
    from gatewise.adapters.files import fingerprint

    return {"name": _name_of(adapter), "sha256": fingerprint(adapter)}


def _name_of(model: str | Path) -> str:
    """A hub id as it is; of a folder its own name, as where it lies is nobody's business."""
    folder = Path(model).expanduser()
    if re.fullmatch(r"\w[\w.-]*(?:/\w[\w.-]*)?", str(model)) and not folder.exists():
        return str(model)
    return str(writable(re.split(r"[/\\]", str(folder.resolve()))[-1]))  # a name of another encoding than UTF-8 is in no file


def _haste(output: Written) -> list[str]:
    if output.hurried and output.ended:
        return ["the output was brought to a close before its end: allow more new tokens"]
    return [] if output.ended else ["the output ended before it was whole: allow more new tokens"]


def _text(output: Written | GatewiseError) -> str:
    return output.text if isinstance(output, Written) else ""


def _check_text(text: str) -> None:
    if not "".join(parted(text)):
        raise GatewiseError("the text is empty, expected a passage of a guideline in English or Chinese")
    if not parted(text)[1]:
        raise GatewiseError(f'the text {text[:60]!r} has a population before the "@" and no passage after it')
    if has_half_a_pair(text):
        raise GatewiseError(f"the text {HALF_A_PAIR}")


def most_alike(trees: Sequence[DecisionTree], candidates: int) -> tuple[int, float]:
    """Which tree has the least mean TER to the others, the first of equal ones; and its agreement, 1 less that mean, in [0, 1].

    The most probable tree is not the best one by a measure such as TER, but the one of the least expected distance to what the
    model holds possible: minimum Bayes risk decoding (Kumar and Byrne, NAACL 2004), here with TER over trees that were drawn. How
    alike they are says how sure the model is.

    Args:
        trees: at least one.
        candidates: how many were written, at least two; those that are no tree are like none.
    """
    # Most draws of a sure model are the same few trees, of which each pair is measured once.
    distinct = list(dict.fromkeys(trees))
    number = {tree: i for i, tree in enumerate(distinct)}
    distance = [[0.0] * len(distinct) for _ in distinct]
    for i in range(len(distinct)):
        for j in range(i):
            distance[i][j] = distance[j][i] = tree_edit_ratio(distinct[i], distinct[j])
    sums = [sum(distance[number[one]][number[other]] for other in trees) for one in trees]
    best = min(range(len(trees)), key=lambda i: sums[i])
    return best, (len(trees) - 1 - sums[best]) / (candidates - 1)
