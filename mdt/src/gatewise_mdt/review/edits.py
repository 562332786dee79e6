"""The edits that correct a tree, on plain nodes in pre-order, and what is still wrong with it.

Every edit keeps the tree whole: each condition has two children, each decision none. A node may be unfinished meanwhile, with an
empty phrase or no triple; :func:`fault_of` says so, by the rules of :mod:`gatewise_mdt.checks` and no others.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gatewise.checks import is_whole
from gatewise.errors import GatewiseError
from gatewise_mdt import checks
from gatewise_mdt.relations import Language, relation_in
from gatewise_mdt.tree import DecisionTree, Node, Triple

Nodes = list[dict[str, Any]]

BLANK = "…"  # stands for an empty phrase in a drawing
_MOST_CHARACTERS = 2000
_MOST_NODES, _MOST_TRIPLES = 400, 100  # the largest published tree has 9 nodes


class Fault(NamedTuple):
    """What is wrong with a tree, and at which node (from 0); None where it is no single node's fault."""

    node: int | None
    message: str


def empty_tree() -> Nodes:
    """The tree to begin with by hand: it recommends nothing."""
    return [_empty_leaf()]


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
        triples = tuple(
            Triple.model_construct(subject=subject.strip() or BLANK, relation=relation, object=object_.strip() or BLANK)
            for subject, relation, object_ in node["triples"]
        )
        made.append(Node.model_construct(role=node["role"], triples=triples, logical_rel=node["logical_rel"]))
    return DecisionTree.model_construct(nodes=tuple(made))


def check_shape(nodes: Any) -> Nodes:
    """Nodes that come from a file, if they can be worked on: whole as a tree, though nodes may be unfinished.

    Raises:
        GatewiseError: they cannot.
    """
    if not isinstance(nodes, list) or len(nodes) > _MOST_NODES:
        raise GatewiseError(f"the tree is {checks.shown(nodes)}, expected a list of at most {_MOST_NODES} nodes")
    try:
        checked = checks.tree_parts(nodes, unfinished=True)
    except checks.TreeError as fault:
        raise GatewiseError(str(fault)) from None
    return [
        {"role": role, "triples": [_short(triple) for triple in triples], "logical_rel": logical_rel}
        for role, triples, logical_rel in checked
    ]


def apply(nodes: Nodes, edit: str, arguments: Mapping[str, Any], language: Language = "en") -> Nodes:
    """The nodes after an edit; the given ones stay as they are. Those that it does not change are the very objects that were given,
    wherever they stand now.

    Args:
        edit: a key of ``EDITS``.
        arguments: ``node`` (from 0), and what the edit takes besides.
        language: of the relation that a new triple begins with.

    Raises:
        GatewiseError: there is no such edit or node, or an argument does not fit.
    """
    if edit not in EDITS:
        raise GatewiseError(f"the edit is {checks.shown(edit)}: expected one of {', '.join(EDITS)}")
    function, wanted = EDITS[edit]
    at = _number(arguments, "node", len(nodes), "node")
    own = {**nodes[at], "triples": [list(triple) for triple in nodes[at]["triples"]]}  # the only one that an edit writes into
    made = function([*nodes[:at], own, *nodes[at + 1 :]], at, *(_READERS[name](arguments, own, language) for name in wanted))
    if len(made) > _MOST_NODES or any(len(node["triples"]) > _MOST_TRIPLES for node in made):
        raise GatewiseError(f"the tree would have more than {_MOST_NODES} nodes, or a node more than {_MOST_TRIPLES} triples")
    now = _joined(own)
    return [(nodes[at] if now == nodes[at] else now) if node is own else node for node in made]


# ---- edits at a node ----


def _join(nodes: Nodes, at: int, join: str) -> Nodes:
    nodes[at]["logical_rel"] = join
    return nodes


def _set_triple(nodes: Nodes, at: int, number: int, triple: list[str]) -> Nodes:
    nodes[at]["triples"][number] = triple
    return nodes


def _add_triple(nodes: Nodes, at: int, triple: list[str]) -> Nodes:
    nodes[at]["triples"].append(triple)
    return nodes


def _remove_triple(nodes: Nodes, at: int, number: int) -> Nodes:
    del nodes[at]["triples"][number]
    return nodes


def _to_condition(nodes: Nodes, at: int) -> Nodes:
    """A decision becomes a condition over two empty leaves."""
    if nodes[at]["role"] == "C":
        return nodes
    nodes[at]["role"] = "C"
    return [*nodes[: at + 1], _empty_leaf(), _empty_leaf(), *nodes[at + 1 :]]


def _to_decision(nodes: Nodes, at: int) -> Nodes:
    """A condition becomes a decision; what hung on it is gone."""
    end = subtree_end(nodes, at)
    nodes[at]["role"] = "D"
    return [*nodes[: at + 1], *nodes[end:]]


def _delete(nodes: Nodes, at: int) -> Nodes:
    """An empty leaf takes the place of a node and all that hangs on it."""
    return [*nodes[:at], _empty_leaf(), *nodes[subtree_end(nodes, at) :]]


def _swap(nodes: Nodes, at: int) -> Nodes:
    """A condition's two branches change places."""
    yes, no, end = _branches(nodes, at)
    return [*nodes[:yes], *nodes[no:end], *nodes[yes:no], *nodes[end:]]


def _keep_branch(nodes: Nodes, at: int, side: str) -> Nodes:
    """A condition goes, with one of its branches; the other takes its place."""
    yes, no, end = _branches(nodes, at)
    kept = nodes[yes:no] if side == "true" else nodes[no:end]
    return [*nodes[:at], *kept, *nodes[end:]]


def _put_above(nodes: Nodes, at: int, side: str) -> Nodes:
    """A new condition, still without triples, comes above a node; its other branch is an empty leaf."""
    end = subtree_end(nodes, at)
    branches = [*nodes[at:end], _empty_leaf()] if side == "true" else [_empty_leaf(), *nodes[at:end]]
    return [*nodes[:at], {"role": "C", "triples": [], "logical_rel": "null"}, *branches, *nodes[end:]]


def subtree_end(nodes: Nodes, at: int) -> int:
    """The position behind a node and all that hangs on it."""
    waiting = 1
    while waiting:
        waiting += 1 if nodes[at]["role"] == "C" else -1
        at += 1
    return at


def _branches(nodes: Nodes, at: int) -> tuple[int, int, int]:
    if nodes[at]["role"] != "C":
        raise GatewiseError(f"node {at + 1} is a decision, which has no branches")
    no = subtree_end(nodes, at + 1)
    return at + 1, no, subtree_end(nodes, no)


def _empty_leaf() -> dict[str, Any]:
    return {"role": "D", "triples": [], "logical_rel": "null"}


def _joined(node: dict[str, Any]) -> dict[str, Any]:
    """A node whose triples became one, or several, has the logical_rel that goes with it."""
    return {**node, "logical_rel": checks.fitting_join(node["logical_rel"], len(node["triples"]))}


# ---- arguments ----


def _number(arguments: Mapping[str, Any], name: str, count: int, what: str) -> int:
    value = arguments.get(name)
    if not is_whole(value) or not 0 <= value < count:
        raise GatewiseError(f"there is no {what} {checks.shown(value)}: the page may show an older tree, load it again")
    return value


def _which_triple(arguments: Mapping[str, Any], node: dict[str, Any], language: Language) -> int:
    return _number(arguments, "triple", len(node["triples"]), "triple")


def _which_join(arguments: Mapping[str, Any], node: dict[str, Any], language: Language) -> str:
    if arguments.get("join") not in ("and", "or"):
        raise GatewiseError(f'join is {checks.shown(arguments.get("join"))}, expected "and" or "or"')
    return str(arguments["join"])


def _which_side(arguments: Mapping[str, Any], node: dict[str, Any], language: Language) -> str:
    if arguments.get("side") not in ("true", "false"):
        raise GatewiseError(f'side is {checks.shown(arguments.get("side"))}, expected "true" or "false"')
    return str(arguments["side"])


def _some_parts(arguments: Mapping[str, Any], node: dict[str, Any], language: Language) -> list[str]:
    """The triple with those parts that were given; null leaves a part as it is, which another edit may just have set."""
    old, given = node["triples"][_which_triple(arguments, node, language)], arguments.get("parts")
    if isinstance(given, list) and len(given) == 3:
        given = [before if part is None else part for before, part in zip(old, given, strict=True)]
    return _parts(given)


def _new_triple(arguments: Mapping[str, Any], node: dict[str, Any], language: Language) -> list[str]:
    """The triple that was given, with what it leaves out as it mostly is in a node of its kind."""
    given = arguments.get("parts") or ["", "", ""]
    if isinstance(given, list) and len(given) == 3 and not given[1]:
        usual = "clinical manifestation" if node["role"] == "C" else "therapeutic schedule"
        before = node["triples"][-1][1] if node["triples"] else relation_in(usual, language)
        given = [given[0], before, given[2]]
    return _parts(given)


def _parts(value: Any) -> list[str]:
    """Three texts, of which the first and last may be empty meanwhile."""
    try:
        return _short(checks.triple_parts(value, unfinished=True))
    except checks.TreeError as fault:
        raise GatewiseError(str(fault)) from None


def _short(triple: checks.TripleParts) -> list[str]:
    if any(len(part) > _MOST_CHARACTERS for part in triple):
        raise GatewiseError(f"a phrase is longer than {_MOST_CHARACTERS} characters, expected a few words of the text")
    return list(triple)


_READERS: dict[str, Callable[[Mapping[str, Any], dict[str, Any], Language], Any]] = {
    "triple": _which_triple,
    "parts": _some_parts,
    "new": _new_triple,
    "join": _which_join,
    "side": _which_side,
}
# edit -> what carries it out, and the arguments that it takes after the node
EDITS: dict[str, tuple[Callable[..., Nodes], tuple[str, ...]]] = {
    "join": (_join, ("join",)),
    "set_triple": (_set_triple, ("triple", "parts")),
    "add_triple": (_add_triple, ("new",)),
    "remove_triple": (_remove_triple, ("triple",)),
    "to_condition": (_to_condition, ()),
    "to_decision": (_to_decision, ()),
    "delete": (_delete, ()),
    "swap": (_swap, ()),
    "keep_branch": (_keep_branch, ("side",)),
    "put_above": (_put_above, ("side",)),
}
