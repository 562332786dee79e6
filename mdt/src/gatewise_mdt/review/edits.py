"""The edits that correct a tree, on plain nodes in pre-order, and what is still wrong with it.

Every edit keeps the tree whole: each condition has two children, each decision none. A node may be unfinished meanwhile, with an
empty phrase or no triple; :func:`fault_of` says so, by the rules of :mod:`gatewise_mdt.checks` and no others.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gatewise.checks import is_whole
from gatewise.errors import GatewiseError
from gatewise_mdt import checks
from gatewise_mdt.relations import Language, relation_in
from gatewise_mdt.tree import DecisionTree, Node, Triple

Nodes = list[dict[str, Any]]

BLANK = "…"  # stands for an empty phrase in a drawing


# fmt: off
EDITS = (
    "join", "set_triple", "add_triple", "remove_triple", "to_condition", "to_decision", "delete", "swap", "keep_branch",
    "put_above",
)
# fmt: on


class Fault(NamedTuple):
    """What is wrong with a tree, and at which node (from 0); None where it is no single node's fault."""

    node: int | None
    message: str


def empty_tree() -> Nodes:
    """The tree to begin with by hand: it recommends nothing."""
    return [{"role": "D", "triples": [], "logical_rel": "null"}]


def fault_of(nodes: Nodes) -> Fault | None:
    """The first thing that keeps nodes from being a tree; None for a valid one."""
    try:
        checks.tree_parts(nodes)
    except checks.TreeError as fault:
        return Fault(None if fault.node is None else fault.node - 1, fault.message)
    return None


def drawable(nodes: Nodes) -> DecisionTree:
    """A tree to draw, unchecked: its nodes may be unfinished."""
    made = []
    for node in nodes:
        triples = tuple(Triple(s.strip() or BLANK, relation, o.strip() or BLANK) for s, relation, o in node["triples"])
        made.append(Node(node["role"], triples, node["logical_rel"]))
    return DecisionTree(tuple(made))


def check_shape(nodes: Any) -> Nodes:
    """Nodes that come from a file, if they can be worked on: whole as a tree, though nodes may be unfinished.

    Raises:
        GatewiseError: they cannot.
    """
    try:
        checked = checks.tree_parts(nodes, unfinished=True)
    except checks.TreeError as fault:
        raise GatewiseError(str(fault)) from None
    return [
        {"role": role, "triples": [list(triple) for triple in triples], "logical_rel": logical_rel}
        for role, triples, logical_rel in checked
    ]


def apply(nodes: Nodes, edit: str, arguments: Mapping[str, Any], language: Language = "en") -> Nodes:
    """The nodes after an edit; the given ones stay as they are. Those that it does not change are the very objects that were given,
    wherever they stand now.

    Args:
        edit: one of ``EDITS``.
        arguments: ``node`` (from 0), and what the edit takes besides: ``triple`` (from 0), its ``parts``, ``join`` or ``side``.
        language: of the relation that a new triple begins with.

    Raises:
        GatewiseError: there is no such edit or node, or an argument does not fit.
    """
    at = _number(arguments, "node", len(nodes), "node")
    old, before, end = nodes[at], nodes[:at], subtree_end(nodes, at)
    own = {**old, "triples": [list(triple) for triple in old["triples"]]}  # the only one that an edit writes into
    here = [own, *nodes[at + 1 : end]]  # what comes into the place of the node and of all that hangs on it
    match edit:
        case "join":
            own["logical_rel"] = _one_of(arguments, "join", ("and", "or"))
        case "set_triple":
            number = _number(arguments, "triple", len(own["triples"]), "triple")
            own["triples"][number] = _some_parts(own["triples"][number], arguments.get("parts"))
        case "add_triple":
            own["triples"].append(_new_triple(own, arguments.get("parts") or ["", "", ""], language))
        case "remove_triple":
            del own["triples"][_number(arguments, "triple", len(own["triples"]), "triple")]
        case "to_condition":  # a decision becomes one over two empty leaves
            here = here if own["role"] == "C" else [own, *empty_tree(), *empty_tree()]
            own["role"] = "C"
        case "to_decision":  # what hung on it is gone
            own["role"] = "D"
            here = [own]
        case "delete":
            here = empty_tree()
        case "swap":
            yes, no = _branches(nodes, at)
            here = [own, *no, *yes]
        case "keep_branch":  # the condition goes, with its other branch
            yes, no = _branches(nodes, at)
            here = yes if _one_of(arguments, "side", ("true", "false")) == "true" else no
        case "put_above":  # a condition, still without triples, over the node and an empty leaf
            above = {"role": "C", "triples": [], "logical_rel": "null"}
            on_yes = _one_of(arguments, "side", ("true", "false")) == "true"
            here = [above, *here, *empty_tree()] if on_yes else [above, *empty_tree(), *here]
        case _:
            raise GatewiseError(f"the edit is {checks.shown(edit)}: expected one of {', '.join(EDITS)}")
    made = [*before, *here, *nodes[end:]]
    own["logical_rel"] = checks.fitting_join(own["logical_rel"], len(own["triples"]))
    return [old if node is own and own == old else node for node in made]


def subtree_end(nodes: Nodes, at: int) -> int:
    """The position behind a node and all that hangs on it."""
    waiting = 1
    while waiting:
        waiting += 1 if nodes[at]["role"] == "C" else -1
        at += 1
    return at


def _branches(nodes: Nodes, at: int) -> tuple[Nodes, Nodes]:
    if nodes[at]["role"] != "C":
        raise GatewiseError(f"node {at + 1} is a decision, which has no branches")
    no = subtree_end(nodes, at + 1)
    return nodes[at + 1 : no], nodes[no : subtree_end(nodes, no)]


# ---- arguments ----


def _number(arguments: Mapping[str, Any], name: str, count: int, what: str) -> int:
    value = arguments.get(name)
    if not is_whole(value) or not 0 <= value < count:
        raise GatewiseError(f"there is no {what} {checks.shown(value)}: the page may show an older tree, load it again")
    return value


def _one_of(arguments: Mapping[str, Any], name: str, values: tuple[str, str]) -> str:
    if arguments.get(name) not in values:
        raise GatewiseError(f'{name} is {checks.shown(arguments.get(name))}, expected "{values[0]}" or "{values[1]}"')
    return str(arguments[name])


def _some_parts(old: list[str], given: Any) -> list[str]:
    """The triple with those parts that were given; null leaves a part as it is, which another edit may just have set."""
    if isinstance(given, list) and len(given) == 3:
        given = [before if part is None else part for before, part in zip(old, given, strict=True)]
    return _parts(given)


def _new_triple(node: dict[str, Any], given: Any, language: Language) -> list[str]:
    """The triple that was given, with what it leaves out as it mostly is in a node of its kind."""
    if isinstance(given, list) and len(given) == 3 and not given[1]:
        usual = "clinical manifestation" if node["role"] == "C" else "therapeutic schedule"
        before = node["triples"][-1][1] if node["triples"] else relation_in(usual, language)
        given = [given[0], before, given[2]]
    return _parts(given)


def _parts(value: Any) -> list[str]:
    """Three texts, of which the first and last may be empty meanwhile."""
    try:
        return list(checks.triple_parts(value, unfinished=True))
    except checks.TreeError as fault:
        raise GatewiseError(str(fault)) from None
