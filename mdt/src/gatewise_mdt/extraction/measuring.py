"""How well each stage of the pipeline does alone: from gold input, so that one stage's mistakes are not counted in the next.

| stage     | given                | measured                                                    |
|-----------|----------------------|-------------------------------------------------------------|
| `triples` | the text             | triplet precision, recall, F1                               |
| `nodes`   | text, gold triples   | node precision, recall, F1                                  |
| `tree`    | text, gold nodes     | all metrics of :mod:`gatewise_mdt.evaluation.metrics`                  |
"""

from collections.abc import Sequence
from typing import Any

from gatewise.errors import GatewiseError
from gatewise_mdt.evaluation.intervals import intervals
from gatewise_mdt.evaluation.metrics import count_sets, count_trees, metrics_of, rates
from gatewise_mdt.evaluation.mistakes import count_mistakes
from gatewise_mdt.extraction.extractor import Asked, Extraction, Extracts, Progress
from gatewise_mdt.extraction.prompts import STAGES, Stage, nodes_in_order
from gatewise_mdt.formats.lines import triples_in_order
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.tree import Node, Triple


def measure(
    extractor: Extracts,
    records: Sequence[TreeRecord],
    stage: Stage | None = None,
    progress: Progress | None = None,
    *,
    mistakes: bool = False,
) -> dict[str, Any]:
    """The metrics of a stage on gold records, or of the whole way from text to tree. What fails counts as nothing found.

    Args:
        stage: of the pipeline; None for the whole way, end to end or through the pipeline as the extractor says.
        mistakes: count them by kind, too, see :mod:`gatewise_mdt.evaluation.mistakes`; not with the first two stages, which make
            no trees.

    Returns:
        Metrics by name, with ``n``, the number of records, ``failed``, for how many of them nothing could be read, and
        ``intervals``, see :mod:`gatewise_mdt.evaluation.intervals`; with ``mistakes``, also what
        :func:`gatewise_mdt.count_mistakes` counts.

    Raises:
        GatewiseError: there are no records, or none with a triple; the stage is unknown, makes no trees whose mistakes could be
            counted, or was given with several candidates.
    """
    if stage is not None and stage not in STAGES:
        raise GatewiseError(f"the stage is {stage!r}: expected one of {', '.join(STAGES)}")
    if mistakes and stage in ("triples", "nodes"):
        raise GatewiseError(f"mistakes by kind were asked for of stage {stage}, which makes no trees: leave one of the two out")
    if stage is not None and extractor.candidates > 1:
        raise GatewiseError(f"several candidates were asked for of stage {stage}, which writes one: leave one of the two out")
    if not records:
        raise GatewiseError("there are no gold trees, expected at least one")
    if stage is None:
        # A tree without a triple names no relation, and so has no language of its own: as in training, its text says it.
        languages = [record.tree.language if record.tree.triples else None for record in records]
        found = extractor([record.text for record in records], language=languages, progress=progress)
        return _of_trees(records, found, mistakes)
    # The first two stages have nothing to do for a tree without a triple, and the third has nothing to put together.
    used = [record for record in records if record.tree.triples]
    if not used:
        raise GatewiseError("no gold tree has a triple, expected at least one that has")
    asked = [
        Asked(
            record.text,
            record.tree.language,
            tuple(triples_in_order(record.text, record.tree)) if stage == "nodes" else (),
            tuple(nodes_in_order(record.text, record.tree)) if stage == "tree" else (),
        )
        for record in used
    ]
    if stage == "tree":
        return _of_trees(used, extractor.trees(asked, progress), mistakes)
    run = extractor.triples if stage == "triples" else extractor.nodes
    results = run(asked, progress)
    sound = [one if isinstance(one, Asked) else Asked("", "en") for one in results]
    if stage == "triples":
        wanted = [set(map(_plain, record.tree.triples)) for record in used]
        counts = count_sets("triplet", wanted, [set(map(_plain, one.triples)) for one in sound])
    else:
        gold = [{_plain_node(node) for node in record.tree.nodes if not node.is_empty} for record in used]
        counts = count_sets("node", gold, [{_plain_node(node) for node in one.nodes} for one in sound])
    made = {name: float(value) for name, value in rates({name: column.sum() for name, column in counts.items()}).items()}
    failed = sum(isinstance(one, GatewiseError) for one in results)
    return {**made, "n": len(used), "failed": failed, "intervals": intervals(counts)}


def _of_trees(records: Sequence[TreeRecord], found: Sequence[Extraction | GatewiseError], mistakes: bool) -> dict[str, Any]:
    trees: list[Any] = [one.tree if isinstance(one, Extraction) else [] for one in found]
    gold = [record.tree for record in records]
    counts = count_trees(gold, trees)
    failed = sum(isinstance(one, GatewiseError) for one in found)
    metrics = {**metrics_of(counts).to_json(), "failed": failed, "intervals": intervals(counts)}
    return {**metrics, "mistakes": count_mistakes(gold, trees)} if mistakes else metrics


def _plain(triple: Triple) -> tuple[str, ...]:
    return tuple(part.strip().lower() for part in triple)


def _plain_node(node: Node) -> tuple[str, str, frozenset[tuple[str, ...]]]:
    return node.role, node.logical_rel, frozenset(map(_plain, node.triples))
