"""The losses of the heads against the formulas, one number at a time; padding, and batches in which something is missing."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gatewise_mdt import DecisionTree
from gatewise_mdt.pointing.heads import Gold, UnitPlaces
from gatewise_mdt.pointing.model import PointingCollator, PointingModel, encode_records
from gatewise_mdt.pointing.targets import NOBODY, SUBJECT, Pointed, pointed_at
from gatewise_mdt.pointing.units import Units
from gatewise_mdt.records import TreeRecord
from mdt_trees import node, triple
from pointing_models import GOUT, RECORDS, pointing_model
from tiny_run import byte_tokenizer
from torch import Tensor

from gatewise.losses import loss_kind, microbatches, row_losses

FAMILIES = ["llama", "bert"]
NO_MARK = TreeRecord("cool burns", DecisionTree.from_preorder([node("D", triple("burns", "therapeutic schedule", "cool"))]))
NOTHING_FITS = TreeRecord("a@b c", DecisionTree.from_preorder([node("D", triple("elsewhere", "therapeutic schedule", "a"))]))
ONE_NODE = RECORDS[3]
# One phrase in two nodes.
SHARED = TreeRecord(
    "gout@If flare, give rest. If flare and fever, give ice.",
    DecisionTree.from_preorder(
        [
            node("C", triple("flare", subject="gout")),
            node("C", triple("flare", subject="gout"), triple("fever", subject="gout"), joined="and"),
            node("D", triple("ice", "drug therapy", "gout")),
            node("D", triple("rest", "drug therapy", "gout")),
            node("D"),
        ]
    ),
)
ALL = [*RECORDS, SHARED, NO_MARK, NOTHING_FITS]


def rows_of(records: list[TreeRecord], longest: int = 8) -> list[dict[str, Any]]:
    return encode_records(records, byte_tokenizer(), longest)[0]


def batch_of(records: list[TreeRecord]) -> dict[str, Tensor]:
    return PointingCollator(byte_tokenizer())(rows_of(records))


def losses_by_head(model: PointingModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    states = model(**batch).states
    return model.heads.losses(states, UnitPlaces.of(batch["units"]), Gold.of(batch["mentions"], batch["members"], batch["nodes"]))


def partings(begin: int, n: int, longest: int, kinds: int) -> Iterator[list[tuple[int, int, int]]]:
    if begin == n:
        yield []
        return
    for rest in partings(begin + 1, n, longest, kinds):
        yield rest
    for end in range(begin + 1, min(begin + longest, n) + 1):
        for rest in partings(end, n, longest, kinds):
            for kind in range(kinds):
                yield [(begin, end, kind), *rest]


# ---- each head against its formula ----


def test_phrases_are_one_parting_of_all() -> None:
    text = TreeRecord("b c d", DecisionTree.from_preorder([node("D", triple("c d", "therapeutic schedule", "b"))]))
    model = pointing_model(longest=2)
    batch = PointingCollator(byte_tokenizer())(rows_of([text], longest=2))
    with torch.no_grad():
        got = float(losses_by_head(model, batch)["phrases"])
        units = model.heads.units(model(**batch).states, UnitPlaces.of(batch["units"]))
        scores = model.heads.phrases(units)[0]
    n, longest, kinds = scores.shape
    gold = [(one.begin, one.end, one.kind) for one in pointed_at(text, Units.of(text.text)).mentions]
    assert len(gold) == 2  # the subject is a phrase too
    score = lambda phrases: sum(float(scores[a, b - a - 1, k]) for a, b, k in phrases)  # noqa: E731
    every = [score(phrases) for phrases in partings(0, n, longest, kinds)]
    top = max(every)
    log_all = top + math.log(math.fsum(math.exp(one - top) for one in every))
    assert len(every) > 1000
    assert got == pytest.approx(log_all - score(gold), abs=1e-4)


def _softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    total = sum(math.exp(one - top) for one in scores)
    return [math.exp(one - top) / total for one in scores]


@pytest.mark.parametrize("record", [GOUT, *RECORDS[1:], SHARED])
def test_the_others_are_as_the_table_says(record: TreeRecord) -> None:
    """Subjects, groups, shares, joins and arcs from the scores that the heads give, number by number."""
    model, batch = pointing_model(), batch_of([record])
    pointed = pointed_at(record, Units.of(record.text), 8)
    heads = model.heads
    gold = Gold.of(batch["mentions"], batch["members"], batch["nodes"])
    with torch.no_grad():
        got = {name: float(value) for name, value in losses_by_head(model, batch).items()}
        units = heads.units(model(**batch).states, UnitPlaces.of(batch["units"]))
        vectors = heads.mentions(units, gold.mentions)
        subjects = heads.subjects(vectors, units, gold.mentions.mask)[0].tolist()
        pairs = heads.pairs(vectors, units, gold.mentions)[0].tolist()
        nodes = heads.nodes(vectors, gold.members)
        joins = heads.joins(nodes, units, gold.mentions, gold.members)[0].tolist()
        arcs = heads.arcs(nodes, units, gold.mentions, gold.members, gold.conditions)
    wanted = _reference(pointed, subjects, pairs, joins, arcs)
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    assert set(got) == {*wanted, "phrases"}


def _reference(pointed: Pointed, subjects: Any, pairs: Any, joins: Any, arcs: Any) -> dict[str, float]:
    mentions = pointed.mentions
    made = {"subjects": 0.0, "groups": 0.0, "joins": 0.0, "arcs": 0.0}
    for i, one in enumerate(mentions):
        if one.kind != SUBJECT and pointed.subjects[i] != NOBODY:
            made["subjects"] -= math.log(_softmax(subjects[i])[pointed.subjects[i] + 1])
    for i, one in enumerate(mentions):
        for j, other in enumerate(mentions):
            if i == j or SUBJECT in (one.kind, other.kind) or one.role != other.role:
                continue
            same = pointed.own[i] == pointed.own[j]
            probability = 1 / (1 + math.exp(-pairs[i][j][0]))
            made["groups"] -= math.log(probability if same else 1 - probability)  # each pair both ways
            if not same:
                probability = 1 / (1 + math.exp(-pairs[i][j][1]))
                held = j in pointed.nodes[pointed.own[i]]
                made["groups"] -= math.log(probability if held else 1 - probability)
    for number, join in enumerate(pointed.joins):
        if join != "null":
            made["joins"] -= math.log(_softmax(joins[number])[("and", "or").index(join)])
    if pointed.root >= 0:
        made["arcs"] -= float(arcs.root[0, pointed.root])
        for number, both in enumerate(pointed.children):
            for side, child in enumerate(both or ()):
                if child < 0:
                    made["arcs"] -= float(arcs.empty[0, number, side])
                else:
                    made["arcs"] -= float(arcs.by_side[0, number, side, child]) + float(arcs.by_node[0, number, side, child])
    return made


def test_arcs_are_probabilities_of_what_is_possible() -> None:
    """Each side of a condition has one child or none; each node one parent and side, or is the root."""
    model, batch = pointing_model(), batch_of([GOUT, RECORDS[2], ONE_NODE])
    gold = Gold.of(batch["mentions"], batch["members"], batch["nodes"])
    heads = model.heads
    with torch.no_grad():
        units = heads.units(model(**batch).states, UnitPlaces.of(batch["units"]))
        nodes = heads.nodes(heads.mentions(units, gold.mentions), gold.members)
        arcs = heads.arcs(nodes, units, gold.mentions, gold.members, gold.conditions)
    sides = arcs.by_side.exp().sum(dim=-1) + arcs.empty.exp()
    assert torch.allclose(sides, torch.ones_like(sides), atol=1e-5)
    mask = gold.members.any(dim=-1)
    parents = arcs.by_node.exp().sum(dim=(1, 2)) + arcs.root.exp()
    assert torch.allclose(parents[mask], torch.ones(int(mask.sum())), atol=1e-5)
    g = nodes.shape[1]
    possible = gold.conditions[:, :, None] & mask[:, None] & ~torch.eye(g, dtype=torch.bool)
    for scores in (arcs.by_side, arcs.by_node):
        assert bool((scores.isfinite().any(dim=2) == possible).all())


# ---- batches ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_loss_in_any_batch(family: str) -> None:
    model = pointing_model(family)
    with torch.no_grad():
        together = losses_by_head(model, batch_of(ALL))
        for i, record in enumerate(ALL):
            alone = losses_by_head(model, batch_of([record]))
            for name, value in alone.items():
                assert float(value) == pytest.approx(float(together[name][i]), rel=1e-4, abs=1e-4), (record.text, name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("records", [[NOTHING_FITS], [NO_MARK], [ONE_NODE], ALL], ids=["nothing", "no @", "one node", "all"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_losses_and_gradients_are_finite(family: str, records: list[TreeRecord], precision: str) -> None:
    model = pointing_model(family).train()
    if precision == "bfloat16":
        model.encoder.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        output = model(**batch_of(records))
    assert output.row_losses.dtype == torch.float32
    output.loss.backward()
    assert bool(output.row_losses.isfinite().all())
    assert bool((output.row_losses >= 0).all())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(bool(one.isfinite().all()) for one in gradients)
    if records is ALL:  # and there is one for every part, as training in several processes wants it
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None and "embed_tokens" not in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_has_a_gradient_in_a_batch_that_lacks_most(family: str) -> None:
    model = pointing_model(family).train()
    model(**batch_of([NOTHING_FITS])).loss.backward()
    assert not [name for name, parameter in model.heads.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pointing_model_measures_itself(family: str) -> None:
    """For rounds, compress and evaluation: a label a row, and microbatches whose losses add up."""
    model, batch = pointing_model(family), batch_of(ALL)
    assert loss_kind(model) == "rows"
    with torch.no_grad():
        losses, counts = row_losses(model, batch)
        assert torch.equal(losses, model(**batch).row_losses)
        assert counts.tolist() == [1] * len(ALL)
        parts = microbatches(batch, 200, "rows")
        assert len(parts) > 2
        assert float(sum(row_losses(model, part)[0].sum() for part in parts)) == pytest.approx(float(losses.sum()), rel=1e-4)
