"""Whole or not at all."""

import json
import os
import stat
import sys
from threading import Thread

import pytest

from gatewise.errors import GatewiseError
from gatewise.files import check_new_folder, check_not_read, content_of, whole_file, whole_folder, write_json, write_json_lines

FSYNC = os.fsync


@pytest.fixture(autouse=True)
def _as_for_a_user(monkeypatch):
    """Other tests do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", FSYNC)


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


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "value.json", 1)
    for _ in range(2):
        with whole_folder(tmp_path / "out", replace=True) as part:
            (part / "one").write_text("1")
    assert sorted(os.listdir(tmp_path)) == ["out", "value.json"]


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
    for path, reason in (("nowhere", "there is no such file"), (str(tmp_path), "Is a directory"), ("a\0b", "cannot be read")):
        with pytest.raises(GatewiseError, match=reason):
            content_of(path)
    with pytest.raises(GatewiseError, match="cannot write"):
        write_json(tmp_path / ("x" * 300), 1)


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


@pytest.mark.skipif(sys.platform == "win32", reason="modes are others there")
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444, 0o4750])
def test_what_is_replaced_keeps_its_mode(tmp_path, mode):
    path, folder = tmp_path / "value.json", tmp_path / "folder"
    write_json(path, 1)
    folder.mkdir()
    for one in (path, folder):
        one.chmod(mode)
    write_json(path, 2)
    with whole_folder(folder, replace=True) as part:
        (part / "x").write_text("x")
    assert [one.stat().st_mode & 0o7777 for one in (path, folder)] == [mode, mode]
    assert path.read_text() == "2\n"


def test_everything_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """The order of calls: what is written is brought to disk, then renamed, then the name is brought to disk."""
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    names = {os.stat(tmp_path).st_ino: "folder"}

    def synced(handle):
        done.append(f"sync {names.get(os.fstat(handle).st_ino, os.fstat(handle).st_size)}")
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *where: (done.append("replace"), replace(*where)))
    write_json(tmp_path / "x", 1)
    assert done == ["sync 2", "replace", "sync folder"]
    done.clear()
    with whole_folder(tmp_path / "made") as part:
        (part / "deep").mkdir()
        (part / "deep" / "file").write_text("1234567")
    assert done[0] == "sync 7"
    assert done[-2:] == ["replace", "sync folder"]
    assert len(done) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="there an empty folder is removed first")
def test_of_two_that_write_to_one_place_the_later_one_finds_it_taken(tmp_path):
    (tmp_path / "old").mkdir()  # an empty folder is taken, whatever its name

    def both():
        with whole_folder(tmp_path / "old"), whole_folder(tmp_path / "old") as first:
            (first / "first").touch()

    with pytest.raises(GatewiseError, match="old: Directory not empty; nothing was changed"):
        both()
    assert [one.name for one in tmp_path.rglob("*")] == ["old", "first"]


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("disk"))
    for place in (".", tmp_path / "disk"):
        with pytest.raises(GatewiseError, match="which cannot be replaced: give a new folder in it"):
            check_new_folder(place)
    check_new_folder("new")


def test_what_is_read_is_not_written(tmp_path):
    for name in ("rows1.jsonl", "rows[1].jsonl", "rows2.jsonl"):
        (tmp_path / name).write_text("{}")
    check_not_read(tmp_path / "new.jsonl", tmp_path / "rows[1].jsonl", tmp_path / "rows?.jsonl")
    for read in ("rows[1].jsonl", "rows*.jsonl"):  # a name with brackets is a pattern, too
        with pytest.raises(GatewiseError, match="give what is written another name"):
            check_not_read(tmp_path / "rows[1].jsonl", tmp_path / read)


def test_half_a_character_is_written_as_json_has_it(tmp_path):
    write_json_lines(tmp_path / "rows.jsonl", [{"id": "\ud800é"}])
    assert json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8")) == {"id": "\ud800é"}
