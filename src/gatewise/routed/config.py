"""What a user sets: ``RoutedLoraConfig``, PEFT's ``LoraConfig`` with a router. MiLoRA, arXiv 2410.18035."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from peft import LoraConfig

from gatewise.checks import is_number, is_whole
from gatewise.errors import GatewiseError
from gatewise.internals.registry import SavedWithNote, peft_type

Pooler = Literal["attention", "mean", "max", "last"]
Activation = Literal["rational", "gelu", "relu", "identity"]


# The other ways to start change the base weights, or put something beside A and B that a gate would have to scale too.
_STARTS = (True, False, "gaussian", "orthogonal")


# What a setting of LoraConfig would do, where that cannot be done with routed experts.
_REFUSED = {
    "use_dora": "DoRA's magnitude changes a module even where it is not kept",
    "lora_bias": "a bias on B would be scaled by the gate",
    "layer_replication": "replicated layers share their modules, and a layer must decide for itself",
    "target_parameters": "stacked parameters are not linear modules",
    "megatron_config": "Megatron's parallel layers are not supported",
    "use_qalora": "QA-LoRA pools a module's input",
    "ensure_weight_tying": "embeddings are not experts",
}


@dataclass
class RoutedLoraConfig(SavedWithNote, LoraConfig):
    """LoRA whose modules are the experts of their Transformer layer; the prompt picks ``top_k`` of them, once a request.

    A layer's router reads the prompt's hidden states H that enter it: h = pool(H), p = softmax(g(h) W_r), the k largest are kept.
    A kept module adds gate · alpha / r · B A x to its base module; the others run as the base module alone. The experts of a layer
    are all its adapted linear modules in order, so "all-linear" gives seven in Llama, six in BERT, four in GPT-2. Modules outside
    the layers (LM head, BERT's pooler) have no router: "all-linear" leaves them out, and naming one is refused.

    In training a prompt ends before the first label that is not -100, and the load-balancing loss joins the model's loss; in
    ``generate`` it is what was given. ``model.routing()`` has the gates of the last call by row, layer and module. Merging is
    refused, because the modules depend on the prompt.

    Args:
        r: rank of every expert (the paper's 32).
        lora_alpha: LoRA's alpha; None takes ``r``, so that alpha / r is 1.
        target_modules: as in PEFT; "all-linear" by default.
        top_k: experts kept a layer (the paper has 3 in its tables, 1 in one place).
        pooler: "attention" (softmax over tokens of H w, the paper's), "mean", "max" or "last" token, over the prompt's tokens.
        activation: g: "rational" (learnable, of order (6, 5), starting as GELU; the paper's), "gelu", "relu" or "identity".
        balance_weight: weight of the load-balancing loss, which joins the model's loss in training.
        normalize_gates: a kept expert's gate is its probability divided by the sum of the kept ones, which is held constant
            for the gradient, so that gates add up to one and top_k = 1 still trains its router (reconstructed: the paper does not
            say). False leaves the probability as it is; the adapter then starts near top_k / experts of its scale.
        normalize_states: divide each token's hidden state by its root mean square before pooling, so that the huge numbers that
            the first token has in many models do not drown the prompt (reconstructed). False pools them as they are.
        center_states: take from the pooled vector what the first 64 prompts in training have in common, and give the rest unit
            size, so that routers see what is a prompt's own (ours, not the paper's). It is saved with the adapter. False routes by
            the pooled vector as it is: all prompts then choose nearly alike, which keeps fewer modules in a mixed batch.
        experts: the order of each layer's experts, which that of its router's probabilities is: path of the layer in the base model
            -> paths of the modules within it. gatewise writes it into a saved adapter, for those that have no such model at hand
            (vLLM); leave it out of new ones. Adapters that were saved before there was such an entry have the model's order.

    Raises:
        GatewiseError: a value out of range, or a LoRA variant that experts cannot be.
    """

    r: int = field(default=32, metadata={"help": "Rank of every expert."})
    lora_alpha: int = field(default=cast(int, None), metadata={"help": "Alpha of every expert; by default r."})
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "The linear modules of the Transformer layers that become experts."}
    )
    top_k: int = field(default=3, metadata={"help": "Experts kept a layer and request."})
    pooler: Pooler = field(default="attention", metadata={"help": "How the prompt's hidden states become one vector."})
    activation: Activation = field(default="rational", metadata={"help": "The router's activation."})
    balance_weight: float = field(default=1e-2, metadata={"help": "Weight of the load-balancing loss."})
    normalize_gates: bool = field(default=True, metadata={"help": "Divide gates by the constant sum of the kept probabilities."})
    normalize_states: bool = field(default=True, metadata={"help": "Divide hidden states by their root mean square first."})
    center_states: bool = field(default=True, metadata={"help": "Take off what all prompts have in common."})
    experts: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "The order of each layer's experts; written by gatewise."}
    )

    # Not a field, so not saved: ``experts`` is what a model has put there, and the next one may put its own.
    takes_order = False

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        super().__post_init__()
        self.peft_type = peft_type("ROUTED_LORA")
        if self.target_modules is None:
            self.target_modules = "all-linear"
        self._check_variants()

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Called by PEFT with what an adapter's file says.

        Raises:
            GatewiseError: the adapter was trained with a setting that gatewise no longer has.
        """
        if kwargs.pop("adapt", "always") != "always":
            raise GatewiseError("the adapter was trained with adapt='after_prompt', which gatewise no longer has: train it anew")
        return super().check_kwargs(**kwargs)

    def _check_ranges(self) -> None:
        for name, number in (("r", self.r), ("top_k", self.top_k)):
            if not is_whole(number) or number < 1:
                raise GatewiseError(f"{name} is {number!r}: expected a whole number of at least 1")
            setattr(self, name, int(number))  # NumPy's would not go into the JSON file
        for name, value, choices in (
            ("pooler", self.pooler, get_args(Pooler)),
            ("activation", self.activation, get_args(Activation)),
        ):
            if value not in choices:
                raise GatewiseError(f"{name} is {value!r}: expected one of {', '.join(choices)}")
        weight: Any = self.balance_weight
        if not is_number(weight) or not math.isfinite(weight) or weight < 0:
            raise GatewiseError(f"balance_weight is {weight!r}: expected a number of at least 0; 0 turns the loss off")
        self.balance_weight = float(weight)

    def _check_variants(self) -> None:
        for name, why in _REFUSED.items():
            if getattr(self, name, None):
                raise GatewiseError(f"{name}={getattr(self, name)!r} does not go with routed experts ({why}): leave it out")
        for name, entry in self.__dataclass_fields__.items():
            if entry.metadata.get("is_lora_variant") and getattr(self, name):
                raise GatewiseError(f"{name} is a LoRA variant that does not go with routed experts: leave it out")
        if self.bias != "none":
            raise GatewiseError(
                f"bias is {self.bias!r}: biases belong to the base model, which routed adapters share; expected 'none'"
            )
        if self.init_lora_weights not in _STARTS:
            raise GatewiseError(
                f"init_lora_weights is {self.init_lora_weights!r}, which alters the base model or needs more than A and B: "
                f"expected one of {', '.join(map(repr, _STARTS))}"
            )
