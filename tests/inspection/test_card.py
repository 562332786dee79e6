"""The model card of an adapter: what its files say, and what is carried over from the adapter that it was made of."""

from pathlib import Path

import pytest
from adapter_folders import random_factors, write_folder
from huggingface_hub import EvalResult, ModelCard

from gatewise.files import write_json
from gatewise.inspection.card import carry_card, write_card

MODULE = "model.layers.0.self_attn.q_proj"
RESULT = EvalResult(
    task_type="text-generation", dataset_type="org/rows", dataset_name="org/rows", metric_type="accuracy", metric_value=0.75
)


def adapter(folder: Path, task: str = "CAUSAL_LM", **note: object) -> Path:
    settings = {"base_model_name_or_path": "org/base", "task_type": task, "r": 5}
    write_json(write_folder(folder, random_factors(MODULE, r=5), **settings) / "gatewise.json", note)
    return folder


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_card_says_what_the_files_of_the_adapter_say(task: str, tmp_path: Path) -> None:
    note = {"base": "minilm-l6", "base_quantised": "Q4_1", "template": "Text: {text}\nKind:", "labels": ["bad", "good"]}
    folder = adapter(tmp_path / "adapter", task, **note)
    write_card(folder, "mine", sections={"Data": "Rows."}, results=[RESULT], datasets=["org/rows"], tags=["alora"])
    card = ModelCard.load(folder / "README.md")
    told = card.data.to_dict()
    assert (told["base_model"], told["library_name"], told["datasets"]) == ("org/base", "peft", ["org/rows"])
    assert {"base_model:adapter:org/base", "lora", "alora"} <= set(told["tags"])
    assert [(one.metric_type, one.metric_value) for one in card.data.eval_results or ()] == [("accuracy", 0.75)]
    assert "## Data\n\nRows." in card.text
    assert "quantised to Q4_1" in card.text
    classifier = task == "SEQ_CLS"
    assert told["pipeline_tag"] == ("text-classification" if classifier else "text-generation")
    assert ('AutoModelForSequenceClassification.from_pretrained("org/base", num_labels=2)' in card.text) == classifier
    assert ("```\nText: {text}\nKind:\n```" in card.text) == (not classifier)
    assert ("vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules mine=ADAPTER" in card.text) == (not classifier)


def test_an_adapter_made_of_another_goes_on_with_its_card(tmp_path: Path) -> None:
    source, made = adapter(tmp_path / "run" / "adapter"), adapter(tmp_path / "made")
    carry_card(source, made, "Exported", "As LoRA.")  # there is no card
    assert "# run\n" in (made / "README.md").read_text()
    (source / "ranks.png").write_bytes(b"a picture")
    write_card(source, "mine", sections={"Data": "Rows."}, results=[RESULT])
    carry_card(source, made, "Exported", "As LoRA.")
    card = ModelCard.load(made / "README.md")
    places = [card.text.index(one) for one in ("Rows.", "![ranks](ranks.png)", "## Exported\n\nAs LoRA.", "## How to load it")]
    assert places == sorted(places)
    assert (made / "ranks.png").read_bytes() == b"a picture"
    assert card.data.eval_results is None  # they are the other one's
    (source / "README.md").write_text("---\nlibrary_name: peft\n---\n# Model Card\n[More Information Needed]\n")  # PEFT's form
    carry_card(source, made, "Exported", "As LoRA.")
    assert "More Information" not in (made / "README.md").read_text()
    (source / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n")
    carry_card(source, made, "Exported", "As LoRA.")  # damaged
    assert "# run\n" in (made / "README.md").read_text()
    (source / "README.md").write_text("# Mine\n\n## How to load it\n\nSo.\n\n## Thanks\n\nTo all.\n")
    carry_card(source, made, "Exported", "As LoRA.")
    written = (made / "README.md").read_text()
    assert "## Thanks\n\nTo all." in written
    assert "So." not in written
    cached = adapter(tmp_path / "models--org--theirs" / "snapshots" / "0a1b2c")
    carry_card(cached, made, "Exported", "As LoRA.")
    assert "# theirs\n" in (made / "README.md").read_text()


@pytest.mark.parametrize("base", ["../models/secret", "~/models/secret", "/gone/models/secret"])
def test_a_folder_is_no_id_on_the_hub(base: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    write_folder(folder, random_factors(MODULE, r=5), base_model_name_or_path=base, r=5)
    card = ModelCard.load(write_card(folder, "mine"))
    assert card.data.base_model is None
    assert "for `secret`" in card.text
    assert "models/" not in str(card)
