"""The stages of SPT: which layers a search keeps, and the training of their prompts from scratch."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from prompted_models import arguments, hyper, prompt_config, prompted_base, stopped
from transformers import Trainer

from gatewise import GatewiseError, SelectivePromptConfig, prompts
from gatewise.prompts.stages import chosen_layers, discrete_config


def test_choosing_layers():
    assert chosen_layers(torch.tensor([0.1, 0.7, 0.3, 0.7]), 1) == [1]
    assert chosen_layers(torch.tensor([0.1, 0.7, 0.3, 0.7]), 3) == [1, 2, 3]
    with pytest.raises(GatewiseError, match="keep is 5: expected a whole number from 1 to 4"):
        chosen_layers(torch.zeros(4), 5)
    config = prompt_config(modules_to_save=["score", "score"], inference_mode=True)
    discrete = discrete_config(config, [2, 3])
    assert (discrete.prompt_layers, discrete.modules_to_save, discrete.inference_mode) == ([2, 3], ["score"], False)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_retraining_is_from_scratch(tmp_path, data, family):
    """After a search it gives what it gives on a model that was never searched, its head included."""
    searched = hyper(family)
    result = prompts.search(searched, data(family), arguments(tmp_path / "s"), keep=1)
    models = []
    for model in (searched, prompted_base_again(family)):
        torch.manual_seed(8)
        models.append(prompts.retrain(model, result.config, data(family), arguments(tmp_path / "r")))
    one, other = (dict(model.named_parameters()) for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert models[0].gates().sum() == 1
    assert not models[0].gate_parameters()


def prompted_base_again(family: str) -> Any:
    torch.manual_seed(0)
    return prompted_base(family)


def test_search_and_retraining_with_the_same_arguments(tmp_path, data):
    """Neither takes the other's checkpoints for its own, or away."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    found = prompts.search(hyper(), data("bert"), args, keep=3)
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["checkpoint-4"]

    with pytest.raises(KeyboardInterrupt):
        prompts.retrain(hyper(), found.config, data("bert"), args, trainer_class=stopped(Trainer))
    resumed = prompts.retrain(hyper(), found.config, data("bert"), args, resume_from_checkpoint=True)
    whole = prompts.retrain(hyper(), found.config, data("bert"), arguments(tmp_path / "whole"))
    for (name, one), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    fresh = arguments(tmp_path / "new")
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        prompts.retrain(hyper(), found.config, data("bert"), fresh, resume_from_checkpoint=True)
    search = str(tmp_path / "search/checkpoint-4")
    with pytest.raises(GatewiseError, match="checkpoint-4 is a checkpoint of a search, not of the training of its layers"):
        prompts.retrain(hyper(), found.config, data("bert"), args, resume_from_checkpoint=search)


def test_a_model_whose_prompts_were_taken_off(tmp_path, data):
    """Whatever its base model carries next would answer in its place."""
    searched = hyper()
    found = prompts.search(searched, data("bert"), arguments(tmp_path), keep=1)
    first = prompts.retrain(searched, found.config, data("bert"), arguments(tmp_path))
    second = prompts.retrain(first, prompt_config("bert", prompt_layers=[0, 1]), data("bert"), arguments(tmp_path))
    assert second.gates().tolist() == [1, 1, 0]
    assert all(len(module._forward_pre_hooks) == 1 for module in second.base_model._transformer.around)
    batch = {"input_ids": data("bert")[0]["input_ids"][None]}
    for model in (searched, first):
        for call in (
            lambda model: model(**batch),
            lambda model: model.gates(),
            lambda model: model.unload(),
            lambda model: model.save_pretrained(tmp_path / "lost"),
            lambda model: prompts.search(model, data("bert"), arguments(tmp_path), keep=1),
            lambda model: prompts.retrain(model, found.config, data("bert"), arguments(tmp_path)),
        ):
            with pytest.raises(GatewiseError, match=r"prompts were taken off, by retrain\(\) or unload\(\)"):
                call(model)


def test_a_head_that_is_not_trained_is_told_of(tmp_path, data, caplog):
    config = SelectivePromptConfig(num_prompt_tokens=3, bottleneck=4)
    found = prompts.search(get_peft_model(prompted_base("bert"), config), data("bert"), arguments(tmp_path), keep=1)
    prompts.retrain(prompted_base("bert"), found.config, data("bert"), arguments(tmp_path))
    wanted = "the head of this BertForSequenceClassification is not trained: give the configuration task_type='SEQ_CLS'"
    assert sum(wanted in message for message in caplog.messages) == 2
    caplog.clear()
    prompts.search(hyper(), data("bert"), arguments(tmp_path), keep=1)
    prompts.search(hyper("llama"), data("llama"), arguments(tmp_path), keep=1)
    assert not any("is not trained" in message for message in caplog.messages)


def test_the_checkpoint_of_another_configuration_is_refused(tmp_path, data):
    """Of other layers some generators would be loaded and others not."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    prompts.retrain(prompted_base("bert"), prompt_config("bert", prompt_layers=[0, 1]), data("bert"), args)
    for other, message in (
        (
            {"prompt_layers": [1, 2]},
            r"checkpoint-4 is a checkpoint of a training with prompt_layers=\[0, 1\], but .* is \[1, 2\] now",
        ),
        ({"prompt_layers": [0, 1], "num_prompt_tokens": 2}, "with num_prompt_tokens=3, but num_prompt_tokens is 2 now"),
        ({"prompt_layers": [0, 1], "tau": 0.5}, "with tau=1.0, but tau is 0.5 now"),
        ({"prompt_layers": [0, 1], "activation": "relu"}, "with activation=gelu, but activation is relu now"),
        ({"prompt_layers": [0, 1], "balanced": True}, "with balanced=None, but balanced is True now"),
        ({"prompt_layers": [0, 1], "normalize_states": False}, "with normalize_states=True, but normalize_states is False now"),
    ):
        config = prompt_config("bert", **other)
        with pytest.raises(GatewiseError, match=message):
            prompts.retrain(prompted_base("bert"), config, data("bert"), args, resume_from_checkpoint=True)


def test_the_checkpoint_of_another_search_is_refused(tmp_path, data):
    """Under way or ended, of another model."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    prompts.search(hyper(), data("bert"), args, keep=1)
    for checkpoint in (True, str(tmp_path / "search/checkpoint-2")):
        for other in ({"tau": 0.5}, {"activation": "relu"}, {"num_prompt_tokens": 2}):
            (name,) = other
            model = get_peft_model(prompted_base("bert"), prompt_config("bert", **other))
            with pytest.raises(GatewiseError, match=f"is a checkpoint of a search with {name}="):
                prompts.search(model, data("bert"), args, keep=1, resume_from_checkpoint=checkpoint)


def test_a_configuration_from_an_adapters_folder_is_trained(tmp_path, data):
    """It comes as one for inference."""
    get_peft_model(prompted_base("bert"), prompt_config("bert", prompt_layers=[1])).save_pretrained(tmp_path / "adapter")
    config = SelectivePromptConfig.from_pretrained(tmp_path / "adapter")
    model = prompts.retrain(prompted_base("bert"), config, data("bert"), arguments(tmp_path / "runs"))
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".spt_" in name)
    assert config.inference_mode


def test_both_stages_go_on_with_the_same_flag(tmp_path, data):
    """Where the search had ended and the training had not begun."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    first = prompts.search(hyper(), data("bert"), args, keep=1)
    found = prompts.search(hyper(), data("bert"), args, keep=1, resume_from_checkpoint=True)
    assert found.config == first.config
    resumed = prompts.retrain(hyper(), found.config, data("bert"), args, resume_from_checkpoint=True)
    whole = prompts.retrain(hyper(), found.config, data("bert"), arguments(tmp_path / "whole"))
    for (name, one), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
