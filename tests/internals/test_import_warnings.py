"""Warnings of imports: those that are kept quiet still come from where they came from, and all others are shown."""

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest

from gatewise.internals.import_warnings import KERNEL, no_import_warnings

BITSANDBYTES = "bitsandbytes.backends.cpu.ops"


def test_bitsandbytes_still_warns_there() -> None:
    pytest.importorskip("bitsandbytes")
    spec = find_spec(BITSANDBYTES)
    source = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
    assert "logger = logging.getLogger(__name__)" in source
    assert f"Failed to load CPU {KERNEL}" in source


def shown(logger: str, level: int, text: str) -> bool:
    return bool(logging.getLogger(logger).filter(logging.LogRecord(logger, level, "", 0, text, (), None)))


def test_only_these_warnings_are_kept_quiet_and_only_for_now() -> None:
    quiet = [
        (BITSANDBYTES, logging.WARNING, "Failed to load CPU gemm_4bit_forward from kernels-community: no kernels"),
        ("DeepSpeed", logging.WARNING, "Setting accelerator to CPU."),
    ]
    with no_import_warnings():
        assert not any(shown(*one) for one in quiet)
        assert shown(BITSANDBYTES, logging.WARNING, "the library is not there")
        assert shown("DeepSpeed", logging.ERROR, "it failed")
    assert all(shown(*one) for one in quiet)
