"""Counts the tensor operations that something takes."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# They make no new numbers, only another view of the old ones.
VIEWS = {"view", "_unsafe_view", "t", "transpose", "split", "split_with_sizes", "slice", "detach", "alias", "unsqueeze", "expand"}


class Operations(TorchDispatchMode):
    """Counts operations by name, views only if asked to."""

    def __init__(self, views: bool = False) -> None:
        super().__init__()
        self._views = views
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self._views or name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
