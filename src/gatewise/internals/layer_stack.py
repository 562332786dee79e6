"""Finds the Transformer layers of a model, the linear modules in them that can be experts, and the models around them."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    from peft import LoraConfig

# One expert of a mixture sees a choice of tokens only.
_IN_A_MIXTURE = re.compile(r"(?:^|\.)experts?\.")


class Stack:
    """The main stack: of all lists of modules the one that holds the most linear ones.

    Attributes:
        path, layers: path of the list in the model, and its modules.

    Raises:
        GatewiseError: there is no such list.
    """

    def __init__(self, model: nn.Module) -> None:
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        counts = {name: sum(map(_is_linear, module.modules())) for name, module in lists}
        best = max(lists, key=lambda one: counts[one[0]], default=None)
        if best is None or not counts[best[0]]:
            raise GatewiseError(
                f"{type(model).__name__} has no list of layers with linear modules, and routed experts are the linear modules of "
                "Transformer layers"
            )
        self.path: str = best[0]
        self.layers: list[nn.Module] = list(best[1])

    def layer_of(self, path: str) -> int | None:
        """The index of the layer that a module lies in, by its path in the model; None outside the stack."""
        if not path.startswith(f"{self.path}."):
            return None
        index, dot, _ = path.removeprefix(f"{self.path}.").partition(".")
        return int(index) if dot else None

    def linear_modules(self, model: nn.Module) -> list[str]:
        """Paths of all linear modules in the layers, those that carry experts already among them; what "all-linear" stands for."""
        return [
            path
            for path, module in _outside_of_adapters(model)
            if _is_linear(module) and self.layer_of(path) is not None and not _IN_A_MIXTURE.search(path)
        ]

    def experts(self, model: nn.Module, config: "LoraConfig") -> dict[int, list[str]]:
        """Paths of the modules that a configuration targets, by the index of their layer, in order.

        Raises:
            GatewiseError: a target that no router could choose.
        """
        # Not at the top: PEFT may be importing us just now, to have our methods added (see registry.py).
        from peft.tuners.tuners_utils import check_target_module_exists

        found: dict[int, list[str]] = {}
        for path, module in _outside_of_adapters(model):
            if not path or not check_target_module_exists(config, path):
                continue
            index = self.layer_of(path)
            if index is None:
                raise GatewiseError(
                    f"target_modules matches {path}, which lies outside the layers of {self.path}, where no router chooses it: "
                    "name modules of the layers only, or leave it out with exclude_modules"
                )
            if _IN_A_MIXTURE.search(path):
                raise GatewiseError(
                    f"target_modules matches {path}, one expert of a mixture, which sees a choice of tokens only and cannot be "
                    "routed by the prompt: leave it out with exclude_modules"
                )
            if not _is_linear(module):
                raise GatewiseError(f"target_modules matches {path}, a {type(module).__name__}: only linear modules can be experts")
            found.setdefault(index, []).append(path)
        return found


def models_around(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The Transformers models that a layer is part of, the outermost first: with its head, and without."""
    return [one for one in model.modules() if isinstance(one, PreTrainedModel) and any(part is layer for part in one.modules())]


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
