"""An extraction of many passages that breaks off goes on where it was: nothing is done twice, and nothing is lost."""

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, Extraction
from gatewise_mdt.extraction.batch import Batch, Journal, extract_pieces, read_pieces, summed
from gatewise_mdt.extraction.extractor import Extracts, Text
from mdt_trees import node, triple

from gatewise.errors import GatewiseError

COUNT = 40
SETTINGS = {"adapter": "abc", "verbatim": False}


class Slow(Extracts):
    """Stands in for an extractor: a tree that names its text; every ninth text is a fault, every eleventh has none."""

    batch_size = 3

    def __init__(self, log: Path | None = None, seconds: float = 0) -> None:
        self.log, self.seconds = log, seconds

    def extract(self, texts: Sequence[Text]) -> list[Extraction | GatewiseError]:
        time.sleep(self.seconds)
        if self.log:
            with self.log.open("a") as stream:
                stream.writelines(f"{one.text}\n" for one in texts)
        return [self.one(one.text) for one in texts]

    def one(self, text: str) -> Extraction | GatewiseError:
        number = int(text.split()[-1].rstrip("."))
        if number % 9 == 8:
            return GatewiseError(f"{text!r} is too long")
        nodes = [node("D")] if number % 11 == 10 else [node("D", triple(f"drug {number}", "drug therapy", "adults"))]
        warnings = ("hurried é",) if number % 2 else ()
        return Extraction(
            text, DecisionTree.from_preorder(nodes), "en", warnings=warnings, made_with={"date": text}, confidence=(0.5,)
        )


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two documents, of which the second repeats what the first says."""
    made = [tmp_path / "a.md", tmp_path / "b.md"]
    for file, count in zip(made, (COUNT, 5), strict=True):
        file.write_text("".join(f"# Adults\n\n## Part {i}\n\n{'Give ' * (i % 7 + 1)}adults drug {i}.\n\n" for i in range(count)))
    return made


def extracted(files: Sequence[Path], extractor: Any, journal: Journal | None) -> Batch:
    batch = Batch()
    return extract_pieces(read_pieces(files, batch), extractor, batch, journal=journal)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_killed_at_random_moments(tmp_path: Path, files: list[Path]) -> None:
    expected = extracted(files, Slow(), None)
    assert len(expected.records) > 30
    assert expected.faults
    done, work, result = tmp_path / "done.txt", tmp_path / "out.work.jsonl", tmp_path / "result"
    chance = random.Random(0)
    kills = 0
    while not result.exists():
        child = os.fork()
        if child == 0:
            batch = extracted(files, Slow(done, 0.004), Journal(work, SETTINGS))
            told = json.dumps([[one.to_json() for one in batch.records], batch.faults, batch.notes, batch.failed])
            part = tmp_path / "part"
            part.write_text(told)
            part.replace(result)
            os._exit(0)
        time.sleep(chance.uniform(0.005, 0.1 * (1 + kills / 20)))  # later and later, so that a busy machine gets there too
        os.kill(child, signal.SIGKILL)
        kills += 1
        os.waitpid(child, 0)
        assert kills < 500
    whole = [[one.to_json() for one in expected.records], expected.faults, expected.notes, expected.failed]
    assert json.loads(result.read_text()) == whole
    # Twice is asked only for the batch that was on its way when it was killed.
    assert len(done.read_text().splitlines()) <= COUNT + 5 + kills * Slow.batch_size


def test_what_was_found_is_not_asked_for_again(tmp_path: Path, files: list[Path]) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    expected = extracted(files, Slow(first), Journal(tmp_path / "w.jsonl", SETTINGS))
    lines = (tmp_path / "w.jsonl").read_bytes().split(b"\n")
    assert len(lines) == COUNT + 5 + 2
    (tmp_path / "w.jsonl").write_bytes(b"\n".join([*lines[:20], lines[20][:7]]))  # torn in the middle of a line
    journal = Journal(tmp_path / "w.jsonl", SETTINGS)
    assert extracted(files, Slow(second), journal) == expected
    texts = sorted(first.read_text().splitlines())
    assert len(second.read_text().splitlines()) == len(texts) - 19
    # A document that has changed: only what is new in it is asked for.
    files[1].write_text(files[1].read_text() + "## More\n\nGive adults drug 77.\n")
    third = tmp_path / "third.txt"
    extracted(files, Slow(third), Journal(tmp_path / "w.jsonl", SETTINGS))
    assert third.read_text() == "Adults@More: Give adults drug 77.\n"
    journal.remove()
    assert not journal.path.exists()


def test_a_journal_of_other_settings_or_of_something_else_is_left_alone(tmp_path: Path, files: list[Path]) -> None:
    path = tmp_path / "w.jsonl"
    extracted(files[1:], Slow(), Journal(path, SETTINGS))
    whole = path.read_bytes()
    with pytest.raises(GatewiseError, match="not left by an extraction with these settings"):
        Journal(path, {**SETTINGS, "verbatim": True})
    for other, said in (
        (b'{"text": "a", "tree": []}\n', "not left by an extraction with these settings"),
        (whole.replace(b'"role"', b'"roll"', 1), "line 2 is damaged"),
        (whole.replace(b'"extraction": {', b'"extraction": [5], "x": {', 1), "line 2 is damaged"),
    ):
        path.write_bytes(other)
        with pytest.raises(GatewiseError, match=said):
            Journal(path, SETTINGS)
        assert path.read_bytes() == other


def test_a_full_disk_stops_it_and_costs_nothing(tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, batch = tmp_path / "w.jsonl", Batch()
    pieces = read_pieces(files, batch)
    sync, calls = os.fsync, iter(range(99))

    def full(handle: int) -> None:
        if next(calls) == 6:
            raise OSError(28, "No space left on device")
        sync(handle)

    with monkeypatch.context() as small:
        small.setattr(os, "fsync", full)
        with pytest.raises(GatewiseError, match="No space left on device"):
            extract_pieces(pieces, Slow(), batch, journal=Journal(path, SETTINGS))  # type: ignore[arg-type]
    assert batch.read >= 5  # what was found but could not be kept is given, too
    assert extracted(files, Slow(), Journal(path, SETTINGS)) == extracted(files, Slow(), None)


def test_notes_of_one_kind_are_summed_up() -> None:
    cut = '"{}" is said again, as the text was cut after it'
    said = [("a.md", f"line {line}", cut.format(f"In {line}:")) for line in range(3, 30, 2)]
    said += [("a.md", "line 4", "no headers were found"), ("b.md", "line 3", cut.format("x")), ("b.md", "", "cut at 2")]
    assert summed(said, most=3) == [
        'a.md, line 3: "In 3:" is said again, as the text was cut after it; likewise line 5, line 7, line 9 and 10 more',
        "a.md, line 4: no headers were found",
        'b.md, line 3: "x" is said again, as the text was cut after it',
        "b.md: cut at 2",
    ]
