"""``SelectivePromptModel``: the tuner behind ``SelectivePromptConfig``. SPT, arXiv 2310.20127.

Shapes: b batch, t tokens, l prompt tokens, n layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import Call
from gatewise.internals.layer_stack import Stack
from gatewise.internals.quantised import never_pack
from gatewise.losses import loss_kind
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.forward import AdapterInUse, PassTracker
from gatewise.prompts.layer import Place, PromptLayer, uninstall

DECODERS = ("llama", "gemma3_text", "qwen2", "qwen3", "mistral", "gpt2")
ENCODERS = ("bert", "roberta")
"""The architectures that selective prompts are built and tested for, by ``config.model_type``."""

# Settings of a configuration that change what attends to what.
_REFUSED = {"add_cross_attention": True, "use_bidirectional_attention": True, "is_causal": False, "is_decoder": True}


class SelectivePromptModel(BaseTuner):
    """Puts generated prompts in front of the text inside the model. Its methods can be called on the ``PeftModel``.

    What the caller sees keeps its length: prompt tokens join inside a layer and are taken off again; of ``output_attentions`` alone
    rows and columns begin with them. They stand in front of the
    text at every layer from the first prompt layer on: every token sees them, in sliding-window layers too; they see each other
    (in a decoder, those before) and, in an encoder, the text. Real tokens keep their positions. Prompt tokens have no learned
    position; in rotary models they are at the l positions before the row's first token.

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
    _stack: Stack
    _blocks: list[Any]
    _tracker: PassTracker
    _enabled: bool
    _is_unloaded = False
    _dropped: Tensor | None = None
    _reparameterised = False

    # ---- putting adapters on, and taking them off ----

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if not isinstance(model, PreTrainedModel):
            raise GatewiseError(f"selective prompts go into Transformers models, not into a {type(model).__name__}")
        kind, settings = model.config.model_type, model.config.get_text_config()
        if kind not in (*DECODERS, *ENCODERS):
            raise GatewiseError(
                f"selective prompts are not built for {kind} models: supported are {', '.join((*DECODERS, *ENCODERS))}"
            )
        for name, value in _REFUSED.items():
            if getattr(settings, name, None) is value:
                raise GatewiseError(f"this {kind} model has {name}={value}, which selective prompts do not support")
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise GatewiseError(
                "the base model carries an adapter already: add selective prompts to a PeftModel of their own kind with "
                "add_adapter or load_adapter, or call unload() on the other one first"
            )
        self._stack = Stack(model)
        self._blocks, self._enabled = list(self._stack.layers.values()), True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter, after a look at everything that can be wrong, so that the model is never left half done."""
        config, base = self._config(adapter_name), self._stack.around[0].config
        layers, width = len(self._blocks), base.get_text_config().hidden_size
        made_for = {"model_type": base.model_type, "layers": layers, "hidden_size": width}
        if config.came_with_base and config.made_for != made_for:
            raise GatewiseError(
                f"the adapter was made for {config.made_for}, but the base model is {made_for}: load it on its own base"
            )
        config.made_for = made_for
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
            is_decoder = base.model_type in DECODERS
            writes = is_decoder and loss_kind(model) == "causal" and model.get_output_embeddings() is not None  # type: ignore[operator]
            self._tracker = PassTracker(self._stack, is_decoder, writes, self._adapter_in_use)
            for index, (path, block) in enumerate(self._stack.layers.items()):
                Place(block, index, path, self._tracker.now)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        # PEFT finds modules by these names; they are no field of the configuration, which already says which layers it means.
        paths = list(self._stack.layers)
        layers = range(len(paths)) if peft_config.prompt_layers is None else peft_config.prompt_layers
        peft_config.target_modules = {paths[index] for index in layers}
        return peft_config

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str, **kwargs: Any
    ) -> None:
        if not hasattr(target, "selective_prompt"):
            target.selective_prompt = PromptLayer(target)
        target.selective_prompt.add(adapter_name, peft_config, self.model.config.get_text_config().hidden_size)

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
        before = self.active_adapters[0]
        super().delete_adapter(adapter_name)
        left = [before] if before != adapter_name else list(self.peft_config)[:1]
        self.active_adapter = left
        if left:  # each layer chose for itself, among the adapters that it has
            self.set_adapter(left)

    def unload(self) -> nn.Module:
        """The base model without prompts and hooks; modules that were saved with the active adapter stay in it, as PEFT has it.

        The ``PeftModel`` itself is used up: its calls are refused, because whatever its base model is given next would answer them.
        """
        self._check_loaded()
        model = super().unload()
        self._tracker.remove()
        for block in self._blocks:
            uninstall(block)
        self._is_unloaded = True
        return model

    def _check_loaded(self) -> None:
        if self._is_unloaded:
            raise GatewiseError(
                "this model's prompts were taken off, by retrain() or unload(), and its base model may carry others by now: use "
                "what was returned; to keep an adapter beside the next one, save it first"
            )

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        # PEFT then also copies a weight, which the head of some models does not have.
        setattr(parent, child_name, new_module)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._enabled = enabled

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: prompts are tokens, not weights."""
        raise GatewiseError(
            "selective prompts cannot be merged, because they are tokens generated from each text and no change of the weights"
        )

    merge_and_unload = merge_adapter

    # ---- passes ----

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Opened by PEFT around ``forward`` and ``generate``."""
        self._check_loaded()
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

    def _adapter_in_use(self) -> AdapterInUse | None:
        if not self._enabled or not self.active_adapters:
            return None
        config, gates = self._config(), self._gates()
        dropped = self._dropped if config.prompt_layers is None else None
        first = next((layer for layer in gates if dropped is None or not dropped[layer]), None)
        return None if first is None else AdapterInUse(self.active_adapters[0], config, gates, first)

    # ---- gates ----

    def gates(self) -> Tensor:
        """a (n,) of the active adapter, float32 on the CPU: sigmoid(α), and in a discrete model one or zero."""
        logits: list[Tensor] = list(self.gate_parameters().values())
        if logits:
            return torch.cat(logits).detach().float().sigmoid().cpu()
        gates = torch.zeros(len(self._blocks))
        gates[self._config().prompt_layers] = 1.0
        return gates

    def gate_parameters(self) -> dict[str, nn.Parameter]:
        """The α of the active adapter by name, in the order of the layers; a discrete model has none."""
        self._check_loaded()
        end = f".spt_gate_logit.{self.active_adapters[0]}"
        return {path: parameter for path, parameter in self.named_parameters() if path.endswith(end)}

    @contextmanager
    def gates_dropped(self, dropped: Tensor | Sequence[bool]) -> Iterator[None]:
        """While open, gates are zero where ``dropped`` (n,) is true: these layers only carry the prompt on, if there is one.

        A discrete model has no gates to drop. With all dropped a hyper-network is the base model.
        """
        before, self._dropped = self._dropped, torch.as_tensor(dropped, dtype=torch.bool)
        try:
            yield
        finally:
            self._dropped = before

    @contextmanager
    def gates_reparameterised(self, enabled: bool = True) -> Iterator[None]:
        """While open, gates are â_i = a_i · detach(Σ_j a_j) / Σ_j a_j: the same values, but their gradients compete.

        dâ_i / dα_k = a_k' (δ_ik − a_i / Σ_j a_j), so a gate that helps as much as the gates do on average stays where it is. The
        sums are over the gates that are not dropped. Reconstructed, as one of the two additions of SPT-DARTS.
        """
        before, self._reparameterised = self._reparameterised, enabled
        try:
            yield
        finally:
            self._reparameterised = before

    def _gates(self) -> dict[int, Tensor | None]:
        config, adapter = self._config(), self.active_adapters[0]
        if config.prompt_layers is not None:
            return dict.fromkeys(config.prompt_layers)
        logits = [block.selective_prompt.spt_gate_logit[adapter] for block in self._blocks]  # each on its layer's device
        gates = torch.cat([logit.to(logits[0].device) for logit in logits])
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32)).sigmoid()
        if self._dropped is not None:
            gates = gates.masked_fill(self._dropped.to(gates.device), 0.0)
        if self._reparameterised:
            total = gates.sum()
            gates = gates * (total.detach() / total)
        return dict(enumerate(gates.split(1)))

    def _config(self, adapter: str | None = None) -> SelectivePromptConfig:
        config: Any = self.peft_config[adapter or self.active_adapters[0]]
        return config
