"""Loads base models and tokenizers by the name that a user gives. What is wrong with them is said in one sentence."""

import os
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gatewise.errors import GatewiseError, needs, reason_of, some
from gatewise.internals.library_attributes import set_model_name
from gatewise.internals.quantised import never_pack
from gatewise.losses import text_positions
from gatewise.models.device import Quantization, pick_device, pick_dtype
from gatewise.models.embedded import EMBEDDED, EmbeddedModel, fetch, fetched, hub_name, nearest
from gatewise.progress import quiet

Task = Literal["causal", "classification", "encoder"]


_AUTO: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "encoder": AutoModel,
}

HEADS = ("classifier", "score")
"""How PEFT knows what it trains and saves of every classifier, see ``PeftModelForSequenceClassification``."""


def resolve(name_or_path: str | Path, *, accept_terms: bool = False, progress: Callable[[str], None] | None = None) -> str:
    """Turns what a user wrote for a base model into what Transformers loads.

    An embedded name is fetched and becomes its folder; an existing folder stays as it is; anything else is taken for a hub id, and
    becomes the folder of its embedded model where there is one and the hub is out of reach.

    Raises:
        GatewiseError: for a plain name that is nearly an embedded one.
    """
    text = str(name_or_path)
    if model := embedded_for(text):
        return str(fetch(model.name, accept_terms=accept_terms, progress=progress))
    if text and os.path.isdir(path := os.path.expanduser(text)):
        return path
    if "/" not in text and (near := nearest(text)):
        raise GatewiseError(f"{text!r} is neither a folder nor an embedded model: did you mean {near}?")
    return text


def embedded_for(name_or_path: str | Path) -> EmbeddedModel | None:
    """The embedded model whose weights a name means: its own name, or the hub's where the hub is out of reach."""
    text = str(name_or_path)
    if text in EMBEDDED:
        return EMBEDDED[text]
    model = next((one for one in EMBEDDED.values() if one.hub == text), None)
    if model is None or Path(text).is_dir() or (model.by_name and not fetched(model.name)) or _is_on_hub(text):
        return None
    return model


@cache
def _is_on_hub(name: str) -> bool:
    """Whether a model can be had by its hub id, from the hub or its cache. Asked once, and told once if not."""
    weights = "model.safetensors"
    if all(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", weights)):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(name, weights), timeout=5)
    except Exception as error:  # its libraries raise their own kinds: no network, offline mode, a gate
        model = next(one for one in EMBEDDED.values() if one.hub == name)
        how = f", which is quantised to {model.quantised}" if model.quantised else ""
        print(
            f"note: {name} cannot be had from the hub ({reason_of(error, 100)}): the embedded {model.name}{how}, is taken",
            file=sys.stderr,
        )
        return False
    return True


def _at_hand(what: str, given: str | Path, progress: Callable[[str], None] | None = None) -> str:
    """What ``given`` resolves to. A name that only a hub out of reach could have is refused at once.

    Transformers would ask for a minute.

    Raises:
        GatewiseError: there is no folder, no embedded model, nothing in the hub's cache, and no hub.
    """
    source = resolve(given, progress=progress)
    try:
        if not Path(source).is_dir() and try_to_load_from_cache(source, "config.json") is None:
            _ask_hub(source)
    except HFValidationError as error:  # a name that no model can have
        raise _not_loaded(what, given, OSError("there is no such folder")) from error
    except Exception as error:  # no network, offline mode
        raise _not_loaded(what, given, OSError(f"the hub cannot be asked ({reason_of(error, 100)})")) from error
    return source


@cache
def _ask_hub(name: str) -> None:
    """Asks the hub once for a model, whatever it answers; raises as its library does where there is no answer."""
    with suppress(HfHubHTTPError):  # that there is no such file or that it is gated, which Transformers words
        get_hf_file_metadata(hf_hub_url(name, "config.json"))


def folder_of(name_or_path: str | Path) -> Path | None:
    """The folder of a base model that was loaded: one that was given, an embedded model's, or the hub's snapshot in its cache."""
    source = resolve(name_or_path)
    if Path(source).is_dir():
        return Path(source)
    found = try_to_load_from_cache(source, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def load_tokenizer(name_or_path: str | Path, progress: Callable[[str], None] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, padding on the right; without a pad token of its own it pads with end-of-text.

    ``progress`` is told in words what an embedded model that is fetched is waiting for.

    Raises GatewiseError when there is none or it cannot be read.
    """
    source = _at_hand("tokenizer", name_or_path, progress)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way on a file it cannot read
        raise _not_loaded("tokenizer", name_or_path, error) from error
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
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    brought: Collection[str] = (),
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """A base model in evaluation mode.

    `dtype` "auto" is bfloat16 where `device` computes in it by itself, else float32; a classifier, whose new head is trained in
    full, is then in float32. See `gatewise.models.device`.

    An embedded model gets the hub's name (`model.name_or_path`), which PEFT then writes into adapters, so that they name a
    base that can be found on any machine, with gatewise or without. With task "classification" a classifier of `num_labels` outputs
    is drawn afresh unless the model has one of that size; other weights may only be missing in modules that are `brought`: an
    adapter has them as a whole (PEFT's `modules_to_save`), or is to. `model.trained_whole` names those. With task "encoder" it
    comes without a head. With `quantization` its linear layers are quantised as they are read, and compute in `dtype`.

    Raises GatewiseError when the model is not to be found, is damaged, has no safetensors, or is not made for the task, or when
    bitsandbytes, which quantises it, is not installed.
    """
    if dtype == "auto" and task == "classification":
        dtype = torch.float32
    dtype = pick_dtype(dtype, device)
    quantised = {} if quantization is None else _quantised(quantization, dtype, pick_device(device))
    source = _at_hand("model", name_or_path)
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    try:
        with quiet(bars=not Path(source).is_dir()):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
            # Of BART, Transformers would load the decoder alone; of classifiers of this kind, PEFT saves no head.
            if getattr(config, "is_encoder_decoder", False):
                raise GatewiseError(
                    f"{str(name_or_path)!r} is an encoder-decoder model, which no command or recipe runs: train it in Python, with "
                    "RankAllocation in a Seq2SeqTrainer, or give a decoder (causal language model) or an encoder"
                )
            model, notes = _AUTO[task].from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                use_kernels=False,  # by default Transformers 5.25 fetches layers for a GPU from the hub, as code
                output_loading_info=True,
                ignore_mismatched_sizes=task == "classification",  # a classifier of another size: see the check below
                **quantised,
            )
    except GatewiseError:
        raise
    except Exception as error:  # hub, configuration and weights each raise their own kinds
        raise _not_loaded("model", name_or_path, error) from error
    fresh = [*notes["missing_keys"], *(key for key, *_ in notes["mismatched_keys"])]
    if task == "encoder":  # nobody reads what it pools
        fresh = [key for key in fresh if "pooler" not in key]
    if task == "classification":  # its pooler is read, and may be in no file: PEFT saves what has one of these names
        fresh = [key for key in fresh if not _within(key, HEADS)]
        drawn = [key for key in fresh if _within(key, tuple(brought))]
        model.trained_whole = tuple(dict.fromkeys(key.rpartition(".")[0] for key in drawn))
        fresh = [key for key in fresh if key not in drawn]
    if fresh:
        raise GatewiseError(
            f"{str(name_or_path)!r} cannot serve as a {task} model: its files have no fitting weights for "
            f"{some(sorted(fresh), 1)}, which would be random each time: give another model, or one that was saved with them"
        )
    settings = model.config.get_text_config()
    if getattr(settings, "pad_token_id", None) is None:  # a guess, for callers without the tokenizer: see pad_as
        end = getattr(settings, "eos_token_id", None)
        settings.pad_token_id = end[0] if isinstance(end, list) else end
    set_model_name(model, hub_name(str(name_or_path)))
    if quantised:  # where they are to run: bitsandbytes' layers are not moved
        never_pack(model)
        return model.eval()
    return model.eval() if device == "cpu" else model.to(pick_device(device)).eval()


def _quantised(how: Quantization, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What Transformers is asked for, to load a quantised model on a device."""
    with needs("quant", f"quantization {how}"):
        import bitsandbytes  # noqa: F401
    if how == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=how, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    place = torch.cuda.current_device() if device == torch.device("cuda") else device  # of several processes, each has its own
    return {"quantization_config": config, "device_map": {"": place}}


def _within(key: str, names: tuple[str, ...]) -> bool:
    """Whether a weight is in a module of one of these names, as PEFT finds `modules_to_save`: by how the module's path ends."""
    parts = key.split(".")
    return any(".".join(parts[:end]).endswith(names) for end in range(1, len(parts)))


def pad_as(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells a classifier what its batches are padded with: a decoder reads the last token that is no padding."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def load_config(name_or_path: str | Path) -> Any:
    """The Transformers configuration of a model, without its weights.

    Raises GatewiseError when there is none or it cannot be read.
    """
    source = _at_hand("model", name_or_path)
    try:
        with quiet(bars=not Path(source).is_dir()):
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _not_loaded("model", name_or_path, error) from error


def weight_shapes(name_or_path: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a causal model, made of its configuration alone; none where Transformers has no such model.

    Raises GatewiseError when there is no configuration or it cannot be read.
    """
    config = load_config(name_or_path)
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # of a class that Transformers lacks, a want of a library: whoever loads the model says so
        return {}
    return {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}


def class_names(name_or_path: str | Path) -> list[str] | None:
    """What a model's configuration calls the classes of a classifier, in order; None where it only counts them.

    Raises GatewiseError when there is no configuration or it cannot be read.
    """
    config = load_config(name_or_path)
    names = [str(config.id2label[at]) for at in sorted(config.id2label)]
    return None if names == [f"LABEL_{at}" for at in range(len(names))] else names


def most_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens of a text a model and its tokenizer allow."""
    return min(text_positions(model), tokenizer.model_max_length)


def _not_loaded(what: str, given: str | Path, error: Exception) -> GatewiseError:
    return GatewiseError(
        f"no {what} {str(given)!r} could be loaded: {reason_of(error)} (expected a folder, a hub id or an embedded model: "
        f"{', '.join(EMBEDDED)})"
    )
