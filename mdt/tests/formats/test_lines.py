from typing import Any

import pytest
from gatewise_mdt import DecisionTree, in_text_order, linearise, parse, parse_lenient, read_trees
from gatewise_mdt.formats.lines import letters
from gatewise_mdt.relations import relation_in
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import TEXT, gout, node, preorders, properties, published, trees

from gatewise.errors import GatewiseError

LEVELS = [(level, by_number) for level in (0, 1, 2) for by_number in (True, False)]
LEVEL_0 = """\
C: adults with gout | sign | acute flare; ~ | basic | normal kidney function | and
D: ~ | drug | colchicine; colchicine | dose | 0.5 mg twice daily; ~ | drug | naproxen | or
C: ~ | sign | Without a flare
D: ~ | plan | check uric acid
D"""
LEVEL_2 = """\
triples:
1. adults with gout | sign | acute flare
2. ~ | basic | normal kidney function
3. ~ | drug | colchicine
4. colchicine | dose | 0.5 mg twice daily
5. ~ | drug | naproxen
6. ~ | sign | Without a flare
7. ~ | plan | check uric acid
nodes:
A. C: 1; 2 | and
B. D: 3; 4; 5 | or
E. C: 6
F. D: 7
tree:
A
B
E
F
D"""


def test_the_lines_are_as_documented() -> None:
    tree = DecisionTree.from_preorder(gout())
    assert linearise(tree) == LEVEL_0
    assert linearise(tree, 2) == LEVEL_2
    level_1 = linearise(tree, 1).splitlines()
    assert level_1[:8] == LEVEL_2.splitlines()[:8]
    assert level_1[8:] == ["tree:", "C: 1; 2 | and", "D: 3; 4; 5 | or", "C: 6", "D: 7", "D"]
    with pytest.raises(GatewiseError, match="level is 3"):
        linearise(tree, 3)


@pytest.mark.parametrize(("level", "by_number"), LEVELS)
@properties
@given(tree=trees)
def test_what_is_written_is_read_back(tree: DecisionTree, level: int, by_number: bool) -> None:
    written = linearise(tree, level, by_number=by_number)
    assert parse(written) == tree
    lenient = parse_lenient(written)
    assert (lenient.tree, lenient.notes) == (tree, ())
    assert set(lenient.triples) == set(tree.triples)
    if level == 0:
        assert written.count("\n") == len(tree.nodes) - 1


def test_published_trees_are_written_and_read_back() -> None:
    for file in published():
        for record in read_trees(file, repair=True).records:
            for level, by_number in LEVELS:
                assert parse(linearise(record.tree, level, text=record.text, by_number=by_number)) == record.tree


def test_triples_follow_the_text_where_it_is_given() -> None:
    nodes = gout()
    nodes[0]["triples"].reverse()
    nodes[1]["triples"].reverse()
    tree = DecisionTree.from_preorder(nodes)
    assert linearise(tree, text=TEXT) == LEVEL_0
    ordered = in_text_order(TEXT, tree)
    assert ordered == tree
    assert ordered.to_preorder() == gout()


def test_names_of_nodes_are_never_roles_nor_twice() -> None:
    names = [letters(i) for i in range(2000)]
    assert names[:4] == ["A", "B", "E", "F"]
    assert len(set(names)) == 2000
    assert not {"C", "D"} & set(names)


# What models get wrong ------------------------------------------------------------------------------------------------

STRICT_FAULTS = [
    (LEVEL_0.replace("~ | basic", "~ | basics"), ["line 1", "'basics'"]),
    (LEVEL_0.replace(" | colchicine;", ";"), ["line 2", "subject | relation | object"]),
    (LEVEL_0.replace("adults with gout", "~"), ["line 1", '"~"']),
    (LEVEL_0.replace("C: ~", "If: ~"), ["line 3", "'If: ~"]),
    (LEVEL_0.replace(" | and", ""), ["line 1", '"null" with 2 triples']),
    (LEVEL_0.replace("flare\nD: ~", "flare | or\nD: ~"), ["line 3", '"or" with one triple']),
    (LEVEL_0.replace(" | or", " | xor"), ["line 2", "subject | relation | object"]),
    (LEVEL_0[: LEVEL_0.rindex("\n")], ["missing"]),
    (LEVEL_0 + "\nD", ["node 6", "1 more node follows"]),
    (LEVEL_2.replace("E. C: 6", "E. C: 9"), ["line 12", "triple 9", "1 to 7"]),
    (LEVEL_2.replace("6. ~", "8. ~"), ["line 7", "number 8", "expected 6"]),
    (LEVEL_2.replace("\nF\n", "\nZ\n"), ["'Z'"]),
    (LEVEL_2.replace("F. D: 7", "E. D: 7"), ["line 13", "name E", "expected F"]),
    (LEVEL_2.replace("B. D", "F. D"), ["line 11", "name F", "expected B"]),
    ("", ["line 1"]),
]


@pytest.mark.parametrize(("output", "said"), STRICT_FAULTS)
def test_strict_reading_names_the_line(output: str, said: list[str]) -> None:
    with pytest.raises(GatewiseError) as caught:
        parse(output, "row 5")
    for text in ["row 5", *said]:
        assert text in str(caught.value)


def test_lenient_reading_mends_and_says_so() -> None:
    tree = DecisionTree.from_preorder(gout())
    slips = LEVEL_0.replace("| basic |", "| Basic Conditon |").replace("C: ad", "c: ad").replace("| and", "| AND")
    parsed = parse_lenient(f"Here is the tree:\n```\n{slips}\n```")
    assert parsed.tree == tree
    assert len(parsed.notes) == 4
    assert "line 1" in parsed.notes[0]
    assert parsed.notes[2] == "line 3: the relation 'Basic Conditon' is read as \"basic condition\""

    parsed = parse_lenient(LEVEL_0.replace(" | or", "").replace("flare\nD: ~", "flare | or\nD: ~"))
    assert parsed.tree is not None
    assert [one.logical_rel for one in parsed.tree.nodes] == ["and", "and", "null", "null", "null"]
    assert len(parsed.notes) == 2


@pytest.mark.parametrize(
    "line",
    [
        "C or: a | sign | b; ~ | sign | x",
        "C: a | sign | b; ~ | sign | x | or;",
        "C: a | sign | b | or; ~ | sign | x | or",
        "c, OR : a | sign | b; ~ | sign | x; ",
    ],
)
def test_lenient_reading_finds_the_join_where_a_model_puts_it(line: str) -> None:
    parsed = parse_lenient(f"{line}\nD: ~ | drug | c | null\nD")
    assert parsed.tree is not None
    assert parsed.notes == ()
    assert [one.logical_rel for one in parsed.tree.nodes] == ["or", "null", "null"]
    assert [triple.object for triple in parsed.tree.triples] == ["b", "x", "c"]
    with pytest.raises(GatewiseError):
        parse(f"{line}\nD\nD")


@pytest.mark.parametrize(
    "word", ["prohibted drugs", "Prohibited  Drug", "prohibitde drugs", "prohibited_drugs", "prohibiteddrugs", "禁用 药物"]
)
def test_a_relation_with_a_slip_is_read_and_what_was_spelt_otherwise_is_noted(word: str) -> None:
    parsed = parse_lenient(f"D: adults | {word} | aspirin")
    assert parsed.tree is not None
    assert relation_in(parsed.tree.triples[0].relation, "en") == "prohibited drugs"
    assert len(parsed.notes) == 1
    assert " is read as " in parsed.notes[0]
    assert word in parsed.notes[0]


@pytest.mark.parametrize(
    "word",
    [
        *("prescribed drugs", "permitted drugs", "preferred drugs", "no drug therapy", "non-drug therapy", "nondrug therapy"),
        *("unprohibited drugs", "therapeutic drugs", "drugs", "basic cognition", "subclinical manifestation"),
        *("常用药物", "使用药物", "选用药物", "应用药物", "停用药物", "治疗药品", "非药物治疗", "基本治疗"),
    ],
)
def test_another_word_is_no_relation(word: str) -> None:
    parsed = parse_lenient(f"D: adults | {word} | aspirin; adults | drug therapy | ibuprofen")
    assert [triple.object for triple in parsed.triples] == ["ibuprofen"]
    assert len(parsed.notes) == 1
    assert "the relation is" in parsed.notes[0]


def test_a_number_that_several_triples_have_names_none() -> None:
    parsed = parse_lenient("triples:\n1. adults | sign | flare\n1. ~ | drug | colchicine\ntree:\nC: 1\nD: 1\nD")
    assert parsed.tree is None
    assert [triple.object for triple in parsed.triples] == ["flare", "colchicine"]
    assert parsed.notes[0] == "line 3: the number 1 was given to a triple above already"
    assert parsed.notes[1].startswith("line 5: no one triple has the number 1")
    unknown = parse_lenient("triples:\n0. adults | drug | colchicine\ntree:\nD: 1234567")
    assert unknown.tree is not None
    assert unknown.tree.triples == ()
    unread = parse_lenient("triples:\n1. a flare\n1. adults | drug | colchicine\n2. ~ | sign | flare\ntree:\nC: 2\nD: 1\nD")
    assert unread.tree is not None
    assert unread.tree.nodes[1].is_empty
    assert len(unread.notes) == 3
    same = parse_lenient("triples:\n1. adults | sign | flare\n1. adults | sign | flare\ntree:\nC: 1\nD\nD")
    assert same.tree is not None
    assert len(same.notes) == 1


def test_a_name_that_several_nodes_have_names_none() -> None:
    triples = "triples:\n1. adults | sign | flare\n2. ~ | drug | colchicine\n3. ~ | drug | naproxen\n"
    parsed = parse_lenient(f"{triples}nodes:\nA. C: 1\nB. D: 2\nB. D: 3\ntree:\nA\nB\nD")
    assert parsed.tree is None
    assert [one.triples[0].object for one in parsed.nodes] == ["flare", "colchicine", "naproxen"]
    assert parsed.notes[0] == "line 8: the name B was given to a node above already"
    assert parsed.notes[-1].startswith("no tree: line 11: nobody can tell which node B is")
    # One that cannot be read leaves no gap either, into which the nodes below would move.
    assert parse_lenient(f"{triples}nodes:\nA. C: 1\nB. give it\nE. D: 3\ntree:\nA\nB\nE").tree is None
    assert parse_lenient(f"{triples}nodes:\nA. C: 1\nD. D: 2\ntree:\nA\nD\nD").tree is None
    same = parse_lenient(f"{triples}nodes:\nA. C: 1\nB. D: 2; 3 | or\nB. D: 3; 2 | or\ntree:\nA\nB\nD")
    assert same.tree is not None
    assert len(same.notes) == 1
    assert len(same.nodes) == 2


@pytest.mark.parametrize("line", ["C: a | sign | x | or; ~ | sign | y | and", "C and: a | sign | x; ~ | sign | y | or"])
def test_a_node_that_is_joined_in_two_ways_gives_no_tree(line: str) -> None:
    parsed = parse_lenient(f"{line}\nD: ~ | drug | z\nD")
    assert parsed.tree is None
    assert parsed.notes[0].startswith("line 1: the triples are joined by ")
    assert parsed.notes[-1].startswith("no tree: line 1")
    known = parse_lenient("C: a | sign | x | null; ~ | sign | y | or\nD\nD")
    assert known.tree is not None
    assert known.tree.nodes[0].logical_rel == "or"
    assert len(known.notes) == 1


def test_lenient_reading_of_what_is_cut_off() -> None:
    parsed = parse_lenient(LEVEL_0[: LEVEL_0.index("check uric acid")])
    assert parsed.tree is not None
    assert [one.role for one in parsed.tree.nodes] == ["C", "D", "C", "D", "D"]
    assert parsed.tree.nodes[3].is_empty
    assert "missing" in parsed.notes[-1]
    cut = parse_lenient(LEVEL_2[: LEVEL_2.index("nodes:")])
    assert cut.tree is None
    assert len(cut.triples) == 7


def test_a_condition_that_lost_its_triples_gives_no_tree_but_a_reason() -> None:
    parsed = parse_lenient(LEVEL_0.replace("~ | sign | Without a flare", "when quiet"))
    assert parsed.tree is None
    assert parsed.notes[-1].startswith("no tree: node 3: a condition (role C) without triples")
    for nothing in ("", "I cannot help with that.", None, 7, "C: a | sign | b\n" * 5000):
        failed = parse_lenient(nothing)
        assert failed.tree is None
        assert failed.notes
        assert len(failed.notes) < 100


@properties
@given(st.text(max_size=200) | st.text(st.sampled_from("CD:;|~\\ \nand12.tree"), max_size=120))
def test_no_output_breaks_the_lenient_reader(output: str) -> None:
    parsed = parse_lenient(output)
    assert parsed.tree is not None or parsed.notes
    try:
        strict = parse(output)
    except GatewiseError:
        return
    assert strict == parsed.tree


@properties
@given(preorders(), st.integers(0, 2), st.data())
def test_no_slip_of_a_model_breaks_the_lenient_reader(nodes: list[dict[str, Any]], level: int, data: st.DataObject) -> None:
    written = linearise(DecisionTree.from_preorder(nodes), level)
    start = data.draw(st.integers(0, len(written)))
    end = data.draw(st.integers(start, len(written)))
    parsed = parse_lenient(written[:start] + data.draw(st.text(max_size=3)) + written[end:])
    assert parsed.tree is not None or parsed.notes


def test_a_triple_that_looks_like_a_number_or_a_ditto_keeps_its_meaning() -> None:
    odd = DecisionTree.from_preorder([node("D", ["~", "drug therapy", "1"], ["a;b|c\\", "drug therapy", "~\n2"], joined="and")])
    assert parse(linearise(odd)) == odd


@pytest.mark.parametrize(
    ("named", "called"), [("B. D: 2", "F"), ("B. D: 2", "f:"), ("B D: 2", "B"), ("B D: 2", "b."), ("B. nothing", "B")]
)
def test_a_name_that_no_node_has_gives_no_tree(named: str, called: str) -> None:
    """Without it the nodes below would come to other places."""
    triples = "triples:\n1. p | sign | fever\n2. ~ | drug | aspirin\n3. ~ | drug | ibuprofen\n"
    found = parse_lenient(f"{triples}nodes:\nA. C: 1\n{named}\nE. D: 3\ntree:\nA\n{called}\nE\n")
    assert found.tree is None
    assert any("nobody can tell which node" in note for note in found.notes)


@pytest.mark.parametrize("called", ["b", "B:", "b.", "B"])
@pytest.mark.parametrize("named", ["B. D: 2", "b. D: 2", "B) D: 2"])
def test_a_name_may_be_written_small_and_with_a_mark(named: str, called: str) -> None:
    triples = "triples:\n1. p | sign | fever\n2. ~ | drug | aspirin\n3. ~ | drug | ibuprofen\n"
    found = parse_lenient(f"{triples}nodes:\nA. C: 1\n{named}\nE. D: 3\ntree:\nA\n{called}\nE\n")
    assert found.tree is not None
    assert [triple.object for node in found.tree.nodes for triple in node.triples] == ["fever", "aspirin", "ibuprofen"]
