"""The pictures in docs/pictures: each is on a page, in words too, and small; a recording has what was printed."""

import re
from pathlib import Path

import pytest
from scripts import ROOT, script
from test_readme import PAGES

pictures = script("tools/pictures.py")
SHOWN = {
    (page.parent / file).resolve(): words
    for page in PAGES
    for words, file in re.findall(r"!\[(.*?)\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
}


def test_every_picture_is_on_a_page_and_every_one_shown_has_words() -> None:
    assert {*(ROOT / "docs/pictures").iterdir()} - {*SHOWN} == set()
    assert [str(picture) for picture, words in SHOWN.items() if len(words.split()) < 4] == []


@pytest.mark.parametrize("picture", sorted((ROOT / "docs/pictures").iterdir()), ids=lambda picture: picture.name)
def test_a_picture_is_small_and_fetches_nothing(picture: Path) -> None:
    assert picture.stat().st_size < (150_000 if picture.suffix == ".svg" else 100_000)
    if picture.suffix == ".svg":
        assert not re.search(r"href|url\(|@import|<script", picture.read_text(encoding="utf-8"))


def test_a_recording_ends_with_what_a_terminal_would_show() -> None:
    bar = "".join(f"\r\x1b[2Kmeasuring {done}/4" for done in range(5))
    *earlier, (_, last) = pictures.frames("run it", f"\x1b[2mloading\x1b[0m\r\n{bar}\r\n\x1b[1A\x1b[2Kdone \x1b[1m12\x1b[0m\r\n")
    assert ["".join(one for one, _ in line) for line in last] == ["$ run it", "loading", "done 12"]
    assert last[1][0] == ("l", "d")
    assert last[2][5:] == (("1", "b"), ("2", "b"))
    assert any("measuring 2/4" in "".join(one for one, _ in line) for _, screen in earlier for line in screen)


def test_columns_stay_in_their_places() -> None:
    drawn = pictures.drawn(tuple((one, "") for one in "a   bc"), 0)
    assert re.findall(r'x="([\d.]+)" textLength="([\d.]+)">(\w+)', drawn) == [("0", "7.8", "a"), ("31.2", "15.6", "bc")]
