"""The one exception a user is meant to read: what was given, what was expected, what to do."""


class GatewiseError(Exception):
    """A fault in what the user gave. The message is one clear sentence; the command line exits with code 2."""
