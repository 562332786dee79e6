"""A saved adapter on its base model, and data read as the run that trained it read its data."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import (
    CONFIG_FILE,
    PEFT_PREFIX,
    VOCABULARY,
    base_of,
    read_config,
    read_note,
    read_tensors,
    tensor_shapes,
    weights_of,
)
from gatewise.errors import GatewiseError, reason_of, some
from gatewise.models.device import DTYPES, Quantization, pick_device, pick_dtype
from gatewise.models.loading import HEADS, Task, class_names, load_model, load_tokenizer, pad_as
from gatewise.parts import TASKS
from gatewise.progress import quiet
from gatewise.tasks import ChatFormat, Prompting, Records, Template, default_template
from gatewise.tasks.records import check_labels, is_data_set
from gatewise.tasks.splitting import load_part

_BASE_WEIGHT = re.compile(r"\.(?:base_layer|original_module)\.(weight|bias)$")

Around = Callable[[PreTrainedModel], PreTrainedModel]


@dataclass(frozen=True)
class Loaded:
    """An adapter on its base model, and data read as the adapter's own run read its data.

    Attributes:
        base: the base model's name.
        template: how rows become prompts; None for a classifier, which reads the text itself.
        max_length: most tokens of a sequence in that run.
        note: what that run says of itself.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    records: Records
    template: Prompting | None
    max_length: int
    note: Mapping[str, Any]


def load_with_data(
    adapter: str | Path,
    data: str,
    options: DataOptions = DataOptions(),
    *,
    trainable: bool = False,
    say: Callable[[str], None] | None = None,
) -> Loaded:
    """Loads an adapter and the data it is to be run on.

    Args:
        data: a .jsonl, .json or .csv file, ``sample:NAME``, or a data set's name.
        options: how to read the data, and where the model runs.
        trainable: leave the adapter's own parameters free.
        say: called with a line about what happens now.

    Raises:
        GatewiseError: adapter, base model and data cannot be read or do not fit each other, or there is no such device.
    """
    adapter = Path(adapter)
    device = pick_device(options.device)
    records, template, max_length = read_data(adapter, data, options)
    parts = read_note(adapter).get("parts")
    if say and parts and (options.split is None or is_data_set(data)):
        names = " or ".join(f"--split {name}" for name in parts)
        say(
            f"warning: the adapter's run dealt one source of rows out to train, {' and '.join(parts)}: if it is {data}, most of "
            f"these rows were trained on; of a file {names} takes others"
        )
    model, tokenizer, base_name = load_as_trained(adapter, base=options.base, device=device, trainable=trainable, say=say)
    return Loaded(model, tokenizer, base_name, records, template, max_length, read_note(adapter))


def read_data(adapter: Path, data: str, options: DataOptions) -> tuple[Records, Prompting | None, int]:
    """The part of ``load_with_data`` that needs no model.

    Returns:
        Rows, with their labels in the order of a classifier's classes; how prompts are written, None for a classifier; and the most
        tokens of a sequence.

    Raises:
        GatewiseError: the data cannot be read, or labels and classes do not fit each other.
    """
    note, config = read_note(adapter), _peft_config(adapter)
    task = note.get("task") or _task_of(config, adapter)
    elsewhere = TASKS[task].elsewhere if task in TASKS else f"is for task {task}, which no installed package brings"
    if elsewhere:
        raise GatewiseError(f"the adapter {adapter} {elsewhere}")
    causal = task == "causal"
    length = int(note.get("max_length") or 512)
    names, words = note.get("labels"), note.get("label_words")
    if options.labels:
        given = _labels(options.labels)
        same = names is not None and set(given) == set(names)  # perhaps in another order
        if any(given.values()):
            words = given
        elif not same:
            words = None
        if causal or not same:  # which class of a run's classifier is which does not change
            names = list(given)
    columns = note.get("columns") if options.columns is None else _columns(options.columns)
    records = load_part(data, options.split, note, limit=options.limit, labels=names, columns=columns)
    if not causal and names is None and records.labels is not None:
        base = options.base or base_of(adapter)
        known = class_names(base) if base else None
        if known is None or not set(records.labels) <= set(known):
            told = f" ({', '.join(known)})" if known else ""
            raise GatewiseError(
                f"{adapter} does not say which of its classes{told} is which of the labels {', '.join(records.labels)}: give "
                "--labels with all of them, in the order of the classes"
            )
        records = replace(records, labels=known)
    check_labels(records, "give --labels with all of them")
    if causal and records.kind == "chat":
        if prompt := options.prompt or note.get("template"):
            raise GatewiseError(f"{data} holds conversations, but prompts are written as {prompt!r}: give rows with its fields")
        return records, ChatFormat(note.get("chat_template"), note.get("assistant") or "all"), length
    if causal:
        prompt = options.prompt or note.get("template")
        if prompt is None and note.get("chat_template"):
            raise GatewiseError(
                f"{data} holds {records.kind} rows, but {adapter} was trained on conversations: give rows with messages, or say "
                "how these are written (--template-prompt)"
            )
        return records, Template(prompt or default_template(records).prompt, words), length
    if options.prompt:
        raise GatewiseError(f"{adapter} is a classifier, which reads the text itself: leave the prompt's template out")
    return records, None, length


def _columns(text: str) -> dict[str, str]:
    """Field -> the column that it is read from."""
    parts = [part.partition("=") for part in text.split(",")]
    found = {name.strip(): column.strip() for name, _, column in parts}
    if len(set(found.values())) < len(parts) or not all(found) or not all(found.values()):
        raise GatewiseError(f"--columns {text!r}: expected each field with its column, such as 'text=message,label=category'")
    return found


def _labels(text: str) -> dict[str, str]:
    """Label -> the word for it, empty where only labels are given."""
    parts = [part.partition("=") for part in text.split(",")]
    found = {name.strip(): word.strip() for name, _, word in parts}
    if len(found) < len(parts) or not all(found) or any(found.values()) != all(found.values()):
        raise GatewiseError(f"--labels {text!r}: expected 'no,yes', or with a word for each label 'no=bad,yes=good'")
    return found


def load_as_trained(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    device: torch.device | str = "auto",
    trainable: bool = False,
    say: Callable[[str], None] | None = None,
    around: Around | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase, str]:
    """``load_adapter`` in the precision that the adapter's recipe asked for, quantised if it was; "auto" is for this device."""
    device = pick_device(device)
    note = read_note(Path(adapter))
    asked, quantization = note.get("dtype"), note.get("quantization")
    classifier = around is None and _task_of(_peft_config(Path(adapter)), Path(adapter)) == "classification"
    dtype = torch.float32 if classifier else pick_dtype(asked if asked in DTYPES else "auto", device, say)
    if say:
        say(f"loading {adapter} in {quantization or str(dtype).removeprefix('torch.')} on {device}")
    return load_adapter(
        adapter, base=base, dtype=dtype, device=device, trainable=trainable, around=around, quantization=quantization
    )


# The last linear of a sequence classifier: BERT and kin, decoders, RoBERTa and kin.
_CLASSIFIER = re.compile(r"(?:^|\.)(?:classifier|score)(?:\.out_proj)?\.weight$")


def load_adapter(
    adapter_dir: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trainable: bool = False,
    around: Around | None = None,
    quantization: Quantization | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase, str]:
    """An adapter on its base model: (model in evaluation mode, tokenizer, name of the base).

        model, tokenizer, _ = gatewise.models.load_adapter("runs/quickstart/adapter")
        asked = tokenizer("Message: Where is my parcel?\nDepartment:", return_tensors="pt")
        print(tokenizer.decode(model.generate(**asked, max_new_tokens=1)[0]))

    `base` defaults to the one that adapter_config.json names. The tokenizer is the adapter's own if its folder has one.
    A sequence-classification adapter comes with its classifier. All parameters are frozen, or, with `trainable`, all
    but the adapter's. `dtype`, `device` and `quantization` are those of `load_model`. `around` puts another model around the base,
    which is then loaded without a head.

    Raises GatewiseError when the folder is no adapter, a file is damaged, or the adapter does not fit the base.
    """
    folder = Path(os.path.expanduser(adapter_dir))
    config = _peft_config(folder)
    model, base_name = load_base(
        folder, base=base, dtype=dtype, device=device, headless=around is not None, quantization=quantization
    )
    model = around(model) if around else model
    # Without a vocabulary beside it, Transformers makes a tokenizer of the configuration that knows no word.
    brings = (folder / "tokenizer_config.json").is_file() and any(any(folder.glob(name)) for name in VOCABULARY)
    tokenizer = load_tokenizer(folder if brings else base_name)
    if around is None and _task_of(config, folder) == "classification":
        pad_as(model, tokenizer)
    adapted = _put(model, config, folder, "default", base_name, trainable)
    if not trainable:  # PEFT leaves soft prompts and biases free
        adapted.requires_grad_(False)
    return adapted.to(pick_device(device)).eval(), tokenizer, base_name


def load_base(
    folder: Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    headless: bool = False,
    quantization: Quantization | None = None,
) -> tuple[PreTrainedModel, str]:
    """The base model of an adapter: (model, its name). Arguments and errors are those of ``load_adapter``.

    It is on the CPU or, quantised, on the device.
    """
    config, weights = _peft_config(folder), weights_of(folder)
    base_name = str(base or base_of(folder) or "")
    if not base_name:
        raise GatewiseError(f"{folder / CONFIG_FILE} does not name the base model: say which one it is (--base).")
    task = "encoder" if headless else _task_of(config, folder)
    num_labels = _count_labels(weights) if task == "classification" else None
    place = pick_device(device)
    precision = torch.float32 if dtype == "auto" and task == "classification" else pick_dtype(dtype, place)
    settings: dict[str, Any] = {"brought": getattr(config, "modules_to_save", None) or ()}
    if quantization is not None:
        settings |= {"quantization": quantization, "device": place}
    return load_model(base_name, task=task, num_labels=num_labels, dtype=precision, **settings), base_name


def put_on(model: PreTrainedModel | PeftModel, adapter_dir: str | Path, name: str, base_name: str) -> PeftModel:
    """Puts an adapter, frozen, on a base model that is there already, or beside the adapters of one that has some.

    If the adapter cannot be loaded, a model with adapters keeps the others, but a base model without any must be loaded anew.

    Args:
        name: what PEFT is to call it.
        base_name: the base model's, for errors.

    Raises:
        GatewiseError: the folder is no adapter for a causal model, a file is damaged, or the adapter does not fit the base.
    """
    folder = Path(adapter_dir)
    config = _peft_config(folder)
    if (task := _task_of(config, folder)) != "causal":
        raise GatewiseError(f"the adapter {folder} is for {task}: expected one that writes text (CAUSAL_LM)")
    try:
        adapted = _put(model, config, folder, name, base_name)
    except GatewiseError:
        if isinstance(model, PeftModel) and name in model.peft_config:
            model.delete_adapter(name)
        raise
    adapted.requires_grad_(False)
    return adapted.eval()


def check_base_weights(model: PreTrainedModel, adapter_dir: str | Path) -> None:
    """Refuses an adapter that would change the base model that it shares with other adapters.

    PEFT may write base weights of embeddings and output heads into an adapter's file, and reads them back into the base model:
    those of modules with LoRA, and those of modules without, under the names of the base model. Modules that the adapter trained
    as a whole (``modules_to_save``) have such names too, but stay the adapter's own.

    Args:
        model: the base model, without adapters.

    Raises:
        GatewiseError: its file has base weights that differ from the model's, or is damaged.
    """
    config = read_config(adapter_dir)
    tensors, _ = read_tensors(weights_of(adapter_dir))
    whole = {*(config.get("modules_to_save") or ()), *(HEADS if config.get("task_type") == "SEQ_CLS" else ())}
    own = re.compile("|".join([r"\.(lora_|token_adapter\.)", *(rf"{re.escape(name)}\." for name in sorted(whole))]))
    # Biases of base modules, which the adapter says that it has.
    trained = None if config.get("bias") in (None, "none") else ".bias"
    there = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        in_base = name.startswith(PEFT_PREFIX) and not own.search(name) and not (trained and name.endswith(trained))
        # Prompts and routers have names of their own.
        if not _BASE_WEIGHT.search(name) and not (in_base and config.get("peft_type") == "LORA"):
            continue
        base = there.get(_BASE_WEIGHT.sub(r".\1", name).removeprefix(PEFT_PREFIX))
        if base is None or base.shape != tensor.shape or not torch.equal(tensor.to(base), base):
            raise GatewiseError(
                f"the adapter {adapter_dir} has other base weights ({name}) than the base model that all adapters share: save it "
                "with save_embedding_layers=False"
            )


def _put(
    model: PreTrainedModel | PeftModel, config: PeftConfig, folder: Path, name: str, base_name: str, trainable: bool = False
) -> PeftModel:
    config.inference_mode = not trainable
    weights = weights_of(folder)
    for key, tensor in read_tensors(weights)[0].items():
        # A router would choose experts from such numbers without an error.
        if "lora_" in key and tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise GatewiseError(f"{weights} is damaged: {key} has numbers that are not finite; copy, download or train it again")
    try:
        with quiet():
            adapted = model if isinstance(model, PeftModel) else get_peft_model(model, config, adapter_name=name)
            result = adapted.load_adapter(str(folder), name, is_trainable=trainable, torch_device="cpu")
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise _misfit(folder, base_name, reason_of(error)) from error
    # PEFT itself passes over tensors that found no module, and modules that found no tensor.
    if result.missing_keys:
        raise _misfit(folder, base_name, f"the adapter has no weights for {some(sorted(result.missing_keys), 1)}")
    if result.unexpected_keys and not config.is_prompt_learning:  # a soft prompt is loaded apart from the modules
        raise _misfit(folder, base_name, f"the base has no module for the adapter's {some(sorted(result.unexpected_keys), 1)}")
    return adapted


def _peft_config(folder: Path) -> PeftConfig:
    read_config(folder)  # refuses what PEFT would stumble over
    try:
        with quiet():
            return PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise GatewiseError(f"{folder / CONFIG_FILE} is not a configuration that PEFT can read: {reason_of(error)}") from error


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


def _count_labels(weights: Path) -> int:
    for key, shape in tensor_shapes(weights).items():
        if _CLASSIFIER.search(key) and len(shape) == 2:
            return shape[0]
    raise GatewiseError(f"{weights} has no classifier, though the adapter is for classification: save it again with one.")


def _misfit(folder: Path, base: str, why: str) -> GatewiseError:
    return GatewiseError(f"the adapter {folder} does not fit the base model {base!r}: {why}")
