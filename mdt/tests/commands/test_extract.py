"""``gatewise mdt extract`` and ``evaluate --adapter``, with an adapter of random weights."""

import hashlib
import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import Extractor, read_trees
from mdt_models import pdf, random_adapter_folder
from mdt_trees import TEXT, gout
from refusals import assert_refused
from typer.testing import CliRunner

from gatewise import __version__ as gatewise_version
from gatewise.adapters.files import fingerprint
from gatewise.cli.main import app
from gatewise.errors import GatewiseError

pytest.importorskip("llguidance")

Gatewise = Callable[..., Any]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def gatewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path) -> Gatewise:
    """gatewise("extract", ...) -> the result of the command with the adapter, in a folder with some texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Path("good.txt").write_text(TEXT)
    Path("long.md").write_text("# Adults with gout\n\nGive colchicine at once.\n\n# Children with gout\n\nGive naproxen to them.\n")
    Path("scan.pdf").write_bytes(pdf(""))
    Path("gold.json").write_text(json.dumps([{"text": TEXT, "tree": gout()}]))
    few = ["--max-new-tokens", "150", "--verbatim"]
    return lambda *words, **more: CliRunner().invoke(app, ["mdt", *map(str, words), "--adapter", str(adapter), *few], **more)


def test_trees_say_what_they_were_made_with_and_from_which_document(gatewise: Gatewise, adapter: Path, tmp_path: Path) -> None:
    result = gatewise("extract", "good.txt", "long.md", "-f", "json", "-o", "out.json")
    assert result.exit_code == 0, result.output
    first, second, third = json.loads(Path("out.json").read_text())
    assert third["text"] == "Children with gout@Give naproxen to them."
    assert (third["source"], third["place"], third["headings"]) == ("long.md", "line 7", ["Children with gout"])
    assert (third["absent"], len(third["spans"])) == ([], len(third["tree"]))
    assert first["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert second["sha256"] == third["sha256"] == hashlib.sha256(Path("long.md").read_bytes()).hexdigest()
    made = first["extraction"]
    assert (made["base"], made["gatewise"]) == ("base", gatewise_version)
    assert made["adapter"] == {"name": "adapter", "sha256": fingerprint(adapter)}
    assert datetime.fromisoformat(made["date"]).utcoffset() == timedelta(0)
    assert made["settings"] | {"dtype": "", "device": ""} == {
        "verbatim": True, "max_new_tokens": 150, "dtype": "", "device": "",
    }  # fmt: skip
    assert made["settings"]["device"] in ("cpu", "cuda", "mps")
    assert made["settings"]["dtype"] in ("float32", "bfloat16")
    assert str(adapter.parent) not in json.dumps(made)
    read = read_trees("out.json").records[0]
    assert (read.extraction, read.sha256, read.reviewed) == (made, first["sha256"], None)
    # None of it comes before a model in training.
    result = CliRunner().invoke(app, ["mdt", "prepare", "out.json", "--out", "rows.jsonl"])
    assert result.exit_code == 0, result.output
    rows = Path("rows.jsonl").read_text()
    assert not any(word in rows for word in (made["date"], first["sha256"], fingerprint(adapter), "extraction"))


def test_a_batch_goes_on_and_says_at_the_end_what_failed(gatewise: Gatewise) -> None:
    Path("russian.txt").write_text("Пациентам с подагрой назначают колхицин.")
    result = gatewise("extract", "scan.pdf", "good.txt", "none.docx", "russian.txt", "--format", "json")
    assert_refused(result, "3 of the 4 texts gave no tree: scan.pdf, none.docx, russian.txt")
    assert len(json.loads(result.stdout)) == 1
    for said in (
        "scan.pdf has no text on its 1 page",
        "none.docx: there is no such file",
        "russian.txt: the text is in another script",
    ):
        assert f"failed: {said}" in result.stderr


def test_help_has_the_options_that_most_people_need() -> None:
    said = CliRunner().invoke(app, ["mdt", "extract", "--help"]).stdout.partition("Options:")[2]
    options = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", said, re.MULTILINE)
    wanted = "--adapter --server --adapter-name --format --out --language --population --verbatim --help"
    assert options == wanted.split()


def test_extract_reads_standard_input(gatewise: Gatewise) -> None:
    result = gatewise("extract", "-", input=TEXT)
    assert result.exit_code == 0, result.output
    assert "needs review by a clinician" in result.stdout.lower()
    assert_refused(gatewise("extract", "-", input=""), "the text gave no tree: stdin")


def test_settings_that_contradict_each_other(gatewise: Gatewise) -> None:
    assert_refused(
        gatewise("evaluate", "--gold", "gold.json", "--pred", "gold.json"),
        "expected --pred FILE, the predicted trees, or --adapter DIR",
    )


def test_evaluate_extracts_and_measures(gatewise: Gatewise) -> None:
    result = gatewise("evaluate", "--gold", "gold.json", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    table = gatewise("evaluate", "--gold", "gold.json")
    assert table.exit_code == 0, table.output
    assert f"tree edit ratio: {values['ter']:.4f}" in table.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["long.md", "-f", "svg"], "svg of several trees cannot be printed: name a new folder with --out"),
        (["good.txt", "-f", "dak", "--drafts"], "dak cannot be printed: name a file with --out"),
        (["good.txt", "-f", "dmn"], "dmn takes approved trees alone, and nobody has approved what is extracted now: give --drafts"),
        (["long.md", "-f", "mermaid", "-o", "full"], "full is not empty"),
        (["good.txt", "-o", "full"], "full is a folder"),
        (["good.txt", "-o", "good.txt/x"], "cannot write good.txt/x"),
        (["good.txt", "-o", "x" * 300], "cannot write"),
        (["long.md", "good.txt", "-o", "./good.txt"], "is a file that is read"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(gatewise: Gatewise, words: list[str], said: str) -> None:
    Path("full").mkdir()
    Path("full/x").write_text("")
    result = gatewise("extract", *words)
    assert_refused(result, said)
    assert "loading" not in result.stderr
    assert Path("good.txt").read_text() == TEXT


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), GatewiseError("out of memory")])
def test_what_was_found_before_a_stop_is_given(gatewise: Gatewise, monkeypatch: pytest.MonkeyPatch, stop: BaseException) -> None:
    whole, calls = Extractor.extract, 0

    def stopping(self: Extractor, texts: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise stop
        return whole(self, texts)

    monkeypatch.setattr(Extractor, "extract", stopping)
    result = gatewise("extract", "good.txt", *["long.md"] * 4, "--batch-size", "1", "-f", "json")
    assert result.exit_code == (130 if isinstance(stop, KeyboardInterrupt) else 2), result.output
    assert "stopped after 4 of 9 passages" in result.stderr
    assert len(json.loads(result.stdout)) == 4
    assert "gave no tree" not in result.stderr


def without_dates(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**one, "extraction": {**one["extraction"], "date": ""}} for one in records]


@pytest.mark.parametrize("format", ["json", "svg"])
def test_the_same_command_goes_on_after_a_stop(gatewise: Gatewise, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    whole, asked = Extractor.extract, list[str]()
    words = ("extract", "good.txt", "long.md", "long.md", "--batch-size", "2", "-f", format, "-o", "out")
    expected = json.loads(gatewise(*words[:-4], "-f", "json").stdout)

    def stopping(self: Extractor, texts: Any) -> Any:
        asked.extend(texts)
        if len(asked) > 2 and stop:
            raise KeyboardInterrupt
        return whole(self, texts)

    monkeypatch.setattr(Extractor, "extract", stopping)
    stop = True
    result = gatewise(*words)
    assert result.exit_code == 130, result.output
    assert "the same command goes on from there, out.work.jsonl has what was found" in result.stderr
    assert not Path("out").exists()
    refused = gatewise(*words, "--base", "other")
    assert_refused(refused, "out.work.jsonl was not left by an extraction with these settings")
    stop = False
    del asked[2:]
    result = gatewise(*words)
    assert result.exit_code == 0, result.output
    assert len(asked) == 5  # none of them twice
    assert not Path("out.work.jsonl").exists()
    if format == "json":
        assert without_dates(json.loads(Path("out").read_text())) == without_dates(expected)
    else:
        assert len(list(Path("out").iterdir())) == 5


def test_what_a_document_leaves_out_is_noted(gatewise: Gatewise) -> None:
    Path("more.txt").write_text(f"Treatment\n\n{TEXT}\n\nReferences\n")
    result = gatewise("extract", "more.txt")
    assert result.exit_code == 0, result.output
    assert 'note: more.txt: a heading was left out, as nothing stands under: "References" (line 5)' in result.stderr
