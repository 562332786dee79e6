"""Warnings that libraries write while they are imported, of no use to whoever runs a command.

Read in deepspeed 0.19 and bitsandbytes 0.50.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

KERNEL = "gemm_4bit_forward"
_FILTERS: dict[str, Callable[[logging.LogRecord], bool]] = {
    # Accelerate imports DeepSpeed where it is installed, and it warns on stdout, which is for results.
    "DeepSpeed": lambda record: record.levelno >= logging.ERROR,
    # PEFT imports bitsandbytes where it is installed. On processors with AVX512-BF16 it looks for a kernel in a package that few
    # have, says so, and takes its own.
    "bitsandbytes.backends.cpu.ops": lambda record: KERNEL not in record.getMessage(),
}


@contextmanager
def no_import_warnings() -> Iterator[None]:
    """Keeps these warnings, and no others of the same loggers, from being written."""
    for name, keeps in _FILTERS.items():
        logging.getLogger(name).addFilter(keeps)
    try:
        yield
    finally:
        for name, keeps in _FILTERS.items():
            logging.getLogger(name).removeFilter(keeps)
