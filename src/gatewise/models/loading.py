"""Base models, tokenizers and adapters from what a user names; whatever is wrong with them becomes one sentence."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gatewise.errors import GatewiseError
from gatewise.models.cache import resolve
from gatewise.models.convert import quiet
from gatewise.models.embedded import EMBEDDED

Task = Literal["causal", "classification"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# The last linear of a sequence classifier: BERT and kin, decoders, RoBERTa and kin.
_CLASSIFIER = re.compile(r"(?:^|\.)(?:classifier|score)(?:\.out_proj)?\.weight$")

# What to do where a model's files are not those of the task.
_INSTEAD = {
    "causal": "give a decoder, or let an encoder sort texts into classes, with task classification",
    "classification": "give a model whose files are whole",
}
# How torch reports the first of the tensors that do not fit.
_SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, padding on the right; without a pad token of its own it pads with end-of-text.

    Raises GatewiseError when there is none or it cannot be read.
    """
    source = resolve(name_or_path)
    try:
        with quiet(bars=not Path(source).is_dir()):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way on a file it cannot read
        raise _not_loaded("tokenizer", name_or_path, source, error) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise GatewiseError(f"the tokenizer of {str(name_or_path)!r} has neither a pad token nor an end-of-text token.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.name_or_path = str(name_or_path)
    return tokenizer


def load_model(
    name_or_path: str | Path,
    *,
    task: Task = "causal",
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A base model on the CPU, in evaluation mode.

    An embedded model keeps its name (`model.name_or_path`), which PEFT then writes into adapters, so that they name a
    base that can be found on any machine. With task "classification" a classifier of `num_labels` outputs is drawn
    afresh unless the model has one of that size.

    Raises GatewiseError when the model is not to be found, is damaged, has no safetensors, or is not made for the task.
    """
    if num_labels is not None and task != "classification":
        raise ValueError("num_labels goes with task='classification'")
    source = resolve(name_or_path)
    if Path(source).is_dir():
        _check_model_folder(Path(source))
    auto: Any = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    try:
        with quiet(bars=not Path(source).is_dir()):
            model, notes = auto.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=task == "classification",  # a classifier of another size: see the check below
                **options,
            )
    except Exception as error:  # hub, configuration and weights each raise their own kinds
        raise _not_loaded("model", name_or_path, source, error) from error
    fresh = [*notes["missing_keys"], *(key for key, *_ in notes["mismatched_keys"])]
    if task == "classification":
        prefix = f"{model.base_model_prefix}."
        fresh = [key for key in fresh if key.startswith(prefix) and "pooler" not in key]
    if fresh:
        raise GatewiseError(
            f"{str(name_or_path)!r} cannot serve as a {task} model: its files have no fitting weights for "
            f"{_some(fresh)}, which would be random: {_INSTEAD[task]}"
        )
    if model.config.pad_token_id is None:  # decoders that classify look for the last token that is no padding
        end = model.config.eos_token_id
        model.config.pad_token_id = end[0] if isinstance(end, list) else end
    # PEFT reads the attribute for adapter_config.json and the configuration's for the model card.
    model.name_or_path = model.config._name_or_path = str(name_or_path)
    return model.eval()


def load_adapter(
    adapter_dir: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
) -> tuple[PeftModel, PreTrainedTokenizerBase, str]:
    """An adapter on its base model: (model in evaluation mode, tokenizer, name of the base).

    `base` defaults to the one that adapter_config.json names. The tokenizer is the adapter's own if its folder has one.
    A sequence-classification adapter comes with its classifier. All parameters are frozen, or, with `trainable`, all
    but the adapter's.

    Raises GatewiseError when the folder is no adapter, a file is damaged, or the adapter does not fit the base.
    """
    folder = Path(adapter_dir).expanduser()
    config, weights = _read_adapter_config(folder), folder / ADAPTER_WEIGHTS
    shapes = _tensor_shapes(weights)
    base_name = str(base or config.base_model_name_or_path or "")
    if not base_name:
        raise GatewiseError(f"{folder / ADAPTER_CONFIG} does not name the base model: say which one it is (--base).")
    task = _task_of(config, folder)
    num_labels = _count_labels(shapes, weights) if task == "classification" else None
    try:
        model = load_model(base_name, task=task, num_labels=num_labels, dtype=dtype)
        own_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(folder if own_tokenizer else base_name)
    except GatewiseError as error:
        raise GatewiseError(f"the adapter {folder} could not be put on its base model: {error}") from error
    config.inference_mode = not trainable
    try:
        with quiet():
            adapted = get_peft_model(model, config)
            result = adapted.load_adapter(str(folder), "default", is_trainable=trainable, torch_device="cpu")
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise _misfit(folder, base_name, _why_not(error)) from error
    # PEFT itself passes over tensors that found no module, and modules that found no tensor.
    if result.missing_keys:
        raise _misfit(folder, base_name, f"the adapter has no weights for {_some(result.missing_keys)}")
    if result.unexpected_keys and not config.is_prompt_learning:  # a soft prompt is loaded apart from the modules
        raise _misfit(folder, base_name, f"the base has no module for the adapter's {_some(result.unexpected_keys)}")
    if not trainable:  # PEFT leaves soft prompts and biases free
        adapted.requires_grad_(False)
    return adapted.eval(), tokenizer, base_name


def _check_model_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise GatewiseError(f"{folder} is an adapter, not a base model: give the base model it was trained on.")
        raise GatewiseError(f"{folder} is not a model folder: it has no config.json.")
    for file in sorted(folder.glob("*.safetensors")):
        _tensor_shapes(file)


def _tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor from the header, which also tells whether the file is whole."""
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise GatewiseError(f"{file} is damaged or cut short ({_sentence(error)}): copy, download or train it again.") from error


def _read_adapter_config(folder: Path) -> PeftConfig:
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        kind = "that folder has no" if folder.is_dir() else "there is no such folder with an"
        raise GatewiseError(f"{folder} is not an adapter: {kind} {ADAPTER_CONFIG}.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        more = "; adapter_model.bin is a pickle, which is never read: save the adapter as safetensors" if pickled else ""
        raise GatewiseError(f"the adapter {folder} has no {ADAPTER_WEIGHTS}{more}.")
    try:
        if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise ValueError("it is not a JSON object")
        with quiet():
            return PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise GatewiseError(f"{path} is not a configuration that PEFT can read: {_sentence(error)}") from error


def _task_of(config: PeftConfig, folder: Path) -> Task:
    if config.task_type is None:  # then PEFT notes the class of the base model
        base_class = (config.auto_mapping or {}).get("base_model_class") or ""
        return "classification" if base_class.endswith("ForSequenceClassification") else "causal"
    if config.task_type == TaskType.SEQ_CLS:
        return "classification"
    if config.task_type == TaskType.CAUSAL_LM:
        return "causal"
    raise GatewiseError(
        f"the adapter {folder} has task_type {config.task_type}: only CAUSAL_LM and SEQ_CLS adapters can be loaded."
    )


def _count_labels(shapes: dict[str, list[int]], weights: Path) -> int:
    for key, shape in shapes.items():
        if _CLASSIFIER.search(key) and len(shape) == 2:
            return shape[0]
    raise GatewiseError(f"{weights} has no classifier, though the adapter is for classification: save it again with one.")


def _not_loaded(what: str, given: str | Path, source: str, error: Exception) -> GatewiseError:
    if Path(source).is_dir():
        return GatewiseError(f"the {what} in {source} could not be loaded: {_sentence(error)}")
    return GatewiseError(
        f"no model {str(given)!r}: it is not a folder, not an embedded model ({', '.join(EMBEDDED)}), and the "
        f"Hugging Face hub could not give its {'weights' if what == 'model' else what} ({_sentence(error)})"
    )


def _misfit(folder: Path, base: str, why: str) -> GatewiseError:
    return GatewiseError(f"the adapter {folder} does not fit the base model {base!r}: {why}")


def _why_not(error: Exception) -> str:
    first = _SIZE_MISMATCH.search(str(error))
    return "{} is {} in the adapter and {} in the base".format(*first.groups()) if first else _sentence(error)


def _sentence(error: BaseException) -> str:
    """What an exception says, on one line and cut to a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
