"""What a server counts, as Prometheus reads it (text format 0.0.4)."""

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping

Labels = tuple[tuple[str, str], ...]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters, histograms of seconds, and gauges that are asked when they are read. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Labels, int]] = defaultdict(lambda: defaultdict(int))
        self._seconds: dict[str, dict[Labels, list[float]]] = defaultdict(dict)  # buckets, then the sum
        self.gauges: dict[str, Callable[[], Mapping[Labels, float]]] = {}

    def count(self, name: str, by: int = 1, **labels: str) -> None:
        with self._lock:
            self._counts[name][tuple(labels.items())] += by

    def took(self, name: str, seconds: float, **labels: str) -> None:
        with self._lock:
            held = self._seconds[name].setdefault(tuple(labels.items()), [0.0] * (len(_SECONDS) + 2))
            held[bisect_left(_SECONDS, seconds)] += 1
            held[-1] += seconds

    def text(self) -> str:
        """All of it."""
        lines: list[str] = []
        with self._lock:
            for name, rows in sorted(self._counts.items()):
                lines += [f"# TYPE {name} counter", *(f"{name}{_labels(labels)} {value}" for labels, value in rows.items())]
            for name, histograms in sorted(self._seconds.items()):
                lines.append(f"# TYPE {name} histogram")
                for labels, held in histograms.items():
                    total = 0.0
                    for most, value in zip((*map(str, _SECONDS), "+Inf"), held, strict=False):
                        total += value
                        lines.append(f"{name}_bucket{_labels((*labels, ('le', most)))} {total}")
                    lines.append(f"{name}_sum{_labels(labels)} {held[-1]:.6f}")
                    lines.append(f"{name}_count{_labels(labels)} {total}")
        for name, ask in sorted(self.gauges.items()):
            lines += [f"# TYPE {name} gauge", *(f"{name}{_labels(labels)} {value}" for labels, value in ask().items())]
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    escaped = (f'{key}="{value.translate(_ESCAPED)}"' for key, value in labels)
    return f"{{{','.join(escaped)}}}" if labels else ""


_ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
