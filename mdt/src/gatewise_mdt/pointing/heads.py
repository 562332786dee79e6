"""What points: small layers on the states of an encoder, from phrases to the tree, and their losses.

The encoder is any of gatewise's base models. Each head scores what the one before has found; in training all see the gold
answers.

| head     | scores                                                                           | normalised over              |
|----------|----------------------------------------------------------------------------------|------------------------------|
| phrases  | each span of units as the object of a relation in a role, or as a subject        | all partings of the text     |
| subjects | for each object, the population and every phrase as its subject                  | them                         |
| groups   | whether two phrases are in one node                                              | (each pair for itself)       |
| shares   | whether a node has a phrase that is another node's                               | (each for itself)            |
| joins    | "and" or "or" of a node                                                          | the two                      |
| arcs     | for each side of a condition, which node is its child; for each node, whose child | nodes and none; sides, root |

A span is scored as a whole by its two ends, which is the idea of GlobalPointer (Su et al., arXiv 2208.03054), and by the mean of
what is between them; how scores are normalised, and the other heads, are our own.

Shapes: b texts, t tokens, n units, m phrases, g nodes, h width of the encoder, d width of the heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass as settings_dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from gatewise_mdt.pointing.chart import log_partition
from gatewise_mdt.pointing.targets import EMPTY, JOINS, KINDS, NOBODY, SUBJECT, Pointed
from gatewise_mdt.pointing.units import MOST_INSIDE

IGNORED = -100
ATTENTION_HEADS = 4
"""Of the layers in which phrases, and nodes, see each other."""


@settings_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HeadSettings:
    """The sizes of the heads.

    Attributes:
        hidden: width of the encoder's states.
        width: of the heads.
        longest: units of the longest phrase.
        dropout: in training.
    """

    hidden: PositiveInt
    width: Annotated[int, Field(gt=0, multiple_of=ATTENTION_HEADS)] = 128
    longest: PositiveInt = 24
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class PointingHeads(nn.Module):
    """All heads; see the module."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.settings = settings
        h, d = settings.hidden, settings.width
        self.norm = nn.LayerNorm(h)
        self.inside = nn.ModuleList([nn.Embedding(MOST_INSIDE + 1, h) for _ in range(2)])
        self.dropout = nn.Dropout(settings.dropout)
        self.first, self.last, self.middle = nn.Linear(h, d), nn.Linear(h, d), nn.Linear(h, d)
        self.size = nn.Embedding(settings.longest + 1, d)
        self.phrase = nn.Sequential(nn.GELU(), self.dropout, nn.Linear(d, len(KINDS) + 1))
        self.mention = nn.ModuleList([nn.Linear(h, d) for _ in range(3)])
        self.kind = nn.Embedding(len(KINDS) + 1, d)
        self.place = nn.Embedding(_PLACES, d)
        self.among = nn.TransformerEncoderLayer(
            d, ATTENTION_HEADS, 2 * d, settings.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.subject_of, self.subject_is = nn.Linear(d, d), nn.Linear(d, d)
        self.population = nn.Linear(h, d)
        self.pair = nn.ModuleList([nn.Linear(d, d), nn.Linear(d, d), nn.Linear(h, d)])
        self.apart = nn.Embedding(_PLACES, d)
        self.same = nn.Sequential(nn.GELU(), self.dropout, nn.Linear(d, 2))  # of one node; the second shares the first
        self.number = nn.Embedding(_PLACES, d)
        self.around = nn.TransformerEncoderLayer(
            d, ATTENTION_HEADS, 2 * d, settings.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.reading = nn.ModuleDict({name: Reading(h, d) for name in ("pair", "join", "arc")})
        self.join = nn.Sequential(nn.Linear(2 * d, d), nn.GELU(), self.dropout, nn.Linear(d, len(JOINS)))
        self.root = nn.Sequential(nn.Linear(d, d), nn.GELU(), self.dropout, nn.Linear(d, 1))
        self.parent, self.child, self.between = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(h, d)
        self.order = nn.Embedding(2 * _PLACES, d)
        self.arc = nn.Sequential(nn.GELU(), self.dropout, nn.Linear(d, 2))
        self.empty = nn.Sequential(nn.Linear(d, d), nn.GELU(), self.dropout, nn.Linear(d, 2))

    # ---- units and phrases ----

    def units(self, states: Tensor, places: "UnitPlaces") -> "UnitStates":
        """States of tokens (b, t, h) -> of units."""
        states = self.dropout(self.norm(states.float()))
        rows = torch.arange(len(states), device=states.device)[:, None]
        first = states[rows, places.first] + self.inside[0](places.begins)
        last = states[rows, places.last] + self.inside[1](places.ends)
        mean = (first + last) / 2 * places.mask[..., None]
        sums = F.pad(mean.cumsum(dim=1), (0, 0, 1, 0))
        return UnitStates(first, last, sums, places)

    def phrases(self, units: "UnitStates") -> Tensor:
        """The scores of all phrases: (b, n, longest, kinds), for ``chart``."""
        n = units.first.shape[1]
        most = min(self.settings.longest, n)
        device = units.first.device
        begin = torch.arange(n, device=device)[:, None]
        end = begin + torch.arange(most, device=device)[None]  # the last unit
        inside = end.clamp(max=n - 1)
        made = self.first(units.first)[:, :, None] + self.last(units.last)[:, inside]
        total = self.middle(units.sums)  # a linear map of a sum, but for its bias, is the sum of the maps
        sizes = torch.arange(1, most + 1, device=device)
        made = made + (total[:, inside + 1] - total[:, begin]) / sizes[:, None] + self.size(sizes)
        scores = self.phrase(made)
        possible = (end[None] < units.places.lengths[:, None, None])[..., None]
        return scores.masked_fill(~possible, float("-inf"))

    def mentions(self, units: "UnitStates", places: "Places") -> Tensor:
        """Phrases as vectors that know of each other: (b, m, d)."""
        rows = torch.arange(len(places.begin), device=places.begin.device)[:, None]
        parts = (units.first[rows, places.begin], units.last[rows, places.end - 1], units.mean(places.begin, places.end))
        made = sum(layer(part) for layer, part in zip(self.mention, parts, strict=True))
        numbers = torch.arange(places.begin.shape[1], device=places.begin.device).clamp(max=_PLACES - 1)
        made = self.dropout(F.gelu(made + self.kind(places.kind) + self.place(numbers)))
        return _attended(self.among, made, places.mask)

    # ---- subjects ----

    def subjects(self, mentions: Tensor, units: "UnitStates", mask: Tensor) -> Tensor:
        """Scores of the subjects of each phrase: (b, m, 1 + m), the population first; -inf where there is none."""
        b, m, d = mentions.shape
        size = units.places.population
        population = self.population(units.mean(torch.zeros_like(size)[:, None], size[:, None].clamp(min=1)))
        candidates = torch.cat([population, self.subject_is(mentions)], dim=1)
        scores = self.subject_of(mentions) @ candidates.transpose(1, 2) / d**0.5
        possible = torch.cat([(size > 0)[:, None], mask], dim=1)[:, None].expand(b, m, 1 + m)
        own = F.pad(torch.eye(m, dtype=torch.bool, device=mentions.device), (1, 0))
        return scores.masked_fill(~possible | own, float("-inf"))

    # ---- nodes ----

    def pairs(self, mentions: Tensor, units: "UnitStates", places: "Places") -> Tensor:
        """Logits (b, m, m, 2): [..., 0] that two phrases are in one node (the same both ways), [..., 1] that the second is in the
        node of the first too."""
        m, begin, end = mentions.shape[1], places.begin, places.end
        one, other = self.pair[0](mentions), self.pair[1](mentions)
        high = torch.maximum(begin[:, :, None], begin[:, None])
        ends = torch.where(begin[:, :, None] <= begin[:, None], end[:, :, None], end[:, None])
        stretch = units.mean(ends.clamp(max=units.sums.shape[1] - 1), high)
        numbers = torch.arange(m, device=begin.device)
        far = (numbers[:, None] - numbers).abs().clamp(max=_PLACES - 1)
        both = one[:, :, None] + other[:, None] + self.pair[2](stretch) + self.apart(far)
        logits = self.same(both + self.reading["pair"](both, units, ends, high))
        symmetric = logits[..., 0] + logits[..., 0].transpose(1, 2)
        return torch.stack([symmetric, logits[..., 1]], dim=-1)

    def nodes(self, mentions: Tensor, members: Tensor) -> Tensor:
        """Nodes as the mean of their phrases, which then know of each other: (b, g, d). ``members``: (b, g, m) bool."""
        weights = members.float()
        made = weights @ mentions / weights.sum(dim=-1, keepdim=True).clamp(min=1)
        made = made + self.number(torch.arange(made.shape[1], device=made.device).clamp(max=_PLACES - 1))
        return _attended(self.around, made, members.any(dim=-1))

    def joins(self, nodes: Tensor, units: "UnitStates", places: "Places", members: Tensor) -> Tensor:
        """Logits of "and" and "or" for each node: (b, g, 2), of its phrases and of the text from the first to the last of them."""
        first, last = _stretch(members, places)
        return self.join(torch.cat([nodes, self.reading["join"](nodes, units, first, last)], dim=-1))

    # ---- the tree ----

    def arcs(self, nodes: Tensor, units: "UnitStates", places: "Places", members: Tensor, conditions: Tensor) -> "Arcs":
        """Who is whose child, of nodes (b, g, d), the phrases that they have, (b, g, m), and which are conditions, (b, g)."""
        b, g, _ = nodes.shape
        first, _last = _stretch(members, places)
        mask = members.any(dim=-1)
        numbers = torch.arange(g, device=nodes.device)
        order = (numbers[None] - numbers[:, None]).clamp(-_PLACES, _PLACES - 1) + _PLACES
        a, z = first[:, :, None].expand(b, g, g), first[:, None].expand(b, g, g)
        stretch = units.mean(torch.minimum(a, z), torch.maximum(a, z))
        made = self.parent(nodes)[:, :, None] + self.child(nodes)[:, None] + self.order(order)[None] + self.between(stretch)
        made = made + self.reading["arc"](made, units, torch.minimum(a, z), torch.maximum(a, z))
        scores = self.arc(made).permute(0, 1, 3, 2)  # (b, g, 2, g)
        impossible = ~(conditions[:, :, None] & mask[:, None] & ~torch.eye(g, dtype=torch.bool, device=nodes.device))
        scores = scores.masked_fill(impossible[:, :, None], float("-inf"))
        empty = self.empty(nodes)
        by_side = torch.cat([scores, empty[..., None]], dim=-1).log_softmax(dim=-1)
        root = self.root(nodes).squeeze(-1)
        by_node = torch.cat([scores.reshape(b, 2 * g, g), root[:, None]], dim=1).log_softmax(dim=1)
        return Arcs(by_side[..., :g], by_side[..., g], by_node[:, : 2 * g].reshape(b, g, 2, g), by_node[:, 2 * g])

    # ---- training ----

    def losses(self, states: Tensor, units: "UnitPlaces", gold: "Gold") -> dict[str, Tensor]:
        """Cross-entropy of the gold answers by head, in nats: (b,) each, the sum over all that a text has of it."""
        own = self.units(states, units)
        places, b, g = gold.mentions, len(states), gold.members.shape[1]
        scores = self.phrases(own)
        rows = torch.arange(b, device=states.device)[:, None]
        size = (places.end - places.begin - 1).clamp(0, scores.shape[2] - 1)
        chosen = scores[rows, places.begin, size, places.kind].masked_fill(~places.mask, 0.0).sum(dim=1)
        vectors = self.mentions(own, places)
        nodes = self.nodes(vectors, gold.members)
        arcs = self.arcs(nodes, own, places, gold.members, gold.conditions)
        by_side = torch.cat([arcs.by_side, arcs.empty[..., None]], dim=-1)
        by_node = torch.cat([arcs.by_node.reshape(b, 2 * g, g), arcs.root[:, None]], dim=1).transpose(1, 2)
        return {
            "phrases": log_partition(scores, units.lengths) - chosen,
            "subjects": _cross_entropy(self.subjects(vectors, own, places.mask), gold.subjects),
            "groups": _binary(self.pairs(vectors, own, places), gold.pairs),
            "joins": _cross_entropy(self.joins(nodes, own, places, gold.members), gold.joins),
            "arcs": _picked(by_side, gold.sides) + _picked(by_node, gold.parents),
        }


class Reading(nn.Module):
    """What a stretch of the text says to a question: attention over its units and ``AROUND`` on either side of it.

    That is where "or", "otherwise" and "if not" stand, which say how phrases go together.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(hidden, width), nn.Linear(hidden, width)

    def forward(self, questions: Tensor, units: "UnitStates", begin: Tensor, end: Tensor) -> Tensor:
        """Questions (b, ..., d) about units ``begin`` to ``end - 1``, (b, ...) each -> (b, ..., d)."""
        b, d = len(questions), questions.shape[-1]
        states = (units.first + units.last) / 2
        scores = self.query(questions).reshape(b, -1, d) @ self.key(states).transpose(1, 2) / d**0.5
        at = torch.arange(states.shape[1], device=states.device)
        inside = (at >= begin.reshape(b, -1, 1) - AROUND) & (at < end.reshape(b, -1, 1) + AROUND) & units.places.mask[:, None]
        # Of a stretch of padding there is nothing to read, and nobody reads what comes of it.
        inside = inside | ~inside.any(dim=-1, keepdim=True)
        made = scores.masked_fill(~inside, float("-inf")).softmax(dim=-1) @ self.value(states)
        return made.reshape(questions.shape)


AROUND = 3
_PLACES = 16


def _attended(layer: nn.Module, vectors: Tensor, mask: Tensor) -> Tensor:
    """A layer of attention among what is no padding; zeros for the rest. A text with nothing of it sees padding."""
    seen = mask | (~mask).all(dim=1, keepdim=True)
    return layer(vectors, src_key_padding_mask=~seen) * mask[..., None]


def _stretch(members: Tensor, places: "Places") -> tuple[Tensor, Tensor]:
    """The first unit of each node, and the one after its last: (b, g) each, 0 for no node."""
    last = torch.where(members, places.end[:, None], 0).amax(dim=-1)
    return torch.where(members, places.begin[:, None], last[..., None]).amin(dim=-1), last


def _cross_entropy(scores: Tensor, gold: Tensor) -> Tensor:
    # Where nothing is gold there may be nothing possible either, of which a softmax would have no gradient.
    known = gold != IGNORED
    return _picked(scores.masked_fill(~known[..., None], 0.0).log_softmax(dim=-1), gold)


def _picked(logs: Tensor, gold: Tensor) -> Tensor:
    """Minus the sum of the logarithms at the gold places: (b, ..., c) and (b, ...) -> (b,)."""
    known = gold != IGNORED
    picked = logs.gather(-1, gold.clamp(min=0)[..., None]).squeeze(-1)
    return -picked.masked_fill(~known, 0.0).flatten(1).sum(dim=1)


def _binary(logits: Tensor, gold: Tensor) -> Tensor:
    known = gold != IGNORED
    made = F.binary_cross_entropy_with_logits(logits, gold.clamp(min=0).float(), reduction="none")
    return made.masked_fill(~known, 0.0).flatten(1).sum(dim=1)


# ---- batches ----


@dataclass(frozen=True)
class UnitPlaces:
    """Where the units of texts are among their tokens: (b, n) each, ``lengths`` and ``population`` (units before "@") (b,)."""

    first: Tensor
    last: Tensor
    begins: Tensor
    ends: Tensor
    lengths: Tensor
    population: Tensor

    @classmethod
    def of(cls, units: Tensor) -> "UnitPlaces":
        """Of what :func:`unit_rows` makes, padded with -1: (b, n, 5)."""
        first, last, begins, ends, population = units.clamp(min=0).unbind(dim=-1)
        return cls(first, last, begins, ends, (units[..., 0] >= 0).sum(dim=1), population.sum(dim=1))

    @property
    def mask(self) -> Tensor:
        """(b, n): what is no padding."""
        return torch.arange(self.first.shape[1], device=self.first.device)[None] < self.lengths[:, None]


@dataclass(frozen=True)
class UnitStates:
    """States of units (b, n, h) at their first and last characters, and sums up to each unit, (b, n + 1, h), for means."""

    first: Tensor
    last: Tensor
    sums: Tensor
    places: UnitPlaces

    def mean(self, begin: Tensor, end: Tensor) -> Tensor:
        """The mean of units ``begin`` to ``end - 1``, (b, ...) each -> (b, ..., h); zeros where there are none."""
        rows = torch.arange(len(begin), device=begin.device).reshape(-1, *[1] * (begin.dim() - 1))
        count = (end - begin).clamp(min=1)[..., None]
        return (self.sums[rows, end] - self.sums[rows, begin]) / count * (end > begin)[..., None]


@dataclass(frozen=True)
class Arcs:
    """Log-probabilities: of each child of a side, (b, g, 2, g), or none there, (b, g, 2); of each parent and side of a node,
    (b, g, 2, g), or being the root, (b, g)."""

    by_side: Tensor
    empty: Tensor
    by_node: Tensor
    root: Tensor


@dataclass(frozen=True)
class Places:
    """Phrases: (b, m) each; ``end`` is the unit after the last."""

    begin: Tensor
    end: Tensor
    kind: Tensor
    mask: Tensor

    @classmethod
    def of(cls, mentions: Tensor) -> "Places":
        """Of what :func:`mention_rows` makes, padded with -1: (b, m, ...)."""
        mask = mentions[..., 0] >= 0
        begin, end, kind = (mentions[..., i].clamp(min=low) for i, low in enumerate((0, 1, 0)))
        return cls(begin, end, kind, mask)


@dataclass(frozen=True)
class Gold:
    """Gold answers. IGNORED where there is none.

    Attributes:
        subjects: (b, m), 0 for the population, else 1 + the phrase.
        pairs: (b, m, m, 2), see :meth:`PointingHeads.pairs`.
        members: (b, g, m) which phrases a node has; conditions: (b, g) which nodes are conditions.
        joins: (b, g), numbers in JOINS.
        sides: (b, g, 2), the node there, or g for none.
        parents: (b, g), 2 · node + side, or 2 · g for the root.
    """

    mentions: Places
    subjects: Tensor
    pairs: Tensor
    members: Tensor
    conditions: Tensor
    joins: Tensor
    sides: Tensor
    parents: Tensor

    @classmethod
    def of(cls, mentions: Tensor, members: Tensor, nodes: Tensor) -> "Gold":
        """Of what :func:`mention_rows`, :func:`member_rows` and :func:`node_rows` make: (b, m, 5), (b, g, m) and (b, g, 4)."""
        places, members = Places.of(mentions), members > 0
        kind, subject, own = mentions[..., 2], mentions[..., 3], mentions[..., 4]
        g = members.shape[1]
        subjects = torch.where(places.mask & (kind != SUBJECT) & (subject != NOBODY), subject + 1, IGNORED)
        is_condition = torch.tensor([role == "C" for _, role in KINDS] + [False], device=kind.device)[places.kind]
        counted = places.mask & (own >= 0)
        both = counted[:, :, None] & counted[:, None] & (is_condition[:, :, None] == is_condition[:, None])
        both &= ~torch.eye(kind.shape[1], dtype=torch.bool, device=kind.device)
        same = own[:, :, None] == own[:, None]
        held = members.gather(1, own.clamp(min=0)[..., None].expand(-1, -1, kind.shape[1]))  # is phrase j in the node of phrase i?
        pairs = torch.stack([same.long().masked_fill(~both, IGNORED), held.long().masked_fill(~both | same, IGNORED)], dim=-1)
        conditions = (members & is_condition[:, None]).any(dim=-1)
        joins, sides, parents = nodes[..., 0], nodes[..., 1:3], nodes[..., 3]
        sides = torch.where(sides == EMPTY, g, sides)
        parents = torch.where(parents == EMPTY, 2 * g, parents)
        return cls(places, subjects, pairs, members, conditions, joins, sides, parents)


def unit_rows(tokens: Mapping[str, list[int]], population: int) -> list[list[int]]:
    """What ``units.tokens_of`` made, a row a unit: first and last token, what stands before and after, whether it is population."""
    columns = zip(*(tokens[key] for key in ("unit_first", "unit_last", "unit_begins", "unit_ends")), strict=True)
    return [[*row, int(i < population)] for i, row in enumerate(columns)]


def mention_rows(pointed: Pointed) -> list[list[int]]:
    """A row a phrase: first unit, unit after the last, kind, subject, own node; the latter two only where they are known."""
    subjects = pointed.subjects or (NOBODY,) * len(pointed.mentions)
    own = pointed.own or (-1,) * len(pointed.mentions)
    return [[one.begin, one.end, one.kind, s, o] for one, s, o in zip(pointed.mentions, subjects, own, strict=True)]


def member_rows(pointed: Pointed) -> list[list[int]]:
    """A row a node: 1 for each of the phrases that it has."""
    return [[int(m in held) for m in range(len(pointed.mentions))] for held in pointed.nodes]


def node_rows(pointed: Pointed) -> list[list[int]]:
    """A row a node: join, yes child, no child, and 2 · parent + side; EMPTY for no child and no parent, IGNORED for not known."""
    rows = [[JOINS.index(join) if join in JOINS else IGNORED, IGNORED, IGNORED, IGNORED] for join in pointed.joins]
    if pointed.has_tree and rows:
        rows[pointed.root][3] = EMPTY
        for node, both in enumerate(pointed.children):
            for side, child in enumerate(both or ()):
                rows[node][1 + side] = child
                if child != EMPTY:
                    rows[child][3] = 2 * node + side
    return rows


def padded(rows: Sequence[Sequence[Sequence[int]]], columns: int, value: int) -> Tensor:
    """Rows of several texts, or none, as one tensor (b, at least 1, columns), the rest filled with ``value``."""
    longest = max([1, *map(len, rows)])
    full = [
        [*([*row, *[value] * (columns - len(row))] for row in one), *[[value] * columns] * (longest - len(one))] for one in rows
    ]
    return torch.tensor(full)
