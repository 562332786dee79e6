"""``RoutedLoraModel``: PEFT's ``LoraModel`` whose adapters route every prompt to some of their modules. MiLoRA, arXiv 2410.18035.

Shapes: b batch, t tokens, l layers that have experts, m experts.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import Call
from gatewise.internals.layer_stack import Stack
from gatewise.internals.quantised import never_pack
from gatewise.losses import IGNORED, LossKind, loss_kind
from gatewise.routed.config import RoutedLoraConfig
from gatewise.routed.layer import LayerRouting, RoutedLinear
from gatewise.routed.request import Request, RequestTracker
from gatewise.routed.router import Router, balance
from gatewise.serving.products import BASE, rows_side_by_side


@dataclass(frozen=True)
class Routing:
    """The decision of one call.

    Attributes:
        gates: (b, l, m), float32 and without a graph; zero where a row does not keep an expert, or a layer has none.
        layers: paths of the layers in the base model, in order.
        modules: for each layer, the paths of its experts within it, in order.
    """

    gates: Tensor
    layers: tuple[str, ...]
    modules: tuple[tuple[str, ...], ...]


class RoutedLoraModel(LoraModel):
    """The tuner behind ``RoutedLoraConfig``. Its methods can be called on the ``PeftModel``.

    A prompt is what the model is called with: without padding, and in a causal model without the answer, that is, before the first
    label that is not -100, or all that ``generate`` was given. A row with labels from its start on (plain language modelling) is
    its own prompt. The decision holds for the whole row, and for every token that is added with its key-value cache, in
    ``generate`` and in loops of one's own. A cache that already holds tokens brings the decision of the prompt that filled it;
    start with an empty one to route anew. Loops without a cache start a request with every call: run them under
    ``prompt_positions``. Calls of several threads come one after the other.

    In evaluation mode and without gradients, a module that no row keeps is its base module, and one that is kept adds two products
    for all adapters of the batch, which are gathered once a request, in the precision of the base module's output. A request that
    goes on keeps its decision, and the A, B and scaling that it began with.

    In training the load-balancing loss joins the loss that the model returns by itself; loops that compute a loss of their own add
    ``balance_loss()``.
    """

    tuner_layer_cls: type[LoraLayer] = RoutedLinear
    uses_shared_state = True  # PEFT then refuses to put the layers into a model without this tuner, which routes them
    _layers: list[LayerRouting]
    _stack: Stack
    _tracker: RequestTracker
    _enabled: bool
    _kind: LossKind
    _routers_to_add: dict[str, int]
    _orders: dict[str, dict[str, list[str]]]

    # ---- putting adapters on, and taking them off ----

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if not isinstance(model, PreTrainedModel):
            raise GatewiseError(f"routed adapters go on Transformers models, not on a {type(model).__name__}")
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise GatewiseError(
                "the base model carries an adapter already: add routed adapters to a routed PeftModel with add_adapter or "
                "load_adapter, or call unload() on the other one first"
            )
        kind = loss_kind(model)
        if kind == "causal" and not hasattr(model.config.get_text_config(), "num_attention_heads"):
            raise GatewiseError(
                f"{model.config.model_type} models keep their past in a recurrent state, by which a routed adapter cannot find the "
                "prompt again that a token goes on with: use a model with attention, or a plain LoraConfig"
            )
        # A backbone without a head writes no answers.
        self._kind = "rows" if kind == "causal" and model.get_output_embeddings() is None else kind
        self._enabled, self._orders, self._stack = True, {}, Stack(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter, after a look at everything that can be wrong, so that the model is never left half done."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, RoutedLoraConfig)
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config.target_modules = set(self._stack.linear_modules(model))  # type: ignore[assignment]
        experts = self._stack.experts(model, config)
        order = {layer: [path.removeprefix(f"{layer}.") for path in paths] for layer, paths in experts.items()}
        for layer, names in order.items():
            if config.top_k > len(names):
                raise GatewiseError(f"top_k is {config.top_k}, but layer {layer} has {len(names)} experts: give at most that")
        # An order that another model has put into the same configuration says nothing about this one.
        if config.experts is not None and not config.takes_order:
            order = in_stored_order(order, config.experts)
        else:
            config.takes_order = True
        config.experts = self._orders[adapter_name] = order
        self._routers_to_add = {f"{layer}.{names[0]}": len(names) for layer, names in order.items()}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # TRL's "ref" is the same configuration added once more with copied parameters: what routers take off is in buffers.
        twin = next((name for name, own in self.peft_config.items() if own is config and name != adapter_name), None)
        if adapter_name == "ref" and twin is not None:
            for module in model.modules():
                if isinstance(module, RoutedLinear) and adapter_name in module.prompt_router:
                    kept = dict(module.prompt_router[twin].named_buffers())
                    module.prompt_router[adapter_name].load_state_dict(kept, strict=False)
        if not config.inference_mode:
            never_pack(model)  # or an evaluation would break the training that follows it
        if not hasattr(self, "_tracker"):
            self._tracker = RequestTracker(self._stack.around, self._kind == "causal", self._adapters_in_use, self._finish)
            self._layers = [LayerRouting(path, layer, self._tracker.now) for path, layer in self._stack.layers.items()]
        self._refresh()

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str, **kwargs: Any
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        experts = self._routers_to_add.get(current_key)
        if experts is not None:
            layer = getattr(parent, target_name)
            router = Router(
                self.model.config.get_text_config().hidden_size,
                experts,
                lora_config.pooler,
                lora_config.activation,
                lora_config.normalize_states,
                lora_config.center_states,
            )
            router.requires_grad_(adapter_name in self.active_adapters and not lora_config.inference_mode)
            layer.prompt_router[adapter_name] = router
            layer._move_adapter_to_device_of_base_layer(adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # In files routers have the name that they always had. In a model LoRA-FA's optimiser, among others, would take it for an A.
        return super()._remove_adapter_name_from_key(key, adapter_name).replace(".prompt_router.", ".lora_router.")

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> RoutedLinear:
        return RoutedLinear(target, adapter_name, config=lora_config, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter with its routers. If it was the active one, another is active afterwards, the same in every layer."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        left = [name for name in self.active_adapters if name in self.peft_config] or list(self.peft_config)[:1]
        if was_active and left:  # each layer chose for itself, among the adapters that it has
            self.set_adapter(left)
        self._orders.pop(adapter_name, None)
        self._tracker.now.last = None
        self._refresh()

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters, hooks or routed layers."""
        model = super().unload()
        self._tracker.remove()
        for layer in self._layers:
            layer.uninstall()
        return model

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._enabled = enabled

    def _refresh(self) -> None:
        for layer in self._layers:
            layer.refresh(self.peft_config, self._orders)

    # ---- what cannot be done ----

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the sum of two adapters would need one router that decides as both of theirs do."""
        raise GatewiseError(
            "routed adapters cannot be added up, because each has routers of its own: make them active together with "
            "base_model.set_adapter([...]), or train one adapter on both tasks"
        )

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise GatewiseError(
            "a routed adapter cannot be converted to plain LoRA: leave path_initial_model_for_weight_conversion out"
        )

    # ---- requests ----

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Opened by PEFT around ``forward`` and ``generate``: keeps the adapters' names, which the base model does not get."""
        names = kwargs.get("adapter_names")
        if names is not None:
            self._check_names(names)
        with self._tracker.call(Call(names)), rows_side_by_side(self.model):
            yield

    def _check_names(self, names: list[str]) -> None:
        if self.training:
            raise GatewiseError(
                "adapter_names was given in training mode, where one adapter serves the whole batch: call model.eval()"
            )
        unknown = sorted({name for name in names if name != BASE and name not in self.peft_config})
        if unknown:
            raise GatewiseError(
                f"adapter_names has {', '.join(map(repr, unknown))}; the model has {', '.join(map(repr, self.peft_config))}, and "
                f"{BASE!r} stands for the base model"
            )
        if any(isinstance(module, AuxiliaryTrainingWrapper) for module in self.modules()):
            raise GatewiseError(
                "adapter_names was given, but modules saved with an adapter (a classifier's head) serve the whole batch: run the "
                "rows of each adapter by themselves"
            )

    def prompt_positions(self, prompt: Tensor) -> AbstractContextManager[None]:
        """While open, prompts lie where ``prompt`` (b, t) is true: for calls without labels that hold answers too.

        It goes before labels; padding is never part of a prompt. Columns beyond those of ``prompt`` belong to no prompt.
        """
        return self._tracker.prompt_positions(prompt)

    def _adapters_in_use(self) -> list[str]:
        return self.active_adapters if self._enabled else []

    # ---- what was decided ----

    def routing(self) -> Routing:
        """The decision of the last call: gates (b, l, m), and the names of layers and modules. Rows are those that ran, beams too.

        Raises:
            GatewiseError: no prompt has been routed yet.
        """
        decided = self._last().decided
        modules: dict[str, tuple[str, ...]] = {}
        for layer in self._layers:
            chosen_from = {name for one in decided.get(layer.path, {}).values() for name in one.experts}
            if chosen_from:
                modules[layer.path] = tuple(name for name in layer.modules if name in chosen_from)
        gates = torch.zeros(len(self._last().prompt), len(modules), max(map(len, modules.values()), default=0))
        for index, (path, names) in enumerate(modules.items()):
            for one in decided[path].values():
                gates[:, index, [names.index(name) for name in one.experts]] += one.gates.detach().float().cpu()
        return Routing(gates, tuple(modules), tuple(modules.values()))

    def balance_loss(self) -> Tensor:
        """balance_weight · mean over layers of L_lb for the last call's prompts, with its graph: a scalar, for a batch's mean loss.

        Zero unless the last call was in training mode. It is part of the loss already where the model was given labels and returned
        one. Several active adapters add up.

        Raises:
            GatewiseError: it has no gradient.
        """
        request: Request | None = self._tracker.now.last
        total = torch.zeros((), device=next(self.model.parameters()).device)
        if request is None or not request.training:
            return total
        for adapter in request.groups:
            weight = self._balance_weight(adapter)
            made = [layer[adapter].probabilities for layer in request.decided.values() if adapter in layer]
            if weight and made:
                if torch.is_grad_enabled() and not made[0].requires_grad and any(p.requires_grad for p in self.parameters()):
                    raise GatewiseError(
                        "the load-balancing loss has no gradient: use gradient_checkpointing_kwargs={'use_reentrant': False}, or "
                        "balance_weight=0"
                    )
                total = total + weight * torch.stack([balance(one).to(total.device) for one in made]).mean()
        return total

    def _balance_weight(self, adapter: str) -> float:
        config: Any = self.peft_config[adapter]
        return float(config.balance_weight)

    def _last(self) -> Request:
        request: Request | None = self._tracker.now.last
        if request is None or not request.decided:
            raise GatewiseError("no prompt has been routed yet: call the model, with a routed adapter active, and ask again")
        return request

    def _finish(self, request: Request, arguments: Mapping[str, Any], output: Any) -> Any:
        has_no_loss = isinstance(output, MutableMapping) and output.get("loss") is None
        if has_no_loss or not any(map(self._balance_weight, request.groups)):
            return None
        return with_balance(output, self.balance_loss(), arguments, self._kind)


def in_stored_order(found: Mapping[str, list[str]], stored: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The experts of each layer in the order that an adapter's configuration has.

    Raises:
        GatewiseError: they are not the experts ``found`` in the model.
    """
    for layer in dict.fromkeys([*stored, *found]):
        saved, there = stored.get(layer, []), found.get(layer, [])
        if sorted(saved) != sorted(there):
            raise GatewiseError(
                f"the adapter's configuration says that the experts of {layer} are {', '.join(saved) or 'none'}, but the model and "
                f"target_modules make them {', '.join(there) or 'none'}: load the adapter on the base model it was trained on, "
                "or leave experts out of a new configuration"
            )
    return dict(stored)


def with_balance(output: Any, term: Tensor, arguments: Mapping[str, Any], kind: LossKind) -> Any:
    """The output of a forward that was given ``arguments``, with ``term`` added to its loss; a tuple without one is as it was.

    TRL's SFTTrainer does not read the loss: it sums the log-probabilities of all labels itself and divides by their number, in
    the batch or in the step. There the term is a cost of each label, which comes to the same. TRL's other trainers (DPO, GRPO and
    so on) do other things with log-probabilities, and get none.
    """
    if isinstance(output, MutableMapping):
        loss = output["loss"]
        if _is_for_sft(output):
            cost = term.to(output["log_probs"]) * output["label_mask"]
            output["log_probs"] = output["log_probs"] - cost
        output["loss"] = loss + (term * _share_of_step(arguments, kind)).to(loss)
        return output
    if isinstance(output, tuple) and arguments.get("labels") is not None:
        return (output[0] + (term * _share_of_step(arguments, kind)).to(output[0]), *output[1:])
    return output


def _share_of_step(arguments: Mapping[str, Any], kind: LossKind) -> Tensor | float:
    """How much of an optimiser step's loss this batch is.

    With ``num_items_in_batch``, the number of labels of all batches of the step, the model's loss is a sum divided by it, and the
    shares of the step's batches add up to one. Without it, the loss is the batch's mean, and the caller divides.
    """
    items, labels = arguments.get("num_items_in_batch"), arguments.get("shift_labels")
    if labels is None:
        labels = arguments.get("labels")
        labels = labels[..., 1:] if kind == "causal" and labels is not None else labels
    if items is None or labels is None:
        return 1.0
    return (labels != IGNORED).sum() / torch.as_tensor(items, device=labels.device)


def _is_for_sft(output: Mapping[str, Any]) -> bool:
    """Whether these are the log-probabilities that TRL's SFTTrainer asked for: by the measures that it alone asks for with them."""
    there = {name: output.get(name) is not None for name in ("log_probs", "label_mask", "is_top1", "mean_logits")}
    return there["log_probs"] and there["label_mask"] and there["is_top1"] and not there["mean_logits"]
