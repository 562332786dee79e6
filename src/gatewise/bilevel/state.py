"""The upper level of a bi-level training: its parameters, the order of its rows, and what a checkpoint keeps of it."""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset, Sampler, Subset

from gatewise.errors import GatewiseError, some
from gatewise.files import whole_file


@dataclass
class UpperLevel:
    """The upper parameters by name, their optimiser, and how far they are.

    Attributes:
        optimizer: of the parameters, in their order.
        steps: upper steps so far.
        rows_seen: rows of the upper stream so far, over all processes.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    steps: int = 0
    rows_seen: int = 0

    def save(self, path: Path) -> None:
        """Writes the optimiser's state and the counters."""
        about = {"steps": self.steps, "rows_seen": self.rows_seen, "parameters": list(self.parameters)}
        with whole_file(path) as part:
            torch.save({**about, "state": self.optimizer.state_dict()["state"]}, part)

    def load(self, path: Path) -> None:
        """Takes up what ``save`` wrote; the learning rate and the other settings stay those of this run.

        Raises:
            GatewiseError: no such file, one that cannot be read, or one of other upper parameters.
        """
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise GatewiseError(
                f"{path.parent} has no {path.name}: another Trainer wrote it, or save_only_model was on; start from the beginning"
            ) from error
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise GatewiseError(f"{path} cannot be read ({error}): resume from an earlier checkpoint") from error
        if stored["parameters"] != list(self.parameters):
            raise GatewiseError(
                f"{path} is of the upper parameters {some(stored['parameters'])}, but this run's are {some(self.parameters)}: "
                "resume with the upper_parameters it was written with"
            )
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": stored["state"]})
        self.steps, self.rows_seen = stored["steps"], stored["rows_seen"]


def select_upper(model: Any, pattern: str) -> dict[str, nn.Parameter]:
    """The trainable parameters in whose names a regular expression is found, by name in the model's order.

    Raises:
        GatewiseError: it fits no trainable parameter, or all of them.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = {name: parameter for name, parameter in trainable.items() if re.search(pattern, name)}
    if not 0 < len(chosen) < len(trainable):
        raise GatewiseError(
            f"upper_parameters is {pattern!r}, which fits {len(chosen)} of the {len(trainable)} trainable parameters "
            f"({some(trainable)}): expected some, and others for train_dataset"
        )
    return chosen


@contextmanager
def held_fixed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While open, the parameters require no gradient: none is computed, and no hook on one runs."""
    moving = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)


class CyclicRows(Sampler[list[int]]):
    """Batches of row numbers without end, for one of several processes, in an order that depends on seed and pass alone.

    Passes follow one another without a gap, so a batch may hold the end of one and the start of the next: all batches are full.

    Args:
        rows: how many there are.
        batch_size: rows of a batch of one process; processes take turns on one common order.
        seed: of the order.
        start: rows that all processes together have had before.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, start: int = 0, process: int = 0, processes: int = 1) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.start, self.process, self.processes = start, process, processes

    def __iter__(self) -> Iterator[list[int]]:
        drawn, order = -1, list(range(self.rows))
        first = self.start + self.process * self.batch_size
        while True:
            batch = []
            for position in range(first, first + self.batch_size):
                number, place = divmod(position, self.rows)
                if number != drawn:
                    drawn, order = number, list(range(self.rows))
                    random.Random(f"upper/{self.seed}/{number}").shuffle(order)
                batch.append(order[place])
            yield batch
            first += self.batch_size * self.processes


def split_in_half(dataset: Any, seed: int = 0) -> tuple[Any, Any]:
    """Two disjoint random halves of a data set, each in its old order: SPT trains weights on the first and gates on the second.

    Args:
        dataset: a ``datasets.Dataset``, of which the halves are too, or any rows with a length. The first half gets the odd row.

    Raises:
        GatewiseError: a stream, or fewer than two rows.
    """
    count = count_rows("the data set to split", dataset, 2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    first, second = sorted(order[: (count + 1) // 2]), sorted(order[(count + 1) // 2 :])
    if hasattr(dataset, "select"):
        return dataset.select(first), dataset.select(second)
    return Subset(dataset, first), Subset(dataset, second)


def count_rows(what: str, dataset: Any, least: int) -> int:
    """The number of rows of a data set.

    Raises:
        GatewiseError: a stream or no data set at all, or fewer rows than ``least``.
    """
    by_number = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not by_number or isinstance(dataset, IterableDataset | Mapping):
        raise GatewiseError(
            f"{what} is a {type(dataset).__name__}; expected rows with a length that can be read by number: of a stream, take as "
            "many as you need into a list"
        )
    if len(dataset) < least:
        raise GatewiseError(f"{what} has {len(dataset)} rows; expected at least {least}")
    return len(dataset)
