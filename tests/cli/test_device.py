"""``--device``: every command that runs a model puts the model there, and with it whatever the model is given.

No second device is here that computes. ``meta`` has no numbers but is a device of its own: a model there, and a look at what its
forward gets, tell whether a command places all it should.
"""

import json
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import write_adapter, write_base, write_recipe, write_rows
from transformers import GenerationMixin, LlamaForCausalLM, LlamaModel
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.inspection import importance
from gatewise.losses import scored
from gatewise.models import device as device_module

PLACED = "all of it is on the second device"
SECOND = torch.device("meta")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters beside their base model and data: ``lora``, a classifier ``bert``, and trained ones."""
    made = tmp_path_factory.mktemp("device")
    write_rows(made / "rows.jsonl", 6)
    write_adapter(made / "lora", write_base(made / "base", max_position_embeddings=2048))
    (made / "texts.jsonl").write_text(json.dumps({"source": "a", "target": "b"}) + "\n")
    recipe = write_recipe(made, "milora", training={"max_steps": 1, "batch_size": 4})
    assert CliRunner().invoke(app, ["train", str(recipe), "--output", str(made / "milora-run")]).exit_code == 0
    recipe = write_recipe(made, "lora", "bert", training={"max_steps": 1, "batch_size": 4})
    assert CliRunner().invoke(app, ["train", str(recipe), "--output", str(made / "bert-run")]).exit_code == 0
    return made


@pytest.fixture
def second_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--device cuda:1`` is the second device, and what runs a model there ends the command with what was found."""
    pick = device_module.pick_device
    for name in ("gatewise.models.device", "gatewise.models.loading", "gatewise.adapters.loading", "gatewise.runs.run"):
        monkeypatch.setattr(f"{name}.pick_device", lambda wanted="auto": SECOND if wanted == "cuda:1" else pick(wanted))

    def looked_at(run: Callable[..., Any]) -> Callable[..., Any]:
        def look(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = {**dict(enumerate(args)), **kwargs}
            given |= next((one for one in args if isinstance(one, dict)), {})
            tensors = {name: value.device for name, value in given.items() if isinstance(value, torch.Tensor)}
            assert tensors
            for name, where in {**tensors, "the model": next(self.parameters()).device}.items():
                if where != SECOND:
                    raise GatewiseError(f"{name} is on {where}")
            raise GatewiseError(PLACED)

        return look

    from transformers import BertModel

    monkeypatch.setattr(LlamaModel, "forward", looked_at(LlamaModel.forward))
    monkeypatch.setattr(BertModel, "forward", looked_at(BertModel.forward))
    monkeypatch.setattr(GenerationMixin, "generate", looked_at(GenerationMixin.generate))
    # A score cuts up its batch, once that is placed.
    opened: list[torch.nn.Module] = []
    scoring = importance.importance_of
    monkeypatch.setattr(
        importance, "importance_of", lambda model, *args, **how: opened.append(model) or scoring(model, *args, **how)
    )
    monkeypatch.setattr("gatewise.losses.microbatches", lambda batch, *_: looked_at(scored)(opened[0], batch))
    autocast = torch.autocast  # which does not know the second device
    monkeypatch.setattr(torch, "autocast", lambda kind, **how: nullcontext() if kind == SECOND.type else autocast(kind, **how))
    # A loss reads its labels before there is a forward.
    for name in ("gatewise.losses", "gatewise.runs.trainer"):
        monkeypatch.setattr(f"{name}.scored", looked_at(scored))


@pytest.mark.usefixtures("second_device")
@pytest.mark.parametrize(
    "words",
    [
        "eval lora --data rows.jsonl",
        "eval lora --data texts.jsonl",
        "eval bert-run/adapter --data rows.jsonl",
        "inspect lora --scores --data rows.jsonl --score taylor",
        "inspect lora --scores --data rows.jsonl --score path_moments",
        "inspect milora-run/adapter --routing --data rows.jsonl",
        "train lora.yaml --output lora-run",
        "train milora.yaml --output other-run",
        "train prompt-tuning.yaml --output prompt-run",
        "mdt extract guideline.txt --adapter mdt --language en",
        "mdt evaluate --gold sample:guidelines --adapter mdt --limit 1",
    ],
)
def test_the_model_and_all_it_gets_are_on_the_device(words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "guideline.txt").write_text("Adults with gout@For a flare, give colchicine.")
    if "mdt" in words:
        pytest.importorskip("llguidance")
        if not (folder / "mdt").exists():
            (folder / "mdt").mkdir()
            for file in (folder / "lora").iterdir():
                (folder / "mdt" / file.name).write_bytes(file.read_bytes())
    write_recipe(folder, "lora")
    write_recipe(folder, "prompt-tuning")
    result = CliRunner().invoke(app, [*words.split(), "--device", "cuda:1"])
    assert result.stderr.strip().splitlines()[-1] == f"error: {PLACED}", result.output
    assert "on meta" in result.stderr


@pytest.mark.usefixtures("second_device")
def test_a_training_step_is_on_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured before it is left out."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("gatewise.tasks.rows.evaluate", lambda *_, **__: {"n": 1})
    write_recipe(folder, "lora")
    result = CliRunner().invoke(app, ["train", "lora.yaml", "--output", "step-run", "--device", "cuda:1"])
    told = result.output + "".join(traceback.format_exception(result.exception))
    assert result.stderr.strip().splitlines()[-1] == f"error: {PLACED}", told


def test_every_command_that_runs_a_model_takes_a_device() -> None:
    for words in ("train", "eval", "inspect", "mdt extract", "mdt evaluate", "mdt review"):
        assert "--device" in CliRunner().invoke(app, [*words.split(), "--help"]).stdout


def test_a_device_that_is_not_there_is_refused_before_any_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for words in ("eval lora --data rows.jsonl", "inspect lora --scores --data rows.jsonl"):
        result = CliRunner().invoke(app, [*words.split(), "--device", "cuda"])
        assert result.exit_code == 2
        assert "the device is cuda, but PyTorch finds 0 such devices here: take device auto or cpu" in result.stderr
    write_recipe(folder, "lora")
    for words, said in (
        ("eval lora --data rows.jsonl", "the device 'tpu' is not known: expected auto, cpu, cuda, cuda:1 or mps"),
        ("train lora.yaml", "device: String should match pattern"),
    ):
        assert said in CliRunner().invoke(app, [*words.split(), "--device", "tpu"]).stderr
