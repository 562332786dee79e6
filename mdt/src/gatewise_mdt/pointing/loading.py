"""The extractor of an adapter, by what the adapter was trained for: to write trees, or to point at the text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatewise.adapters.files import read_note
from gatewise.errors import GatewiseError
from gatewise_mdt.extraction.extractor import Extractor, Extracts
from gatewise_mdt.pointing.extractor import PointingExtractor
from gatewise_mdt.pointing.together import CANDIDATES, TogetherExtractor

_OPTIONS = {
    "level": "--level",
    "pipeline": "--pipeline",
    "verbatim": "--verbatim",
    "candidates": "--candidates",
    "constrained": "--free",
    "max_new_tokens": "--max-new-tokens",
}
_OFF = {
    "level": None,
    "pipeline": False,
    "verbatim": False,
    "candidates": 1,
    "constrained": True,
    "max_new_tokens": Extractor.max_new_tokens,
}


def load_extractor(
    adapter: str | Path,
    *,
    second: str | Path | None = None,
    base: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Extracts:
    """The adapter with its base model, ready for texts.

    Args:
        second: an adapter of the other kind, so that one points and one writes: both judge the trees of both
            (:class:`gatewise_mdt.pointing.together.TogetherExtractor`). ``candidates`` are then those of the writing one.
        settings: attributes of :class:`Extractor`. Of a model that points at the text, which writes nothing, only ``batch_size``
            means something.
        Others: as for :meth:`Extractor.load`.

    Raises:
        GatewiseError: adapter or base cannot be read, or the settings do not go with it.
    """
    if second is not None:
        return _together(adapter, second, base, device, say, settings)
    if read_note(Path(adapter)).get("task") != "text2mdt":
        return Extractor.load(adapter, base=base, device=device, say=say, **settings)
    given = [option for name, option in _OPTIONS.items() if settings.get(name, _OFF[name]) != _OFF[name]]
    if given:
        raise GatewiseError(f"{adapter} points at the text and writes nothing: leave out {', '.join(given)}")
    sizes = {"batch_size": settings["batch_size"]} if "batch_size" in settings else {}
    return PointingExtractor.load(adapter, base=base, device=device, say=say, **sizes)


def _together(
    one: str | Path, other: str | Path, base: str | None, device: str, say: Callable[[str], None] | None, settings: dict[str, Any]
) -> TogetherExtractor:
    points = [read_note(Path(adapter)).get("task") == "text2mdt" for adapter in (one, other)]
    if points[0] == points[1]:
        what = "point at the text" if points[0] else "write trees"
        raise GatewiseError(f"{one} and {other} both {what}: expected one of each kind, or leave --second out")
    if base is not None:
        raise GatewiseError("--base was given with two adapters, each of which names its own: leave it out")
    if settings.get("pipeline") or settings.get("level"):
        raise GatewiseError("of two adapters the one that writes writes a tree at once: leave --pipeline and --level out")
    if not settings.get("constrained", True):
        raise GatewiseError("of two adapters the one that writes is kept to phrases of the text: leave --free out")
    left = {name: value for name, value in settings.items() if name not in ("pipeline", "level", "verbatim", "candidates")}
    pointing, writing = (one, other) if points[0] else (other, one)
    written = settings.get("candidates", CANDIDATES)
    return TogetherExtractor.load(pointing, writing, device=device, say=say, written=written, **left)
