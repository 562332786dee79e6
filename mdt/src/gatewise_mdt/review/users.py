"""Who may review: each person has a token of their own, and a file has the names with the SHA-256 of each token.

A token is 24 random bytes, so a plain hash gives nothing away and nobody can guess one. It is shown once, when it is made. The file
is read for every request: who is added may come in at once, and whose entry is taken out is refused from then on.
"""

import os
import secrets
import unicodedata
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from gatewise.errors import GatewiseError
from gatewise.files import content_of, write_json
from gatewise_mdt.review.session import checked_name

_NAMES = TypeAdapter(dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]])


class OneUser:
    """Who has the token is the one who started the review."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(24)

    def who(self, token: str) -> str | None:
        """The empty name for the right token, None for any other."""
        return _owner(token, {"": _hash(self.token)})


class UserFile:
    """A JSON object: name -> SHA-256 of the person's token, in hexadecimal digits."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def who(self, token: str) -> str | None:
        """The name that a token stands for, None for any other text.

        Raises:
            GatewiseError: the file cannot be read, so that nobody can be let in.
        """
        return _owner(token, self.read())

    def read(self) -> dict[str, str]:
        """The names with their hashes.

        Raises:
            GatewiseError: there is no such file, or it is no list of reviewers.
        """
        try:
            return _NAMES.validate_json(content_of(self.path))
        except ValidationError as error:
            raise GatewiseError(
                f"{self.path} is no list of reviewers ({error.errors()[0]['msg']}): expected a JSON object of names with the"
                " SHA-256 of their tokens"
            ) from error

    def add(self, name: str) -> str:
        """Adds a person and gives their token back, which is kept nowhere.

        Raises:
            GatewiseError: the name cannot be one or is taken, or the file cannot be read or written.
        """
        name = checked_name(name)
        token = secrets.token_urlsafe(24)
        names = self.read() if os.path.exists(self.path) else {}
        if _folded(name) in map(_folded, names):
            raise GatewiseError(
                f"{self.path} has a reviewer named {name!r}, or nearly so, already: take another name, or delete that entry to give"
                " a new token"
            )
        write_json(self.path, {**names, name: _hash(token)})
        os.chmod(self.path, 0o600)
        return token


def _owner(token: str, hashes: dict[str, str]) -> str | None:
    """All are compared, each in constant time: how long it takes says nothing of how near a token is, or to whose."""
    given, found = _hash(token), None
    for name, digest in hashes.items():
        if secrets.compare_digest(given, digest):
            found = name
    return found


def _hash(token: str) -> str:
    return sha256(token.encode("utf-8", "replace")).hexdigest()


def _folded(name: str) -> str:
    """A name without case, blanks, and other ways to write the same letters."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())
