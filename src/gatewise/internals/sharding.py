"""How FSDP and Accelerate are set so that an adapter stays whole while its base model is sharded.

LoRA factors that FSDP2 cuts up (DTensors) can be neither pruned nor grown, and gates on them cannot be scored. They are small: left
out of the sharding, every process holds them whole, as under DDP, and only their gradients have to be averaged.

Read in torch 2.13 and Accelerate 1.16.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, check_cuda_p2p_ib_support
from torch import distributed, nn
from torch.autograd import Variable
from torch.distributed.fsdp import StateDictType

from gatewise import processes
from gatewise.errors import GatewiseError
from gatewise.internals import zero


def fsdp_plugin() -> Any | None:
    """Accelerate's settings of FSDP, once a Trainer or an Accelerator that uses it is made; else None."""
    return AcceleratorState._shared_state.get("fsdp_plugin")


def leave_out_of_sharding(
    model: nn.Module, parameters: Sequence[nn.Parameter], device: torch.device, loads_best: bool = False
) -> None:
    """Has FSDP2 leave these parameters whole in every process. Without FSDP nothing happens.

    Call it when the Trainer is made and has not wrapped its model yet.

    Args:
        device: where this process trains.
        loads_best: whether the Trainer is to end with its best checkpoint.

    Raises:
        GatewiseError: FSDP 1, weights that only the main process loads, or a best checkpoint in pieces.
    """
    plugin = fsdp_plugin()
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise GatewiseError(
            "FSDP's version is 1, which cannot keep an adapter whole: take FSDP2 (fsdp_config={'version': 2} in TrainingArguments, "
            "fsdp_version: 2 in an Accelerate config)"
        )
    if plugin.cpu_ram_efficient_loading:
        raise GatewiseError(
            "FSDP's cpu_ram_efficient_loading is on, which gives the adapter's parameters up for new ones: set "
            "fsdp_cpu_ram_efficient_loading: false"
        )
    if loads_best and plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT:
        # Transformers' processes then each look whether the best checkpoint is there, while the first of them makes its folder.
        raise GatewiseError(
            "load_best_model_at_end is on and FSDP's state_dict_type is SHARDED_STATE_DICT, with which Transformers' processes may "
            "wait for each other for ever: take FULL_STATE_DICT, the adapter is whole anyway"
        )
    # A list of modules is what Accelerate takes; a ParameterList is one with exactly these parameters. FSDP does not move them.
    whole = nn.ParameterList(parameters).to(device)
    plugin.ignored_modules = [*(plugin.ignored_modules or ()), whole]
    plugin.transformer_cls_names_to_wrap = _classes_to_wrap(model, plugin.transformer_cls_names_to_wrap)


def _classes_to_wrap(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """The classes whose modules FSDP shards one by one (Transformers names them, if nobody else), but for such as BertEmbeddings.

    Accelerate shards the input embedding by itself, which fails where a module around it has been sharded before.
    """
    embedding = cast(Any, model).get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    around = {type(one).__name__ for one in model.modules() if one is not embedding and any(m is embedding for m in one.modules())}
    return [name for name in names or getattr(model, "_no_split_modules", None) or () if name not in around]


def shared_by() -> str | None:
    """What the launcher of this process has share out the model or the optimiser's state, by name; None for neither."""
    if zero.is_asked_for():
        return "DeepSpeed"
    return "FSDP" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else None


def join(device: torch.device) -> None:
    """Joins the other processes, where a launcher started several: what follows may speak with them."""
    deepspeed, on_cpu = zero.is_asked_for(), device.type == "cpu"
    own = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and device.index is not None and own not in (None, str(device.index)):
        raise GatewiseError(
            f"the device is {device}, but a launcher gives each process a GPU of its own, here cuda:{own}: take --device cuda, and "
            "choose GPUs by launch.gpu_ids"
        )
    if device.type == "cuda" and not check_cuda_p2p_ib_support():  # as accelerate's launcher does: the driver would not answer
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed is installed, Accelerate imports it, and it would ask
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not deepspeed:
        return
    processes, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device.type == "cuda" and processes > there:
        raise GatewiseError(
            f"{processes} processes were asked for, but there are {there} GPUs here: give at most that, or take --device cpu"
        )
    if deepspeed and on_cpu:
        zero.without_compiling()
        PartialState(backend="gloo")
        return
    if on_cpu and shared_by() == "FSDP":
        share_cpu_models()
    PartialState(cpu=on_cpu and not deepspeed)


def share_cpu_models() -> None:
    """Lets Accelerate shard a model over processes on the CPU, which it does only on accelerators: for the rest of this process.

    torch's FSDP2 runs on the CPU over gloo as it does anywhere. Without FSDP nothing that Accelerate does is changed.
    """
    original = AcceleratorState.__init__
    if getattr(original, "_gatewise", False):
        return

    def __init__(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            # Each AcceleratorState() made later takes over what PartialState says.
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    __init__._gatewise = True  # type: ignore[attr-defined]
    AcceleratorState.__init__ = __init__


def reshard(model: nn.Module) -> None:
    """Has FSDP2 give up what a forward left whole. Call it in every process before the main one alone saves the model.

    Reading the state dict does the same, but in that process only: the next forward would then gather parts that the others have.
    """
    if processes.count() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average_gradients(parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    """From now on the gradients of whole parameters are their mean over all processes, as under DDP.

    They are averaged at the end of the backward pass that an optimiser step follows, once for all accumulated before, in one
    message. First every process takes over the main one's values.

    Returns:
        What undoes it.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        distributed.broadcast(parameter.data, src=0)
    waiting = False
    device = trained[0].device if trained else torch.device("cpu")

    def one_is_ready(_: nn.Parameter) -> None:
        nonlocal waiting
        if not waiting and GradientState().sync_gradients:
            waiting = True
            Variable._execution_engine.queue_callback(average)

    def average() -> None:
        nonlocal waiting
        waiting = False
        processes.average_gradients(trained, device)

    handles = [parameter.register_post_accumulate_grad_hook(one_is_ready) for parameter in trained]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
