import pytest
from gatewise_mdt import DecisionTree, in_text_order, linearise, parse, parse_lenient, read_trees
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import TEXT, gout, node, properties, published, trees

from gatewise.errors import GatewiseError

LINES = """\
C: adults with gout | sign | acute flare; ~ | basic | normal kidney function | and
D: ~ | drug | colchicine; colchicine | dose | 0.5 mg twice daily; ~ | drug | naproxen | or
C: ~ | sign | Without a flare
D: ~ | plan | check uric acid
D"""


def test_the_lines_are_as_documented() -> None:
    assert linearise(DecisionTree.from_preorder(gout())) == LINES


@properties
@given(tree=trees)
def test_what_is_written_is_read_back(tree: DecisionTree) -> None:
    written = linearise(tree)
    assert parse(written) == tree
    assert parse_lenient(written) == (tree, ())
    assert written.count("\n") == len(tree.nodes) - 1


def test_published_trees_are_written_and_read_back() -> None:
    for file in published():
        for record in read_trees(file, repair=True).records:
            assert parse(linearise(record.tree, text=record.text)) == record.tree


def test_triples_follow_the_text_where_it_is_given() -> None:
    nodes = gout()
    nodes[0]["triples"].reverse()
    nodes[1]["triples"].reverse()
    tree = DecisionTree.from_preorder(nodes)
    assert linearise(tree, text=TEXT) == LINES
    assert in_text_order(TEXT, tree).to_preorder() == gout()


def test_a_triple_that_looks_like_a_mark_keeps_its_meaning() -> None:
    odd = DecisionTree.from_preorder([node("D", ["~", "drug therapy", "1"], ["a;b|c\\", "drug therapy", "~\n2"], joined="and")])
    assert parse(linearise(odd)) == odd


# What models get wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (LINES.replace("~ | basic", "~ | basics"), ["line 1", "'basics'"]),
        (LINES.replace(" | colchicine;", ";"), ["line 2", "subject | relation | object"]),
        (LINES.replace("adults with gout", "~"), ["line 1", '"~"']),
        (LINES.replace("C: ~", "If: ~"), ["line 3", "'If: ~"]),
        (LINES.replace(" | and", ""), ["line 1", '"null" does not fit']),
        (LINES.replace("flare\nD: ~", "flare | or\nD: ~"), ["line 3", '"or" does not fit']),
        (LINES.replace(" | or", " | xor"), ["line 2", "subject | relation | object"]),
        (LINES[: LINES.rindex("\n")], ["missing"]),
        (LINES + "\nD", ["line 6", "the tree is complete above"]),
        ("", ["no nodes"]),
    ],
)
def test_strict_reading_names_the_line(output: str, said: list[str]) -> None:
    with pytest.raises(GatewiseError) as caught:
        parse(output)
    for text in said:
        assert text in str(caught.value)


def test_lenient_reading_mends_and_says_so() -> None:
    slips = LINES.replace("C: ad", "- c: ad").replace("| and", "| AND")
    parsed = parse_lenient(f"Here is the tree:\n```\n{slips}\n```")
    assert parsed.tree == DecisionTree.from_preorder(gout())
    assert [note.partition(":")[0] for note in parsed.notes] == ["line 1", "line 2", "line 8"]

    parsed = parse_lenient(LINES.replace(" | or", "").replace("flare\nD: ~", "flare | or\nD: ~"))
    assert parsed.tree is not None
    assert [one.logical_rel for one in parsed.tree.nodes] == ["and", "and", "null", "null", "null"]
    assert len(parsed.notes) == 2


@pytest.mark.parametrize("word", ["non-drug therapy", "therapeutic drugs", "停用药物", "治疗药品"])
def test_another_word_is_no_relation(word: str) -> None:
    parsed = parse_lenient(f"D: adults | {word} | aspirin; adults | drug therapy | ibuprofen")
    assert parsed.tree is not None
    assert [triple.object for triple in parsed.tree.triples] == ["ibuprofen"]
    assert len(parsed.notes) == 1
    assert "the relation is" in parsed.notes[0]


def test_lenient_reading_of_what_is_cut_off() -> None:
    parsed = parse_lenient(LINES[: LINES.index("check uric acid")])
    assert parsed.tree is not None
    assert [one.role for one in parsed.tree.nodes] == ["C", "D", "C", "D", "D"]
    assert parsed.tree.nodes[3].is_empty
    assert "missing" in parsed.notes[-1]


def test_a_node_that_cannot_be_read_moves_no_other_to_another_side() -> None:
    parsed = parse_lenient("C: a | sign | b\nD -> a | drug | penicillin\nD: a | drug | insulin")
    assert parsed.tree is None
    assert parsed.notes[0].startswith("line 2: found 'D -> a | drug | penicillin'")


def test_the_subject_of_a_first_triple_stands_for_others_though_that_is_none() -> None:
    parsed = parse_lenient(
        "C: gout | basics | mild; kidney function | sign | reduced; ~ | sign | flare | and\nD: ~ | drug | naproxen\nD"
    )
    assert parsed.tree is not None
    assert [triple.subject for triple in parsed.tree.triples] == ["kidney function", "gout", "gout"]


def test_an_empty_subject_stands_for_none() -> None:
    parsed = parse_lenient("C:  | sign | gout; adults | sign | flare\nD: ~ | drug | naproxen\nD")
    assert parsed.tree is not None
    assert [triple.subject for triple in parsed.tree.triples] == ["adults", "adults"]


def test_a_condition_that_lost_its_triples_gives_no_tree_but_a_reason() -> None:
    parsed = parse_lenient(LINES.replace("~ | sign | Without a flare", "when quiet"))
    assert parsed.tree is None
    assert parsed.notes[-1].startswith("no tree: node 3: a condition (role C) without triples")
    for nothing in ("", "I cannot help with that.", "C: a | sign | b\n" * 5000, "no\n" * 5000):
        failed = parse_lenient(nothing)
        assert failed.tree is None
        assert 0 < len(failed.notes) < 100


@properties
@given(st.text(max_size=200) | st.text(st.sampled_from("CD:;|~\\ \nand12.tree"), max_size=120))
def test_no_output_breaks_the_lenient_reader(output: str) -> None:
    parsed = parse_lenient(output)
    assert parsed.tree is not None or parsed.notes
    if parsed.tree is not None and not parsed.notes:
        assert parse(output) == parsed.tree
