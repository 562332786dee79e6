"""Finds the Transformer layers of a model, the linear modules in them that can be experts, and the models around them."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    from peft import LoraConfig

# One expert of a mixture sees a choice of tokens only.
_IN_A_MIXTURE = re.compile(r"(?:^|\.)experts?\.")


@dataclass(frozen=True)
class Layer:
    """A Transformer layer.

    Attributes:
        path, module: in the model.
        width: the size of the hidden states by which it is routed.
        reads_encoder: it is a layer of an encoder-decoder model's decoder, which has no prompt inside.
    """

    path: str
    module: nn.Module
    width: int
    reads_encoder: bool = False


class Stack:
    """The layers of a model: those of its main stack or, in an encoder-decoder model, of the encoder's and the decoder's.

    A stack is, of all lists of modules, the one that holds the most linear ones.

    Attributes:
        layers: by path, in order, an encoder's first.

    Raises:
        GatewiseError: there is no such list, or an encoder-decoder model whose encoder reads no text or whose decoder's layers
            are not given what the encoder has made of it.
    """

    def __init__(self, model: nn.Module) -> None:
        found = _both_stacks(model) if is_encoder_decoder(model) else _main_stack(model)
        self.layers = {layer.path: layer for layer in found}

    def layer_of(self, path: str) -> str | None:
        """The path of the layer that a module lies in, by the module's path in the model; None outside the stacks."""
        names = path.split(".")
        before = (".".join(names[:length]) for length in range(1, len(names)))
        return next((one for one in before if one in self.layers), None)

    def linear_modules(self, model: nn.Module) -> list[str]:
        """Paths of all linear modules in the layers, those that carry experts already among them; what "all-linear" stands for."""
        return [
            path
            for path, module in _outside_of_adapters(model)
            if _is_linear(module) and self.layer_of(path) is not None and not _IN_A_MIXTURE.search(path)
        ]

    def experts(self, model: nn.Module, config: "LoraConfig") -> dict[str, list[str]]:
        """Paths of the modules that a configuration targets, by the path of their layer, in order.

        Raises:
            GatewiseError: a target that no router could choose.
        """
        # Not at the top: PEFT may be importing us just now, to have our methods added (see registry.py).
        from peft.tuners.tuners_utils import check_target_module_exists

        found: dict[str, list[str]] = {}
        positions = _position_modules(model)
        for path, module in _outside_of_adapters(model):
            if not path or not check_target_module_exists(config, path):
                continue
            layer = self.layer_of(path)
            if layer is None:
                stacks = dict.fromkeys(one.rpartition(".")[0] for one in self.layers)
                raise GatewiseError(
                    f"target_modules matches {path}, which lies outside the layers of {' and '.join(stacks)}, where no router "
                    "chooses it: name modules of the layers only, or leave it out with exclude_modules"
                )
            if _IN_A_MIXTURE.search(path):
                raise GatewiseError(
                    f"target_modules matches {path}, one expert of a mixture, which sees a choice of tokens only and cannot be "
                    "routed by the prompt: leave it out with exclude_modules"
                )
            if path.rpartition(".")[2] in positions:
                raise GatewiseError(
                    f"target_modules matches {path}, which also projects a table of relative positions, and those belong to no "
                    f"prompt: leave it out with exclude_modules={positions!r}"
                )
            if not _is_linear(module):
                raise GatewiseError(f"target_modules matches {path}, a {type(module).__name__}: only linear modules can be experts")
            found.setdefault(layer, []).append(path)
        return found


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model has an encoder, which reads the prompt, and a decoder, which writes the answer."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def models_around(model: nn.Module, *layers: nn.Module) -> list[PreTrainedModel]:
    """The Transformers models that one of the layers is part of, the outermost first: with its head, and without."""
    wanted = set(layers)
    return [one for one in model.modules() if isinstance(one, PreTrainedModel) and not wanted.isdisjoint(one.modules())]


def forward_arguments(module: nn.Module) -> list[str]:
    """The names of a module's forward's arguments, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _main_stack(model: nn.Module) -> list[Layer]:
    config = getattr(model, "config", None)
    width = getattr(config.get_text_config() if config is not None else None, "hidden_size", 0)
    return [Layer(path, layer, width) for path, layer in _longest_list(model, model)]


def _both_stacks(model: Any) -> list[Layer]:
    name = type(model).__name__
    encoder, decoder = model.get_encoder(), model.get_decoder()
    if encoder is model or decoder is model or not {"input_ids", "attention_mask"} <= set(forward_arguments(encoder)):
        raise GatewiseError(
            f"{name} is an encoder-decoder model whose encoder reads no text, by which a routed adapter could choose: use one that "
            "reads text (T5, BART), or a plain LoraConfig"
        )
    read, written = _longest_list(model, encoder), _longest_list(model, decoder)
    if "encoder_hidden_states" not in forward_arguments(written[0][1]):
        raise GatewiseError(
            f"{name} is an encoder-decoder model whose decoder's layers are not given the encoder's states, by which a routed "
            "adapter chooses there: use another one (T5, BART), or a plain LoraConfig"
        )
    around, inside = (models_around(model, layers[0][1])[-1].config for layers in (read, written))
    # A composite of two models may widen the states in between.
    crossed = getattr(inside, "cross_attention_hidden_size", None) or inside.hidden_size
    return [
        *(Layer(path, layer, around.hidden_size) for path, layer in read),
        *(Layer(path, layer, crossed, reads_encoder=True) for path, layer in written),
    ]


def _longest_list(model: nn.Module, part: nn.Module) -> list[tuple[str, nn.Module]]:
    """The list in ``part`` that holds the most linear modules: its members by path in the model."""
    inside = set(part.modules())
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and module in inside]
    counts = {path: sum(map(_is_linear, module.modules())) for path, module in lists}
    best = max(lists, key=lambda one: counts[one[0]], default=None)
    if best is None or not counts[best[0]]:
        raise GatewiseError(
            f"{type(model).__name__} has no list of layers with linear modules, and routed experts are the linear modules of "
            "Transformer layers"
        )
    return [(f"{best[0]}.{name}", layer) for name, layer in best[1].named_children()]


def _position_modules(model: Any) -> list[str]:
    """The last names of the linear modules that run on a table of relative positions (DeBERTa's), not on the tokens of a text."""
    config = model.config
    if config.model_type not in ("deberta", "deberta-v2") or not config.relative_attention:
        return []
    if getattr(config, "share_att_key", False):
        return ["query_proj", "key_proj"]
    return ["pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj"]


def _is_linear(module: nn.Module) -> bool:
    """Also quantised modules, which have the sizes of a linear one under one of two names."""
    sizes = (("in_features", "out_features"), ("infeatures", "outfeatures"))
    return isinstance(module, Conv1D) or any(all(hasattr(module, name) for name in names) for names in sizes)


def _outside_of_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, an adapted one standing for itself and not for what it wraps."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = None
    for path, module in model.named_modules():
        if adapted is not None and path.startswith(adapted):
            continue
        adapted = f"{path}." if isinstance(module, BaseTunerLayer) else None
        yield path, module
