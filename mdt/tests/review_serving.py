"""A review that is served while a test asks it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gatewise_mdt.review.server import ReviewServer


@contextmanager
def serving(*given: Any, **options: Any) -> Iterator[ReviewServer]:
    """A :class:`ReviewServer` of these arguments, which runs in a thread until the block ends."""
    with ReviewServer(*given, **options) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server
        finally:
            server.end()
            thread.join(30)
        assert not thread.is_alive()
