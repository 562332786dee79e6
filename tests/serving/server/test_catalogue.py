"""Folders that change while they are watched: what is served is whole, and of one state."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from served_models import adapter_folder, base_folder

from gatewise.errors import GatewiseError
from gatewise.serving.server.catalogue import Catalogue, ReplacedError, Version, kind_of, name_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one base that differ in their weights, one of another rank, and one with a router."""
    root = tmp_path_factory.mktemp("made")
    base = base_folder(root / "base")
    adapter_folder(base, root / "one", seed=1)
    adapter_folder(base, root / "two", seed=2)
    adapter_folder(base, root / "wide", seed=3, r=7)
    adapter_folder(base, root / "routed", "routed", seed=4)
    return root


def catalogue(*places: Any, **settings: Any) -> Catalogue:
    return Catalogue([str(one) for one in places], **{"settled": 0.0, "say": lambda text: None, **settings})


def names(found: Catalogue) -> list[str]:
    return [one.name for one in found.all()]


def test_places(made: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("a", "b"):
        shutil.copytree(made / "one", runs / name / "adapter")
    (runs / "c").mkdir()
    assert names(catalogue(made)) == ["one", "routed", "two", "wide"]
    assert names(catalogue(made / "one")) == ["one"]
    assert names(catalogue(f"{runs}/*/adapter")) == ["a", "b"]
    assert names(catalogue(f"mine={made / 'one'}", runs / "a" / "adapter", f"{runs}/*/adapter")) == ["a", "b", "mine"]
    assert {one.name: one.kind for one in catalogue(made).all()}["routed"] == "routed"
    assert name_of(Path("runs/x/adapter")) == "x"
    shutil.copytree(made / "one", tmp_path / "many" / ".new")
    assert names(catalogue(tmp_path / "many")) == []  # that is still being written
    assert names(catalogue(f"x={tmp_path / 'many' / '.new'}")) == ["x"]


def test_what_cannot_be_served_is_told(made: Path, tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=r"nothing cannot be read \(No such file or directory\): give an adapter, a folder"):
        catalogue(tmp_path / "nothing")
    with pytest.raises(GatewiseError, match=r"made\d* is not an adapter, it has no adapter_config\.json"):
        catalogue(f"x={made}")
    with pytest.raises(GatewiseError, match="two adapters are called 'one'"):
        catalogue(made / "one", shutil.copytree(made / "two", tmp_path / "one"))
    with pytest.raises(GatewiseError, match="'one' as the base model is"):
        catalogue(made / "one", taken=["one"])
    said: list[str] = []
    for change, why in (
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"peft_type": "ADALORA"}, "gatewise export"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "path_initial_model"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ):
        folder = shutil.copytree(made / "one", tmp_path / "bad" / "changed", dirs_exist_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text()) | change
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(GatewiseError, match=why):
            catalogue(folder)
        assert not names(catalogue(tmp_path / "bad", say=said.append))  # in a watched folder it is passed over
        assert why in said[-1]
    for key, kind in (("use_dora", "alone"), ("lora_bias", "alone"), ("use_rslora", "plain")):
        config = json.loads((made / "one" / "adapter_config.json").read_text()) | {key: True}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert kind_of(folder) == kind


def test_a_name_stays_with_its_folder_while_that_is_broken(made: Path, tmp_path: Path) -> None:
    """Clients that ask for it must not get another adapter's answers, whichever folder is looked at first."""
    said: list[str] = []
    first, second = shutil.copytree(made / "one", tmp_path / "a" / "x"), tmp_path / "b" / "x"
    second.parent.mkdir()
    found = catalogue(tmp_path / "b", tmp_path / "a", say=said.append)
    shutil.copytree(made / "two", second)  # which is looked at first
    weights = first / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for _ in range(2):
        weights.write_bytes(whole[: len(whole) // 2])
        for _ in range(2):
            found.scan()
            assert names(found) == []
        weights.write_bytes(whole)
        found.scan()
        assert found["x"].folder == first
    assert sum("two adapters are called 'x'" in one for one in said) == 1
    weights.write_bytes(b"")
    found.scan()
    shutil.rmtree(first)
    found.scan()
    assert found["x"].folder == second


def forbid(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Whatever is in the folder cannot be seen, by root either."""
    known = os.stat

    def look(path: Any, **more: Any) -> os.stat_result:
        if not isinstance(path, int) and folder in Path(os.fsdecode(path)).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return known(path, **more)

    monkeypatch.setattr(os, "stat", look)


def test_a_folder_that_cannot_be_read_is_passed_over(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    private = shutil.copytree(made / "two", tmp_path / "places" / "private")
    shutil.copytree(made / "one", tmp_path / "places" / "good")
    forbid(monkeypatch, private)
    for places in ([tmp_path / "places"], [f"{tmp_path}/places/*"]):
        found = catalogue(*places, say=said.append)
        assert found.scan() == []
        assert names(found) == ["good"]
        assert len(said) == 1
        assert said[0].startswith(f"note: the folder {private} cannot be read (Permission denied): give an adapter")
        said.clear()
    for place in (private, f"x={private}"):
        with pytest.raises(GatewiseError, match=r"private cannot be read \(Permission denied\): give an adapter"):
            catalogue(place)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["stat", "listdir", "scandir"])
def test_what_is_served_stays_through_faults_of_the_file_system(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    said: list[str] = []
    for name in ("runs/a/adapter", "runs/b/adapter", "many/c", "d"):
        shutil.copytree(made / "one", tmp_path / name)
    found = catalogue(f"{tmp_path}/runs/*/adapter", tmp_path / "many", f"mine={tmp_path / 'd'}", tmp_path / "d", say=said.append)
    before = found.all()
    assert [one.name for one in before] == ["a", "b", "c", "mine"]
    shutil.copytree(made / "two", tmp_path / "runs" / "new" / "adapter")
    shutil.copytree(made / "two", tmp_path / "many" / "new")
    known = getattr(os, call)

    def fails(path: Any = ".", **more: Any) -> Any:
        if not isinstance(path, int) and tmp_path in (place := Path(os.fsdecode(path))).parents:
            raise OSError(code, os.strerror(code), str(place))
        return known(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        for _ in range(2):
            found.scan()
            assert [one for one in found.all() if one.name != "new"] == before
    assert not any(one.gone for one in before)
    assert len(said) == len(set(said))
    shutil.rmtree(tmp_path / "runs" / "b")
    shutil.rmtree(tmp_path / "many" / "new")
    found.scan()
    assert names(found) == ["a", "c", "mine", "new"]
    shutil.rmtree(tmp_path / "many")
    shutil.rmtree(tmp_path / "d")
    found.scan()
    assert names(found) == ["a", "new"]


def test_whatever_is_in_a_folder_ends_no_look_at_the_others(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    found = catalogue(tmp_path, say=said.append)
    deep = shutil.copytree(made / "two", tmp_path / "deep")
    (deep / "adapter_config.json").write_text("[" * 200000)
    shutil.copytree(made / "two", tmp_path / "odd")
    shutil.copytree(made / "one", tmp_path / "one")

    def kind(folder: Path) -> Any:
        if folder.name == "odd":
            raise AssertionError("a fault of ours")
        return kind_of(folder)

    monkeypatch.setattr("gatewise.serving.server.catalogue.kind_of", kind)
    for _ in range(2):
        found.scan()
    assert names(found) == ["one"]
    assert len(said) == 2  # each once
    assert "deep/adapter_config.json is not valid JSON (maximum recursion depth" in said[0]
    assert said[1] == f"note: the adapter {tmp_path / 'odd'} cannot be read (AssertionError: a fault of ours); it is not served"
    with pytest.raises(GatewiseError, match=r"odd cannot be read \(AssertionError"):
        catalogue(tmp_path / "odd")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), PermissionError(13, "no")])
def test_what_changes_as_it_is_looked_at_stays(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    shutil.copytree(made / "one", tmp_path / "x")
    found = catalogue(tmp_path)
    first = found["x"]

    def fails(_: Path) -> Any:
        raise error

    for signature in (fails, lambda _: ()):
        monkeypatch.setattr("gatewise.serving.server.catalogue._signature", signature)
        found.scan()
        assert found["x"] is first


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass for the catalogue, which takes none of ours."""
    ahead = [0.0]

    def later(seconds: float) -> None:
        ahead[0] += seconds

    clock = SimpleNamespace(time=time.time, sleep=later, monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr("gatewise.serving.server.catalogue.time", clock)
    return later


def test_a_half_written_folder_is_not_served(made: Path, tmp_path: Path, wait: Callable[[float], None]) -> None:
    said: list[str] = []
    found = catalogue(tmp_path, say=said.append, settled=60.0)
    folder = tmp_path / "new"
    folder.mkdir()
    weights = (made / "one" / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert not found.scan()
    shutil.copy(made / "one" / "adapter_config.json", folder)
    assert found.scan() == [folder]  # seen for the first time, a moment ago
    assert not names(found)
    wait(30.0)
    assert found.scan() == [folder]  # looks that come often are no reason to take it for whole
    wait(30.0)
    assert not found.scan()  # it has not changed for long enough: it is looked into
    assert not names(found)
    assert "damaged or cut short" in said[-1]
    (folder / "adapter_model.safetensors").write_bytes(weights)
    found.scan()
    assert not names(found)
    wait(60.0)
    found.scan()
    assert names(found) == ["new"]


def test_versions_come_and_go(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "one", tmp_path / "x")
    found = catalogue(tmp_path)
    first = found["x"]
    found.scan()
    assert found["x"] is first
    with first.copy() as copy:
        assert (copy / "adapter_model.safetensors").read_bytes() == (made / "one" / "adapter_model.safetensors").read_bytes()
    shutil.copytree(made / "two", folder, dirs_exist_ok=True)
    with pytest.raises(ReplacedError), first.copy():
        pass
    found.scan()
    second = found["x"]
    assert second is not first
    assert first.gone
    assert second.key != first.key
    shutil.rmtree(folder)
    found.scan()
    assert not names(found)
    assert second.gone
    with pytest.raises(KeyError):
        found["x"]


def test_an_old_version_is_served_until_the_new_one_is_whole(made: Path, tmp_path: Path, wait: Callable[[float], None]) -> None:
    folder = shutil.copytree(made / "one", tmp_path / "x")
    found = catalogue(tmp_path, settled=60.0)
    first = found["x"]
    shutil.copy(made / "wide" / "adapter_config.json", folder)
    found.scan()
    assert found["x"] is first
    wait(59.0)
    shutil.copy(made / "wide" / "adapter_model.safetensors", folder)
    found.scan()
    wait(59.0)
    found.scan()
    assert found["x"] is first  # the folder changed less than a minute ago
    wait(1.0)
    found.scan()
    assert found["x"] is not first
    assert not found["x"].gone


def test_no_copy_mixes_old_and_new(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is replaced by another, whole, between the copies of two files."""
    shutil.copytree(made / "one", tmp_path / "x")
    shutil.copytree(made / "two", tmp_path / ".new")
    version = catalogue(tmp_path)["x"]
    copyfile = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        copyfile(source, target)
        if source.name == "adapter_config.json":
            (tmp_path / "x").rename(tmp_path / ".old")
            (tmp_path / ".new").rename(tmp_path / "x")

    monkeypatch.setattr("gatewise.serving.server.catalogue.shutil.copyfile", copy)
    with pytest.raises(ReplacedError), version.copy():
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_what_cannot_be_copied_is_not_called_replaced(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    shutil.copytree(made / "one", tmp_path / "x")
    version = catalogue(tmp_path)["x"]

    def fails(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code), str(source))

    monkeypatch.setattr("gatewise.serving.server.catalogue.shutil.copyfile", fails)
    with (
        pytest.raises(GatewiseError, match=rf"x cannot be copied \({os.strerror(code)}, {tmp_path}/x/.*has room.*"),
        version.copy(),
    ):
        pass
    (tmp_path / "x").rename(tmp_path / ".x")
    with pytest.raises(ReplacedError), version.copy():
        pass


def test_no_key_is_a_part_of_another() -> None:
    keys = [Version("x", Path("x"), "plain", ()).key for _ in range(120)]
    assert not any(one in other for one in keys for other in keys if one is not other)
