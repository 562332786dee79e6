"""The one exception a user is meant to read: what was given, what was expected, what to do; and what others' errors say."""


class GatewiseError(Exception):
    """A fault in what the user gave. The message is one clear sentence; the command line exits with code 2."""


def reason_of(error: Exception) -> str:
    """The first line of what a library's error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
