"""What the optimiser keeps of a rank: cleared when the rank is pruned, and that of a new adapter when it is grown.

A slot of a LoRA layer is a row of A and a column of B, but an optimiser counts its steps by whole parameter. A grown slot starts
with a state of zero, as any new parameter does. For SGD, Lion, RMSprop or Adagrad that is all. Adam and its relatives also
divide their running averages by 1 - beta^t, and t is the step count of the old parameter: the slot would move several learning
rates a step. There are two remedies:

- Adam, AdamW and RAdam, exactly: ``YoungSlots.correct`` follows each step of the optimiser and moves a slot from where the
  parameter's step count took it to where the slot's own age takes it. It needs the averages and the two counts, nothing else.
- Every other optimiser that counts steps (NAdam, Adafactor, 8-bit Adam, schedule-free Adam), roughly: the slot's running average
  of squares starts at the mean of the live slots', so that its steps are about as large as theirs.

A dead slot has no gradient, and an optimiser that computes exactly leaves it where it is. One that rounds its averages to 8 bits
does not: ``DeadSlots`` puts it back after each step.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Adam, AdamW, Optimizer, RAdam

if TYPE_CHECKING:
    from gatewise.allocation.algorithm import Round

# Running averages of squares, by the names that optimisers give them ("state2" is bitsandbytes').
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "state2")
# A slot is young until its bias correction is as near to 1 as this: for 9,200 steps at Adam's usual beta of 0.999.
_NEGLIGIBLE = 1e-4

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where some slots of a LoRA layer lie in one of its factors.

    Attributes:
        parameter: A or B.
        dim: the dimension of the slots, counted from the end: AdEMAMix stacks two averages in one tensor.
        indices: theirs along it.
    """

    parameter: nn.Parameter
    dim: int
    indices: Tensor


UpdateRule = Callable[[Tensor, Tensor, int, Mapping[str, Any]], Tensor]


def clear(places: Iterable[Place], optimizer: Optimizer | None) -> None:
    """Sets to zero what the optimiser keeps of these slots, and their gradient: a dead slot then stays dead."""
    if optimizer is None:
        return
    for parameter, dim, slots in places:
        if parameter.grad is not None:
            parameter.grad.index_fill_(dim, slots, 0)
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.shape[-parameter.ndim :] != parameter.shape:
                continue
            if type(value) is not Tensor:  # torchao's states are tensors of its own classes
                value.copy_(value.dequantize().index_fill(dim, slots, 0))
                continue
            # bitsandbytes keeps codes of a table ("state1" of "qmap1"), in which code 0 is not the number 0.
            table = state.get(key.replace("state", "qmap")) if value.dtype == torch.uint8 else None
            value.index_fill_(dim, slots, 0 if table is None else int(table.abs().argmin()))


def start(grown: Sequence[Place], live: Sequence[Place], optimizer: Optimizer | None) -> None:
    """Gives grown slots, whose weights are in place, the optimiser state that their training starts from.

    Args:
        grown: where the grown slots lie in A and in B.
        live: where the slots lie that lived before.
    """
    clear(grown, optimizer)
    if optimizer is None:
        return
    for (parameter, dim, new), (_, _, old) in zip(grown, live, strict=True):
        state = optimizer.state.get(parameter, {})
        if "z" in state:  # schedule-free optimisers: a second copy of the weights, which the parameter is drawn towards
            state["z"].index_copy_(dim, new, parameter.detach().index_select(dim, new).to(state["z"].dtype))
        kept = dict.fromkeys(_SQUARES, dim) | _factored_squares(parameter, dim)
        squares = {key: along for key, along in kept.items() if key in state}
        if not squares or _update_rule(optimizer):
            continue
        if not len(old):  # no mean to take, and nothing to lose: the optimiser makes this parameter's state anew
            del optimizer.state[parameter]
            continue
        for key, along in squares.items():
            _start_at_mean(state, key, along, new, old)


def _factored_squares(parameter: nn.Parameter, dim: int) -> dict[str, int]:
    """The averages of squares that Adafactor keeps without a parameter's last dimension, and without the one before it.

    Returns:
        Name -> dimension of the slots in it. Transformers drops the dimension that it averages over, torch keeps it with size 1.
    """
    last, at = parameter.ndim - 1, parameter.ndim + dim
    found: dict[str, int] = {}
    if at != last:
        found |= {"exp_avg_sq_row": at, "row_var": at}
    if at != last - 1:
        found |= {"exp_avg_sq_col": min(at, last - 1), "col_var": at}
    return found


def _start_at_mean(state: Mapping[str, Any], key: str, dim: int, grown: Tensor, live: Tensor) -> None:
    """Sets a state of grown slots to the mean of the live slots', however the optimiser stores it."""
    stored = state[key]
    if stored.dtype == torch.uint8:  # bitsandbytes: codes of an ascending table, times the largest number of each block
        table, largest = state[f"qmap{key[-1]}"], state[f"absmax{key[-1]}"]
        # The size of a block is not kept: 256, or in older versions 2048.
        block = 2 ** math.ceil(math.log2(stored.numel() / len(largest)))
        scale = largest.repeat_interleave(block)[: stored.numel()].view(stored.shape)
        values = table[stored.long()] * scale
    else:
        values = stored if type(stored) is Tensor else stored.dequantize()
    mean = values.index_select(dim, live).mean(dim, keepdim=True)
    values = values.index_copy(dim, grown, mean.repeat_interleave(len(grown), dim))
    if stored.dtype == torch.uint8:
        blocks = pad(values.flatten(), (0, len(largest) * block - values.numel())).view(-1, block)
        largest.copy_(blocks.amax(1))
        shares = blocks / largest.clamp(min=torch.finfo(largest.dtype).tiny)[:, None]
        nearest = torch.bucketize(shares, (table[1:] + table[:-1]) / 2)
        values = nearest.flatten()[: stored.numel()].view(stored.shape)
    stored.copy_(values)


class YoungSlots:
    """The slots grown in the last few thousand steps, whose updates need a bias correction by their own age.

    Which they are, and how old, follows from the rounds alone, so that a resumed run goes on as if it had not stopped.
    """

    def __init__(self) -> None:
        # Parameter -> (dimension of the slots, their indices, the training step after which they were grown).
        self._slots: dict[nn.Parameter, list[tuple[int, Tensor, int]]] = {}
        # Parameter -> the optimiser's step count when it was last looked at.
        self._counts: dict[nn.Parameter, int] = {}

    def follow(
        self,
        places: Mapping[str, Callable[[Sequence[int]], Sequence[Place]]],
        history: Sequence["Round"],
        optimizer: Optimizer | None = None,
    ) -> None:
        """Takes up the rounds so far. Call it when training begins and after each round.

        Args:
            places: path -> what says where slots lie in A and B, of every LoRA layer.
            optimizer: of the training, whose steps so far have been corrected.
        """
        born: dict[str, dict[int, int]] = {path: {} for path in places}
        for one in history:
            for path, slots in one.pruned.items():
                born[path] = {slot: step for slot, step in born[path].items() if slot not in slots}
            for path, slots in one.grown.items():
                born[path].update(dict.fromkeys(slots, one.step))
        self._slots = {}
        for path, steps in born.items():
            for step in sorted(set(steps.values())):
                for parameter, dim, index in places[path]([slot for slot in steps if steps[slot] == step]):
                    self._slots.setdefault(parameter, []).append((dim, index, step))
        if optimizer is not None and _update_rule(optimizer):
            states = {parameter: optimizer.state.get(parameter) for parameter in self._slots}
            self._counts = {parameter: int(state["step"]) for parameter, state in states.items() if state}

    @torch.no_grad()
    def correct(self, optimizer: Optimizer, step: int) -> None:
        """Makes the last update of each young slot that of a new adapter. Call it after each step of the optimiser.

        Args:
            step: the number of steps that training has taken, this one included. The learning rate must still be this step's.
        """
        update = _update_rule(optimizer) if self._slots else None
        if update is None:
            return
        for group in optimizer.param_groups:
            # Slots that need the same correction are computed in one piece: (step count, age, device) -> parameter and its slots.
            alike: dict[tuple[int, int, torch.device], list[tuple[nn.Parameter, int, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter not in self._slots:
                    continue
                state = optimizer.state.get(parameter)
                count = int(state["step"]) if state else 0
                if count == self._counts.get(parameter, 0):
                    continue  # the optimiser left this step out: there was no gradient, or one that overflowed
                self._counts[parameter] = count
                self._slots[parameter] = [
                    one for one in self._slots[parameter] if group["betas"][1] ** (step - one[2]) > _NEGLIGIBLE
                ]
                for dim, index, born in self._slots[parameter]:
                    if step - born < count:  # else the optimiser's state is no older than the slot: made, or made anew, since
                        alike.setdefault((count, step - born, parameter.device), []).append((parameter, dim, index))
            for (count, age, _), members in alike.items():
                states = [(optimizer.state[parameter], dim, index) for parameter, dim, index in members]
                means = [state["exp_avg"].index_select(dim, index) for state, dim, index in states]
                second = "max_exp_avg_sq" if "max_exp_avg_sq" in states[0][0] else "exp_avg_sq"
                squares = [state[second].index_select(dim, index) for state, dim, index in states]
                mean, square = (torch.cat([one.flatten() for one in many]).float() for many in (means, squares))
                excess = (update(mean, square, count, group) - update(mean, square, age, group)) * group["lr"]
                parts = excess.split([one.numel() for one in means])
                for (parameter, dim, index), part, like in zip(members, parts, means, strict=True):
                    parameter.index_add_(dim, index, part.view_as(like).to(parameter.dtype))
        self._slots = {parameter: young for parameter, young in self._slots.items() if young}


class DeadSlots:
    """The dead slots, which stay dead whatever the optimiser does to weights without a gradient.

    torch's own optimisers do nothing to them, and cost nothing here.
    """

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._said = False

    def follow(self, places: Iterable[Place]) -> None:
        """Learns where dead slots lie now. Call it when training begins and after each round."""
        self._places = [place for place in places if len(place.indices)]

    @torch.no_grad()
    def keep(self, optimizer: Optimizer) -> None:
        """Sets to zero what a step of the optimiser made of dead slots, and says so the first time. Call it after each step."""
        kind = type(getattr(optimizer, "optimizer", optimizer))
        if not self._places or kind.__module__.startswith("torch.optim."):
            return
        if not self._said:
            found = [parameter.index_select(dim, dead).count_nonzero() for parameter, dim, dead in self._places]
            if any(torch.stack([one.to(found[0].device) for one in found]).tolist()):
                self._said = True
                logger.warning(
                    "%s moves weights that have no gradient: dead ranks are put back after each of its steps", kind.__name__
                )
        for parameter, dim, dead in self._places:
            parameter.index_fill_(dim, dead, 0)


def _adam(mean: Tensor, squares: Tensor, count: int, group: Mapping[str, Any]) -> Tensor:
    """What Adam subtracts from a parameter at step ``count``, in learning rates. Decoupled weight decay is not part of it."""
    beta1, beta2 = group["betas"]
    return mean / (1 - beta1**count) / ((squares / (1 - beta2**count)).sqrt() + group["eps"])


def _radam(mean: Tensor, squares: Tensor, count: int, group: Mapping[str, Any]) -> Tensor:
    """The same of RAdam (Liu et al., arXiv 1908.03265, algorithm 2), with eps where torch has it."""
    beta1, beta2 = group["betas"]
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * count * beta2**count / (1 - beta2**count)
    if length <= 5:
        return mean / (1 - beta1**count)
    rectified = math.sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length))
    return mean / (1 - beta1**count) * (rectified * math.sqrt(1 - beta2**count)) / (squares.sqrt() + group["eps"])


_UPDATE_RULES: dict[type, UpdateRule] = {Adam: _adam, AdamW: _adam, RAdam: _radam}


def _update_rule(optimizer: Optimizer) -> UpdateRule | None:
    """The rule of exactly this class, for a subclass may step otherwise. Accelerate wraps the Trainer's optimiser."""
    kind = type(getattr(optimizer, "optimizer", optimizer))
    # What DeepSpeed puts in Adam's place when it offloads the optimiser; not imported, for it need not be installed.
    return _adam if kind.__name__ == "DeepSpeedCPUAdam" else _UPDATE_RULES.get(kind)
