"""What is installed with which extra: a Trainer script needs none, and what does need one says so in a sentence."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gatewise.errors import GatewiseError, needs

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OTHER_NAMES = {"rouge-score": "rouge_score", "ruamel.yaml": "ruamel"}


def packages_of(*extras: str) -> set[str]:
    """What extras bring, theirs included, by the names under which they are imported."""
    found = set()
    for requirement in (one for extra in extras for one in PROJECT["optional-dependencies"][extra]):
        name, inner = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", requirement).groups()  # type: ignore[union-attr]
        found |= packages_of(*inner.split(",")) if name == "gatewise" else {OTHER_NAMES.get(name, name)}
    return found


def without(packages: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in which these packages are not there."""
    gone = f"import sys; sys.modules |= dict.fromkeys({sorted(packages)!r})\n"
    return subprocess.run([sys.executable, "-c", gone + code], capture_output=True, text=True, check=False)


SCRIPT = """
import torch, gatewise
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sizes = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, target_modules="all-linear"))
rows = [{"input_ids": [1, 2, 3, at % 9], "labels": [1, 2, 3, at % 9]} for at in range(8)]
batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
schedule = gatewise.ConstantBudget(rounds=1, prune_fraction=1 / 4, first_round=2, recover=1)
allocation = gatewise.RankAllocation(schedule=schedule, validation_batch=batch)
arguments = TrainingArguments("run", max_steps=3, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True)
Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[allocation]).train()
assert len(allocation.history) == 1
model.save_pretrained("adapter")
gatewise.export.to_lora("adapter", "plain", padded=True)
assert gatewise.scores.path_moments(model, batch) and gatewise.RoutedLoraConfig(r=2) and gatewise.SelectivePromptConfig()
gatewise.fast_lora(model)
"""


def test_a_trainer_script_needs_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The client of the model hub brings filelock, and DeepSpeed, where it is installed, wants pydantic.
    extras = packages_of("cli", "deepspeed") - {"filelock"}
    assert {"datasets", "gguf", "matplotlib", "pydantic", "rich", "rouge_score", "ruamel", "sacrebleu", "typer"} <= extras
    ran = without(extras, SCRIPT)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "plain" / "adapter_config.json").is_file()


def test_the_command_without_its_extra_is_one_sentence() -> None:
    ran = without({"typer"}, "from gatewise.__main__ import main; main()")
    assert ran.returncode == 1
    assert ran.stderr == "error: the gatewise command needs typer, which is not installed: pip install 'gatewise[cli]'\n"
    assert PROJECT["scripts"]["gatewise"] == "gatewise.__main__:main"


def test_parts_of_the_library_say_which_extra_they_need() -> None:
    ran = without({"rich"}, "import gatewise; gatewise.importance")
    assert "GatewiseError: gatewise.importance needs rich, which is not installed: pip install 'gatewise[cli]'" in ran.stderr
    with (
        pytest.raises(GatewiseError, match=r"^measuring needs none_such, .*: pip install 'gatewise\[metrics\]'$"),
        needs("metrics", "measuring"),
    ):
        import none_such.part  # noqa: F401
