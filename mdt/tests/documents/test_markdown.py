"""Markdown: what is no certain markup is text, and no word vanishes."""

import pytest
from gatewise_mdt.documents.document import Document
from gatewise_mdt.documents.passages import split_passages
from gatewise_mdt.documents.reading import document_of


def read(text: str) -> Document:
    return document_of(text.encode(), "gout.md", ".md")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("Give it if eGFR <LLN and ALT >ULN in adults.", ["Give it if eGFR <LLN and ALT >ULN in adults."]),
        ("ALT<ULN and eGFR>30", ["ALT<ULN and eGFR>30"]),
        ("if a<b and c>3", ["if a<b and c>3"]),
        ("<div>\nDo not give it.\n</div>\n\nGive <b>5</b> mg.", ["Do not give it.", "Give 5 mg."]),
        ('<p class="x">Do not</p><p>give</p>', ["Do not give"]),
        ("<table><tr>Never <td>A</td><td>5 mg</td></tr></table>", ["Never A 5 mg"]),
        ("10<sup>9</sup>/L, CO<sub>2</sub>, m<sup>2</sup>", ["10^9/L, CO2, m2"]),
        ("below 130/80<sup>1</sup> mmHg and 5 mg<sup>a</sup>", ["below 130/80 mmHg[1] and 5 mg[a]"]),
        ("below 130/80^1^ mmHg, 3x10^9^/L", ["below 130/80 mmHg[1], 3x10^9/L"]),
        ("below 130/80¹ mmHg, 10⁹/L, 5 m²", ["below 130/80 mmHg[1], 10⁹/L, 5 m²"]),
        ("1<sup>st</sup> line, 血压<sup>2</sup>", ["1st line, 血压[2]"]),
        ("<del>500</del> 250 mg", ["<del>500</del> 250 mg"]),
        ('![Not in pregnancy](a.png) <img alt="nor in infants">', ['Not in pregnancy <img alt="nor in infants">']),
        ('Give [it](https://x.org/a "never").', ["Give (never) it."]),
        ("[Dose]: 5mg\n\nGive it.", ["[Dose]: 5mg", "Give it."]),
        ("|a|b|\n|---|---|\n|x|5 mg|not in pregnancy|", ["a: x. b: 5 mg. not in pregnancy."]),
        ("Treat until ANC\n> 500, then stop.", ["Treat until ANC > 500, then stop."]),
        ("> 140/90: start it\n\n> ULN: stop it", ["> 140/90: start it", "> ULN: stop it"]),
        ("> Do not\n> give it.\n>\n> - 5 mg", ["Do not give it.", "5 mg"]),
        ("A dose of 5\n- 10 mg.", ["A dose of 5 - 10 mg."]),
        ("Test HLA-B*57:01 and HLA-B*58:01.", ["Test HLA-B*57:01 and HLA-B*58:01."]),
        ("\n".join("  " * depth + f"- level {depth}" for depth in range(30)), [f"level {depth}" for depth in range(30)]),
    ],
)
def test_no_word_vanishes(source: str, said: list[str]) -> None:
    assert [block.text for block in read(source).blocks] == said


def test_a_list_may_begin_with_zero_and_an_allele_with_a_star() -> None:
    assert [block.text for block in read("0. Stop\n1. Give\n2. Repeat step 1").blocks] == ["0. Stop", "1. Give", "2. Repeat step 1"]
    assert [block.text for block in read("*2/*2 or *2/*3 need 5 mg").blocks] == ["*2/*2 or *2/*3 need 5 mg"]


def test_a_line_under_a_sentence_makes_no_heading_of_it() -> None:
    blocks = read("Gout in adults\n====\n\nIf she is pregnant, do not give methotrexate\n---\nOtherwise give it.").blocks
    assert [(block.level, block.where) for block in blocks] == [(1, "line 1"), (0, "line 4"), (0, "line 6")]


def test_comments_and_empty_headings_are_noted() -> None:
    document = read(
        "<!-- which\n\ndose? -->\n# Gout\n\nGive it.\n\n## Later\n\n# Do not give NSAIDs in renal failure\n\n# Sources\n"
    )
    assert document.notes == (
        'gout.md: a comment was left out: "which dose?"',
        'gout.md: headings were left out, as nothing stands under: "Later" (line 8), "Sources" (line 12)',
    )
    assert [block.where for block in document.blocks][:2] == ["line 4", "line 6"]
    assert [one.text for one in split_passages(document)] == ["Gout@Give it.", "Do not give NSAIDs in renal failure"]


def test_a_heading_that_tells_something_is_kept_with_the_headings_above() -> None:
    (first, second) = split_passages(read("# Adults with gout\n\n## Do not give NSAIDs\n\n### Flares\n\nGive colchicine."))
    assert first.text == "Adults with gout@Do not give NSAIDs"
    assert second.headings == ("Adults with gout", "Do not give NSAIDs", "Flares")


@pytest.mark.parametrize("text", ["Give O2.", "O2", "给氧"])
def test_a_few_words_under_a_heading_are_a_passage(text: str) -> None:
    assert [one.text for one in split_passages(read(f"# Hypoxia in adults\n\n{text}"))] == [f"Hypoxia in adults@{text}"]


def test_a_bold_line_is_a_heading_and_a_footnote_follows_what_refers_to_it() -> None:
    blocks = read(
        "# Gout\n\n**Renal failure:**\n\nGive less.[^a]\n\n**Do not stop.**\n\n[^a]: Not\n  in infants.\n\n[^b]: 5 mg"
    ).blocks
    assert [(block.level, block.text) for block in blocks] == [
        (1, "Gout"),
        (2, "Renal failure:"),
        (0, "Give less."),
        (0, "Footnote: Not in infants."),
        (0, "Do not stop."),
        (0, "[^b]: 5 mg"),
    ]


def test_a_footnote_of_a_header_over_an_empty_column_is_said() -> None:
    blocks = read("| Drug | Never[^a] |\n|---|---|\n| colchicine | |\n\n[^a]: In pregnancy.").blocks
    assert [block.text for block in blocks] == ["Drug: colchicine."]
    assert blocks[0].notes == ('headers of the table were left out, as nothing stands under: "Never (footnote: In pregnancy.)"',)


def test_a_table_in_html_is_read_as_text_with_a_note() -> None:
    html = "<table>\n<tr><th>Drug</th><th>Dose</th></tr>\n<tr><td>naproxen</td><td>5 mg</td></tr>\n</table>"
    (first, second) = read(f"# Gout\n\n| Adults | Dose |\n|---|---|\n| all | 5 mg |\n\n{html}").blocks[1:]
    assert (first.text, first.notes) == ("Adults: all. Dose: 5 mg.", ())
    assert second.text == "Drug Dose naproxen 5 mg"
    assert "a table in HTML, read as text" in second.notes[0]
