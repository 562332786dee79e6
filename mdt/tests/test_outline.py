import pytest
from gatewise_mdt import DecisionTree
from mdt_trees import gout

from gatewise.errors import GatewiseError

OUTLINE = """\
if all:
  - adults with gout | clinical manifestation | acute flare
  - adults with gout | basic condition | normal kidney function
yes:
  do any:
    - adults with gout | drug therapy | colchicine
    - colchicine | dosage and administration | 0.5 mg twice daily
    - adults with gout | drug therapy | naproxen
no:
  if:
    - adults with gout | clinical manifestation | Without a flare
  yes:
    do:
      - adults with gout | therapeutic schedule | check uric acid
  no:
    no recommendation
"""


def test_the_outline_is_as_documented() -> None:
    assert DecisionTree.from_preorder(gout()).to_outline() == OUTLINE


def test_editing_leaves_freedom_in_what_does_not_matter() -> None:
    edited = "# a remark\n\n" + OUTLINE.replace("if all:", "If ALL:").replace("no recommendation", "No recommendation.")
    edited = edited.replace(" | ", "|").replace("\n  ", "\n\t").replace("\n", "\r\n")
    assert DecisionTree.from_outline(edited) == DecisionTree.from_preorder(gout())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("yes:\n  do any", "maybe:\n  do any", ["line 4", "'maybe:'", '"yes:"']),
        ("if all:", "if some:", ["line 1", "'if some:'", '"if any:"']),
        ("  no:\n    no recommendation\n", "", ["line 14", "ends here", '"no:"']),
        ("no recommendation\n", "no recommendation\nyes:\n", ["line 17", "'yes:'", "the tree is complete"]),
        ("    do:\n      - adults with gout | therapeutic schedule | check uric acid", "    do:", ["line 13", "no triple follows"]),
        ("if all:", "if:", ["line 1", '"null" with 2 triples']),
        ("do:", "do any:", ["line 13", '"or" with one triple']),
        ("basic condition", "basics", ["line 3", "'basics'"]),
        (" | acute flare", "", ["line 2", "2 parts"]),
        ("  do any:", "do any:", ["line 5", "further to the right"]),
        (OUTLINE, "", ["line 1", "ends here"]),
    ],
)
def test_faults_are_named_with_their_line(old: str, new: str, said: list[str]) -> None:
    assert old in OUTLINE
    with pytest.raises(GatewiseError) as caught:
        DecisionTree.from_outline(OUTLINE.replace(old, new, 1), "tree.txt")
    for text in ["tree.txt, ", *said]:
        assert text in str(caught.value)
