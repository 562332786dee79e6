"""The engine: one thread that owns the model, and writes the answers of many clients a token at a time.

Between two steps new requests come in, in the order in which they were asked, and those that are done or cancelled leave. So a
long answer keeps nobody waiting for longer than a step, as long as there is room. A request is bound to the version of its adapter
when it is asked, and ends with it.

Shapes: t tokens of a prompt, n rows, v vocabulary.
"""

import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.serving.products import BASE
from gatewise.serving.server.bodies import Body, RefusedError
from gatewise.serving.server.catalogue import Catalogue, ReplacedError, Version, describe_fault
from gatewise.serving.server.lanes import Lane
from gatewise.serving.server.metrics import Metrics
from gatewise.serving.server.text import Writing

PROMPT_TOKENS = 4096
"""Tokens of prompts after which those who write have their turn; a longer prompt is read whole."""

Limit = Callable[[Sequence[int], Tensor], Tensor]
"""Of one answer: what was written, and scores (v,) of the next token -> these with -inf for what may not come."""

_GREEDY = 1e-5  # a lower temperature is none


@dataclass(frozen=True)
class Piece:
    """What comes next of an answer.

    Attributes:
        text: that can be given out.
        tokens: that were written since the last piece; a piece's text may end with a part of theirs, the rest comes later.
        finish: "stop" or "length" in the last one.
        problem: in the last one, why there will be no more.
    """

    text: str = ""
    tokens: int = 0
    finish: str | None = None
    problem: Exception | None = None


@dataclass(eq=False)
class Answer:
    """One answer that is asked for.

    Args:
        body: the request.
        version: of the adapter, None for the base model.
        prompt: token ids.
        max_tokens: of the answer, at most.
        seed: of what is drawn.
        send: called with each piece, in the engine's thread.
        limit: what may be written; None leaves it free.
        before: what is left out where it begins with it.
    """

    body: Body
    version: Version | None
    prompt: list[int]
    max_tokens: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    send: Callable[[Piece], None]
    limit: Limit | None = None
    before: str = ""
    cancelled: bool = False
    is_done: bool = False
    asked: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)

    def begin(self, ends: Collection[int]) -> None:
        """What only an answer that is being written needs. ``ends``: token ids that end it."""
        self.ends = ends
        self.writing = Writing(self.tokenizer, self.prompt, self.body.stop, self.before)
        self.generator = torch.Generator().manual_seed(self.seed)


class Engine:
    """Writes answers.

    Args:
        bare: the base model, in evaluation mode.
        base: its name.
        ends: token ids that end a text.
        catalogue: told why an adapter cannot be loaded.
        most_loaded: adapters in the model at a time. The one that was not used for longest makes room.
        most_running, most_waiting: answers.
        broke: called when a fault has ended it, in its thread.

    Attributes:
        is_broken: a fault has ended it.
    """

    def __init__(
        self,
        bare: PreTrainedModel,
        base: str,
        ends: Sequence[int],
        catalogue: Catalogue,
        metrics: Metrics,
        *,
        most_loaded: int,
        most_running: int,
        most_waiting: int,
        broke: Callable[[], None],
    ) -> None:
        self._bare, self._base, self._ends, self._catalogue, self._metrics = bare, base, frozenset(ends), catalogue, metrics
        self._most_loaded, self._most_running, self.most_waiting = most_loaded, most_running, most_waiting
        self._plain = Lane(bare, "plain")
        self._running: dict[Lane, list[Answer]] = {self._plain: []}
        self._loaded: dict[Version, Lane] = {}
        self._waiting: deque[Answer] = deque()
        self._news = threading.Condition()
        self._is_ending, self.is_broken, self._broke = False, False, broke
        self._thread = threading.Thread(target=self._run, name="gatewise-engine", daemon=True)
        metrics.gauges |= {
            "gatewise_running": lambda: _by_model([one for rows in list(self._running.values()) for one in list(rows)]),
            "gatewise_waiting": lambda: _by_model(list(self._waiting)),
            "gatewise_adapters_loaded": lambda: {(): len(self._loaded)},
        }

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Ends the thread; answers that are not done end with a problem."""
        with self._news:
            self._is_ending = True
            self._news.notify()
        self._thread.join()

    def ask(self, answers: Sequence[Answer]) -> None:
        """Has answers written, all of them or none.

        Raises:
            RefusedError: too many wait already, or it has ended.
        """
        with self._news:
            if self._is_ending:
                raise self._why_ended()
            if len(self._waiting) + len(answers) > self.most_waiting:
                self._metrics.count("gatewise_requests_total", len(answers), model=answers[0].body.model, how="refused")
                raise RefusedError(f"{len(self._waiting)} requests wait already: ask again in a moment", 503)
            self._waiting.extend(answers)
            self._news.notify()

    def ends_of(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """The token ids that end a text of an adapter with this tokenizer: the base model's, and the one that it was trained to end
        with."""
        return self._ends | ({tokenizer.eos_token_id} - {None})

    def cancel(self, answers: Sequence[Answer]) -> None:
        """The client is gone: answers that wait are dropped at once, the others after the next step."""
        with self._news:
            for one in answers:
                one.cancelled = True
            dropped = [one for one in self._waiting if one.cancelled]
            if dropped:
                self._waiting = deque(one for one in self._waiting if not one.cancelled)
            for one in dropped:
                self._ended(one, "cancelled")

    def load(self, version: Version) -> None:
        """Loads an adapter, in place of the one that was not used for longest if need be; other threads may call this only before
        ``start``.

        Raises:
            GatewiseError: it cannot be loaded.
            ReplacedError: it is being replaced.
        """
        with version.copy() as folder:  # first: no other makes room for what cannot be copied
            if len(self._loaded) >= self._most_loaded:
                self._unload(min(self._unused(), key=lambda one: one.used))
            lane = self._plain
            if version.kind == "alone":
                lane = Lane(self._bare, "alone")
            elif version.kind == "routed":
                lane = next((one for one in self._running if one.kind == "routed"), None) or Lane(self._bare, "routed")
            lane.load(folder, version.key, self._base)
        self._running.setdefault(lane, [])
        self._loaded[version] = lane
        self._metrics.count("gatewise_adapter_loads_total", model=version.name)

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    # ---- the thread ----

    def _run(self) -> None:
        try:
            while self._has_work():
                self._unload_gone()
                self._admit()
                for lane in list(self._running):  # do not name an answer: this frame would keep it alive
                    if self._running[lane]:
                        self._step(lane)
        except Exception as error:  # a bug, or a dead device: no client may wait for an answer that never comes
            traceback.print_exception(error, file=sys.stderr)
            self.is_broken = True
        with self._news:
            self._is_ending = True
        for one in (*self._waiting, *(one for rows in self._running.values() for one in rows)):
            self._fail(one, self._why_ended())
        if self.is_broken:
            self._broke()
        for lane in self._running:
            lane.clear()  # PEFT's call holds a lock that no other thread can give back

    def _why_ended(self) -> Exception:
        return RefusedError("the engine has ended: see the server's log" if self.is_broken else "the server is ending", 503)

    def _has_work(self) -> bool:
        """Waits until there is something to do; false at the end."""
        with self._news:
            while not (self._is_ending or self._waiting or any(self._running.values())):
                self._news.wait(timeout=1.0)
                if any(one.gone for one in self._loaded):
                    break
            return not self._is_ending

    def _admit(self) -> None:
        """New answers begin, in order, as far as there is room: each prompt is read, and the first token written.

        At most one adapter is loaded, and then those who write have their turn. Where there is no room for an adapter until one in
        use is free, the requests for adapters behind it wait too, or it would never have its turn. The base model's need not.
        """
        tokens, loads, has_room = 0, 0, True
        with self._news:
            waiting = list(self._waiting)
        for one in waiting:
            if tokens >= PROMPT_TOKENS or sum(map(len, self._running.values())) >= self._most_running:
                return
            version = one.version
            is_there = version is None or version in self._loaded
            if not (has_room or version is None) or (loads and not is_there):
                continue
            try:
                loads += version is not None and not is_there and not version.is_given_up
                lane = self._lane_of(version)
                if lane is None:
                    has_room = False
                    continue
                if self._take(one):
                    one.begin(self.ends_of(one.tokenizer))
                    prompt = lane.read(one.prompt, BASE if version is None else version.key)
            except Exception as error:
                self._take(one)
                self._fail(one, error)
                self._print(error)
                continue
            if one.is_done:
                continue
            tokens += len(one.prompt)
            self._metrics.count("gatewise_prompt_tokens_total", len(one.prompt), model=one.body.model)
            self._running[lane].append(one)
            self._try(lane, lane.join, prompt)
            if not one.is_done:
                self._write(lane, [one], prompt.logits)

    def _take(self, one: Answer) -> bool:
        """Takes an answer out of those that wait; false if it is cancelled."""
        with self._news:
            if one in self._waiting:
                self._waiting.remove(one)
                return True
            return False

    # ---- adapters ----

    def _lane_of(self, version: Version | None) -> Lane | None:
        """The lane of an adapter, loading it first if need be; None if there is no room, as all loaded adapters are in use.

        Raises:
            RefusedError: it cannot be loaded.
        """
        if version is None:
            return self._plain
        if version not in self._loaded:
            said = f"the adapter {version.name!r} cannot be loaded: see the server's log"  # which names files
            hidden = RefusedError(said, 500, "model")
            if version.is_given_up:
                raise hidden
            if len(self._loaded) >= self._most_loaded and not self._unused():
                return None
            try:
                self.load(version)
            except ReplacedError:
                raise
            except Exception as error:
                version.failed = time.monotonic()
                self._catalogue.tell({version.folder: describe_fault(version.folder, error)})
                raise hidden from error
        version.used = time.monotonic()
        return self._loaded[version]

    def _unused(self) -> list[Version]:
        """The loaded adapters that no answer is being written with."""
        used = {one.version for rows in self._running.values() for one in rows}
        return [one for one in self._loaded if one not in used]

    def _unload(self, version: Version) -> None:
        lane = self._loaded.pop(version)
        if lane is not self._plain and lane.names == {version.key}:
            lane.clear()
            del self._running[lane]
        else:
            lane.unload(version.key)

    def _unload_gone(self) -> None:
        """Unloads versions that are no longer in their folders, once no request needs them."""
        with self._news:
            used = {one.version for rows in (self._waiting, *self._running.values()) for one in rows}
        for version in list(self._loaded):
            if version.gone and version not in used:
                self._unload(version)

    # ---- rows ----

    def _step(self, lane: Lane) -> None:
        rows = self._running[lane]
        logits = self._try(lane, lane.step, [one.tokens[-1] for one in rows])
        if logits is not None:
            self._write(lane, rows, logits)

    def _write(self, lane: Lane, rows: Sequence[Answer], logits: Tensor) -> None:
        """The next token of some rows of a lane, by logits (n, v); those that are done then leave.

        A fault in one of them, such as in its limit, ends that one alone.
        """
        for one, own in zip(rows, logits, strict=True):
            try:
                if one.cancelled:
                    self._ended(one, "cancelled")
                else:
                    self._write_token(one, own)
            except Exception as error:
                self._fail(one, error)
                self._print(error)
        before = self._running[lane]
        self._running[lane] = [one for one in before if not one.is_done]
        self._try(lane, lane.keep, [place for place, one in enumerate(before) if not one.is_done])

    def _write_token(self, one: Answer, logits: Tensor) -> None:
        """Chooses a token by logits (v) and gives it out."""
        scores = logits if one.limit is None else one.limit(one.tokens, logits)
        best, place = scores.max(dim=-1)
        if not best.isfinite():  # there is a NaN, or nothing that may come
            raise RefusedError(f"the model {one.body.model!r} wrote what is no number", 500, "model")
        token = int(place) if one.body.temperature < _GREEDY else _draw(scores.cpu(), one)
        one.tokens.append(token)
        if len(one.tokens) == 1:
            self._metrics.took("gatewise_first_token_seconds", time.monotonic() - one.asked, model=one.body.model)
        self._metrics.count("gatewise_generated_tokens_total", model=one.body.model)
        is_end = token in one.ends and not one.body.ignore_eos
        text = "" if is_end else one.writing.add(token)
        finish = "stop" if is_end or one.writing.stopped else "length" if len(one.tokens) >= one.max_tokens else None
        if finish is not None:
            text += one.writing.end()
            self._ended(one, finish)
        one.send(Piece(text, 1, finish))

    def _try(self, lane: Lane, call: Callable[[Any], Any], argument: Any) -> Any:
        """Calls a method of a lane. If it fails, all rows of the lane end with the error, and None is returned."""
        try:
            return call(argument)
        except Exception as error:
            rows, self._running[lane] = self._running[lane], []
            for one in rows:
                self._fail(one, error)
            lane.clear()
            self._print(error)
            return None

    def _fail(self, one: Answer, problem: Exception) -> None:
        if one.is_done:
            return
        if one.cancelled:
            self._ended(one, "cancelled")
            return
        self._ended(one, "refused" if getattr(problem, "status", 500) == 503 else "failed")
        one.send(Piece(problem=problem))

    def _ended(self, one: Answer, how: str) -> None:
        one.is_done = True
        self._metrics.count("gatewise_requests_total", model=one.body.model, how=how)
        self._metrics.took("gatewise_request_seconds", time.monotonic() - one.asked, model=one.body.model)

    def _print(self, error: Exception) -> None:
        """Prints a fault that is not one of a request or an adapter.

        Raises:
            Exception: this one, if the device computes nothing more. The engine then ends, which is seen from outside, and whatever
                started it starts it again.
        """
        if _is_dead(error):
            raise error
        if not isinstance(error, GatewiseError | RefusedError):
            traceback.print_exception(error, file=sys.stderr)


def _is_dead(error: BaseException | None) -> bool:
    """Whether the device computes nothing more: after such a fault every call to it fails until the process ends.

    A want of memory passes; CUDA and cuBLAS tell of it in these words. For other faults in cuBLAS PyTorch has no error of its own.
    """
    if isinstance(error, GatewiseError | RefusedError):
        return _is_dead(error.__cause__)
    is_fault = isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
    wants_memory = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    return is_fault and not any(one in str(error) for one in wants_memory)


def _draw(logits: Tensor, one: Answer) -> int:
    """A token of logits (v,)."""
    probabilities = (logits / one.body.temperature).softmax(dim=-1)
    if one.body.top_p < 1:
        ordered, places = probabilities.sort(descending=True)
        is_out = ordered.cumsum(dim=-1) - ordered >= one.body.top_p
        is_out[0] = False  # or no token would be in where top_p is zero in this precision
        probabilities = torch.zeros_like(probabilities).scatter(0, places, ordered.masked_fill(is_out, 0.0))
    return int(torch.multinomial(probabilities, 1, generator=one.generator))


def _by_model(answers: Sequence[Answer]) -> dict[tuple[tuple[str, str], ...], float]:
    return dict(Counter((("model", one.body.model),) for one in answers))
