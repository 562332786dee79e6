"""What a search for prompt layers came to, as it lies beside a run and in its adapter: ``search.json``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gatewise.errors import GatewiseError
from gatewise.files import write_json

SEARCH_FILE = "search.json"


@dataclass(frozen=True)
class Selection:
    """The layers a search chose, and why.

    Attributes:
        layers: the chosen ones, in order.
        gates: a of every layer at the end of the search.
        losses: the mean loss with each layer among the open ones, where layers were chosen by it.
        steps: optimiser steps of the search.
        seconds: what it took, in the process that ended it.
        resumed_from: the step that process went on from, or None.
        settings: of the search and the prompts.
        log: losses and learning rates over its steps.
    """

    layers: list[int]
    gates: list[float]
    steps: int
    seconds: float
    losses: list[float] | None = None
    resumed_from: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()

    def write(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all."""
        write_json(path, {"format": 1, **asdict(self)})


def read_selection(path: Path) -> Selection:
    """Reads what ``Selection.write`` wrote.

    Raises:
        GatewiseError: no such file, or one that does not hold a selection.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        layers, gates = [int(layer) for layer in told["layers"]], [float(gate) for gate in told["gates"]]
        losses = None if told.get("losses") is None else [float(loss) for loss in told["losses"]]
        if not layers or sorted(set(layers)) != layers or not 0 <= layers[0] <= layers[-1] < len(gates):
            raise ValueError(f"layers {layers} of {len(gates)}")
        return Selection(
            layers=layers,
            gates=gates,
            losses=losses,
            steps=int(told["steps"]),
            seconds=float(told["seconds"]),
            resumed_from=None if told["resumed_from"] is None else int(told["resumed_from"]),
            settings=dict(told["settings"]),
            log=list(told["log"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GatewiseError(
            f"{path} is not what a search wrote ({type(error).__name__}: {error}): restore it, or search again with --overwrite"
        ) from error
