"""Whole or not at all."""

import json
import os
from threading import Thread

import pytest

from gatewise.errors import GatewiseError
from gatewise.files import content_of, whole_file, whole_folder, write_json


def test_a_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "a" / "value.json"
    write_json(path, {"é": 1})
    assert json.loads(path.read_text()) == {"é": 1}

    def fail():
        with whole_file(path) as part:
            part.write_text("half")
            raise RuntimeError

    pytest.raises(RuntimeError, fail)
    assert json.loads(path.read_text()) == {"é": 1}
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_a_folder_is_replaced_in_one_go(tmp_path):
    target = tmp_path / "out"
    with whole_folder(target) as part:
        (part / "one").write_text("1")
    with pytest.raises(GatewiseError, match="is not empty"), whole_folder(target):
        pass

    def interrupted():
        with whole_folder(target, replace=True) as part:
            (part / "two").write_text("2")
            raise KeyboardInterrupt

    pytest.raises(KeyboardInterrupt, interrupted)
    assert [p.name for p in target.iterdir()] == ["one"]
    with whole_folder(target, replace=True) as part:
        (part / "two").write_text("2")
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    target = tmp_path / "out"
    with whole_folder(target) as part:
        (part / "one").write_text("1")
    replace = os.replace

    def fail(source, to):
        if os.path.basename(source) == "out" and str(to) == str(target):
            raise OSError(13, "Permission denied")
        replace(source, to)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(GatewiseError, match="Permission denied; nothing was changed"), whole_folder(target, replace=True) as part:
        (part / "two").write_text("2")
    assert [p.name for p in target.iterdir()] == ["one"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(GatewiseError, match="No space left on device; nothing was changed"), whole_file(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_reading_says_what_is_wrong(tmp_path):
    (tmp_path / "there").write_bytes(b"\xff")
    assert content_of(tmp_path / "there") == b"\xff"
    with pytest.raises(GatewiseError, match=r"nowhere: there is no such file"):
        content_of(tmp_path / "nowhere")
    with pytest.raises(GatewiseError, match=r"cannot be read: Is a directory"):
        content_of(str(tmp_path))


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "value.json")
    write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "there" / "value.json").read_text() == "1\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_what_is_no_file_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_json(pipe, 1)
    reader.join(10)
    assert read == [b"1\n"]
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250])
def test_a_name_can_be_too_long_for_the_system_but_not_for_us(tmp_path, name):
    if len(name) > 255:
        with pytest.raises(GatewiseError, match="cannot write"):
            write_json(tmp_path / name, 1)
        with pytest.raises(GatewiseError, match="cannot write"), whole_folder(tmp_path / name):
            pass
        assert not list(tmp_path.iterdir())
    else:
        write_json(tmp_path / name, 1)
        assert content_of(tmp_path / name) == b"1\n"


def test_a_name_with_a_nul_is_no_bug_of_ours():
    with pytest.raises(GatewiseError, match="cannot be read"):
        content_of("a\0b")
