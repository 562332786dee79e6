"""HTML: lists and tables as they are marked, what is not shown left out, and nothing without a word."""

import pytest
from gatewise_mdt.documents.document import Document
from gatewise_mdt.documents.passages import split_passages
from gatewise_mdt.documents.reading import document_of

from gatewise.errors import GatewiseError


def read(source: str) -> Document:
    return document_of(source.encode(), "gout.html", ".html")


def passages(source: str) -> list[str]:
    return [one.text for one in split_passages(read(source))]


SYMBOL = "<span style='font-family:Symbol'>{}</span>"
LINK = '<sup><a href="#n{0}">{0}</a></sup>'


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (  # a page without the tag "body": the parser leaves all this in its head
            "<!doctype html><title>t</title><main><h1>Gout</h1><p>Give it</p></main>",
            ["Gout", "Give it"],
        ),
        ("<h2><button>Renal failure</button></h2><p>Stop it", ["Renal failure", "Stop it"]),
        ("<dl><div>Note:<div><dt>Pregnant<dd>stop it</div><p>and rest</div>", ["Note:", "Pregnant", "stop it", "and rest"]),
        ("<p>Give <s>50</s>5 mg", ["Give 50 5 mg"]),
        ("<table><tr><th>Drug<td>aspirin<tr><th>Dose<td>75 mg</table>", ["Drug aspirin", "Dose 75 mg"]),
        (
            "<h1>Gout</h1><p>Give\n <b>5</b>&nbsp;mg.</p>and <i>rest</i><div>Stop it</div>",
            ["Gout", "Give 5 mg.", "and rest", "Stop it"],
        ),
        ("<p>Give 10<sup>9</sup>/L, below 130/80<sup>1</sup> mmHg, CO<sub>2</sub>", ["Give 10^9/L, below 130/80 mmHg[1], CO2"]),
        ("<p>If ALT &lt; 3 give it<br><br>Else stop", ["If ALT < 3 give it", "Else stop"]),
        ("<p>Give <math><mfrac><mn>1</mn><mn>2</mn></mfrac></math> mg", ["Give 1/2 mg"]),
        ("<p>Give <math><mn>1</mn><mfrac><mn>1</mn><mn>2</mn></mfrac></math> tablets", ["Give 1 1/2 tablets"]),
        ("<p>below <math><msup><mn>10</mn><mn>9</mn></msup></math>/L", ["below 10^9/L"]),
        ("<p>Give 1<sup>1</sup>/<sub>2</sub> tablets", ["Give 1 1/2 tablets"]),
        (
            f"<p>5 {SYMBOL.format('m<sup><a href=#fn1>1</a></sup>')}g<p id=fn1>Not in children.",
            ["5 μg", "Footnote: Not in children."],
        ),
        (f"<p>eGFR {SYMBOL.format('³')} 30, 5 {SYMBOL.format('m')}g", ["eGFR ≥ 30, 5 μg"]),
        ("<p><span style='font-family: Segoe UI Symbol'>Give 5 mg</span>", ["Give 5 mg"]),
        ("<p><![CDATA[Give 5 mg if < 3]]> daily", ["Give 5 mg if < 3 daily"]),
        ("<h2>6 months to 5 years</h2><p>Give 120 mg", ["6 months to 5 years", "Give 120 mg"]),
        ("<p>Stop:<br>- naproxen<br>• warfarin", ["Stop:", "naproxen", "warfarin"]),
        ("<p>Stop:<br>\uf0b7 naproxen<br>\uf0a7warfarin", ["Stop:", "naproxen", "warfarin"]),  # of Word's own fonts
        (
            "<p>Give it</p><p><strong>Renal failure</strong></p><p><b>Do not give it.</b></p>",
            ["Give it", "Renal failure", "Do not give it."],
        ),
        ("<ol start=3><li>Test<li value=7>Skip step 3<li>Go</ol>", ["3. Test", "7. Skip step 3", "8. Go"]),
        ("<ol type=a><li>Test</ol><ol reversed><li>x<li type=I>y</ol>", ["a. Test", "2. x", "I. y"]),
        ("<table><tr><td>Only a box<p>and more</table>", ["Only a box", "and more"]),
        (
            "<p class=MsoListParagraph style='mso-list:l0 level1 lfo1'><span style='mso-list:Ignore'>2.&nbsp;</span>Test",
            ["2. Test"],
        ),
    ],
)
def test_what_is_marked_is_read(source: str, said: list[str]) -> None:
    assert [block.text for block in read(source).blocks] == said


def test_inner_items_belong_to_their_outer_items() -> None:
    inner = "<ul><li>stop <b>warfarin</b><li>give LMWH</ul>"
    assert passages(f"<h1>Heart failure</h1><ul><li>In pregnancy:{inner}<li>Give bisoprolol<p>and rest</ul>") == [
        "Heart failure@In pregnancy: stop warfarin; give LMWH",
        "Heart failure@Give bisoprolol and rest",
    ]
    assert passages("<dl><dt>In pregnancy<dd>stop it<dt>Others<dd>give it</dl>") == ["In pregnancy: stop it", "Others: give it"]
    word = "".join(
        f"<p style='mso-list:l0 level{level} lfo1'>{text}" for level, text in ((1, "Pregnant:"), (2, "stop"), (1, "Give it"))
    )
    assert passages(word) == ["Pregnant: stop", "Give it"]


def test_cells_over_columns_and_rows_keep_their_headers() -> None:
    top = "<thead><tr><th rowspan=2>Drug<th colspan=3>Dose if eGFR is<tr><th>&ge; 60<th>30-59<th>&lt; 30</thead>"
    rows = "<tr><td rowspan=2>apixaban<td>5 mg<td>2.5 mg<td>none<tr><td>6 mg<td colspan=2><ul><li>ask<li>stop</ul>"
    blocks = read(f"<table><caption>Doses</caption>{top}{rows}<tfoot><tr><td colspan=4>Not in infants.</table>").blocks
    egfr = "Dose if eGFR is"
    assert [block.text for block in blocks] == [
        "Doses",
        f"Drug: apixaban. {egfr} ≥ 60: 5 mg. {egfr} 30-59: 2.5 mg. {egfr} < 30: none.",
        f"Drug: apixaban. {egfr} ≥ 60: 6 mg. {egfr} 30-59 and {egfr} < 30: ask; stop.",
        "Not in infants.",
    ]


def test_a_table_that_only_sets_things_side_by_side_is_no_table() -> None:
    assert passages("<table><tr><td><h2>Adults</h2><p>Give it.<td><h2>Children</h2>Ask.</table>") == [
        "Adults@Give it.",
        "Children@Ask.",
    ]
    (row,) = read("<table><tr><th>Drug<th>Dose<tr><td>a<td><table><tr><td>1<td>2</table></table>").blocks
    assert "compare it with the document" in row.notes[0]


def test_a_footnote_follows_what_refers_to_it() -> None:
    link = '<sup><a href="#fn1">1</a></sup>'
    document = read(f'<p>Give it{link}.<p>Rest.<ol><li id="fn1">Not in infants. <a href="#r">↩</a></ol>')
    assert [block.text for block in document.blocks] == ["Give it.", "Footnote: Not in infants.", "Rest."]


@pytest.mark.parametrize(
    ("link", "note", "said"),
    [
        ('<a href="#n">1</a>', "<p id=n><sup>1</sup>5 mg if eGFR is below 30.", "5 mg if eGFR is below 30."),
        ('<a href="#n">1</a>', '<p id=n><a href="#back">1</a>20 mg in children.', "20 mg in children."),
        ('<a href="#n">1</a>', "<aside id=n><p>5 mg if eGFR is below 30.</aside>", "5 mg if eGFR is below 30."),
        ('<a href="#n">1</a>', "<p id=n>[1] Not in infants.", "Not in infants."),
        (
            '<a href="#n">1</a>',
            "<ol><li id=n><p>Below 4</p><p>2 mg if 10<sup>9</sup>/L</ol>",
            "Below 4 2 mg if 10^9/L",
        ),
        ('<a href="#n">T1</a>', "<div id=n><table><tr><th>Age<th>Dose<tr><td>3 months<td>60 mg</table></div>", None),
    ],
)
def test_a_footnote_keeps_its_numbers(link: str, note: str, said: str | None) -> None:
    found = read(f"<p>Give it<sup>{link}</sup>.</p>{note}").blocks
    assert [block.text for block in found if block.kind == "footnote"] == ([] if said is None else [f"Footnote: {said}"])
    assert said is not None or found[-1].text == "Age: 3 months. Dose: 60 mg."


def test_what_is_not_shown_or_leads_elsewhere_is_left_out_and_the_rest_noted() -> None:
    hidden = (
        "<script>let x = 1</script><style>p {}</style><template>no</template><p hidden>never</p><p style='display: none'>so</p>"
    )
    page = (
        f"<nav>Home</nav><header><h1>Gout</h1>Join</header><main>{hidden}<del>5</del> Give it.<img alt='flow chart'><svg/></main>"
    )
    document = read(f"<html><head><title>t</title></head><body>{page}<footer>Imprint</footer>Ends</body></html>")
    assert [block.text for block in document.blocks] == ["Gout", "5 Give it."]
    assert document.notes == (
        'gout.html: what stands around the text was left out: "Ends", "Home", "Gout Join", "Imprint"',
        'gout.html: hidden text was left out: "never", "so"',
        'gout.html: text that is struck through was read like any other: "5"',
        "gout.html: 1 picture could not be read: look there for text that matters",
        'gout.html: 1 picture could not be read, which the page calls "flow chart": look there for text that matters',
    )
    assert passages("<body><header><h1>Gout</h1></header><p>Give it.</p><aside>Join</aside>") == ["Gout@Give it."]


@pytest.mark.parametrize(
    ("source", "note"),
    [
        ("<p>Give it<button>Pregnancy</button><textarea>x y</textarea>", 'left out: "Pregnancy", "x y"'),
        (f"<nav>{LINK.format(1)}</nav><p>Give it<p id=n1>1. Not in infants", 'refers to were left out: "Not in infants"'),
        (
            f"<p>Give it{LINK.format(1)}<p id=n1>1. Never{LINK.format(2)}<p id=n2>2. Not in infants",
            'refers to were left out: "Not in infants"',
        ),
        ("<table><tr><th>Drug<th>Dose<tr><td>a<nav>Not in infants</nav><td>5 mg</table>", 'was left out: "Not in infants"'),
        ("<p>Give 5 mg.</p><footer>1<h1>x</h1>", 'was left out: "1 x"'),
    ],
)
def test_nothing_is_left_out_without_a_note(source: str, note: str) -> None:
    assert note in " ".join(read(source).notes)


def test_a_page_that_is_too_deep_is_refused_in_a_sentence() -> None:
    with pytest.raises(GatewiseError, match="hundreds deep"):
        read("<div>" * 2000 + "Give it")


def test_a_page_that_names_an_encoding_of_no_texts_is_refused_in_a_sentence() -> None:
    for name in (b"rot13", b"hex", b"undefined"):
        with pytest.raises(GatewiseError, match="not UTF-8"):
            document_of(b"<meta charset=" + name + b"><p>Give it\xe9", "gout.html", ".html")
