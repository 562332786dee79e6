"""WholeAdapter: keeps an adapter whole in every process while FSDP2 or ZeRO-3 shards its base model."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gatewise.errors import GatewiseError
from gatewise.internals.sharding import average_gradients, fsdp_plugin, leave_out_of_sharding
from gatewise.internals.zero import Zero, check_settings, zero_of
from gatewise.processes import is_sharded


class WholeAdapter(TrainerCallback):
    """Keeps everything that is trained whole in every process, with its gradients averaged as under DDP.

    Give it to ``Trainer(callbacks=[...])`` for an adapter that FSDP2 or DeepSpeed's ZeRO-3 cannot cut up: routed LoRA, selective
    prompts. ``RankAllocation`` does the same by itself. The base model, which is frozen, is sharded as ever, and so is what ZeRO's
    optimiser keeps. Without FSDP and DeepSpeed it does nothing.

    Raises:
        GatewiseError: when the Trainer is made, FSDP 1 or settings that contradict it; when training begins, a parameter that was
            sharded all the same.
    """

    def __init__(self) -> None:
        self._undo: Callable[[], None] | None = None
        self.zero: Zero | None = None  # DeepSpeed's part, while it trains

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tells FSDP what to leave out, before it wraps the model."""
        model = kwargs["model"]
        leave_out_of_sharding(model, _trained(model), args.device, args.load_best_model_at_end)
        check_settings(model)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Averages gradients from here on, as DeepSpeed does by itself."""
        self.zero = zero_of(kwargs.get("optimizer"))
        if self.zero is not None:
            self.zero.keep_whole(_trained(kwargs["model"]))
        if fsdp_plugin() is None:
            return
        trained = _trained(kwargs["model"])
        if is_sharded(nn.ParameterList(trained)):
            raise GatewiseError(
                "FSDP cut up parameters of the adapter: pass WholeAdapter or RankAllocation in Trainer(callbacks=[...])"
            )
        self._undo = average_gradients(trained)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves the parameters as they were found."""
        if self._undo is not None:
            self._undo()
            self._undo = None


def keeps_whole(callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether one of a Trainer's callbacks keeps what is trained whole."""
    return any(isinstance(one, WholeAdapter) for one in callbacks)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
