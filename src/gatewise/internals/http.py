"""What every server of gatewise needs of uvicorn and Starlette: patience with limits, and bodies with limits.

Read in uvicorn 0.40 to 0.54.
"""

import asyncio

from h11 import IDLE, SEND_RESPONSE, Data, EndOfMessage
from h11 import Response as Head
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 256  # fewer than the files that a process may have open
SILENCE = 60  # seconds that a connection may be silent while it is its turn


async def read_body(request: Request, most: int, large: str) -> bytes:
    """The body, of which no more is held than is allowed, whatever its length is said to be.

    Args:
        most: bytes.
        large: what a client is told whose body has more.

    Raises:
        HTTPException: with status 413 or 408.
    """
    content = bytearray()
    if int(request.headers.get("Content-Length", 0)) > most:  # h11 lets nothing through but digits
        raise HTTPException(413, large)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(SILENCE) as silence:
            async for piece in request.stream():
                content += piece
                if len(content) > most:
                    raise HTTPException(413, large)
                silence.reschedule(loop.time() + SILENCE)
    except TimeoutError:
        raise HTTPException(408, "the request did not come whole: try again") from None
    return bytes(content)


class PatientProtocol(H11Protocol):
    """uvicorn's, which waits for ever for a request's head and for who reads no answer, takes any number of connections, and sends
    what is no HTTP bare answers.

    Its attributes (``connections``, ``cycle``, ``conn``, ``loop``, ``transport``) are those of uvicorn 0.40 to 0.54.
    """

    most_connections = MOST_CONNECTIONS
    _heard = 0.0
    _patience: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # a transport of a socket
        self.transport.set_write_buffer_limits(high=0)  # whatever is not on its way pauses
        self._heard = self.loop.time()
        if len(self.connections) > self.most_connections:
            self._make_room()
        self._wait()

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        super().data_received(data)
        self._wait()

    @property
    def _is_asked(self) -> bool:
        """Whether an answer is being made, or is on its way."""
        return self.cycle is not None and not self.cycle.response_complete

    def _make_room(self) -> None:
        """Closes the connection that asks for nothing and was silent for longest, else this one: files have to be written, too."""
        others = (one for one in self.connections if isinstance(one, PatientProtocol) and one is not self)
        idle = (one for one in others if not one._is_asked and not one.transport.is_closing())
        min(idle, key=lambda one: one._heard, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._wait()
        self.resume_writing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(5 * SILENCE, self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def _wait(self) -> None:
        """A clock runs from the first byte of a head, or the beginning of the connection, until the head is whole."""
        if self._is_asked or self.transport.is_closing():
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None
        elif self._patience is None:
            self._patience = self.loop.call_later(SILENCE, self.transport.close)

    def unreadable(self) -> Response:
        """The answer to what is no HTTP."""
        raise NotImplementedError

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (IDLE, SEND_RESPONSE):
            answer = self.unreadable()
            head = Head(status_code=400, headers=[*answer.raw_headers, (b"Connection", b"close")], reason=b"Bad Request")
            for event in (head, Data(data=bytes(answer.body)), EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
