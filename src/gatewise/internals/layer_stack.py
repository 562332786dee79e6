"""Finds the Transformer layers of a model, the linear modules in them that can be experts, and the models around them."""

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    from peft import LoraConfig

# One expert of a mixture sees a choice of tokens only.
_IN_A_MIXTURE = re.compile(r"(?:^|\.)experts?\.")


class Stack:
    """The layers of a model: of all its lists of modules, the one that holds the most linear ones.

    Attributes:
        path: of the list in the model.
        layers: by path, in order.
        around: the Transformers models that hold the layers, the outermost first: with its head, and without.

    Raises:
        GatewiseError: not a decoder or an encoder, or there is no such list.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        name = type(model).__name__
        if model.config.is_encoder_decoder:
            raise GatewiseError(
                f"{name} has an encoder and a decoder, but routed adapters and selective prompts go into models with one of the two"
            )
        lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        counts = {path: sum(map(_is_linear, module.modules())) for path, module in lists.items()}
        self.path = max(lists, key=lambda path: counts[path], default="")
        if not counts.get(self.path):
            raise GatewiseError(f"{name} has no list of layers with linear modules")
        found = lists[self.path]
        self.layers = {f"{self.path}.{place}": layer for place, layer in found.named_children()}
        self.around = [one for one in model.modules() if isinstance(one, PreTrainedModel) and found in one.modules()]

    def layer_of(self, path: str) -> str | None:
        """The path of the layer that a module lies in, by the module's path in the model; None outside the layers."""
        return next((layer for layer in self.layers if path.startswith(f"{layer}.")), None)

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
        for path, module in _outside_of_adapters(model):
            if not path or not check_target_module_exists(config, path):
                continue
            layer = self.layer_of(path)
            if layer is None:
                why = f"lies outside the layers of {self.path}, where no router chooses it"
            elif _IN_A_MIXTURE.search(path):
                why = "is one expert of a mixture, which sees a choice of tokens only"
            elif not _is_linear(module):
                why = f"is a {type(module).__name__}, and only linear modules can be experts"
            else:
                found.setdefault(layer, []).append(path)
                continue
            raise GatewiseError(f"target_modules matches {path}, which {why}: leave it out with exclude_modules")
        return found


def forward_arguments(module: nn.Module) -> list[str]:
    """The names of a module's forward's arguments, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _is_linear(module: Any) -> bool:
    """Also quantised modules, which have the sizes of a linear one under one of two names."""
    return isinstance(module, Conv1D) or hasattr(module, "in_features") or hasattr(module, "infeatures")


def _outside_of_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, an adapted one standing for itself and not for what it wraps."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = None
    for path, module in model.named_modules():
        if adapted is not None and path.startswith(adapted):
            continue
        adapted = f"{path}." if isinstance(module, BaseTunerLayer) else None
        yield path, module
