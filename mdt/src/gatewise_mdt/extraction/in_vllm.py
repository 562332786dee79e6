"""The constraint of trees inside vLLM's engine: ``--logits-processors gatewise_mdt.extraction.in_vllm:TreeLogits``.

A request whose ``vllm_xargs`` have a course under "gatewise_tree" writes only what can still become a valid tree, token by token as
in :mod:`gatewise_mdt.extraction.constraint`; all others are left alone. Only for processes that have vLLM (tried with 0.32).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from gatewise.errors import GatewiseError
from gatewise_mdt.extraction.constraint import TreeScores, llguidance_tokenizer
from gatewise_mdt.extraction.course import ARGUMENT, Course


class TreeLogits(AdapterLogitsProcessor):
    """Takes from the scores of requests for trees the tokens that would lead nowhere."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses a request whose course cannot be read, before it reaches the engine.

        Raises:
            ValueError: it cannot; the server answers 400.
        """
        told = (sampling_params.extra_args or {}).get(ARGUMENT)
        if told is None:
            return
        try:
            Course.from_json(str(told))
        except GatewiseError as error:
            raise ValueError(str(error)) from error
        if not sampling_params.max_tokens:
            raise ValueError("a tree was asked for without max_tokens, by which it is brought to a close: give it")

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        model = vllm_config.model_config
        self.tokenizer = cached_tokenizer_from_config(model)
        # What cannot be read is told at the start: with the first request it would end the engine.
        llguidance_tokenizer(self.tokenizer, (int(self.tokenizer.eos_token_id),), model.get_vocab_size())

    def is_argmax_invariant(self) -> bool:
        """No: the likeliest token may be a forbidden one."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Tensor], Tensor] | None:
        """What takes the scores of one request; also of one that goes on after it was set aside, whose tokens are read again."""
        told = (params.extra_args or {}).get(ARGUMENT)
        if told is None:
            return None
        ends = [*params.all_stop_token_ids, int(self.tokenizer.eos_token_id)]
        return TreeScores(Course.from_json(str(told)), self.tokenizer, ends, int(params.max_tokens or 0))
