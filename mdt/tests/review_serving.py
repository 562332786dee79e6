"""A review that is served while a test asks it, as its page does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

from gatewise_mdt.review.server import ReviewServer
from gatewise_mdt.review.session import Session


def tick_all(session: Session, number: int) -> int:
    """Ticks every open item of a passage, and gives its version then."""
    for place, (item, tick) in enumerate(session.passage(number).looked_at):
        if tick is None and not item.hint:
            session.tick(number, session.passage(number).version, place, True, "said elsewhere")
    return session.passage(number).version


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


class Client:
    """One person's page, on a connection that stays open; each answer is (status, what the JSON holds)."""

    def __init__(self, port: int, token: str, window: str = "", **headers: str) -> None:
        self.window = window
        self.connection = HTTPConnection("127.0.0.1", port, timeout=30)
        self.headers = {"X-Gatewise-Token": token, "Content-Type": "application/json", **headers}

    def get(self, path: str) -> tuple[int, Any]:
        self.connection.request("GET", f"/api/{path}", headers=self.headers)
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())

    def __call__(self, action: str, **body: Any) -> tuple[int, Any]:
        self.connection.request("POST", f"/api/{action}", json.dumps({"window": self.window, **body}), self.headers)
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())
