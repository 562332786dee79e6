"""``SelectivePromptModel``: the tuner behind ``SelectivePromptConfig``. SPT, arXiv 2310.20127.

Shapes: b batch, t tokens, l prompt tokens, n layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import Call
from gatewise.internals.quantised import never_pack
from gatewise.losses import loss_kind
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.families import Transformer
from gatewise.prompts.forward import AdapterInUse, Gates, PassState, PassTracker
from gatewise.prompts.layer import Place, PromptLayer

_USED_UP = (
    "this model's prompts were taken off, by retrain() or unload(), and its base model may carry others by now: use what that "
    "returned; to keep an adapter beside the next one, save it first"
)

_NO_MERGE = (
    "selective prompts cannot be merged, because they are tokens generated from each text and no change of the weights: use the "
    "adapter as it is"
)


class SelectivePromptModel(BaseTuner):
    """Puts generated prompts in front of the text inside the model. Its methods can be called on the ``PeftModel``.

    What the caller sees keeps its length: prompt tokens join inside a layer and are taken off again. They stand in front of the
    text at every layer from the first prompt layer on: every token sees them, in sliding-window layers too; they see each other
    (in a decoder, those before) and, in an encoder, the text. Real tokens keep their positions. Prompt tokens have no learned
    position; in rotary models, and in those with relative position biases (T5), they are at the l positions before the row's first
    token.

    In an encoder-decoder model they are in the encoder, whose whole input the generators read, whatever the labels are. The decoder
    attends to the text alone, so nothing of it knows of prompts: neither the mask it is given, nor its cache, nor beams. Encoder
    outputs that the caller gives are taken as they are.

    In a decoder generators read the prompt only: what stands before the first label that is not -100 in training; all that
    ``generate`` was given; all of a call without labels. Tokens added with the key-value cache find the prompt's keys and values in
    it, and no generator runs. Loops without a cache, and calls without labels that hold answers, go under ``prompt_positions``.

    The function at the start is not the base model's: l small tokens, random functions of the text, stand in front of it.

    In the hyper-network prompts are there from layer 0 on, or from the first layer whose gate is not dropped. There p^propagated is
    zero (reconstructed: the paper's formula with nothing to propagate), so p_i = τ a_i p^new, as the discrete model's first prompt
    layer has p_i = τ p^new; below it there is no prompt at all.

    Several adapters in one batch, and several active at once, are refused. Calls of several threads come one after the other.
    """

    prefix: str = "spt_"
    tuner_layer_cls: type[BaseTunerLayer] = PromptLayer
    uses_shared_state = True  # PEFT then refuses to put the layers into a model without this tuner, which opens their passes
    _transformer: Transformer
    _tracker: PassTracker
    _enabled: bool
    _unloaded = False
    _now: PassState

    # ---- putting adapters on, and taking them off ----

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise GatewiseError(
                "the base model carries an adapter already: add selective prompts to a PeftModel of their own kind with "
                "add_adapter or load_adapter, or call unload() on the other one first"
            )
        self._transformer = Transformer(model)
        self._enabled, self._now = True, PassState()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter, after a look at everything that can be wrong, so that the model is never left half done."""
        config = self._config(adapter_name)
        layers, width = len(self._transformer.layers), self._width
        model_type = self._transformer.config.model_type
        config.fit_to({"model_type": model_type, "layers": layers, "hidden_size": width})
        if config.prompt_layers is not None and config.prompt_layers[-1] >= layers:
            raise GatewiseError(
                f"prompt_layers names layer {config.prompt_layers[-1]}, but the model has {layers} layers: expected numbers from 0 "
                f"to {layers - 1}"
            )
        if config.phm is not None and width % config.phm:
            raise GatewiseError(f"phm is {config.phm}, which does not divide the model's hidden size {width}: expected a divisor")
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not config.inference_mode:
            never_pack(model)  # or an evaluation would break the training that follows it
        if not hasattr(self, "_tracker"):
            answers = loss_kind(model) == "causal" and model.get_output_embeddings() is not None  # type: ignore[operator]
            self._tracker = PassTracker(self._transformer, self._transformer.family.causal and answers, self._active, self._now)
            for index, block in enumerate(self._transformer.layers):
                Place(block, index, f"{self._transformer.path}.{index}", self._tracker).install(block)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        # PEFT finds modules by these names; they are no field of the configuration, which already says which layers it means.
        peft_config.target_modules = {f"{self._transformer.path}.{index}" for index in self._layers_of(peft_config)}
        return peft_config

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str, **kwargs: Any
    ) -> None:
        if not hasattr(target, "selective_prompt"):
            target.selective_prompt = PromptLayer(target)
        target.selective_prompt.add(adapter_name, peft_config, self._width)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter the active one.

        Raises:
            GatewiseError: several are given.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise GatewiseError(
                f"{len(adapter_name)} adapters were given, but the prompts of one stand in front of a text: activate one at a time"
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter. If it was the active one, another is active afterwards, the same in every layer."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        left = list(self.peft_config)[:1] if was_active else [name for name in self.active_adapters if name in self.peft_config]
        self.active_adapter = left
        if left:  # each layer chose for itself, among the adapters that it has
            self.set_adapter(left[0])

    def unload(self) -> nn.Module:
        """The base model without prompts and hooks; modules that were saved with the active adapter stay in it, as PEFT has it.

        The ``PeftModel`` itself is used up: its calls are refused, because whatever its base model is given next would answer them.
        """
        self.check_loaded()
        model = super().unload()
        self._tracker.remove()
        for block in self._transformer.layers:
            block.place.uninstall(block)  # type: ignore[operator,union-attr]
        self._unloaded = True
        return model

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        # PEFT then also copies a weight, which the head of some models does not have.
        setattr(parent, child_name, new_module)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._enabled = enabled

    # ---- what cannot be done ----

    def check_loaded(self) -> None:
        """Refuses what is asked of a model after ``unload``.

        Raises:
            GatewiseError: it was unloaded.
        """
        if self._unloaded:
            raise GatewiseError(_USED_UP)

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, cls):
            tuner.check_loaded()
        found: dict[str, Tensor] = super()._get_adapter_state_dict(model, *args, **kwargs)
        return found

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: prompts are tokens, not weights.

        Raises:
            GatewiseError: always.
        """
        raise GatewiseError(_NO_MERGE)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as ``merge_adapter`` is."""
        raise GatewiseError(_NO_MERGE)

    def unmerge_adapter(self) -> None:
        """Nothing is ever merged."""

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the generators of two adapters do not add up to one that writes both of their prompts.

        Raises:
            GatewiseError: always.
        """
        raise GatewiseError(
            "selective prompts cannot be added up, because each adapter has generators of its own and one adapter's prompts stand "
            "in front of a text: activate one with set_adapter, or train one adapter on both tasks"
        )

    # ---- passes ----

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Opened by PEFT around ``forward`` and ``generate``."""
        self.check_loaded()
        if kwargs.get("adapter_names") is not None:
            raise GatewiseError(
                "adapter_names was given, but one adapter's prompts serve the whole batch: run the rows of each adapter by "
                "themselves"
            )
        with self._tracker.call(Call()):
            yield

    def prompt_positions(self, prompt: Tensor) -> AbstractContextManager[None]:
        """While open, generators read where ``prompt`` (b, t) is true: for calls without labels that hold answers too.

        It goes before labels; padding is never read. Columns beyond those of ``prompt`` are not read.
        """
        return self._tracker.prompt_positions(prompt)

    def weights_read_elsewhere(self) -> list[nn.Parameter]:
        """The base model's weights that are read where their layer is not running: T5's relative position biases."""
        biases: Any = self._transformer.biases
        return [] if biases is None else list(biases.relative_attention_bias.parameters())

    def _active(self) -> AdapterInUse | None:
        names = self.active_adapters if self._enabled else []
        if not names:
            return None
        name, config = names[0], self._config(names[0])
        # Transformers' disable_adapters() switches off the layers, without a word to this tuner.
        gates = {layer: gate for layer, gate in self._gates(name).items() if not self._prompt_layer(layer).disable_adapters}
        dropped = self._now.dropped if config.prompt_layers is None else None
        first = next((layer for layer in gates if dropped is None or not dropped[layer]), None)
        return None if first is None else AdapterInUse(name, config, gates, first)

    # ---- gates ----

    def gates(self, adapter: str | None = None) -> Tensor:
        """a (n,) of an adapter (None: the active one), float32 on the CPU: sigmoid(α), and in a discrete model one or zero."""
        self.check_loaded()
        name = adapter or self.active_adapters[0]
        logits = self._gate_logits(name)
        if logits:
            return torch.cat(logits).detach().float().sigmoid().cpu()
        gates = torch.zeros(len(self._transformer.layers))
        gates[self._layers_of(self._config(name))] = 1.0
        return gates

    def gate_parameters(self, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """The α of an adapter (None: the active one) by name; a discrete model has none."""
        self.check_loaded()
        end = f".spt_gate_logit.{adapter or self.active_adapters[0]}"
        return {path: parameter for path, parameter in self.named_parameters() if path.endswith(end)}

    @contextmanager
    def gates_dropped(self, dropped: Tensor | Sequence[bool]) -> Iterator[None]:
        """While open, gates are zero where ``dropped`` (n,) is true: these layers only carry the prompt on, if there is one.

        A discrete model has no gates to drop. With all dropped a hyper-network is the base model.

        Raises:
            GatewiseError: ``dropped`` is not one value for each layer.
        """
        which, layers = torch.as_tensor(dropped, dtype=torch.bool), len(self._transformer.layers)
        if which.shape != (layers,):
            raise GatewiseError(f"dropped has the shape {tuple(which.shape)}: expected ({layers},), a value for each layer")
        before, self._now.dropped = self._now.dropped, which
        try:
            yield
        finally:
            self._now.dropped = before

    @contextmanager
    def gates_reparameterised(self, enabled: bool = True) -> Iterator[None]:
        """While open, gates are â_i = a_i · detach(Σ_j a_j) / Σ_j a_j: the same values, but their gradients compete.

        dâ_i / dα_k = a_k' (δ_ik − a_i / Σ_j a_j), so a gate that helps as much as the gates do on average stays where it is. The
        sums are over the gates that are not dropped. Reconstructed, as one of the two additions of SPT-DARTS.
        """
        before, self._now.reparameterised = self._now.reparameterised, enabled
        try:
            yield
        finally:
            self._now.reparameterised = before

    def _gates(self, adapter: str) -> Gates:
        logits = self._gate_logits(adapter)
        if not logits:
            return dict.fromkeys(self._layers_of(self._config(adapter)))
        device = logits[0].device
        gates = torch.cat([logit.to(device) for logit in logits])
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32)).sigmoid()
        if self._now.dropped is not None:
            gates = gates.masked_fill(self._now.dropped.to(device), 0.0)
        if self._now.reparameterised:
            total = gates.sum()
            gates = gates * (total.detach() / total)
        return dict(enumerate(gates.split(1)))

    def _gate_logits(self, adapter: str) -> list[Tensor]:
        if self._config(adapter).prompt_layers is not None:
            return []
        layers = range(len(self._transformer.layers))
        logits: list[Tensor] = [self._prompt_layer(layer).spt_gate_logit[adapter] for layer in layers]
        if any(logit.is_meta for logit in logits):
            raise GatewiseError(
                f"gates of adapter {adapter!r} are offloaded, but a hyper-network needs them before its first layer: keep its "
                "model on the devices where it runs, or offload the discrete model that its search chose"
            )
        return logits

    def _prompt_layer(self, layer: int) -> PromptLayer:
        return cast(PromptLayer, self._transformer.layers[layer].selective_prompt)

    def _layers_of(self, config: SelectivePromptConfig) -> list[int]:
        return list(range(len(self._transformer.layers))) if config.prompt_layers is None else list(config.prompt_layers)

    def _config(self, adapter: str) -> SelectivePromptConfig:
        config: Any = self.peft_config[adapter]
        if not isinstance(config, SelectivePromptConfig):
            raise GatewiseError(
                f"adapter {adapter!r} of this model is now a {type(config).__name__}, because get_peft_model() was called on its "
                "base model again: call unload() first, and give what it returns to get_peft_model()"
            )
        return config

    @property
    def _width(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)
