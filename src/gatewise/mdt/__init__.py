"""From guideline text to medical decision trees (Text2MDT, arXiv 2401.02034): trees, files, metrics, and how people look at them.

    from gatewise import mdt

    record = mdt.sample()[0]
    print(record.tree.to_outline())
    mdt.write_view([record], "html", "tree.html")

Every tree, hand-written or extracted, needs review by a clinician.
"""

from gatewise.mdt.decide import Decision, Step, decide
from gatewise.mdt.linearise import linearise
from gatewise.mdt.metrics import TreeMetrics, evaluate, tree_edit_ratio
from gatewise.mdt.parse import Parsed, parse, parse_lenient
from gatewise.mdt.records import TreeFile, TreeRecord, read_trees, write_trees
from gatewise.mdt.relations import RELATIONS, relation_in
from gatewise.mdt.samples import sample
from gatewise.mdt.spans import Span, TripleSpans, in_text_order, locate, locate_tree
from gatewise.mdt.tree import DecisionTree, Node, Path, Triple
from gatewise.mdt.views import render, write_view

__all__ = [
    "RELATIONS",
    "Decision",
    "DecisionTree",
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
    "decide",
    "evaluate",
    "in_text_order",
    "linearise",
    "locate",
    "locate_tree",
    "parse",
    "parse_lenient",
    "read_trees",
    "relation_in",
    "render",
    "sample",
    "tree_edit_ratio",
    "write_trees",
    "write_view",
]
