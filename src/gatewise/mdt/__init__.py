"""From guideline text to medical decision trees (Text2MDT, arXiv 2401.02034): trees, files, metrics, and how people look at them.

    from gatewise import mdt

    record = mdt.sample()[0]
    print(record.tree.to_outline())
    mdt.write_view([record], "html", "tree.html")

Extraction from text (``Extractor``, ``extract``, ``extract_files``, ``measure``) brings torch and Transformers when it is first
asked for. Every tree, hand-written or extracted, needs review by a clinician.
"""

from typing import TYPE_CHECKING, Any

from gatewise.mdt.decide import Decision, Step, decide
from gatewise.mdt.linearise import linearise
from gatewise.mdt.metrics import TreeMetrics, evaluate, tree_edit_ratio
from gatewise.mdt.mistakes import Mistake, count_mistakes, mistakes
from gatewise.mdt.parse import Parsed, parse, parse_lenient
from gatewise.mdt.prompts import training_rows
from gatewise.mdt.records import TreeFile, TreeRecord, read_trees, write_trees
from gatewise.mdt.relations import RELATIONS, relation_in
from gatewise.mdt.samples import sample
from gatewise.mdt.spans import Span, TripleSpans, in_text_order, locate, locate_tree
from gatewise.mdt.swapping import swapped_copies
from gatewise.mdt.tree import DecisionTree, Node, Path, Triple
from gatewise.mdt.views import render, write_view

if TYPE_CHECKING:
    from gatewise.mdt.batch import extract_files
    from gatewise.mdt.extraction import Extraction, Extractor, extract
    from gatewise.mdt.steps import measure

__all__ = [
    "RELATIONS",
    "Decision",
    "DecisionTree",
    "Extraction",
    "Extractor",
    "Mistake",
    "Node",
    "Parsed",
    "Path",
    "Span",
    "Step",
    "TreeFile",
    "TreeMetrics",
    "TreeRecord",
    "Triple",
    "TripleSpans",
    "count_mistakes",
    "decide",
    "evaluate",
    "extract",
    "extract_files",
    "in_text_order",
    "linearise",
    "locate",
    "locate_tree",
    "measure",
    "mistakes",
    "parse",
    "parse_lenient",
    "read_trees",
    "relation_in",
    "render",
    "sample",
    "swapped_copies",
    "training_rows",
    "tree_edit_ratio",
    "write_trees",
    "write_view",
]

_LAZY = {
    "Extraction": "extraction",
    "Extractor": "extraction",
    "extract": "extraction",
    "extract_files": "batch",
    "measure": "steps",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"gatewise.mdt.{_LAZY[name]}"), name)
