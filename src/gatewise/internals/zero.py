"""What DeepSpeed's ZeRO shards of an adapter, and how a rank is pruned and grown in it.

Under ZeRO the optimiser steps flat float32 tensors. Each holds this process's pieces of many parameters, one after the other: the
master copy, of which the parameters that the model computes with are copies. The optimiser's state has the same shape. Under ZeRO-2
every process has all parameters whole; ZeRO-3 cuts those up too, except those that are set to persist.

Read in DeepSpeed 0.19.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import get_active_deepspeed_plugin
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from gatewise.errors import GatewiseError
from gatewise.processes import summed

_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"
_NOT_WITH_STAGE_3 = {
    "ROUTED_LORA": "a routed adapter runs other modules for other prompts, but under ZeRO-3 all processes must run the same",
    "SELECTIVE_PROMPT": "selective prompts know positions by their tensors, which ZeRO-3 exchanges for others",
}


def is_asked_for() -> bool:
    """True if a launcher started this process to train on DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def without_compiling() -> None:
    """Has DeepSpeed talk over gloo alone on a CPU. Its own way through shared memory would first be compiled, for a minute."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_settings(model: nn.Module) -> None:
    """Refuses, before training, a stage under which an adapter cannot be trained. Without DeepSpeed nothing happens.

    Raises:
        GatewiseError: a stage that is neither 2 nor 3, or a routed adapter or selective prompts under stage 3.
    """
    if not _uses_deepspeed():
        return
    plugin = get_active_deepspeed_plugin(SimpleNamespace(**AcceleratorState._shared_state))
    stage = plugin.deepspeed_config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (2, 3):
        raise GatewiseError(f"DeepSpeed's ZeRO stage is {stage}, but gatewise knows its stages 2 and 3: take one of them, or DDP")
    kinds = [getattr(one, "peft_type", None) for one in getattr(model, "peft_config", {}).values()]
    for kind, why in _NOT_WITH_STAGE_3.items():
        if stage == 3 and kind in kinds:
            raise GatewiseError(f"{why}: take ZeRO-2, FSDP2 or DDP")


def zero_of(optimizer: Any) -> "Zero | None":
    """ZeRO's part of the optimiser that a Trainer gives its callbacks; None without DeepSpeed.

    Raises:
        GatewiseError: an optimiser whose state ZeRO may keep in other shapes than the parameters'.
    """
    if optimizer is None or not _uses_deepspeed():
        return None
    zero = Zero(getattr(optimizer, "optimizer", optimizer))
    kind = type(zero.optimizer)
    if not kind.__module__.startswith(("torch.optim.", "deepspeed.ops.")):
        raise GatewiseError(
            f"the optimizer is {kind.__module__}.{kind.__name__}, whose state ZeRO cuts up in a way of its own: take one of "
            "torch's, such as optim='adamw_torch'"
        )
    return zero


def _uses_deepspeed() -> bool:
    """True if the Trainer or Accelerator that was made last runs on DeepSpeed."""
    return AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED


@dataclass(frozen=True)
class Piece:
    """This process's piece of a parameter.

    Attributes:
        flat: the tensor that the optimiser steps.
        at: where the piece begins in it.
        start: where the piece begins in the parameter, flattened.
        length: how many numbers it has; 0 where the process has none.
    """

    flat: Tensor
    at: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece, of a flat tensor."""
        return tensor.narrow(0, self.at, self.length)

    def within(self, whole: Tensor) -> Tensor:
        """The same numbers, of a whole parameter or of a state of it."""
        return whole.detach().flatten().narrow(0, self.start, self.length)


class Zero:
    """ZeRO's optimiser."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser that steps the flat tensors."""
        return self._zero.optimizer

    @property
    def _cuts_parameters(self) -> bool:
        return type(self._zero).__name__ == _STAGE_3

    @property
    def _flats(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat if self._cuts_parameters else self._zero.single_partition_of_fp32_groups

    def piece(self, parameter: nn.Parameter) -> Piece | None:
        """Where a parameter's piece is; None where this process has none of it."""
        one: Any = parameter
        if self._cuts_parameters:
            group, at, length = self._zero.grad_position[self._zero.get_param_id(one)]
            start = length * distributed.get_rank(one.ds_process_group)
            # The last pieces are filled up to the length of the others.
            piece = Piece(self._flats[group], at, start, min(length, one.ds_numel - start))
            return piece if piece.length > 0 else None
        mapped = one._hp_mapping
        if mapped is None:
            return None
        flat = self._flats[mapped.param_group_index]
        return Piece(flat, mapped.hp_fragment_address.start, mapped.lp_fragment_address.start, mapped.lp_fragment_address.numel)

    def keep_whole(self, parameters: Sequence[nn.Parameter]) -> None:
        """Has ZeRO-3 leave these parameters whole in every process, as ZeRO-2 leaves all."""
        if not self._cuts_parameters:
            return
        kept = self._zero.persistent_parameters
        known = {id(one) for one in kept}
        for parameter in cast(Sequence[Any], parameters):
            parameter.ds_persist = True
            parameter.is_external_param = True  # or they are let go while DeepSpeed learns the order of the modules
            if id(parameter) not in known:
                kept.append(parameter)
        self.gather(parameters)

    def gather(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes parameters whole that a save has left cut up."""
        if self._cuts_parameters and parameters:
            cast(Any, parameters[0]).all_gather(param_list=list(parameters))

    def adopt(self, model: nn.Module) -> None:
        """Takes over the parameters that were put into the model in the place of others: it can be run and saved as before."""
        if not self._cuts_parameters:
            return
        every: list[Any] = list(model.parameters())
        new = [parameter for parameter in every if not hasattr(parameter, "ds_id")]
        one_of_them = next(parameter for parameter in every if hasattr(parameter, "ds_id"))
        one_of_them.convert_to_zero_parameters(new)
        there = {id(parameter) for parameter in every}
        self._zero.persistent_parameters[:] = [one for one in self._zero.persistent_parameters if id(one) in there]
        self.keep_whole(new)
        order = self._zero.parameter_offload.get_param_coordinator()
        if not order.is_invalid_trace():  # DeepSpeed has learned in which order parameters are read
            order._invalidate_trace()

    def state_dict(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The optimiser's state as a process would save it that trained the parameters alone. All processes must ask for it.

        Args:
            groups: the optimiser's groups as they were before ZeRO put its own tensors into them.
        """
        parameters = [parameter for group in groups for parameter in group["params"]]
        states = self._gathered({parameter: self.piece(parameter) for parameter in parameters})
        for state in states.values():
            if "step" in state:
                state["step"] = torch.tensor(float(state["step"]))  # DeepSpeed's own Adam counts in a number
        own, numbers = iter(self.optimizer.param_groups), iter(range(len(parameters)))
        return {
            "state": dict(enumerate(states.values())),
            # A group without parameters is none of ZeRO's.
            "param_groups": [
                {**group, **(next(own) if group["params"] else {}), "params": [next(numbers) for _ in group["params"]]}
                for group in groups
            ],
        }

    def load_state_dict(self, saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes up what ``state_dict``, or an optimiser of whole parameters, has saved."""
        own = self.optimizer.state
        groups_of = {id(flat): group for group in self.optimizer.param_groups for flat in group["params"]}
        parameters = [parameter for group in groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            shape, piece = _shape(parameter), self.piece(parameter)
            for name, value in saved["state"].get(number, {}).items():
                whole = isinstance(value, Tensor) and value.shape == shape
                for flat in self._flats:
                    if whole:
                        own[flat].setdefault(name, torch.zeros_like(flat, requires_grad=False))
                    else:
                        is_torch = type(self.optimizer).__module__.startswith("torch.")
                        own[flat][name] = (
                            _counter(value, flat, groups_of.get(id(flat), self.optimizer.param_groups[0]))
                            if is_torch
                            else int(value)
                        )
                if whole and piece is not None:
                    piece.of(own[piece.flat][name]).copy_(piece.within(value))
        kept = [group for group, before in zip(saved["param_groups"], groups, strict=True) if before["params"]]
        for group, settings in zip(self.optimizer.param_groups, kept, strict=True):
            group |= {name: settings[name] for name in group if name in settings and name != "params"}

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[Any]:
        """Something with ``state``, as an optimiser has it, whole for these parameters. What is changed of it and of them is kept.

        Every process must change the same.
        """
        self.gather(parameters)
        pieces = {parameter: self.piece(parameter) for parameter in parameters}
        before = {parameter: parameter.detach().clone() for parameter in parameters}
        state = self._gathered(pieces)
        yield SimpleNamespace(state=state)
        for parameter, piece in pieces.items():
            if piece is None:
                continue
            for name, own in self.optimizer.state[piece.flat].items():
                if _is_sharded(own, piece.flat):
                    # What was made anew starts with zeros.
                    piece.of(own).copy_(piece.within(state[parameter][name]) if parameter in state else torch.zeros(piece.length))
            # The master copy is more exact than the parameter, so what has not changed stays.
            now, then = piece.within(parameter), piece.within(before[parameter])
            master = piece.of(piece.flat.detach())
            master.copy_(torch.where((now != then).to(master.device), now.to(master), master))
            if self._cuts_parameters:
                cast(Any, parameter).ds_tensor.narrow(0, 0, piece.length).copy_(now)

    def _gathered(self, pieces: dict[nn.Parameter, Piece | None]) -> dict[nn.Parameter, dict[str, Any]]:
        like = self.optimizer.state.get(self._flats[0], {})  # all have the same names
        states: dict[nn.Parameter, dict[str, Any]] = {
            parameter: dict(like if piece is None else self.optimizer.state[piece.flat]) for parameter, piece in pieces.items()
        }
        for name in [name for name, value in like.items() if _is_sharded(value, self._flats[0])]:
            parts = []
            for parameter, piece in pieces.items():
                whole = torch.zeros(_shape(parameter), dtype=torch.float32, device=parameter.device)
                if piece is not None:
                    piece.within(whole).copy_(piece.of(self.optimizer.state[piece.flat][name]))
                parts.append(whole)
            for parameter, total in zip(pieces, summed(parts, parts[0].device), strict=True):
                states[parameter][name] = total
        return states


def _counter(value: Any, flat: Tensor, group: Mapping[str, Any]) -> Any:
    """What an optimiser keeps beside tensors of a parameter's shape, where it looks for it: a fused one has steps on the GPU."""
    if isinstance(value, Tensor) and (group.get("fused") or group.get("capturable")):
        return value.to(flat.device, copy=True)
    return deepcopy(value)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, also while it is cut up."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _is_sharded(value: Any, flat: Tensor) -> bool:
    """True if a part of the optimiser's state has a number for each of the flat tensor's, unlike a step count."""
    return isinstance(value, Tensor) and value.shape == flat.shape
