"""A server of one base model and many adapters, with PEFT and gatewise alone."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from gatewise.errors import GatewiseError
from gatewise.losses import text_positions
from gatewise.models.device import pick_device, pick_dtype
from gatewise.models.loading import load_model, load_tokenizer
from gatewise.serving.constraints import Constraint
from gatewise.serving.server.app import app
from gatewise.serving.server.bodies import RefusedError
from gatewise.serving.server.catalogue import SETTLED, Catalogue, Fit, ReplacedError, Version
from gatewise.serving.server.engine import Engine, Piece
from gatewise.serving.server.lanes import check_model
from gatewise.serving.server.metrics import Metrics
from gatewise.serving.server.reach import HOST, PORT, check_reach, listen, url_of
from gatewise.serving.server.text import Tokenizers
from gatewise.tasks.metrics import end_ids

_GRACE = 5  # seconds that answers under way have when the server ends
_UNTOLD = 4096  # tokens, of a model that does not say how many positions it has


class AdapterServer:
    """Serves until :meth:`end`.

    Args:
        base: the base model: a hub id, a folder or an embedded model.
        adapters: where adapters are, see :class:`Catalogue`.
        name: of the base model as clients say it; by default ``base``.
        host: a name or an address of this machine; one that other machines can reach only with a key.
        port: 0 takes a free one.
        keys: of which clients have to send one.
        device, dtype: of the base model.
        most_tokens: of prompt and answer together; by default the model's positions.
        most_loaded, most_running, most_waiting: see :class:`Engine`.
        constraints: what a request can have its answer kept to, by its name in ``vllm_xargs``.
        every, settled: seconds between two looks at the folders, and in which a folder must not have changed.
        log_requests: say of each request, in a line, how it ended.
        say: told in a line what happens.

    Attributes:
        url: of the server.
        name: of the base model.
        catalogue, metrics: what there is, and what it did.
        length: the most tokens of prompt and answer together.
        vocabulary: token ids are below it.
        hosts: what may stand in ``Host``, None for anything.
        bodies, long_bodies: threads that read bodies and encode prompts. Long ones are among themselves, and keep no other waiting.
        open: where the pieces of answers come that clients wait for.
        is_over: answers have had their time, and no more begin.

    Raises:
        GatewiseError: something of it cannot be had, or an adapter that was named itself cannot be served.
    """

    def __init__(
        self,
        base: str,
        adapters: Sequence[str] = (),
        *,
        name: str | None = None,
        host: str = HOST,
        port: int = PORT,
        keys: Sequence[str] = (),
        device: str = "auto",
        dtype: str = "auto",
        most_tokens: int | None = None,
        most_loaded: int = 32,
        most_running: int = 32,
        most_waiting: int = 256,
        constraints: Mapping[str, Constraint] | None = None,
        every: float = 2.0,
        settled: float = SETTLED,
        log_requests: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        say = say or (lambda text: print(text, file=sys.stderr))
        self.hosts, self.keys, self.constraints = check_reach(host, keys), keys, constraints or {}
        self.log = say if log_requests else None
        self.socket = listen(host, port)
        self.port: int = self.socket.getsockname()[1]
        try:
            self.name = name or base
            fit = Fit(base, self.name)
            self.catalogue = Catalogue(adapters, [self.name], say, settled, lambda folder, _: fit.check(folder))
            self.catalogue.tell_empty()
            place = pick_device(device)
            precision = pick_dtype(dtype, place, say)
            say(f"loading {base} in {str(precision).removeprefix('torch.')} on {place}")
            model = load_model(base, dtype=precision, device=place)
            tokenizer = load_tokenizer(base)
            check_model(model)
            positions = text_positions(model)
            self.length = most_tokens or (positions if positions < 2**31 else _UNTOLD)
            if self.length > positions:
                raise GatewiseError(f"--max-model-len is {self.length}, but {base} has {positions} positions: give at most that")
            if getattr(model.generation_config, "repetition_penalty", None) not in (None, 1):
                say(f"note: the repetition_penalty in the generation_config.json of {base} is passed over")
            self.metrics = Metrics()
            self.tokenizers = Tokenizers(tokenizer)
            self.engine = Engine(
                model, base, sorted(end_ids(model, tokenizer)), self.catalogue, self.metrics,
                most_loaded=most_loaded, most_running=most_running, most_waiting=most_waiting, broke=self.end,
            )  # fmt: skip
            for version in [one for one in self.catalogue.versions.values() if one.is_named][:most_loaded]:
                say(f"loading {version.folder}")
                with suppress(ReplacedError):  # whoever watches the folders finds the new state
                    self.engine.load(version)
        except BaseException:
            self.socket.close()
            raise
        embeddings: Any = model.get_input_embeddings()
        self.vocabulary = int(embeddings.weight.shape[0])
        self._every = every
        self.bodies = ThreadPoolExecutor(2, thread_name_prefix="gatewise-encode")
        self.long_bodies = ThreadPoolExecutor(2, thread_name_prefix="gatewise-encode-long")
        # One text a thread: with threads of its own beside ours, the tokenizers library has texts wait for each other.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.open: set[asyncio.Queue[tuple[int, Piece]]] = set()
        self.is_over = False
        self.url = url_of(host, self.port)
        self._server = _Listener(
            self._end_answers,
            uvicorn.Config(
                app(self),
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="critical",  # what the user has to know is printed by the app
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=512,  # connections; requests of further ones get status 503
                timeout_keep_alive=60,
                timeout_graceful_shutdown=_GRACE + 3,
            ),
        )

    @property
    def names(self) -> list[str]:
        """Of the adapters that are served now."""
        return list(self.catalogue.versions)

    def run(self) -> None:
        """Serves until :meth:`end`, or until SIGINT or SIGTERM, which is raised again when the answers under way have ended.

        They have some seconds for that, and end with an error then. A second signal ends the process at once.

        Raises:
            GatewiseError: a fault has ended the engine. Whatever started the server may start it again.
        """
        self.engine.start()
        self.catalogue.watch(self._every)
        try:
            self._server.run(sockets=[self.socket])
        finally:
            self.catalogue.end()
            self.engine.end()
            for threads in (self.bodies, self.long_bodies):
                threads.shutdown(wait=False, cancel_futures=True)
        if self.engine.is_broken:
            raise GatewiseError("the engine has ended by a fault, which is told above, and the server with it: start it again")

    def version_of(self, name: str) -> Version | None:
        """The adapter of a name, None for the base model.

        Raises:
            RefusedError: there is none.
        """
        if name == self.name:
            return None
        version = self.catalogue.versions.get(name)
        if version is None:
            raise RefusedError(f"The model {name[:200]!r} does not exist.", 404, "model")
        return version

    def _end_answers(self) -> None:
        self.is_over = True
        for pieces in self.open:
            pieces.put_nowait((0, Piece(problem=RefusedError("the server is ending", 503))))

    def end(self) -> None:
        """Ends :meth:`run`, from another thread."""
        self._server.should_exit = True

    def __enter__(self) -> "AdapterServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class _Listener(uvicorn.Server):
    """Ends in order.

    Args:
        end_answers: ends answers that have had their time.
    """

    def __init__(self, end_answers: Callable[[], None], config: uvicorn.Config) -> None:
        super().__init__(config)
        self._end_answers = end_answers

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_GRACE, self._end_answers)
        await super().shutdown(sockets)
