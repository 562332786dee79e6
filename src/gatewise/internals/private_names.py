"""Every name that gatewise relies on of PyTorch, PEFT, Transformers, Accelerate, DeepSpeed and filelock with an underscore first.

Libraries may change such names in any version. ``tests/internals/test_private_names.py`` looks each of them up in the versions
that are installed, and fails when the source comes to use one that is not listed here.

Read in torch 2.13, peft 0.21, transformers 5.25, accelerate 1.16, deepspeed 0.19 and filelock 4.3. Names that a subclass must
override, or calls on itself, are used where the subclass is; all others only in this folder.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """One name.

    Args:
        owner: what has it, as "module:name", or "module".
        name: it.
        why: what gatewise relies on it for.
        parameters: of a method, those that gatewise counts on, in order; None for an attribute.
        files: where it is used under src/gatewise, outside of this folder.
    """

    owner: str
    name: str
    why: str
    parameters: tuple[str, ...] | None = None
    files: tuple[str, ...] = ()


_TUNER, _LORA = "peft.tuners.tuners_utils:BaseTuner", "peft.tuners.lora:LoraModel"
_LAYER, _TRAINER = "peft.tuners.tuners_utils:BaseTunerLayer", "transformers:Trainer"
_BOTH_TUNERS = ("routed/model.py", "prompts/model.py")
_MODULE, _HOOKS = "torch.nn:Module", "torch.nn.modules:module"

PRIVATE_NAMES = (
    # PyTorch
    PrivateName(_MODULE, "_forward_hooks", "finds hooks that see what a module makes"),
    PrivateName(_MODULE, "_forward_pre_hooks", "finds hooks that change what A and B are given"),
    PrivateName(_MODULE, "_parameters", "puts another weight there while a module runs, and multiplies by what is there"),
    PrivateName(_HOOKS, "_global_forward_pre_hooks", "multiplies by a weight without its module's call where nobody sees it"),
    PrivateName(_HOOKS, "_global_forward_hooks", "multiplies by a weight without its module's call where nobody sees it"),
    PrivateName(
        _MODULE, "_load_from_state_dict", "has a router look again at how many prompts it has seen", (), ("routed/router.py",)
    ),
    PrivateName("torch.autograd:Variable", "_execution_engine", "averages gradients at the end of a backward pass"),
    # PEFT: what tuners override
    PrivateName(
        _TUNER,
        "_pre_injection_hook",
        "looks at the base model before it is changed",
        ("model", "config", "adapter_name"),
        _BOTH_TUNERS,
    ),
    PrivateName(
        _TUNER,
        "_create_and_replace",
        "puts prompt generators at layers",
        ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
        ("prompts/model.py",),
    ),
    PrivateName(
        _LORA,
        "_create_and_replace",
        "puts routers at the first module of a layer",
        ("lora_config", "adapter_name", "target", "target_name", "parent", "current_key"),
        ("routed/model.py",),
    ),
    PrivateName(
        _LORA, "_create_new_module", "makes routed modules", ("lora_config", "adapter_name", "target"), ("routed/model.py",)
    ),
    PrivateName(
        _TUNER, "_prepare_adapter_config", "names the layers with prompts", ("peft_config", "model_config"), ("prompts/model.py",)
    ),
    PrivateName(
        _TUNER,
        "_replace_module",
        "saved modules without a weight",
        ("parent", "child_name", "new_module", "child"),
        ("prompts/model.py",),
    ),
    PrivateName(_TUNER, "_enable_adapter_layers", "learns that adapters are switched off", ("enabled",), _BOTH_TUNERS),
    PrivateName(
        _TUNER, "_remove_adapter_name_from_key", "what routers are called in files", ("key", "adapter_name"), ("routed/model.py",)
    ),
    PrivateName(_TUNER, "_convert_state_dict_for_initial_model", "refuses to become plain LoRA", (), ("routed/model.py",)),
    PrivateName(
        _LORA,
        "_enable_peft_forward_hooks",
        "learns what forward and generate were called with",
        (),
        (*_BOTH_TUNERS, "serving/lora.py", "serving/server/lanes.py"),
    ),
    # PEFT: adapter layers
    PrivateName(
        _LAYER,
        "_active_adapter",
        "names the adapter that a new layer begins with, and asks whether it is still in use",
        None,
        ("routed/layer.py",),
    ),
    PrivateName(_LAYER, "_disable_adapters", "asks in every decoding step whether adapters are still on"),
    PrivateName(_LAYER, "_cast_input_dtype", "gives A its own precision", ("x", "dtype"), ("routed/layer.py",)),
    PrivateName(
        _LAYER,
        "_move_adapter_to_device_of_base_layer",
        "keeps the precision of routers and generators",
        ("adapter_name", "device"),
        ("routed/layer.py", "routed/model.py", "prompts/layer.py"),
    ),
    # Transformers
    PrivateName("transformers:PreTrainedModel", "_no_split_modules", "has FSDP leave modules around the embedding to Accelerate"),
    PrivateName("transformers:TrainingArguments", "_n_gpu", "keeps a Trainer on one of several GPUs"),
    PrivateName("transformers:TrainingArguments", "_setup_devices", "puts a Trainer on one named device"),
    PrivateName("transformers:PretrainedConfig", "_attn_implementation", "refuses attention whose masks prompts do not make"),
    *(
        PrivateName("transformers:PreTrainedModel", name, "a model around another one says that it can do what that one can")
        for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
    ),
    PrivateName(
        "transformers:PreTrainedModel",
        "_can_set_experts_implementation",
        "a model around a mixture of experts leaves the choice to it",
        (),
    ),
    PrivateName("transformers:PretrainedConfig", "_name_or_path", "has the model card name the base model"),
    PrivateName(_TRAINER, "_save", "saves the adapter alone", ("output_dir", "state_dict"), ("runs/trainer.py",)),
    PrivateName(
        _TRAINER,
        "_load_from_checkpoint",
        "goes on with a checkpoint's adapter",
        ("resume_from_checkpoint", "model"),
        ("runs/trainer.py",),
    ),
    PrivateName(
        _TRAINER,
        "_save_optimizer_and_scheduler",
        "keeps the upper level and the gates in checkpoints",
        ("output_dir",),
        ("bilevel/trainer.py", "prompts/darts.py", "runs/trainer.py"),
    ),
    PrivateName(
        _TRAINER,
        "_load_optimizer_and_scheduler",
        "takes them up again",
        ("checkpoint",),
        ("bilevel/trainer.py", "prompts/darts.py", "runs/trainer.py"),
    ),
    PrivateName(_TRAINER, "_load_best_model", "loads an adapter that FSDP left whole", (), ("runs/trainer.py",)),
    PrivateName(
        _TRAINER,
        "_prepare_for_training",
        "loads a checkpoint's adapter before DeepSpeed takes the model",
        ("max_steps", "train_dataloader", "resume_from_checkpoint"),
        ("runs/trainer.py",),
    ),
    PrivateName("torch.optim.lr_scheduler:LRScheduler", "_last_lr", "has one number for each group", None, ("runs/trainer.py",)),
    PrivateName(
        _TRAINER,
        "_prepare_inputs",
        "brings batches to the device",
        ("inputs",),
        ("bilevel/trainer.py", "runs/trainer.py"),
    ),
    PrivateName(
        _TRAINER,
        "_remove_unused_columns",
        "leaves out columns that the model does not take",
        ("dataset", "description"),
        ("bilevel/trainer.py",),
    ),
    PrivateName(
        _TRAINER,
        "_get_collator_with_removed_columns",
        "the same for rows that are no data set",
        ("data_collator", "description"),
        ("bilevel/trainer.py",),
    ),
    PrivateName(_TRAINER, "_train_batch_size", "rows of a batch, after the Trainer found what fits", None, ("runs/trainer.py",)),
    PrivateName(
        "transformers.modeling_layers:GradientCheckpointingLayer",
        "_gradient_checkpointing_func",
        "finds out which layers are computed again in the backward pass",
    ),
    # Accelerate
    PrivateName("accelerate.state:AcceleratorState", "_shared_state", "reads how a Trainer was told to shard"),
    PrivateName("accelerate.state:PartialState", "_shared_state", "says that a model on the CPU is sharded"),
    PrivateName("accelerate.hooks:add_hook_to_module", "_old_forward", "exchanges the forward that a hook keeps"),
    PrivateName("accelerate:Accelerator", "_original_forward", "scores without the autocast that Accelerate put around a model"),
    # DeepSpeed
    PrivateName(
        "deepspeed.utils.mixed_precision_linkage:link_hp_params",
        "_hp_mapping",
        "finds a rank's piece in what ZeRO's optimiser steps",
    ),
    PrivateName(
        "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator",
        "_invalidate_trace",
        "has ZeRO-3 learn anew in which order it reads parameters",
        (),
    ),
)
