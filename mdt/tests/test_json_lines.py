"""Rows that were appended stay, whatever happens to the ones after them."""

import errno
import os

import pytest
from gatewise_mdt.json_lines import JsonLines

from gatewise.errors import GatewiseError
from gatewise.files import write_json_lines


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_failure_of_any_call_leaves_the_lines_as_they_were(tmp_path, monkeypatch, call):
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.append([{"a": 1}])
    whole = getattr(os, call)

    def half(handle, *content):
        if content:
            whole(handle, content[0][:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, call, half)
        for _ in range(2):
            with pytest.raises(GatewiseError, match="No space left on device; nothing was changed"):
                lines.append([{"b": 2}])
        cut, fails = os.ftruncate, iter([False, True])
        full.setattr(os, "ftruncate", lambda *where: half(where[0]) if next(fails) else cut(*where))
        pytest.raises(GatewiseError, lines.append, [{"c": 3}])  # and what was written of it cannot even be taken back
    assert JsonLines(tmp_path / "log.jsonl").read()[:1] == [{"a": 1}]
    lines.append([{"d": 4}, {"e": "é"}])
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == '{"a": 1}\n{"d": 4}\n{"e": "é"}\n'


def test_a_torn_last_line_is_cut_off_wherever_it_tore(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"a": 1}, {"b": "é\nü"}]
    write_json_lines(path, rows)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) + 1):
        for more in (b"", b"\0" * 9):
            path.write_bytes(whole[:end] + more)
            lines = JsonLines(path)
            known = 2 if end >= len(whole) - 1 and not (more and end == len(whole) - 1) else 1
            assert lines.read() == rows[:known]
            assert path.read_bytes() == whole[:end] + more  # reading changes nothing
            lines.append([{"c": 3}])
            assert JsonLines(path).read() == [*rows[:known], {"c": 3}]


def test_lines_that_are_damaged_or_not_ours_are_left_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"b"\n{"c": 3}\n')
    with pytest.raises(GatewiseError, match=r"log\.jsonl, line 2: not a line of JSON"):
        JsonLines(path).read()
    path.write_text('{"a": 1}\n')
    lines = JsonLines(path)
    lines.read()
    for other in ('{"a": 1}\n{"by": "others"}\n', ""):
        path.write_text(other)
        with pytest.raises(GatewiseError, match="changed by another program"):
            lines.append([{"b": 2}])
        assert path.read_text() == other
    with pytest.raises(GatewiseError, match="cannot write"):
        JsonLines(tmp_path / "none" / "x").append([{}])
    assert JsonLines(tmp_path / "none" / "x").read() == []
