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
from peft import LoraConfig, get_peft_model
from served_models import adapter_folder, base_folder
from tiny_models import EXPERTS, tiny_base

from gatewise.cli import serve
from gatewise.errors import GatewiseError
from gatewise.serving.server.catalogue import Catalogue, Fit, ReplacedError, Version, kind_of, name_of


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
    return list(found.versions)


def test_places(made: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("a", "b"):
        shutil.copytree(made / "one", runs / name / "adapter")
    (runs / "c").mkdir()
    assert names(catalogue(made)) == ["one", "routed", "two", "wide"]
    assert names(catalogue(made / "one")) == ["one"]
    assert names(catalogue(f"{runs}/*/adapter")) == ["a", "b"]
    assert names(catalogue(f"mine={made / 'one'}", runs / "a" / "adapter", f"{runs}/*/adapter")) == ["a", "b", "mine"]
    # A name of its own, before or after a pattern that fits too, and one alone.
    for places in (
        (f"{runs}/*/adapter", f"prod={runs / 'a' / 'adapter'}"),
        (f"prod={runs / 'a' / 'adapter'}", f"{runs}/*/adapter"),
    ):
        assert names(catalogue(*places)) == ["b", "prod"]
    with pytest.raises(GatewiseError, match="was given two names, x, y: leave one of them out"):
        catalogue(f"x={made / 'one'}", f"y={made / 'one'}")
    assert {one.name: one.kind for one in catalogue(made).versions.values()}["routed"] == "routed"
    assert name_of(Path("runs/x/adapter")) == "x"
    shutil.copytree(made / "one", tmp_path / "many" / ".new")
    assert names(catalogue(tmp_path / "many")) == []  # that is still being written
    assert names(catalogue(f"x={tmp_path / 'many' / '.new'}")) == ["x"]


def test_a_path_with_an_equals_sign_is_no_id_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(serve, "at_hand", lambda path: asked.append(str(path)) or path)
    assert [serve._at_hand(place) for place in ("runs/lr=1e-3/adapter", "x=somebody/adapter")] == [
        "runs/lr=1e-3/adapter",
        "x=somebody/adapter",
    ]
    assert asked == ["runs/lr=1e-3/adapter", "somebody/adapter"]


def test_what_cannot_be_served_is_told(made: Path, tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=r"nothing cannot be read \(No such file or directory\): give an adapter, a folder"):
        catalogue(tmp_path / "nothing")
    with pytest.raises(GatewiseError, match=r"made\d* is not an adapter, it has no adapter_config\.json"):
        catalogue(f"x={made}")
    with pytest.raises(GatewiseError, match="two adapters are called 'one'"):
        catalogue(made / "one", shutil.copytree(made / "two", tmp_path / "one"))
    with pytest.raises(GatewiseError, match="'one' as the base model is"):
        catalogue(made / "one", taken=["one"])
    with pytest.raises(GatewiseError, match=r"nowhere cannot be read or copied \(No such file"):
        catalogue(f"x={tmp_path / 'nowhere'}")
    said: list[str] = []
    for change, why in (
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"peft_type": "ADALORA"}, "gatewise export"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "adapters share: write it as plain LoRA"),
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


def test_what_does_not_fit_the_base_model_is_not_listed(made: Path, tmp_path: Path) -> None:
    """Of many in a watched folder one line tells; one that was named is an error."""
    fit = Fit(str(made / "base"))

    def found(*places: Any, **settings: Any) -> Catalogue:
        return catalogue(*places, check=lambda folder, kind: fit.check(folder), **settings)

    adapter_folder(made / "base", tmp_path / "prompts", "prompts")
    adapter_folder(made / "base", tmp_path / "words", target_modules=["embed_tokens", "q_proj"])
    other = base_folder(tmp_path / "other" / "base", hidden_size=32)
    longer = base_folder(tmp_path / "longer" / "base", num_hidden_layers=3)
    gpt2 = base_folder(tmp_path / "gpt2" / "base", "gpt2")
    adapter_folder(other, tmp_path / "of_other")
    adapter_folder(other, tmp_path / "of_other_routed", "routed")
    adapter_folder(longer, tmp_path / "of_longer")
    adapter_folder(longer, tmp_path / "prompts_of_longer", "prompts")
    adapter_folder(gpt2, tmp_path / "of_gpt2")
    shutil.copytree(made / "one", tmp_path / "classifier")
    config = json.loads((tmp_path / "classifier" / "adapter_config.json").read_text()) | {"task_type": "SEQ_CLS"}
    (tmp_path / "classifier" / "adapter_config.json").write_text(json.dumps(config))
    said: list[str] = []
    assert names(found(tmp_path, say=said.append)) == ["prompts", "words"]
    (line,) = said
    assert line.startswith("note: not served are ")
    assert f"{tmp_path / 'classifier'} (is for SEQ_CLS: expected one that writes text (CAUSAL_LM))" in line
    assert f"does not fit the base model '{made / 'base'}': it has model.layers.0" in line
    assert f"{tmp_path / 'of_other'}, {tmp_path / 'of_other_routed'} (" in line
    for name, why in (
        ("of_other", r"with 24 inputs and 32 outputs; there it has 16 and 24$"),
        ("of_longer", r"it has model\.layers\.2\.\S+ with \d+ inputs and \d+ outputs, which is not there$"),
        ("prompts_of_longer", "it was made for .*'layers': 3"),
        ("of_gpt2", r"it has transformer\.h\.0\.\S+ with"),
        ("classifier", "is for SEQ_CLS"),
    ):
        with pytest.raises(GatewiseError, match=why):
            found(tmp_path / name)
    experts = get_peft_model(tiny_base("mixtral"), LoraConfig(task_type="CAUSAL_LM", **EXPERTS))
    experts.save_pretrained(tmp_path / "of_mixtral")
    experts.unload().save_pretrained(tmp_path / "mixtral" / "base")
    for base, name in ((gpt2, "of_gpt2"), (tmp_path / "mixtral" / "base", "of_mixtral")):
        Fit(str(base)).check(tmp_path / name)
    with pytest.raises(GatewiseError, match="does not fit"):
        fit.check(tmp_path / "of_mixtral")


def test_an_adapter_of_a_quantised_base_is_served_and_said(made: Path, tmp_path: Path) -> None:
    folder, said = Path(shutil.copytree(made / "one", tmp_path / "one")), []
    (folder / "gatewise.json").write_text('{"quantization": "nf4"}')
    assert names(catalogue(folder, say=said.append)) == ["one"]
    assert said == ["one: trained on the base model in nf4, served on it as it is here"]


def rewritten(folder: Path, **changes: Any) -> Path:
    """With changes in its adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_an_adapter_of_another_base_with_these_sizes_is_served_and_said(made: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = rewritten(shutil.copytree(made / "one", tmp_path / "one"), base_model_name_or_path="org/sibling")
    fit = Fit(str(made / "base"))
    found = catalogue(folder, shutil.copytree(made / "two", tmp_path / "two"), say=said.append, check=lambda one, _: fit.check(one))
    found.scan()
    assert names(found) == ["one", "two"]
    line = f"one: trained on org/sibling, served on {made / 'base'}"
    assert said == [line]
    rewritten(folder, inference_mode=False)
    found.scan()
    assert said == [line, line]  # of each version


def test_a_base_by_another_name_is_the_same(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a base is called, and where it was when the adapter was trained: what may be the same is passed over."""
    monkeypatch.setattr("gatewise.serving.server.catalogue.weight_shapes", lambda base: {})  # the hub is not asked
    base, hub = made / "base", "HuggingFaceTB/SmolLM2-135M-Instruct"
    short, cached = "smollm2-135m-instruct", f"{tmp_path}/hub/models--Org--Model/snapshots/0a1b"
    copy, link = shutil.copytree(base, tmp_path / "copy"), tmp_path / "link"
    link.symlink_to(base)
    (tmp_path / "models" / short).mkdir(parents=True)
    Path(cached).mkdir(parents=True)
    longer = shutil.copytree(base, tmp_path / "longer" / "base")
    (longer / "model.safetensors").write_bytes(b"longer")
    snapshot = shutil.copytree(base, tmp_path / "hub/models--Org--Other/snapshots/0a1b")
    sibling = shutil.copytree(base, tmp_path / "sibling")
    weights = (sibling / "model.safetensors").read_bytes()
    (sibling / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))  # as many bytes
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "Model").symlink_to(cached)
    folder = shutil.copytree(made / "one", tmp_path / "one")

    def note(trained: Any, served: Any, name: str = "") -> str | None:
        return Fit(str(served), name).check(rewritten(folder, base_model_name_or_path=trained and str(trained)))

    for trained, served in (
        (None, base), ("", base), (base, base), (f"{base}/", base), (copy, base), (link, base), (base, link),
        (short, hub), (hub, short), (hub.lower(), hub), (hub, tmp_path / "models" / short), (short, tmp_path / "models" / short),
        (cached, "org/model"), ("Org/Model", cached), ("/gone/models--Org--Model/snapshots/2c", "Org/Model"),
        ("Org/Model", "/x/model"), ("/gone/base/", base), ("org/base", base), ("~nobody/\0/base", base),
        (snapshot, base), (base, snapshot), (tmp_path / "linked" / "Model", "elsewhere/Model"),
    ):  # fmt: skip
        assert note(trained, served) is None, (trained, served)
    assert note("/gone/tiny", base, "Org/Tiny") is None
    (folder / "gatewise.json").write_text(json.dumps({"base": short}))
    assert note(hub, short) is None
    for trained, served in (
        (longer, base),
        (sibling, base),
        ("/gone/tiny", base),
        ("Org/Model", "Org/Model-2"),
        (cached, hub),
        (short, base),
    ):
        assert note(trained, served) == f"trained on {trained}, served on {served}"


def test_a_place_without_an_adapter_is_said(made: Path, tmp_path: Path) -> None:
    said: list[str] = []
    shutil.copytree(made / "one", tmp_path / "runs" / "a" / "adapter")
    shutil.copytree(made / "one", tmp_path / "new" / ".a")  # which is still being written
    shutil.copytree(made / "one", tmp_path / "new" / ".b" / "adapter")
    places = [tmp_path / "runs", f"{tmp_path}/run/*/adapter", tmp_path / "new", f"{tmp_path}/runs/*/adapter", f"x={made / 'two'}"]
    found = catalogue(*places, say=said.append)
    found.tell_empty()
    assert said == [
        f"note: no adapter at {tmp_path}/runs yet: did you mean '{tmp_path}/runs/*/adapter'?",
        f"note: no adapter at {tmp_path}/run/*/adapter yet",
        f"note: no adapter at {tmp_path}/new yet",
    ]
    found.scan()
    assert len(said) == 3


def test_a_name_stays_with_the_folder_that_is_served(made: Path, tmp_path: Path) -> None:
    """Whichever folder is looked at first, and while the one that is served is broken: its last whole version stays."""
    said: list[str] = []
    first, second = shutil.copytree(made / "one", tmp_path / "a" / "x"), tmp_path / "b" / "x"
    second.parent.mkdir()
    found = catalogue(tmp_path / "b", tmp_path / "a", say=said.append)
    before = found.versions["x"]
    shutil.copytree(made / "two", second)  # which is looked at first
    (first / "adapter_model.safetensors").write_bytes(b"half")
    for _ in range(2):
        found.scan()
        assert found.versions["x"] is before
        assert not before.gone
    (line,) = said
    assert "two adapters are called 'x'" in line
    assert "damaged or cut short" in line
    shutil.rmtree(first)
    found.scan()
    assert found.versions["x"].folder == second
    assert before.gone


@pytest.mark.parametrize("call", ["stat", "listdir", "scandir"])
def test_what_is_served_stays_through_faults_of_the_file_system(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    said: list[str] = []
    for name in ("runs/a/adapter", "many/c", "d"):
        shutil.copytree(made / "one", tmp_path / name)
    places = (f"{tmp_path}/runs/*/adapter", tmp_path / "many", f"mine={tmp_path / 'd'}")
    found = catalogue(*places, say=said.append)
    before = list(found.versions.values())
    assert [one.name for one in before] == ["a", "c", "mine"]
    shutil.copytree(made / "two", tmp_path / "many" / "new")
    known = getattr(os, call)

    def fails(path: Any = ".", **more: Any) -> Any:
        if not isinstance(path, int) and tmp_path in (place := Path(os.fsdecode(path))).parents:
            raise OSError(errno.EIO, "Input/output error", str(place))
        return known(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        for _ in range(2):
            found.scan()
            assert [one for one in found.versions.values() if one.name != "new"] == before
        if call == "listdir":
            with pytest.raises(GatewiseError, match=r"many cannot be read \(Input/output error\): give an adapter"):
                catalogue(*places)
    assert not any(one.gone for one in before)
    assert len(said) == len(set(said))
    for name in ("many", "d"):
        shutil.rmtree(tmp_path / name)
    found.scan()
    assert names(found) == ["a"]


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
    (line,) = said  # both in one, once
    assert "deep/adapter_config.json is not valid JSON (maximum recursion depth" in line
    assert f"; {tmp_path / 'odd'} (cannot be read or copied (AssertionError: a fault of ours))" in line


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass for the catalogue, which takes none of ours."""
    ahead = [0.0]

    def later(seconds: float) -> None:
        ahead[0] += seconds

    clock = SimpleNamespace(time=lambda: time.time() + ahead[0], sleep=later, monotonic=time.monotonic)
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
    assert found.scan()  # it changed a moment ago
    wait(70.0)
    assert not found.scan()  # it has not changed for long enough: it is looked into
    assert not names(found)
    assert "damaged or cut short" in said[-1]
    wait(-70.0)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert found.scan()
    wait(70.0)
    found.scan()
    assert names(found) == ["new"]


def test_versions_come_and_go(made: Path, tmp_path: Path, wait: Callable[[float], None]) -> None:
    folder = shutil.copytree(made / "one", tmp_path / "x")
    found = catalogue(tmp_path, settled=60.0)  # which waits for it
    first = found.versions["x"]
    found.scan()
    assert found.versions["x"] is first
    with first.copy() as copy:
        assert (copy / "adapter_model.safetensors").read_bytes() == (made / "one" / "adapter_model.safetensors").read_bytes()
    wait(-60.0)
    shutil.copytree(made / "wide", folder, dirs_exist_ok=True)
    with pytest.raises(ReplacedError), first.copy():
        pass
    found.scan()
    assert found.versions["x"] is first  # until the new one has not changed for a minute
    wait(100.0)
    found.scan()
    second = found.versions["x"]
    assert (second is first, first.gone, second.key == first.key) == (False, True, False)
    shutil.rmtree(folder)
    found.scan()
    assert not names(found)
    assert second.gone


def test_what_was_replaced_by_what_cannot_be_served_is_no_longer_waited_for(
    made: Path, tmp_path: Path, wait: Callable[[float], None]
) -> None:
    """While the new files settle there may be a whole state in a moment; once they were refused there is none."""
    said: list[str] = []
    folder = shutil.copytree(made / "one", tmp_path / "x")
    found = catalogue(tmp_path, settled=60.0, say=said.append)
    version = found.versions["x"]
    wait(-60.0)
    for content, refusal in ((b"half", "damaged or cut short"), (b"", "damaged or cut short")):
        (folder / "adapter_model.safetensors").write_bytes(content)
        found.scan()
        with pytest.raises(ReplacedError), version.copy():
            pass
        wait(100.0)
        found.scan()
        with pytest.raises(GatewiseError, match=refusal) as told, version.copy():
            pass
        assert str(told.value) in said[-1]
        wait(-100.0)
    assert found.versions["x"] is version


def test_no_copy_mixes_old_and_new(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is replaced by another, whole, between the copies of two files."""
    shutil.copytree(made / "one", tmp_path / "x")
    shutil.copytree(made / "two", tmp_path / ".new")
    version = catalogue(tmp_path).versions["x"]
    copyfile = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        copyfile(source, target)
        if source.name == "adapter_config.json":
            (tmp_path / "x").rename(tmp_path / ".old")
            (tmp_path / ".new").rename(tmp_path / "x")

    monkeypatch.setattr("gatewise.serving.server.catalogue.shutil.copyfile", copy)
    with pytest.raises(ReplacedError), version.copy():
        pass


def test_no_key_is_a_part_of_another() -> None:
    keys = [Version("x", Path("x"), "plain", ()).key for _ in range(120)]
    assert not any(one in other for one in keys for other in keys if one is not other)
