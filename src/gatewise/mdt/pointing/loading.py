"""The extractor of an adapter, by what the adapter was trained for: to write trees, or to point at the text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatewise.adapters.files import read_note
from gatewise.errors import GatewiseError
from gatewise.mdt.extraction.extractor import Extractor, Extracts
from gatewise.mdt.pointing.extractor import PointingExtractor

_OPTIONS = {
    "level": "--level",
    "pipeline": "--pipeline",
    "verbatim": "--verbatim",
    "candidates": "--candidates",
    "constrained": "--free",
}
_OFF = {"level": None, "pipeline": False, "verbatim": False, "candidates": 1, "constrained": True}


def load_extractor(
    adapter: str | Path,
    *,
    base: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Extracts:
    """The adapter with its base model, ready for texts.

    Args:
        settings: attributes of :class:`Extractor`. Of a model that points at the text, which writes nothing, only ``batch_size``
            means something.
        Others: as for :meth:`Extractor.load`.

    Raises:
        GatewiseError: adapter or base cannot be read, or the settings do not go with it.
    """
    if read_note(Path(adapter)).get("task") != "text2mdt":
        return Extractor.load(adapter, base=base, device=device, say=say, **settings)
    given = [option for name, option in _OPTIONS.items() if settings.get(name, _OFF[name]) != _OFF[name]]
    if given:
        raise GatewiseError(f"{adapter} points at the text and writes nothing: leave out {', '.join(given)}")
    sizes = {"batch_size": settings["batch_size"]} if "batch_size" in settings else {}
    return PointingExtractor.load(adapter, base=base, device=device, say=say, **sizes)
