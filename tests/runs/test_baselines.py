"""AdaLoRA as a baseline: it takes ranks away on time, and ends as a plain LoRA adapter of the same function."""

from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_base
from transformers import TrainerControl, TrainerState, TrainingArguments

from gatewise.runs.baselines import AdaLoraSchedule, orthogonality, to_plain_lora

STEPS = 6


def model(tfinal: int = 2) -> PeftModel:
    config = AdaLoraConfig(
        target_r=2, init_r=4, lora_alpha=6, tinit=1, tfinal=tfinal, total_step=STEPS,
        target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(tiny_base("llama"), config)
    for name, parameter in adapted.named_parameters():
        if "lora_E" in name:
            torch.nn.init.normal_(parameter)
    return adapted


def train(adapted: PeftModel, schedule: AdaLoraSchedule, folder: Path) -> None:
    args, ids = TrainingArguments(output_dir=str(folder), report_to="none"), torch.arange(1, 13).view(2, 6)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for step in range(STEPS):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.on_optimizer_step(args, TrainerState(global_step=step), TrainerControl(), model=adapted)
        assert adapted.peft_config["default"].rank_pattern is None  # what is saved between steps is not cut
        optimizer.zero_grad()


@pytest.mark.parametrize("tfinal", [0, 2])
def test_the_plain_adapter_computes_the_same_at_the_target_budget(tfinal: int, tmp_path: Path) -> None:
    adapted, schedule = model(tfinal), AdaLoraSchedule()
    train(adapted, schedule, tmp_path)
    ids = torch.arange(2, 20).view(2, 9)
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        plain = to_plain_lora(adapted)
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        with plain.disable_adapter():
            torch.testing.assert_close(plain(input_ids=ids).logits, base(ids))
    ranks = [p.shape[0] for name, p in plain.named_parameters() if "lora_A" in name]
    assert sum(ranks) == 2 * 6  # target_r for each of three modules in two layers
    assert len(set(ranks)) > 1
    assert plain.peft_config["default"].peft_type == "LORA"


def base(ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.as_tensor(tiny_base("llama").eval()(input_ids=ids).logits)


def test_the_regulariser_is_the_one_peft_adds(tmp_path: Path) -> None:
    adapted = model().eval()
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        with_it = adapted(input_ids=ids, labels=ids).loss
        without = adapted.base_model.model(input_ids=ids, labels=ids).loss
        weight = adapted.peft_config["default"].orth_reg_weight
        torch.testing.assert_close(weight * orthogonality(adapted), with_it - without, atol=1e-5, rtol=1e-5)
