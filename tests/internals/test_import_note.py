"""The note that saved adapters carry for those who load them without gatewise."""

import json

import pytest
from peft import PeftConfig, PeftModel, get_peft_model, mapping
from tiny_models import tiny_base

from gatewise import RoutedLoraConfig, SelectivePromptConfig
from gatewise.internals.import_note import REQUIRES, with_note

CONFIGS = {"ROUTED_LORA": RoutedLoraConfig, "SELECTIVE_PROMPT": SelectivePromptConfig}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_adapter_says_what_to_import(tmp_path, kind):
    model = get_peft_model(tiny_base("llama"), CONFIGS[kind](task_type="CAUSAL_LM"))
    model.add_adapter("other", CONFIGS[kind](task_type="CAUSAL_LM"))
    for _ in range(2):  # saving again says it once
        model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        assert json.loads((folder / "adapter_config.json").read_text())["requires"] == REQUIRES
    card = (tmp_path / "README.md").read_text("utf-8")
    assert card.count("## Needs gatewise") == card.count("\nimport gatewise\n") == 1
    assert f"KeyError: '{kind}'" in card
    assert card.startswith("---\n")
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path)
    assert loaded.peft_config["default"].requires == REQUIRES


def test_an_adapter_from_before_the_note_loads(tmp_path):
    RoutedLoraConfig(r=4).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    for requires in (None, "something else"):
        path.write_text(
            json.dumps({**saved, "requires": requires} if requires else {k: saved[k] for k in saved if k != "requires"})
        )
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert (loaded.r, loaded.requires) == (4, REQUIRES)


def test_what_peft_says_without_gatewise(tmp_path, monkeypatch):
    """The reason for the note: once PEFT's error is clear by itself, it can go."""
    RoutedLoraConfig(r=4).save_pretrained(tmp_path)
    monkeypatch.delitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "ROUTED_LORA")
    with pytest.raises(KeyError) as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert caught.value.args == ("ROUTED_LORA",)


@pytest.mark.parametrize(
    ("card", "before"),
    [
        ("---\n# a comment\nlibrary_name: peft\n---\n\n# Title\n\nText\n", "# Title\n\n"),
        ("# Title\n\nText\n", "# Title\n\n"),
        ("---\nlibrary_name: peft\n---\n\nText without a title\n", "Text without a title\n\n"),
    ],
)
def test_where_the_note_stands(card, before):
    assert before + "## Needs gatewise\n" in with_note(card, "ROUTED_LORA")
    assert all(line in with_note(card, "ROUTED_LORA") for line in card.splitlines())
