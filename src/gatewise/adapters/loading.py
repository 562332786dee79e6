"""A saved adapter on its base model, and data read as the run that trained it read its data."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import CONFIG_FILE, PEFT_PREFIX, read_config, read_note, read_tensors, tensor_shapes, weights_of
from gatewise.errors import GatewiseError, reason_of, some
from gatewise.models.device import DTYPES, pick_device, pick_dtype
from gatewise.models.loading import HEADS, Task, class_names, load_model, load_tokenizer, pad_as
from gatewise.parts import TASKS
from gatewise.progress import quiet
from gatewise.tasks import Records, Template, default_template
from gatewise.tasks.records import check_labels, load_like

_BASE_WEIGHT = re.compile(r"\.(?:base_layer|original_module)\.(weight|bias)$")

Around = Callable[[PreTrainedModel], PreTrainedModel]


@dataclass(frozen=True)
class Loaded:
    """An adapter on its base model, and data read as the adapter's own run read its data.

    Attributes:
        base: the base model's name.
        template: None for a classifier, which reads the text itself.
        max_length: most tokens of a sequence in that run.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    records: Records
    template: Template | None
    max_length: int


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
        say: told in a line what happens now.

    Raises:
        GatewiseError: adapter, base model and data cannot be read or do not fit each other, or there is no such device.
    """
    adapter = Path(adapter)
    device = pick_device(options.device)
    records, template, max_length = read_data(adapter, data, options)
    model, tokenizer, base_name = load_as_trained(adapter, base=options.base, device=device, trainable=trainable, say=say)
    return Loaded(model, tokenizer, base_name, records, template, max_length)


def read_data(adapter: Path, data: str, options: DataOptions) -> tuple[Records, Template | None, int]:
    """The part of ``load_with_data`` that needs no model: rows, how prompts are written, and the most tokens of a sequence."""
    note = read_note(adapter)
    _refuse_other_tasks(adapter, note)
    causal = (note.get("task") or _task_of(_peft_config(adapter), adapter)) == "causal"

    def classes() -> list[str] | None:
        base = options.base or _peft_config(adapter).base_model_name_or_path
        return class_names(base) if base else None

    records, template = read_rows(str(adapter), data, options, note, causal, classes)
    return records, template, int(note.get("max_length") or 512)


def read_rows(
    called: str, data: str, options: DataOptions, note: Mapping[str, Any], causal: bool, classes: Callable[[], list[str] | None]
) -> tuple[Records, Template | None]:
    """Rows for a model, with their labels in the order of its classes, and how prompts are written for it.

    Args:
        called: what the model is called in errors.
        note: of its run; empty where there is none.
        causal: it writes; otherwise it is a classifier.
        classes: what the model itself calls its classes, in order; None where it does not say.

    Raises:
        GatewiseError: the data cannot be read, or labels and classes do not fit each other.
    """
    names, words = note.get("labels"), note.get("label_words")
    if options.labels:
        given, with_words = _labels(options.labels)
        same = names is not None and set(given) == set(names)  # in an order of one's own, perhaps, with the run's words
        if with_words and not causal:
            raise GatewiseError(f"{called} is a classifier, which writes no words: give --labels without them")
        if causal or not same:  # of a run's classifier, which class is which does not change
            names, words = given, words if same and with_words is None else with_words
    records = load_like(data, names, split=options.split, limit=options.limit)
    if not causal and names is None and records.labels is not None:
        records = replace(records, labels=_in_order(called, classes(), records.labels))
    if options.labels and records.labels is None:
        raise GatewiseError(f"{data} holds {records.kind} rows, which have no labels: leave --labels out")
    check_labels(records, "give --labels with all of them")
    template = None
    if causal:
        prompt = options.prompt or note.get("template") or default_template(records).prompt
        template = Template(prompt, words if records.labels is not None else None)
    elif options.prompt:
        raise GatewiseError(f"{called} is a classifier, which reads the text itself: leave the prompt's template out")
    return records, template


def _in_order(called: str, known: list[str] | None, found: Sequence[str]) -> list[str]:
    """The labels that rows have, in the order of a classifier's classes.

    Raises:
        GatewiseError: they have other names, or none.
    """
    if known is None or not set(found) <= set(known):
        told = f" (its base model calls them {', '.join(known)})" if known else ""
        raise GatewiseError(
            f"{called} does not say which of its classes{told} is which of the labels {', '.join(found)}: give --labels with all "
            "of them, in the order of the classes"
        )
    return known


def load_as_trained(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    device: torch.device | str = "auto",
    trainable: bool = False,
    say: Callable[[str], None] | None = None,
    around: Around | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase, str]:
    """``load_adapter`` in the precision that the adapter's recipe asked for; one that left it open leaves it to this device too."""
    device = pick_device(device)
    asked = read_note(Path(adapter)).get("dtype")
    classifier = around is None and _task_of(_peft_config(Path(adapter)), Path(adapter)) == "classification"
    dtype = torch.float32 if classifier else pick_dtype(asked if asked in DTYPES else "auto", device, say)
    if say:
        say(f"loading {adapter} in {str(dtype).removeprefix('torch.')} on {device}")
    return load_adapter(adapter, base=base, dtype=dtype, device=device, trainable=trainable, around=around)


def _labels(text: str) -> tuple[list[str], dict[str, str] | None]:
    parts = [part.strip() for part in text.split(",")]
    pairs = [part.partition("=") for part in parts]
    names = [name.strip() for name, _, _ in pairs]
    with_words = [bool(equals and word.strip()) for _, equals, word in pairs]
    if not all(names) or len(names) < 2 or any(with_words) != all(with_words):
        raise GatewiseError(f"--labels {text!r}: expected 'no,yes', or with a word for each label 'no=bad,yes=good'")
    return names, {name.strip(): word.strip() for name, _, word in pairs} if all(with_words) else None


# The last linear of a sequence classifier: BERT and kin, decoders, RoBERTa and kin.
_CLASSIFIER = re.compile(r"(?:^|\.)(?:classifier|score)(?:\.out_proj)?\.weight$")


# How torch reports the first of the tensors that do not fit.
_SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)


def load_adapter(
    adapter_dir: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trainable: bool = False,
    around: Around | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase, str]:
    """An adapter on its base model: (model in evaluation mode, tokenizer, name of the base).

    `base` defaults to the one that adapter_config.json names. The tokenizer is the adapter's own if its folder has one.
    A sequence-classification adapter comes with its classifier. All parameters are frozen, or, with `trainable`, all
    but the adapter's. `dtype` and `device` are those of `load_model`. `around` puts a model of one's own around the base,
    which is then loaded without a head.

    Raises GatewiseError when the folder is no adapter, a file is damaged, or the adapter does not fit the base.
    """
    folder = Path(adapter_dir).expanduser()
    config, weights = _peft_config(folder), weights_of(folder)
    shapes = tensor_shapes(weights)
    base_name = str(base or config.base_model_name_or_path or "")
    if not base_name:
        raise GatewiseError(f"{folder / CONFIG_FILE} does not name the base model: say which one it is (--base).")
    task = "encoder" if around else _task_of(config, folder)
    num_labels = _count_labels(shapes, weights) if task == "classification" else None
    place = pick_device(device)
    precision = torch.float32 if dtype == "auto" and task == "classification" else pick_dtype(dtype, place)
    try:
        brought = getattr(config, "modules_to_save", None) or ()
        model = load_model(base_name, task=task, num_labels=num_labels, dtype=precision, brought=brought)
        model = around(model) if around else model
        own_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(folder if own_tokenizer else base_name)
        if task == "classification":
            pad_as(model, tokenizer)
    except GatewiseError as error:
        raise GatewiseError(f"the adapter {folder} could not be put on its base model: {error}") from error
    adapted = _put(model, config, folder, "default", base_name, trainable)
    if not trainable:  # PEFT leaves soft prompts and biases free
        adapted.requires_grad_(False)
    return adapted.to(place).eval(), tokenizer, base_name


def put_on(model: PreTrainedModel | PeftModel, adapter_dir: str | Path, name: str, base_name: str) -> PeftModel:
    """Puts an adapter, frozen, on a base model that is there already, or beside the adapters of one that has some.

    A model that has adapters keeps these, and no more, where this one cannot be loaded. A base model without any is then of no use.

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
    """Refuses an adapter that would change a base model that it is not alone on.

    PEFT writes base weights of embeddings and output heads into an adapter's file, and reads them back into the base model. They
    are those of modules that have LoRA, and of embeddings and heads without, which have the names of the base model then. So have
    modules that the adapter trained as a whole, which stay its own: all whose names end in one of ``modules_to_save``.

    Args:
        model: the base model, without adapters.

    Raises:
        GatewiseError: there are other base weights in it than the model has, or a file is damaged.
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
    _sound(weights_of(folder))
    try:
        with quiet():
            adapted = model if isinstance(model, PeftModel) else get_peft_model(model, config, adapter_name=name)
            result = adapted.load_adapter(str(folder), name, is_trainable=trainable, torch_device="cpu")
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise _misfit(folder, base_name, _why_not(error)) from error
    _check_all_found(result, config, folder, base_name)
    return adapted


def _sound(weights: Path) -> dict[str, Tensor]:
    """An adapter's tensors. LoRA that is not finite is refused: a router makes of it a choice of experts like any other."""
    tensors, _ = read_tensors(weights)
    for key, tensor in tensors.items():
        if "lora_" in key and tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise GatewiseError(
                f"{weights} is damaged: {key} has numbers that are not finite; copy or download the adapter again, or train it anew"
            )
    return tensors


def _check_all_found(result: Any, config: PeftConfig, folder: Path, base_name: str) -> None:
    """PEFT itself passes over tensors that found no module, and modules that found no tensor."""
    if result.missing_keys:
        raise _misfit(folder, base_name, f"the adapter has no weights for {some(sorted(result.missing_keys), 1)}")
    if result.unexpected_keys and not config.is_prompt_learning:  # a soft prompt is loaded apart from the modules
        raise _misfit(folder, base_name, f"the base has no module for the adapter's {some(sorted(result.unexpected_keys), 1)}")


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
    _refuse_other_tasks(folder, read_note(folder))
    raise GatewiseError(
        f"the adapter {folder} has task_type {config.task_type}: only CAUSAL_LM and SEQ_CLS adapters can be loaded."
    )


def _refuse_other_tasks(folder: Path, note: Mapping[str, Any]) -> None:
    """Raises GatewiseError for an adapter of a task whose rows only its own commands can read."""
    name = note.get("task")
    if name is None:
        return
    if name not in TASKS:
        raise GatewiseError(
            f"the adapter {folder} is for task {name}, which no installed package brings: expected {', '.join(TASKS)}"
        )
    if elsewhere := TASKS[name].elsewhere:
        raise GatewiseError(f"the adapter {folder} {elsewhere}")


def _count_labels(shapes: dict[str, list[int]], weights: Path) -> int:
    for key, shape in shapes.items():
        if _CLASSIFIER.search(key) and len(shape) == 2:
            return shape[0]
    raise GatewiseError(f"{weights} has no classifier, though the adapter is for classification: save it again with one.")


def _misfit(folder: Path, base: str, why: str) -> GatewiseError:
    return GatewiseError(f"the adapter {folder} does not fit the base model {base!r}: {why}")


def _why_not(error: Exception) -> str:
    first = _SIZE_MISMATCH.search(str(error))
    if isinstance(error, KeyError):
        return f"there is no {error.args[0] if error.args else 'such module'}"
    return "{} is {} in the adapter and {} in the base".format(*first.groups()) if first else reason_of(error)
