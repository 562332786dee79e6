"""From guideline text to medical decision trees (Text2MDT, arXiv 2401.02034), and what people do with them.

    import gatewise_mdt as mdt

    record = mdt.sample()[0]
    print(record.tree.to_outline())
    mdt.write_view([record], "html", "tree.html")

At the top lie what every room needs: ``tree`` with its rules (``checks``) and relations, files of texts with trees
(``records``), where the phrases of a tree stand in its text (``spans``), and how the trees of a guideline make one ``pathway``.

| room          | its story                                                                              |
|---------------|----------------------------------------------------------------------------------------|
| ``checking``  | what of its text a tree has lost or turned round                                       |
| ``formats``   | a tree becomes the lines that a model writes, and is read back; and what people look at and hand on |
| ``documents`` | a guideline becomes passages                                                           |
| ``evaluation``| trees against trees                                                                    |
| ``extraction``| a passage becomes a tree                                                               |
| ``training``  | trees become rows to train on                                                          |
| ``pointing``  | the same with a model that points at the text: its heads, training and extractor        |
| ``review``    | a person corrects and approves trees                                                   |
| ``commands``  | ``gatewise mdt``                                                                       |

Each word has one meaning, in code, messages and documentation. A *passage* is a piece of a document with its population; a
*record* is a passage with its tree in a file. A *turn* is a condition with the answer taken there, an *edit* a change of a tree
in a review, which makes a new *version* of the passage; the *history* has them all. A *fault*
is what is wrong with something that was given (a document, a file, a tree), a *mistake* is where a prediction differs from the
gold tree. An *item* is something of its text that a tree seems to have lost or turned round. A *note* says what was put right or
left out of what was read, a *warning* what has to be known of an extraction.

Names are imported when first used. Every tree, hand-written or extracted, needs review by a clinician.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewise_mdt.checking.items import Item, items
    from gatewise_mdt.checking.ticks import open_items
    from gatewise_mdt.evaluation.agreement import Agreement, agree
    from gatewise_mdt.evaluation.differences import Difference, differences
    from gatewise_mdt.evaluation.metrics import TreeMetrics, evaluate
    from gatewise_mdt.evaluation.mistakes import Mistake, count_mistakes, mistakes
    from gatewise_mdt.extraction.extractor import Extraction, Extractor, measure
    from gatewise_mdt.formats.lines import Parsed, linearise, parse, parse_lenient
    from gatewise_mdt.formats.views import render, write_view
    from gatewise_mdt.formats.vignettes import Patient, Vignette, vignettes
    from gatewise_mdt.pathway import Link, Pathway, PathwayDecision, propose_links, read_links, write_links
    from gatewise_mdt.pointing.extractor import PointingExtractor, load_extractor
    from gatewise_mdt.records import TreeFile, TreeRecord, read_trees, write_trees
    from gatewise_mdt.relations import RELATIONS, relation_in
    from gatewise_mdt.samples import sample
    from gatewise_mdt.spans import Span, TripleSpans, in_text_order, locate, locate_tree
    from gatewise_mdt.training.rows import training_rows
    from gatewise_mdt.training.swapping import swapped_copies
    from gatewise_mdt.tree import Decision, DecisionTree, Node, Triple, Turn

__version__ = "0.1.0"
# Module -> the public names in it.
_HOME = {
    "checking.items": ("Item", "items"),
    "checking.ticks": ("open_items",),
    "evaluation.agreement": ("Agreement", "agree"),
    "evaluation.differences": ("Difference", "differences"),
    "evaluation.metrics": ("TreeMetrics", "evaluate"),
    "evaluation.mistakes": ("Mistake", "count_mistakes", "mistakes"),
    "extraction.extractor": ("Extraction", "Extractor", "measure"),
    "formats.lines": ("Parsed", "linearise", "parse", "parse_lenient"),
    "formats.views": ("render", "write_view"),
    "formats.vignettes": ("Patient", "Vignette", "vignettes"),
    "pathway": ("Link", "Pathway", "PathwayDecision", "propose_links", "read_links", "write_links"),
    "pointing.extractor": ("PointingExtractor", "load_extractor"),
    "records": ("TreeFile", "TreeRecord", "read_trees", "write_trees"),
    "relations": ("RELATIONS", "relation_in"),
    "samples": ("sample",),
    "spans": ("Span", "TripleSpans", "in_text_order", "locate", "locate_tree"),
    "training.rows": ("training_rows",),
    "training.swapping": ("swapped_copies",),
    "tree": ("Decision", "DecisionTree", "Node", "Triple", "Turn"),
}
__all__ = [
    "RELATIONS",
    "Agreement",
    "Decision",
    "DecisionTree",
    "Difference",
    "Extraction",
    "Extractor",
    "Item",
    "Link",
    "Mistake",
    "Node",
    "Parsed",
    "Pathway",
    "PathwayDecision",
    "Patient",
    "PointingExtractor",
    "Span",
    "TreeFile",
    "TreeMetrics",
    "TreeRecord",
    "Triple",
    "TripleSpans",
    "Turn",
    "Vignette",
    "agree",
    "count_mistakes",
    "differences",
    "evaluate",
    "in_text_order",
    "items",
    "linearise",
    "load_extractor",
    "locate",
    "locate_tree",
    "measure",
    "mistakes",
    "open_items",
    "parse",
    "parse_lenient",
    "propose_links",
    "read_links",
    "read_trees",
    "relation_in",
    "render",
    "sample",
    "swapped_copies",
    "training_rows",
    "vignettes",
    "write_links",
    "write_trees",
    "write_view",
]


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _HOME.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"gatewise_mdt.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
