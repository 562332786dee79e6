"""What a user sets: ``SelectivePromptConfig``. SPT, arXiv 2310.20127."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig

from gatewise.checks import is_number, is_whole
from gatewise.errors import GatewiseError
from gatewise.internals.registry import SavedWithNote, peft_type

Activation = Literal["gelu", "relu", "tanh", "identity"]


@dataclass
class SelectivePromptConfig(SavedWithNote, PeftConfig):
    """Soft prompts that enter at chosen Transformer layers, generated there from the hidden states of the text itself.

    At a prompt layer i, with l prompt tokens standing in front of the text:

        p_i = (1 − τ a_i) · p_i^propagated + τ a_i · p_i^new        p^new = W_up act(pool_l(W_down h))

    where p^propagated is what the layer below left at the prompt positions, and zero where there is none yet. Layers without
    a prompt of their own carry the prompt of the layers below on.

    Args:
        num_prompt_tokens: l.
        bottleneck: m, the width between W_down and W_up (the ALoRA paper's SPT baseline has 256 for LLaMA-2 7B).
        prompt_layers: None is the hyper-network that is searched: every layer may take a new prompt, with a gate
            a_i = sigmoid(α_i), α_i = 0 at the start. A list of layer numbers from 0 is the discrete model: new prompts at these
            layers, all a_i fixed to one, and no α. Layers below the first one then compute exactly what the base model computes.
        tau: τ, above 0 and at most 1 (reconstructed: 0.5 or 1). With 1 and a gate of one, a new prompt replaces the propagated one.
        balanced: count p^propagated and p^new by their directions, and give the mixture a size between theirs
            (``gatewise.prompts.layer.mixed``). Our own: in layers without a norm at their end, as decoders have, propagated prompts
            are tens to hundreds of times as large as new ones and drown them in the sum above (docs/reports/spt.md). None does so
            in decoders and not in encoders. It makes no difference to discrete models with τ = 1.
        phm: n, for projections that are sums of n Kronecker products with about 1/n of the parameters; None for plain matrices.
            It must divide ``bottleneck`` and the model's hidden size.
        activation: "gelu", "relu", "tanh" or "identity" (reconstructed: which one the paper has is not known).
        normalize_states: divide each token's hidden state by its root mean square before it is projected, so that the huge numbers
            that the first token has in many decoders do not drown the text (reconstructed). False takes them as they are.
        modules_to_save: modules outside the layers to train and save with the adapter; PEFT adds a classifier's head by itself.
        made_for: "model_type", "layers" and "hidden_size" of the base model. They are filled in when the adapter is put on, and
            saved. A configuration that comes with them, from a file, goes on no other base.
        Others: those of PEFT's ``PeftConfig``, such as ``task_type``.

    Raises:
        GatewiseError: a value out of range.
    """

    num_prompt_tokens: int = field(default=10, metadata={"help": "Prompt tokens in front of the text."})
    bottleneck: int = field(default=64, metadata={"help": "Width between the generator's two projections."})
    prompt_layers: list[int] | None = field(
        default=None, metadata={"help": "The layers with a new prompt; None for the hyper-network with a gate at every layer."}
    )
    tau: float = field(default=1.0, metadata={"help": "How much of the propagated prompt an open gate replaces."})
    balanced: bool | None = field(
        default=None, metadata={"help": "Mix propagated and new prompts by their directions; None: in decoders."}
    )
    phm: int | None = field(default=None, metadata={"help": "Number of Kronecker products a projection; None for plain ones."})
    activation: Activation = field(default="gelu", metadata={"help": "The generator's activation."})
    normalize_states: bool = field(default=True, metadata={"help": "Divide hidden states by their root mean square first."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules outside the layers to train and save with the adapter."}
    )
    made_for: dict[str, Any] | None = field(
        default=None, compare=False, metadata={"help": "Type, layers and hidden size of the base model; filled in by itself."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("SELECTIVE_PROMPT")
        self.came_with_base = self.made_for is not None
        for name in ("num_prompt_tokens", "bottleneck"):
            setattr(self, name, _whole(name, getattr(self, name)))
        tau: Any = self.tau
        if not is_number(tau) or not 0 < tau <= 1:
            raise GatewiseError(f"tau is {tau!r}: expected a number above 0 and at most 1")
        self.tau = float(tau)
        if self.balanced not in (True, False, None):
            raise GatewiseError(f"balanced is {self.balanced!r}: expected True, False or None")
        if self.phm is not None:
            self.phm = _whole("phm", self.phm)
            if self.bottleneck % self.phm:
                raise GatewiseError(f"phm is {self.phm}, which does not divide bottleneck {self.bottleneck}: expected a divisor")
        if self.activation not in get_args(Activation):
            raise GatewiseError(f"activation is {self.activation!r}: expected one of {', '.join(get_args(Activation))}")
        self._check_layers()

    def _check_layers(self) -> None:
        layers: Any = self.prompt_layers
        if layers is None:
            return
        whole = isinstance(layers, list | tuple | set) and all(is_whole(layer) and layer >= 0 for layer in layers)
        if not whole or not layers or len(set(layers)) != len(layers):
            raise GatewiseError(
                f"prompt_layers is {layers!r}: expected a list of different layer numbers from 0, such as [3, 7], or None to search"
            )
        self.prompt_layers = sorted(map(int, layers))


def _whole(name: str, value: Any) -> int:
    if not is_whole(value) or value < 1:
        raise GatewiseError(f"{name} is {value!r}: expected a whole number of at least 1")
    return int(value)  # NumPy's would not go into the JSON file
