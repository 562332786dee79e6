"""The one place that touches PEFT's closed registry: adds our methods to its enum and tables, at once or when PEFT is imported.

PEFT looks a saved adapter's class up by ``peft_type`` in tables that only its own enum can be a key of, and has no way for others
to register before they are asked. So ``import gatewise`` leaves a note with Python's import system: as soon as ``peft`` has been
imported, our methods are added. Without PEFT nothing is imported, and ``import gatewise`` stays quick.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_HOMES = ("gatewise.routed", "gatewise.prompts")
"""Modules that call ``add_peft_method`` when they are imported.

That may happen in the middle of whatever imports PEFT: one of our own files, or Transformers' trainer. So all that they import must
be complete by then: of gatewise only files that do not import PEFT themselves, of Transformers only what PEFT imports too.
"""


REQUIRES = "gatewise: `import gatewise` before PEFT loads this adapter, or PEFT stops with a KeyError of its peft_type"


@dataclass
class SavedWithNote:
    """A configuration of PEFT that says in ``adapter_config.json`` what to import. It goes in front of PEFT's own class.

    Without gatewise PEFT stops with a bare ``KeyError`` of the type's name, before any code of ours could run.
    """

    requires: str = field(
        default=REQUIRES,
        repr=False,
        compare=False,
        metadata={"help": "A note for those who load the adapter without gatewise; always the same."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.requires = REQUIRES


def peft_type(name: str) -> Any:
    """PEFT's enum member of this name, added to the enum if it has none."""
    from peft.utils.peft_types import PeftType

    return _enum_member(PeftType, name)


def add_peft_method(name: str, config_cls: type, model_cls: type, prefix: str) -> None:
    """Adds a method to PEFT's enum and tables. Doing it again changes nothing.

    Args:
        name: in capitals, as it stands in ``adapter_config.json`` under ``peft_type``.
        prefix: what names of adapter parameters begin with.
    """
    from peft import mapping
    from peft.utils.peft_types import register_peft_method

    kind = peft_type(name)
    if mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) is config_cls:
        return
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=prefix)


def _enum_member(enum: Any, name: str) -> Any:
    """The member of a string enum with this name, made if there is none; what Python's enum does when it builds the class."""
    if name in enum.__members__:
        return enum[name]
    member = str.__new__(enum, name)
    member._name_, member._value_, member.__objclass__ = name, name, enum
    member._sort_order_ = len(enum.__members__)
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    return member


def register_with_peft() -> None:
    """Adds our methods to PEFT now if it has been imported, or else right after it has been."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def _register() -> None:
    for home in _HOMES:
        import_module(home)


class _AfterPeft:
    """Finds ``peft`` where it would be found anyway, and has our methods added after its module has run."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft" or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(name)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        # Not here: others ask for the spec only to learn whether PEFT is installed.
        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            try:
                _register()
            except Exception as error:  # whatever is wrong with gatewise, PEFT itself must stay usable
                warnings.warn(f"gatewise could not add its methods to this PEFT: {error}", stacklevel=2)

        loader.exec_module = run_and_register
        return spec
