"""The document beside the passage, and finding one passage among many."""

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pdfplumber
import pytest
from gatewise_mdt import sample
from gatewise_mdt.review import Review, Session
from gatewise_mdt.review.shown import found_in, titles_of
from gatewise_mdt.review.sources import original_of_record, source_of
from PIL import Image
from reading_corpus import Heading, Prose, Table
from reading_markup import docx_of, html_of, markdown_of
from reading_pdf import pdf_of
from reportlab.pdfgen.canvas import Canvas

from gatewise.errors import GatewiseError

FILLER = "The group found no study of older people who live in care homes, and asks for one."
DOSES = Table(("Drug", "Dose"), (("Ramipril", "2.5 mg"), ("Bisoprolol", "1.25 mg"), ("Lithium", "400 mg")))
PARTS = [
    Heading("Treatment"),
    Prose(("Give colchicine 0.5 mg twice daily.", FILLER, FILLER)),
    Heading("Doses"),
    DOSES,
]
HOSTILE = "<script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def printed() -> bytes:
    return pdf_of(PARTS, Random(3), "none", "two columns")


def test_a_passage_of_a_pdf_is_marked_where_it_is_printed(printed: bytes) -> None:
    """What is printed in its regions is what it says, and nothing else; a table that was read without certainty is whole."""
    source = source_of(printed, "a.pdf")
    assert source.original is not None
    text, table = (source.original.around(*one.more["offsets"]) for one in source.passages)

    def inside(boxes: list[list[float]]) -> str:
        with pdfplumber.open(io.BytesIO(printed)) as opened:
            (page,) = opened.pages
            parts = [page.crop((x - 1, y - 1, x + w + 1, y + h + 1)).extract_text() for _, x, y, w, h in boxes]
        return " ".join(" ".join(parts).split())

    assert inside(text["regions"]) == f"Give colchicine 0.5 mg twice daily. {FILLER} {FILLER}"
    assert text["doubted"] == []
    assert inside(table["regions"]) == "Ramipril 2.5 mg Bisoprolol 1.25 mg Lithium 400 mg"
    assert inside(table["doubted"]) == "Drug Dose Ramipril 2.5 mg Bisoprolol 1.25 mg Lithium 400 mg"
    assert (table["pages"], table["name"]) == (1, "a.pdf")


@pytest.mark.parametrize(
    ("crop", "media", "size", "place"),
    [((50, 100, 545, 792), b"[ 0 0 595 842 ]", (495, 692), (22, 92)), (None, b"[ 10 20 605 862]", (595, 842), (62, 162))],
)
def test_margins_and_corners_of_pages_move_no_mark(
    crop: Any, media: bytes, size: tuple[float, float], place: tuple[float, float]
) -> None:
    """A printer's margins are cut off, or the page does not begin at its corner."""
    made = io.BytesIO()
    canvas = Canvas(made, pagesize=(595, 842), cropBox=crop)
    canvas.drawString(72, 700, "Give colchicine 0.5 mg twice daily for an acute flare of gout.")
    canvas.save()
    original = source_of(made.getvalue().replace(b"[ 0 0 595 842 ]", media), "a.pdf").original
    assert original is not None
    ((_, x, y, _, height),) = original.around(0, 10)["regions"]
    shown = original.picture(1)
    assert (shown["width"], shown["height"]) == size
    assert (x, y + height) == pytest.approx(place, abs=3)


@pytest.mark.parametrize("turned", [90, 180, 270])
def test_margins_of_turned_pages_move_no_mark(turned: int) -> None:
    made = io.BytesIO()
    canvas = Canvas(made, pagesize=(600, 840), cropBox=(20, 10, 500, 700))
    canvas.translate(300, 350)
    canvas.rotate(turned)
    canvas.drawString(0, 0, "Give colchicine 0.5 mg once.")
    canvas.setPageRotation(turned)
    canvas.save()
    original = source_of(made.getvalue(), "a.pdf").original
    assert original is not None
    ((_, x, y, _, height),) = original.around(0, 10)["regions"]
    shown = original.picture(1)
    picture = Image.open(io.BytesIO(base64.b64decode(shown["image"].partition(",")[2]))).convert("L")
    left, top, _, bottom = picture.point(lambda one: 255 * (one < 128)).getbbox() or (0, 0, 0, 0)
    scale = shown["width"] / picture.width
    assert (left * scale, top * scale, bottom * scale) == pytest.approx((x, y, y + height), abs=4)


def test_a_page_is_drawn_on_demand_in_bounds(printed: bytes) -> None:
    original = source_of(printed, "a.pdf").original
    assert original is not None
    shown = original.picture(1)
    picture = Image.open(io.BytesIO(base64.b64decode(shown["image"].removeprefix("data:image/png;base64,"))))
    assert max(picture.size) == 1600
    assert picture.width / picture.height == pytest.approx(shown["width"] / shown["height"], abs=0.001)
    with pytest.raises(GatewiseError, match=r"there is no page 2 in a\.pdf: it has 1"):
        original.picture(2)
    wide = io.BytesIO()
    canvas = Canvas(wide, pagesize=(14000, 200))
    canvas.drawString(72, 100, "Give colchicine 0.5 mg twice daily for an acute flare of gout.")
    canvas.save()
    large = source_of(wide.getvalue(), "large.pdf").original
    assert large is not None
    assert Image.open(io.BytesIO(base64.b64decode(large.picture(1)["image"].partition(",")[2]))).width == 1600


@pytest.mark.parametrize(("name", "write"), [("a.docx", docx_of), ("a.html", html_of), ("a.md", markdown_of)])
def test_blocks_stay_what_they_were(name: str, write: Any) -> None:
    """A table is a table with its headers, and the rows of the passage are marked."""
    source = source_of(write(PARTS, Random(2)), name)
    assert source.original is not None
    table = source.original.around(*source.passages[-1].more["offsets"])
    (block,) = (one for one in table["blocks"] if one["kind"] == "table")
    assert block["headers"] == [[["Drug", 1], ["Dose", 1]]]
    assert [[cell for cell, _ in row["cells"]] for row in block["rows"]] == [list(row) for row in DOSES.rows]
    assert all(row["own"] for row in block["rows"])
    assert table["headings"][-1] == "Doses"
    assert table["pages"] == 0


def test_lists_keep_their_depth_and_all_of_it_is_text() -> None:
    text = f"# Heart\n\nBefore it.\n\n- In pregnancy:\n  - stop warfarin\u202e {HOSTILE}\n- Give bisoprolol 2.5 mg\n"
    source = source_of(text.encode(), "a.md")
    assert source.original is not None
    found = source.original.around(*source.passages[-1].more["offsets"])
    said = [(one["kind"], one["depth"], "".join(text for text, _ in one["pieces"])) for one in found["blocks"]]
    assert said == [
        ("paragraph", 0, "Before it."),
        ("item", 0, "In pregnancy:"),
        ("item", 1, f"stop warfarin\\u202e {HOSTILE}"),
        ("item", 0, "Give bisoprolol 2.5 mg"),
    ]
    assert [own for one in found["blocks"] for _, own in one["pieces"]] == [False, False, False, True]
    assert found["headings"] == ["Heart"]


def test_of_a_long_table_the_rows_around_are_shown() -> None:
    rows = "".join(f"| drug {number} | {number} mg |\n" for number in range(1, 101))
    source = source_of(f"| Drug | Dose |\n|---|---|\n{rows}".encode(), "a.md")
    assert source.original is not None
    place = source.original.document.text.index("drug 50")
    (block,) = source.original.around(place, place + 10)["blocks"]
    assert block["left_out"] == [37, 38]
    assert [row["cells"][0][0] for row in block["rows"] if row["own"]] == ["drug 50"]


def test_without_its_document_a_passage_is_shown_alone(tmp_path: Path) -> None:
    file = tmp_path / "trees.jsonl"
    file.write_text(json.dumps({**sample()[0].to_json(), "sha256": "0" * 64, "source": "gone.pdf", "offsets": [0, 9]}) + "\n")
    review = Review(Session.open(str(file), tmp_path / "out.jsonl", reviewer="Cora Weiss"))
    assert review.show("source", {"number": "1"}) == {"name": ""}  # a file of the name that is another one would not do
    with pytest.raises(GatewiseError):
        review.show("page", {"number": "1", "page": "1"})
    review.session.close()


def test_a_file_of_trees_finds_its_document_as_long_as_that_is_the_same(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("# Gout\n\nGive colchicine.\n")
    (passage,) = source_of(document.read_bytes(), "gone/a.md").passages
    (tmp_path / "trees.jsonl").write_text(json.dumps({**sample()[0].to_json(), **passage.more, "text": passage.text}) + "\n")
    barred = {**passage.more, "source": "gone/" * 2000 + "a.md"}  # cannot be looked into, as a colleague's folder
    assert original_of_record(barred, tmp_path) is not None
    for found in ("gone/a.md", ""):
        session = Session.open(str(tmp_path / "trees.jsonl"), tmp_path / "out.jsonl", reviewer="Cora Weiss")
        assert Review(session).show("source", {"number": "1"})["name"] == found
        session.close()
        document.write_text("# Gout\n\nGive colchicine now.\n")


def test_what_was_cut_from_another_reading_is_not_marked(tmp_path: Path) -> None:
    """Versions of gatewise that read a document otherwise count its characters otherwise."""
    document = tmp_path / "a.md"
    document.write_text("# Gout\n\nGive colchicine.\n\n# Asthma\n\nGive salbutamol.\n")
    first, second = source_of(document.read_bytes(), "a.md").passages
    held = [
        {**sample()[0].to_json(), **second.more, "text": second.text, "offsets": one.more["offsets"]} for one in (first, second)
    ]
    (tmp_path / "trees.json").write_text(json.dumps(held))
    review = Review(Session.open(str(tmp_path / "trees.json"), tmp_path / "out.jsonl", reviewer="Cora Weiss"))
    assert [review.show("source", {"number": number})["name"] for number in (1, 2)] == ["", "a.md"]
    review.session.close()


def test_a_document_that_several_ask_for_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []

    def slow(*asked: Any) -> None:
        read.append(asked)
        time.sleep(0.05)

    monkeypatch.setattr("gatewise_mdt.review.session.original_of_record", slow)
    session = Session.open("sample:guidelines", tmp_path / "out.jsonl", reviewer="Cora Weiss")
    with ThreadPoolExecutor() as pool:
        list(pool.map(session.original, session.passages[:3]))
    assert len(read) == 1
    session.close()


def test_titles_tell_passages_apart() -> None:
    text = (
        "# Heart failure\n\n## Doses\n\n" + "\n\n".join(
            f"In adults with heart failure and a reduced ejection fraction start with {drug} and double it later. {FILLER * 8}"
            for drug in ("ramipril 2.5 mg", "bisoprolol 1.25 mg")
        ) + "\n\n## Follow-up\n\nMeasure the potassium.\n"
    )  # fmt: skip
    titles = titles_of(source_of(text.encode(), "a.md").passages)
    assert [(title, begins[:40]) for title, begins in titles] == [
        ("Doses", "In adults with … ramipril 2.5 mg and dou"),
        ("Doses", "In adults with … bisoprolol 1.25 mg and "),
        ("Follow-up", "Measure the potassium."),
    ]


def test_five_hundred_passages_stay_quick(tmp_path: Path) -> None:
    """Time of the processor, as a busy machine must not fail it: 0.1 to 0.2 s where this was written."""
    records = [sample()[number % 50] for number in range(500)]
    file = tmp_path / "trees.jsonl"
    file.write_text(
        "".join(json.dumps(one.to_json() | {"text": f"Ward {number}: {one.text}"}) + "\n" for number, one in enumerate(records))
    )
    review = Review(Session.open(str(file), tmp_path / "out.jsonl", reviewer="Cora Weiss"))
    review.show("session", {})  # the rules of the check are asked once for each tree
    begun = time.process_time()
    assert len(review.show("session", {})["passages"]) == 500
    assert review.show("passage", {"number": "400"})["number"] == 400
    assert review.show("search", {"words": "WARD 399:"})["numbers"] == [400]
    assert time.process_time() - begun < 2
    assert found_in(review.session.passages, "no such words") == []
    review.session.close()
