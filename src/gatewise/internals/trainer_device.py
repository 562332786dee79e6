"""Puts a Trainer on one named device. ``TrainingArguments`` knows only "the first accelerator" and "the CPU".

Read in Transformers 5.25 and Accelerate 1.16: the device is a cached property of the arguments, and the Accelerator
takes its own from the state that the arguments hold.
"""

import torch
from transformers import TrainingArguments


def run_on(arguments: TrainingArguments, device: torch.device) -> None:
    """Has the Trainer that gets these arguments put its model and its batches on ``device``, and on no second one."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    _ = arguments.device  # worked out once and kept, and with it the state
    arguments.__dict__["_setup_devices"] = device
    arguments.distributed_state.device = device
    # Several GPUs in one process would mean replicas of the model, which hooks do not reach.
    arguments._n_gpu = min(arguments.n_gpu, 1)
