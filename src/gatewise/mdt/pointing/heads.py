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

Spans are scored as by GlobalPointer (Su et al., arXiv 2208.03054), but over units and normalised as in ``chart``.
The rest is our own.

Shapes: b texts, t tokens, n units, m phrases, g nodes, h width of the encoder, d width of the heads.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatewise.mdt.pointing.chart import log_partition
from gatewise.mdt.pointing.targets import EMPTY, JOINS, KINDS, NOBODY, POPULATION, SUBJECT, Pointed
from gatewise.mdt.pointing.units import MOST_INSIDE

IGNORED = -100


@dataclass(frozen=True)
class HeadSettings:
    """The sizes of the heads.

    Attributes:
        hidden: width of the encoder's states.
        width: of the heads.
        longest: units of the longest phrase.
        dropout: in training.
    """

    hidden: int
    width: int = 128
    longest: int = 24
    dropout: float = 0.2

    def to_json(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)


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
        self.among = nn.TransformerEncoderLayer(d, 4, 2 * d, settings.dropout, "gelu", batch_first=True, norm_first=True)
        self.subject_of, self.subject_is = nn.Linear(d, d), nn.Linear(d, d)
        self.population = nn.Linear(h, d)
        self.pair = nn.ModuleList([nn.Linear(d, d), nn.Linear(d, d), nn.Linear(h, d)])
        self.apart = nn.Embedding(_PLACES, d)
        self.same = nn.Sequential(nn.GELU(), self.dropout, nn.Linear(d, 2))  # of one node; the second shares the first
        self.join = nn.Sequential(nn.Linear(d + h, d), nn.GELU(), self.dropout, nn.Linear(d, len(JOINS)))
        self.root = nn.Sequential(nn.Linear(d, d), nn.GELU(), self.dropout, nn.Linear(d, 1))
        self.parent, self.child, self.between = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(h, d)
        self.order = nn.Embedding(2 * _PLACES, d)
        self.arc = nn.Sequential(nn.GELU(), self.dropout, nn.Linear(d, 2))
        self.empty = nn.Sequential(nn.Linear(d, d), nn.GELU(), self.dropout, nn.Linear(d, 2))

    # ---- units and phrases ----

    def units(self, states: Tensor, batch: "UnitPlaces") -> "UnitStates":
        """States of tokens (b, t, h) -> of units."""
        states = self.dropout(self.norm(states.float()))
        rows = torch.arange(len(states), device=states.device)[:, None]
        first = states[rows, batch.first] + self.inside[0](batch.begins)
        last = states[rows, batch.last] + self.inside[1](batch.ends)
        mean = (first + last) / 2 * batch.mask[..., None]
        sums = F.pad(mean.cumsum(dim=1), (0, 0, 1, 0))
        return UnitStates(first, last, sums, batch)

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
        possible = (end[None] < units.batch.lengths[:, None, None])[..., None]
        return scores.masked_fill(~possible, float("-inf"))

    def mentions(self, units: "UnitStates", begin: Tensor, end: Tensor, kind: Tensor, mask: Tensor) -> Tensor:
        """Phrases as vectors that know of each other: (b, m, d). ``begin``, ``end`` (after the last unit), ``kind``: (b, m)."""
        rows = torch.arange(len(begin), device=begin.device)[:, None]
        parts = (units.first[rows, begin], units.last[rows, end - 1], units.mean(begin, end))
        made = sum(layer(part) for layer, part in zip(self.mention, parts, strict=True))
        made = made + self.kind(kind) + self.place(_places(begin.shape[1], begin.device))
        made = self.among(self.dropout(F.gelu(made)), src_key_padding_mask=~mask)
        return made * mask[..., None]

    # ---- subjects ----

    def subjects(self, mentions: Tensor, units: "UnitStates", mask: Tensor) -> Tensor:
        """Scores of the subjects of each phrase: (b, m, 1 + m), the population first; -inf where there is none."""
        b, m, d = mentions.shape
        size = units.batch.population
        population = self.population(units.mean(torch.zeros_like(size)[:, None], size[:, None].clamp(min=1)))
        candidates = torch.cat([population, self.subject_is(mentions)], dim=1)
        scores = self.subject_of(mentions) @ candidates.transpose(1, 2) / d**0.5
        possible = torch.cat([(size > 0)[:, None], mask], dim=1)[:, None].expand(b, m, 1 + m)
        own = F.pad(torch.eye(m, dtype=torch.bool, device=mentions.device), (1, 0))
        return scores.masked_fill(~possible | own, float("-inf"))

    # ---- nodes ----

    def pairs(self, mentions: Tensor, units: "UnitStates", begin: Tensor, end: Tensor) -> Tensor:
        """Logits (b, m, m, 2): [..., 0] that two phrases are in one node (the same both ways), [..., 1] that the second is in the
        node of the first too."""
        m = mentions.shape[1]
        one, other = self.pair[0](mentions), self.pair[1](mentions)
        high = torch.maximum(begin[:, :, None], begin[:, None])
        ends = torch.where(begin[:, :, None] <= begin[:, None], end[:, :, None], end[:, None])
        stretch = units.mean(ends.clamp(max=units.sums.shape[1] - 1), high)
        numbers = torch.arange(m, device=begin.device)
        far = (numbers[:, None] - numbers).abs().clamp(max=_PLACES - 1)
        logits = self.same(one[:, :, None] + other[:, None] + self.pair[2](stretch) + self.apart(far))
        symmetric = logits[..., 0] + logits[..., 0].transpose(1, 2)
        return torch.stack([symmetric, logits[..., 1]], dim=-1)

    def nodes(self, mentions: Tensor, members: Tensor) -> Tensor:
        """Nodes as the mean of their phrases: (b, g, d). ``members``: (b, g, m) bool."""
        weights = members.float()
        return weights @ mentions / weights.sum(dim=-1, keepdim=True).clamp(min=1)

    def joins(self, nodes: Tensor, units: "UnitStates", begin: Tensor, end: Tensor, members: Tensor) -> Tensor:
        """Logits of "and" and "or" for each node: (b, g, 2), of its phrases and of the text from the first to the last of them."""
        first = torch.where(members, begin[:, None], units.sums.shape[1]).amin(dim=-1)
        last = torch.where(members, end[:, None], 0).amax(dim=-1)
        first = torch.minimum(first, last)
        return self.join(torch.cat([nodes, units.mean(first, last)], dim=-1))

    # ---- the tree ----

    def arcs(self, nodes: Tensor, units: "UnitStates", first: Tensor, last: Tensor, mask: Tensor, conditions: Tensor) -> "Arcs":
        """Log-probabilities for the tree. ``first``, ``last``: (b, g) units at which each node begins and ends."""
        b, g, _ = nodes.shape
        numbers = torch.arange(g, device=nodes.device)
        order = (numbers[None] - numbers[:, None]).clamp(-_PLACES, _PLACES - 1) + _PLACES
        a, z = first[:, :, None].expand(b, g, g), first[:, None].expand(b, g, g)
        stretch = units.mean(torch.minimum(a, z), torch.maximum(a, z))
        made = self.parent(nodes)[:, :, None] + self.child(nodes)[:, None] + self.order(order)[None] + self.between(stretch)
        scores = self.arc(made).permute(0, 1, 3, 2)  # (b, g, 2, g)
        impossible = ~(conditions[:, :, None] & mask[:, None] & ~torch.eye(g, dtype=torch.bool, device=nodes.device))
        scores = scores.masked_fill(impossible[:, :, None], float("-inf"))
        empty = self.empty(nodes)
        by_side = torch.cat([scores, empty[..., None]], dim=-1).log_softmax(dim=-1)
        root = self.root(nodes).squeeze(-1)
        by_node = torch.cat([scores.reshape(b, 2 * g, g), root[:, None]], dim=1).log_softmax(dim=1)
        return Arcs(by_side[..., :g], by_side[..., g], by_node[:, : 2 * g].reshape(b, g, 2, g), by_node[:, 2 * g])

    # ---- training ----

    def losses(self, states: Tensor, batch: "Batch") -> dict[str, tuple[Tensor, Tensor]]:
        """For each head, the sum of its losses (nats) and of how many."""
        units = self.units(states, batch.units)
        scores, gold = self.phrases(units), batch.mentions
        rows = torch.arange(len(states), device=states.device)[:, None]
        size = (gold.end - gold.begin - 1).clamp(0, scores.shape[2] - 1)
        chosen = scores[rows, gold.begin, size, gold.kind].masked_fill(~gold.mask, 0.0).sum(dim=1)
        made = {"phrases": ((log_partition(scores, batch.units.lengths) - chosen).sum(), gold.mask.sum())}
        mentions = self.mentions(units, gold.begin, gold.end, gold.kind, gold.mask)
        made["subjects"] = _cross_entropy(self.subjects(mentions, units, gold.mask), batch.subjects)
        made["groups"] = _binary(self.pairs(mentions, units, gold.begin, gold.end), batch.pairs)
        nodes = self.nodes(mentions, batch.members)
        made["joins"] = _cross_entropy(self.joins(nodes, units, gold.begin, gold.end, batch.members), batch.joins)
        node_mask = batch.members.any(dim=-1)
        first, last = spans_of(batch.members, gold.begin, gold.end)
        arcs = self.arcs(nodes, units, first, last, node_mask, batch.conditions)
        by_side = _picked(torch.cat([arcs.by_side, arcs.empty[..., None]], dim=-1), batch.sides)
        g = batch.members.shape[1]
        flat = torch.cat([arcs.by_node.reshape(len(states), 2 * g, g), arcs.root[:, None]], dim=1).transpose(1, 2)
        by_node = _picked(flat, batch.parents)
        made["arcs"] = (by_side[0] + by_node[0], by_side[1] + by_node[1])
        return made


_PLACES = 16


def _places(m: int, device: Any) -> Tensor:
    return torch.arange(m, device=device).clamp(max=_PLACES - 1)


def spans_of(members: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Where nodes begin and end in the text: (b, g) each; 0 for no node. The latter is the unit after the last."""
    first = torch.where(members, begin[:, None], 10**6).amin(dim=-1)
    last = torch.where(members, end[:, None], 0).amax(dim=-1)
    return torch.where(members.any(dim=-1), first, 0), last


def _cross_entropy(scores: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    known = gold != IGNORED
    return F.cross_entropy(scores[known], gold[known], reduction="sum"), known.sum()


def _picked(logs: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    known = gold != IGNORED
    return -logs[known].gather(1, gold[known][:, None]).sum(), known.sum()


def _binary(logits: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    known = gold != IGNORED
    return F.binary_cross_entropy_with_logits(logits[known], gold[known].float(), reduction="sum"), known.sum()


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
    batch: UnitPlaces

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
class Mentions:
    """Phrases: (b, m) each."""

    begin: Tensor
    end: Tensor
    kind: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Batch:
    """Gold answers. IGNORED where there is none.

    Attributes:
        subjects: (b, m), 0 for the population, else 1 + the phrase.
        pairs: (b, m, m, 2).
        members: (b, g, m); conditions: (b, g).
        joins: (b, g).
        sides: (b, g, 2), the node there, or g for none.
        parents: (b, g), 2 · node + side, or 2 · g for the root.
    """

    units: UnitPlaces
    mentions: Mentions
    subjects: Tensor
    pairs: Tensor
    members: Tensor
    conditions: Tensor
    joins: Tensor
    sides: Tensor
    parents: Tensor


def units_of(features: Sequence[dict[str, Any]]) -> UnitPlaces:
    """Rows of ``units.tokens_of`` with ``population`` -> a batch."""
    n = max(len(row["unit_first"]) for row in features)

    def padded(key: str) -> Tensor:
        return torch.tensor([row[key] + [0] * (n - len(row[key])) for row in features])

    return UnitPlaces(
        *(padded(key) for key in ("unit_first", "unit_last", "unit_begins", "unit_ends")),
        torch.tensor([len(row["unit_first"]) for row in features]),
        torch.tensor([row["population"] for row in features]),
    )


def mentions_of(pointed: Sequence[Pointed]) -> Mentions:
    """The phrases of a batch."""
    m = max([1, *(len(one.mentions) for one in pointed)])
    rows = [
        [(*(p.begin, p.end, p.kind), True) for p in one.mentions] + [(0, 1, 0, False)] * (m - len(one.mentions)) for one in pointed
    ]
    begin, end, kind, mask = torch.tensor(rows).unbind(-1)
    return Mentions(begin, end, kind, mask.bool())


def batch_of(features: Sequence[dict[str, Any]], pointed: Sequence[Pointed]) -> Batch:
    """Rows and what is gold in them."""
    b, mentions = len(pointed), mentions_of(pointed)
    m, g = mentions.begin.shape[1], max([1, *(len(one.nodes) for one in pointed)])
    subjects = torch.full((b, m), IGNORED)
    pairs = torch.full((b, m, m, 2), IGNORED)
    members, conditions = torch.zeros(b, g, m, dtype=torch.bool), torch.zeros(b, g, dtype=torch.bool)
    joins, sides, parents = torch.full((b, g), IGNORED), torch.full((b, g, 2), IGNORED), torch.full((b, g), IGNORED)
    for row, one in enumerate(pointed):
        for i, (phrase, subject) in enumerate(zip(one.mentions, one.subjects, strict=True)):
            if phrase.kind != SUBJECT and subject != NOBODY:
                subjects[row, i] = 0 if subject == POPULATION else 1 + subject
        for i, a in enumerate(one.mentions):
            for j, c in enumerate(one.mentions):
                if i == j or SUBJECT in (a.kind, c.kind) or a.role != c.role:
                    continue
                pairs[row, i, j, 0] = int(one.own[i] == one.own[j])
                if one.own[i] != one.own[j]:
                    pairs[row, i, j, 1] = int(j in one.nodes[one.own[i]])
        for node, held in enumerate(one.nodes):
            members[row, node, list(held)] = True
            conditions[row, node] = one.mentions[held[0]].role == "C"
            if one.joins[node] in JOINS:
                joins[row, node] = JOINS.index(one.joins[node])
        if not one.has_tree:
            continue
        parents[row, one.root] = 2 * g
        for node, both in enumerate(one.children):
            for side, child in enumerate(both or ()):
                sides[row, node, side] = g if child == EMPTY else child
                if child != EMPTY:
                    parents[row, child] = 2 * node + side
    return Batch(units_of(features), mentions, subjects, pairs, members, conditions, joins, sides, parents)
