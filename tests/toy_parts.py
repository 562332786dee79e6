"""What a distribution of somebody else would hold to bring a method and a task: on gatewise's public names alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatewise.losses import mean_loss
from gatewise.parts import Count, Counting, DataSection, Features, Measured, Method, NotNegative, Report, Run, Section, Task
from gatewise.tasks import PadCollator


class ShrinkSection(Section):
    """Settings of the toy method."""

    rank: Count = 2
    weight: NotNegative = 0.5


class Shrunk(Method):
    """LoRA on values alone, whose B is held small by a term of the loss."""

    files = ("shrunk.txt",)
    shrink: ShrinkSection

    def config(self, run: Run, base: PreTrainedModel) -> LoraConfig:
        """LoRA."""
        return LoraConfig(r=self.shrink.rank, target_modules=["v_proj"], task_type=run.task.task_type)

    def loss_term(self, model: nn.Module, share: float | Tensor) -> Tensor:
        """The squares of all B."""
        squares = [parameter.square().sum() for name, parameter in model.named_parameters() if "lora_B" in name]
        return share * self.shrink.weight * torch.stack(squares).sum()

    def report(self, adapter: Path) -> Report:
        """The size of B."""
        return Report(numbers={"kept_small": True}, pictures={"shrunk.txt": self._draw})

    def _draw(self, path: Path) -> None:
        path.write_text(f"weight {self.shrink.weight}", encoding="utf-8")


class NumbersSection(DataSection):
    """Numbers from 0 to ``train``, and to ``dev``."""

    base: Count = 10


class Successor(Task):
    """Writes the number that follows on a number."""

    collator = PadCollator
    data: NumbersSection
    elsewhere = "counts: give it to nobody"

    def read(self, noted: Any) -> None:
        """All numbers."""
        self.train, self.measured = range(int(self.data.train)), {"dev": range(int(self.data.dev))}

    def encode(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, *, key: str, say: Callable[[str], None]
    ) -> Features:
        """A number, and the next one to be written."""
        made = []
        for row in rows:
            prompt, answer = (tokenizer(str(number % self.data.base))["input_ids"] for number in (row, row + 1))
            made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return made

    def measure(self, run: Run, model: nn.Module, rows: Any, counting: Counting) -> Measured:
        """The loss."""
        return Measured({"loss": mean_loss(model.eval(), [run.collate(run.dev)]), "n": len(rows)})

    def note(self, base: PreTrainedModel) -> dict[str, Any]:
        """What follows on 9."""
        return {"base_of_numbers": self.data.base}

    def note_after(self, run: Run, model: PeftModel) -> dict[str, Any]:
        """That it is done."""
        return {"counted": True}
