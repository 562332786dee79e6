"""The engine: one thread that owns the model, and writes the answers of many clients a token at a time.

Between two steps new requests come in, in the order in which they were asked, and those that are done or cancelled leave. So a
long answer keeps nobody waiting for longer than a step, as long as there is room. A request is bound to the version of its adapter
when it is asked, and ends with it.
"""

import secrets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatewise.adapters.loading import likeness
from gatewise.errors import GatewiseError
from gatewise.serving.products import BASE
from gatewise.serving.server.catalogue import ReplacedError, Version
from gatewise.serving.server.lanes import Lane, Routed
from gatewise.serving.server.metrics import Metrics
from gatewise.serving.server.text import Writing

PREFILL = 4096
"""Tokens, padding among them, that are read at once at most; a longer prompt is read alone."""

LOGITS = 2**26
"""Logits that are kept at once at most where those of all of a prompt's tokens are asked for; a longer prompt is read alone."""

Limit = Callable[[Sequence[int], Tensor], Tensor]
"""Of one answer: what was written, and scores (v,) of the next token -> these with -inf for what may not come."""

_GREEDY = 1e-5  # a lower temperature is none
_PASSING = (OSError, MemoryError, torch.OutOfMemoryError)
_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")  # what CUDA and cuBLAS say then


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: of the answer, at most; 0 only reads the prompt.
        temperature: 0 takes the most probable token.
        top_p: the smallest set of tokens that has this probability is drawn from.
        seed: of what is drawn; None takes a new one.
        stop: texts that end the answer.
        ignore_eos: go on after the token that ends a text.
        logprobs: of so many of the most probable tokens at each place, log-probabilities are told, and of the chosen one; None: of
            none. They are those of the model, before a limit, temperature and top_p.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True)
class Told:
    """A token, its log-probability, and the most probable ones at its place with theirs. The first of a prompt has none."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What comes next of an answer.

    Attributes:
        text: that can be given out.
        tokens: that were written since the last piece; a piece's text may end with a part of theirs, the rest comes later.
        told: of each of them, if it was asked for.
        finish: "stop" or "length" in the last one.
        problem: in the last one, why there will be no more.
    """

    text: str = ""
    tokens: int = 0
    told: tuple[Told, ...] = ()
    finish: str | None = None
    problem: Exception | None = None


@dataclass(eq=False)
class Answer:
    """One answer that is asked for.

    Args:
        model: the name that the client gave.
        version: of the adapter, None for the base model.
        prompt: token ids.
        tell: gets the pieces, in the engine's thread.
        limit: what may be written; None leaves it free.
        echo: the prompt's text, to be given out before the answer, and told of as the answer is; None: only the answer.
    """

    model: str
    version: Version | None
    prompt: list[int]
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    tell: Callable[[Piece], None]
    limit: Limit | None = None
    echo: str | None = None
    cancelled: bool = False
    asked: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writing = Writing(self.tokenizer, self.prompt, self.sampling.stop)
        seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed % 2**63
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def tells_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are told."""
        return self.echo is not None and self.sampling.logprobs is not None

    @property
    def key(self) -> str:
        """What its adapter is called in the model."""
        return BASE if self.version is None else self.version.key


class BusyError(Exception):
    """There is no room for more requests at the moment."""


class EndedError(Exception):
    """The engine has ended by a fault, and writes nothing more."""


class NotLoadedError(Exception):
    """The adapter of a request could not be loaded."""


@dataclass(eq=False)
class _Loaded:
    version: Version
    lane: Lane
    used: float = field(default_factory=time.monotonic)


class Engine:
    """Writes answers.

    Args:
        bare: the base model, in evaluation mode.
        base: its name.
        ends: token ids that end a text.
        most_loaded: adapters in the model at a time. The one that was not used for longest makes room, or one of the older half
            that the new one is like (``likeness``).
        most_running, most_waiting: answers.
        broke: called when a fault has ended it, in its thread.
    """

    def __init__(
        self,
        bare: PreTrainedModel,
        base: str,
        ends: Sequence[int],
        metrics: Metrics,
        *,
        most_loaded: int = 32,
        most_running: int = 32,
        most_waiting: int = 256,
        broke: Callable[[], None] = lambda: None,
    ) -> None:
        self._bare, self._base, self._ends, self._metrics = bare, base, frozenset(ends), metrics
        self._most_loaded, self._most_running, self.most_waiting = most_loaded, most_running, most_waiting
        self._plain = Lane(bare, "plain")
        self._running: dict[Lane, list[Answer]] = {self._plain: []}
        self._loaded: dict[str, _Loaded] = {}
        self._waiting: deque[Answer] = deque()
        self._entering: set[Answer] = set()  # that wait no more and have no row yet
        self._news = threading.Condition()
        self._is_ending, self._is_broken, self._broke = False, False, broke
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
            BusyError: too many wait already, or the server is ending.
            EndedError: it has ended by a fault.
        """
        with self._news:
            if self._is_ending:
                raise self._why_ended()
            if len(self._waiting) + len(answers) > self.most_waiting:
                raise BusyError(f"{len(self._waiting)} requests wait already: ask again in a moment")
            self._waiting.extend(answers)
            self._news.notify()

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Nobody reads these any more: they are told nothing more, and leave their places."""
        with self._news:
            for one in answers:
                one.cancelled = True
            self._news.notify()

    def load(self, version: Version) -> None:
        """Loads an adapter before anybody asks for it; before ``start``.

        Raises:
            GatewiseError: it cannot be loaded.
        """
        assert not self._thread.is_alive()
        self._load(version)

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    @property
    def ends(self) -> frozenset[int]:
        """Token ids that end a text."""
        return self._ends

    @property
    def room(self) -> int:
        """How many more adapters can be loaded without another one having to go."""
        return self._most_loaded - len(self._loaded)

    # ---- the thread ----

    def _run(self) -> None:
        try:
            while self._has_work():
                self._drop_cancelled()
                self._unload_gone()
                self._admit()
                for lane in list(self._running):
                    if self._running[lane]:
                        self._step(lane)
        except Exception as error:  # a fault of ours, or a device that is dead: nobody must wait for answers that never come
            traceback.print_exception(error, file=sys.stderr)
            self._is_broken = True
        with self._news:
            self._is_ending = True
        for one in (*self._waiting, *self._entering, *(one for rows in self._running.values() for one in rows)):
            self._fail(one, self._why_ended())
        if self._is_broken:
            self._broke()

    def _why_ended(self) -> Exception:
        return EndedError("the engine has ended: see the server's log") if self._is_broken else BusyError("the server is ending")

    def _has_work(self) -> bool:
        """Waits until there is something to do; false at the end."""
        with self._news:
            while not (self._is_ending or self._waiting or any(self._running.values())):
                self._news.wait(timeout=1.0)
                if any(one.version.gone for one in self._loaded.values()):
                    break
            return not self._is_ending

    def _drop_cancelled(self) -> None:
        with self._news:
            gone = [one for one in self._waiting if one.cancelled]
            if gone:
                self._waiting = deque(one for one in self._waiting if not one.cancelled)
        for one in gone:
            self._ended(one, "cancelled")
        for lane, rows in self._running.items():
            if any(one.cancelled for one in rows):
                for one in rows:
                    if one.cancelled:
                        self._ended(one, "cancelled")
                self._keep(lane, [place for place, one in enumerate(rows) if not one.cancelled])

    def _admit(self) -> None:
        """New answers begin, in order, as far as there is room: one batch of prompts a lane."""
        batches: dict[Lane, list[Answer]] = {}
        room = self._most_running - sum(map(len, self._running.values()))
        while room > 0:
            with self._news:
                if not self._waiting:
                    break
                first = self._waiting[0]
            try:
                lane = self._lane_of(first, [one.key for rows in batches.values() for one in rows])
            except (GatewiseError, ReplacedError) as error:
                self._leave_queue()
                hidden = NotLoadedError(f"the adapter {first.model!r} cannot be loaded: see the server's log")  # which names files
                self._fail(first, error if isinstance(error, ReplacedError) else hidden)
                continue
            if lane is None:
                break  # until an adapter in use makes room
            batch = batches.get(lane, [])
            if batch and (len(batch) + 1) * max(len(one.prompt) for one in (*batch, first)) > self._most_read([*batch, first]):
                break
            self._leave_queue()
            self._entering.add(first)
            batches.setdefault(lane, []).append(first)
            room -= 1
        for lane, batch in batches.items():
            self._enter(lane, batch)

    def _most_read(self, batch: Sequence[Answer]) -> int:
        """Tokens of the prompts of a batch, if it has more than one."""
        if not any(one.tells_prompt for one in batch):
            return PREFILL
        embeddings: Any = self._bare.get_input_embeddings()
        return min(PREFILL, LOGITS // int(embeddings.weight.shape[0]))

    def _leave_queue(self) -> None:
        with self._news:
            self._waiting.popleft()

    def _lane_of(self, answer: Answer, in_use: Sequence[str]) -> Lane | None:
        """The lane of an answer, with its adapter loaded; None where all that are loaded are in use."""
        version = answer.version
        if version is None:
            return self._plain
        held = self._loaded.get(version.key)
        if held is None:
            if version.problem is not None:
                raise GatewiseError(version.problem)
            going: list[_Loaded] = []
            if len(self._loaded) >= self._most_loaded:
                used = {one.key for rows in self._running.values() for one in rows} | set(in_use)
                going = sorted((one for one in self._loaded.values() if one.version.key not in used), key=lambda one: one.used)
                if not going:
                    return None
            held = self._load(version, going)
        held.used = time.monotonic()
        return held.lane

    def _load(self, version: Version, going: Sequence[_Loaded] = ()) -> _Loaded:
        """Loads an adapter.

        Args:
            going: of these one has to make room, if there are any, the least used first: one that the new one can replace, which
                is much faster, or the first.
        """
        folder: Path | None = None
        try:
            with version.copied() as folder:
                lane = self._in_place(version, going, folder)
                if lane is None:
                    if going:
                        self._unload(going[0])
                    lane = self._lane_for(version)
                    lane.load(folder, version.key, self._base)
        except ReplacedError:
            raise
        except Exception as error:
            if self.is_alive:
                _raise_if_dead(error)
            if not isinstance(error, GatewiseError):
                traceback.print_exception(error, file=sys.stderr)
            # Said of the folder that the user knows, not of the copy.
            problem = (str(error) or type(error).__name__).replace(str(folder or version.folder), str(version.folder))
            if isinstance(error, GatewiseError) and not _is_passing(error.__cause__):
                version.problem = problem
            if self.is_alive and version.is_news(problem):  # nobody else says it
                print(f"error: {problem}", file=sys.stderr)
            raise GatewiseError(problem) from error
        self._running.setdefault(lane, [])
        self._metrics.count("gatewise_adapter_loads_total", model=version.name)
        held = self._loaded[version.key] = _Loaded(version, lane)
        return held

    def _in_place(self, version: Version, going: Sequence[_Loaded], folder: Path) -> Lane | None:
        """The lane where the adapter has replaced one of those; None where it is like none of their older half."""
        like = likeness(folder) if going else ""
        older = going[: (len(going) + 1) // 2]  # or adapters that nobody uses would stay, and those in use go in turn
        held = next((one for one in older if one.lane.alike[one.version.key] == like), None)
        if held is None or not held.lane.replace(held.version.key, folder, version.key):
            return None
        del self._loaded[held.version.key]
        return held.lane

    def _lane_for(self, version: Version) -> Lane:
        """Where an adapter of its kind is loaded."""
        if version.kind == "alone":
            return Lane(self._bare, "alone")
        if version.kind == "routed":
            return next((one for one in self._running if one.kind == "routed"), None) or Lane(self._bare, "routed")
        return self._plain

    def _unload(self, held: _Loaded) -> None:
        del self._loaded[held.version.key]
        if held.lane is not self._plain and held.lane.names == {held.version.key}:
            held.lane.clear()
            del self._running[held.lane]
        else:
            held.lane.unload(held.version.key)

    def _unload_gone(self) -> None:
        """Versions that are no longer in their folders, once nobody needs them."""
        gone = [held for held in self._loaded.values() if held.version.gone]
        if gone:
            with self._news:
                used = {one.key for one in self._waiting} | {one.key for rows in self._running.values() for one in rows}
            for held in gone:
                if held.version.key not in used:
                    try:
                        self._unload(held)
                    except Exception as error:  # what is left of it is asked for by nobody
                        _raise_if_dead(error)
                        traceback.print_exception(error, file=sys.stderr)

    # ---- rows ----

    def _enter(self, lane: Lane, batch: list[Answer]) -> None:
        now = time.monotonic()
        for one in batch:
            self._metrics.took("gatewise_queue_seconds", now - one.asked, model=one.model)
        try:
            read = lane.read([one.prompt for one in batch], [one.key for one in batch], any(one.tells_prompt for one in batch))
        except Exception as error:
            _raise_if_dead(error)
            traceback.print_exception(error, file=sys.stderr)
            for one in batch:
                self._fail(one, error)
            return
        try:
            lane.join(read)
        except Exception as error:
            self._break(lane, batch, error)
            return
        self._running[lane] += batch
        self._entering.difference_update(batch)
        for one, decided in zip(batch, read.routed, strict=True):
            self._metrics.count("gatewise_prompt_tokens_total", len(one.prompt), model=one.model)
            if decided is not None:
                self._note_routing(one, decided)
        broken: dict[int, Exception] = {}
        for place, one in enumerate(batch):
            if one.echo is not None and not one.cancelled:
                try:
                    told = () if read.everywhere is None else _told_of(read.everywhere[place], one)
                    one.tell(Piece(one.echo, told=told))
                except Exception as error:
                    broken[place] = error
        self._go_on(lane, batch, read.logits, broken)

    def _step(self, lane: Lane) -> None:
        rows = self._running[lane]
        try:
            logits = lane.step([one.tokens[-1] for one in rows])
        except Exception as error:
            self._break(lane, [], error)
            return
        self._go_on(lane, rows, logits, {})

    def _go_on(self, lane: Lane, rows: Sequence[Answer], logits: Tensor, broken: dict[int, Exception]) -> None:
        """The next token of each of some rows of a lane, by logits (n, v); those of ``broken`` end, each with its own fault."""
        unlimited: dict[int, Tensor] = {}  # where log-probabilities are told, which are the model's
        for place, one in enumerate(rows):
            if one.limit is not None and not one.cancelled:
                try:
                    if one.sampling.logprobs is not None:
                        unlimited[place] = logits[place].clone()
                    logits[place] = one.limit(one.tokens, logits[place])
                except Exception as error:
                    broken[place] = error
        try:
            best = logits.argmax(dim=-1).tolist()
            is_sound = logits.max(dim=-1).values.isfinite().tolist()  # not where there is a NaN, or nothing that may come
        except Exception as error:
            self._break(lane, [], error)
            return
        done: set[Answer] = set()
        for place, one in enumerate(rows):
            if one.cancelled:  # since its prompt's reading began, it may be: then it has no token to go on with
                self._ended(one, "cancelled")
                done.add(one)
                continue
            if place not in broken and not is_sound[place]:
                self._fail(one, NotLoadedError(f"the model {one.model!r} wrote what is no number"))
                done.add(one)
                continue
            try:
                if place in broken:
                    raise broken[place]
                if self._next(one, best[place], logits[place], unlimited.get(place, logits[place])):
                    done.add(one)
            except Exception as error:
                if _is_dead(error):  # nobody is told again that has the whole answer
                    self._running[lane] = [other for other in self._running[lane] if other not in done]
                    raise
                traceback.print_exception(error, file=sys.stderr)
                self._fail(one, error)
                done.add(one)
        if done:
            self._keep(lane, [place for place, one in enumerate(self._running[lane]) if one not in done])

    def _next(self, one: Answer, best: int, logits: Tensor, unlimited: Tensor) -> bool:
        """Chooses a token by logits (v) and gives it out; whether it was the last."""
        sampling = one.sampling
        if sampling.max_tokens == 0:
            self._ended(one, "length")
            one.tell(Piece(finish="length"))
            return True
        token = best if sampling.temperature < _GREEDY else _drawn(logits.cpu(), sampling, one.generator)
        told = () if sampling.logprobs is None else (_told(unlimited, token, sampling.logprobs),)
        return self._write(one, token, told)

    def _write(self, one: Answer, token: int, told: tuple[Told, ...]) -> bool:
        """Gives out a token; whether it was the last."""
        one.tokens.append(token)
        if len(one.tokens) == 1:
            self._metrics.took("gatewise_first_token_seconds", time.monotonic() - one.asked, model=one.model)
        self._metrics.count("gatewise_generated_tokens_total", model=one.model)
        is_end = token in self._ends and not one.sampling.ignore_eos
        text = "" if is_end else one.writing.add(token)
        finish = "stop" if is_end or one.writing.stopped else "length" if len(one.tokens) >= one.sampling.max_tokens else None
        if finish is not None:
            if not one.writing.stopped:
                text += one.writing.end()
                finish = "stop" if one.writing.stopped else finish
            self._ended(one, finish)
        one.tell(Piece(text, 1, told, finish))
        return finish is not None

    def _keep(self, lane: Lane, places: list[int]) -> None:
        rows = self._running[lane]
        self._running[lane] = [rows[place] for place in places]
        try:
            lane.keep(places)
        except Exception as error:
            self._break(lane, [], error)

    def _break(self, lane: Lane, more: Sequence[Answer], error: Exception) -> None:
        """A fault of ours, or no memory: all rows of the lane end with it, and the lane goes on empty."""
        _raise_if_dead(error)
        traceback.print_exception(error, file=sys.stderr)
        rows, self._running[lane] = self._running[lane], []
        lane.clear()
        for one in (*rows, *more):
            self._fail(one, error)

    def _fail(self, one: Answer, problem: Exception) -> None:
        self._entering.discard(one)
        if not one.cancelled:
            self._ended(one, "refused" if isinstance(problem, BusyError | ReplacedError) else "failed")
            one.tell(Piece(problem=problem))

    def _ended(self, one: Answer, how: str) -> None:
        self._metrics.count("gatewise_requests_total", model=one.model, how=how)
        self._metrics.took("gatewise_request_seconds", time.monotonic() - one.asked, model=one.model)

    def _note_routing(self, one: Answer, routed: Routed) -> None:
        for layer, modules in routed.kept.items():
            self._metrics.count("gatewise_routed_prompts_total", model=one.model, layer=layer)
            for module, is_kept in modules.items():
                self._metrics.count("gatewise_routing_kept_total", int(is_kept), model=one.model, layer=layer, module=module)


def _is_passing(error: BaseException | None) -> bool:
    """Whether what was not loaded may be loaded later. Of a processor's memory PyTorch has no error of its own."""
    return isinstance(error, _PASSING) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _is_dead(error: BaseException | None) -> bool:
    """Whether the device computes nothing more: after such a fault every call to it fails until the process ends.

    A want of memory passes. For faults in cuBLAS PyTorch has no error of its own.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return isinstance(error, GatewiseError) and _is_dead(error.__cause__)
    said = str(error)
    if any(one in said for one in _NO_MEMORY):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in said


def _raise_if_dead(error: Exception) -> None:
    """Ends the engine where it could only fail everybody: its end is seen from outside, and whatever started it starts it again."""
    if _is_dead(error):
        raise error


def _drawn(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token of logits (v,)."""
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(descending=True)
        is_out = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        is_out[0] = False  # or no token would be in where top_p is zero in this precision
        probabilities = torch.zeros_like(probabilities).scatter(0, places, ordered.masked_fill(is_out, 0.0))
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _told(logits: Tensor, token: int, count: int) -> Told:
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(min(count, len(logprobs))) if count else None
    pairs = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Told(token, float(logprobs[token]), pairs)


def _told_of(logits: Tensor, answer: Answer) -> tuple[Told, ...]:
    """Of the tokens of a prompt, by logits (t, v) of which the last belong to it; nothing if it was not asked for."""
    count, ids = answer.sampling.logprobs, answer.prompt
    if count is None:
        return ()
    told = [Told(ids[0], None, ())]
    for start, part in enumerate(logits[-len(ids) : -1].split(64)):  # in float32 they would take as much memory again, or twice
        tokens = ids[1 + 64 * start :][: len(part)]
        told += [_told(row, token, count) for row, token in zip(part.float(), tokens, strict=True)]
    return tuple(told)


def _by_model(answers: Sequence[Answer]) -> dict[tuple[tuple[str, str], ...], float]:
    counts: dict[tuple[tuple[str, str], ...], float] = {}
    for one in answers:
        labels = (("model", one.model),)
        counts[labels] = counts.get(labels, 0) + 1
    return counts
