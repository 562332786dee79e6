"""How a command refuses what it was given."""

from typing import Any


def assert_refused(result: Any, *said: str) -> None:
    """Exit code 2, and one sentence at the end of stderr that says all this."""
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for text in said:
        assert text in last
