"""Carries out a comparison: finds each arm's learning rate on rows taken out of training, then runs seeds that tuned nothing.

What it leaves in its folder:

    plan.json                the arms with their recipes, and how many rates and seeds: what the folder is for
    runs/ARM/RATE-SEED.json  what a finished run came to, whole or not at all
    adapters/ARM/SEED/       the adapters of the seeds, with ``keep_adapters``
    work/                    runs under way, and the locks of the processes that do them
    compare.json             what came out, and compare.png

Which runs are left to do follows from those that are there: a comparison that was stopped goes on, and several processes may share
a folder. A run belongs to the process that holds its lock, which the system lets go of when the process ends, however it ends.
"""

import gc
import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from gatewise.comparing.arms import Arm, arms_of
from gatewise.comparing.forgetting import forgotten
from gatewise.comparing.rates import FIRST_SEED, Score, Trial, best_rate, rate_at
from gatewise.comparing.report import draw, outlook, report
from gatewise.errors import DivergedError, GatewiseError
from gatewise.files import finite, write_json
from gatewise.models.device import machine
from gatewise.progress import ConsoleProgress, quiet
from gatewise.runs.dry_run import duration, ready, timed_step
from gatewise.runs.launch import is_launched
from gatewise.runs.recipe import Recipe, by_key
from gatewise.runs.run import METRICS, train, what_is_kept

PLAN, RUNS, WORK, ADAPTERS, RESULT, PICTURE = "plan.json", "runs", "work", "adapters", "compare.json", "compare.png"
MOST_TUNING, LEAST_TUNING = 500, 32
_FREE_TO_CHANGE: Any = {"device": True, "launch": True, "training": {"log_every", "eval_batch_size"}}
_SILENT = Console(quiet=True)
_ALWAYS = ("arm", "learning_rate", "seed", "for", "metric", "machine", "whole_seconds")


def compare(
    recipe: str | Path,
    methods: Sequence[str],
    output: str | Path,
    *,
    seeds: int = 5,
    rates: int = 5,
    overrides: Sequence[str] = (),
    budget_minutes: float | None = None,
    keep_adapters: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compares methods on the rows of a recipe, each at the learning rate that suits it.

    Args:
        recipe: a recipe file. Its model, rows and training are those of all arms; its learning rate is where the search begins.
        methods: names of methods, controls, or recipe files. The others are compared with the first.
        output: a folder. With the same call again, or in several processes at once, what is left to do in it is done.
        seeds: final runs of each arm, with seeds that tuned nothing.
        rates: learning rates of each arm to begin with; one takes the recipe's own.
        overrides: changes of the recipe, such as ``"training.max_steps=100"``.
        budget_minutes: no run begins that would not end within it.
        keep_adapters: keep the adapters of the final runs.
        console: where progress is shown; stderr by default.

    Returns:
        What ``compare.json`` holds.

    Raises:
        GatewiseError: anything in recipe, data or folder that a user can put right.
    """
    console, output = console or Console(stderr=True), Path(output)
    deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    if not 1 <= seeds <= FIRST_SEED or rates < 1:
        raise GatewiseError(f"seeds is {seeds} and rates {rates}: expected 1 to {FIRST_SEED} seeds, and at least 1 rate")
    if is_launched():
        raise GatewiseError("compare trains in one process: start it by itself; several processes may share its folder")
    progress = ConsoleProgress(console)
    with quiet(bars=True):
        arms = arms_of(Path(recipe), methods, overrides, progress.say)
    task = arms[0].recipe.parts()[0]
    task.read(None)
    tuning = arms[0].recipe.data.tuning
    if rates > 1 and tuning is None:
        count = len(task.train)
        tuning = min(MOST_TUNING, max(LEAST_TUNING, count // 10), count // 4)
    arms = [_one_of_many(arm, tuning) for arm in arms]
    metric = task.metrics[0] if task.metrics else "loss"
    comparison = _Comparison(
        arms,
        seeds,
        rates,
        metric,
        lower_is_better=metric in ("loss", *task.lower_is_better),
        rows=len(task.measured.get("test", task.measured["dev"])),
        output=output,
        progress=progress,
        deadline=deadline,
        keep_adapters=keep_adapters,
    )
    comparison.agree()
    comparison.tell()
    try:
        comparison.work()
    except KeyboardInterrupt:
        comparison.report()
        raise
    return comparison.report()


def _one_of_many(arm: Arm, tuning: int | None) -> Arm:
    """The arm with rows to tune on, and without what is not for a run that is one of many.

    Raises:
        GatewiseError: its runs would need several processes.
    """
    recipe = arm.recipe
    if recipe.launch.processes > 1:
        raise GatewiseError(
            f"{arm.name}: launch.processes is {recipe.launch.processes}, but compare trains each run in one process: leave it out, "
            "and start the same command several times to share the work"
        )
    changes = {
        "push_to_hub": None,
        "seed": 0,
        "data": recipe.data.model_copy(update={"tuning": tuning}),
        "training": recipe.training.model_copy(update={"report_to": []}),
    }
    return replace(arm, recipe=recipe.model_copy(update=changes))


@dataclass(frozen=True)
class _Run:
    """One run of an arm: of its search for a rate, or of its final seeds."""

    arm: Arm
    rate: float
    seed: int

    @property
    def is_final(self) -> bool:
        return self.seed < FIRST_SEED

    @property
    def name(self) -> str:
        return f"{self.arm.name}/{self.rate:.3g}-{self.seed}"

    @property
    def recipe(self) -> Recipe:
        training = self.arm.recipe.training.model_copy(update={"learning_rate": self.rate})
        return self.arm.recipe.model_copy(update={"seed": self.seed, "training": training})


@dataclass
class _Comparison:
    arms: list[Arm]
    seeds: int
    rates: int
    metric: str
    lower_is_better: bool
    rows: int
    output: Path
    progress: ConsoleProgress
    deadline: float | None
    keep_adapters: bool

    def __post_init__(self) -> None:
        self._found: dict[Path, dict[str, Any]] = {}
        self._tried: dict[str, float] = {}

    # The plan -----------------------------------------------------------------------------------------------------------

    def agree(self) -> None:
        """Writes what the folder is for, or checks that it is for this.

        Raises:
            GatewiseError: it is for another comparison.
        """
        plan = {
            "seeds": self.seeds,
            "rates": self.rates,
            "files": _fingerprints(self.arms[0].recipe),
            "arms": {arm.name: arm.recipe.model_dump(mode="json", exclude=_FREE_TO_CHANGE) for arm in self.arms},
        }
        path, self._plan = self.output / PLAN, json.loads(json.dumps(plan))
        others = GatewiseError(f"{self.output} is not empty and holds no comparison: give another folder")
        try:
            there = {one.name for one in self.output.iterdir()} if self.output.exists() else set()
            if there and not there & {PLAN, WORK}:
                raise others
            (self.output / WORK).mkdir(parents=True, exist_ok=True)
            with self._planning():
                if path.is_file():
                    before = _read(path, plan)
                    given = {arm.name: arm.recipe.model_dump(mode="json", exclude_defaults=True) for arm in self.arms}
                    if problems := list(_at_odds(before, self._plan, given, self._begun(before["arms"]))):
                        raise GatewiseError(
                            f"{self.output} holds another comparison: {'; '.join(problems[:5])}. Give another folder, or the "
                            "same settings; only arms, seeds and rates may be added, and arms without a finished run changed"
                        )
                elif any(one.name != WORK for one in self.output.iterdir()):
                    raise others
                write_json(path, plan)
        except OSError as error:
            raise GatewiseError(f"{self.output} cannot be written ({error.strerror or error}): give another folder") from error

    def _planning(self) -> FileLock:
        """Held while the plan is changed, and while a run is claimed by it."""
        return FileLock(self.output / WORK / "plan.lock")

    def _begun(self, names: Iterable[str]) -> set[str]:
        """The arms that have a finished run, or one that a process is making."""

        def is_held(path: Path) -> bool:
            try:
                FileLock(path).acquire(timeout=0).lock.release()
            except Timeout:
                return True
            return False

        finished = {name for name in names if any((self.output / RUNS / name).glob("*.json"))}
        return finished | {name for name in names if any(map(is_held, (self.output / WORK / name).glob("*.lock")))}

    def tell(self) -> None:
        """Says what will be done, and how long it takes."""
        say = self.progress.say
        for arm in self.arms:
            grid = f"{self.rates} learning rates around {arm.recipe.training.learning_rate:g}" if self.rates > 1 else "one rate"
            say(f"{arm.name}: {arm.parameters:,} parameters, {grid}, then {self.seeds} seeds; {self._left(arm)} runs left")
            for line in arm.told:
                say(f"{arm.name} {line}")
        training = self.arms[0].recipe.training
        if training.load_best or training.early_stopping_patience is not None:
            say("the final runs go by dev while they train (load_best, early_stopping_patience): only test is a fair measure then")
        self._tell_outlook()
        if self.keep_adapters:
            kept = {(path.parent.name, path.name) for path in (self.output / ADAPTERS).glob("*/*")}
            finished = {(one["arm"], str(one["seed"])) for one in self._finished() if one["for"] == "seed" and "metrics" in one}
            if lost := len(finished - kept):
                say(f"adapters of finished runs that were not kept: {lost}; to have them, remove the files of these runs")
        for work in (self.output / WORK).glob("*/*"):  # of a process that was killed when its run was finished
            if (self.output / RUNS / work.parent.name / f"{work.name}.json").is_file():
                shutil.rmtree(work, ignore_errors=True)
        if not self._to_do()[0]:
            return
        for arm in self.arms:  # what cannot be trained is refused before anything is
            if not self._seconds(arm):
                # All have the same rows: what there is to tell of them is told once.
                progress = ConsoleProgress(_SILENT) if self._tried else self.progress
                self._tried[arm.name] = _tried(arm, self.output, progress)
        left, seconds = self._to_do()
        more = ", more where a best rate is at the edge" if self.rates > 1 else ""
        say(f"{left} runs left{more}: about {duration(seconds)} in one process")

    def _tell_outlook(self) -> None:
        """Says how large a difference has to be to be found."""
        if found := outlook(self._finished(), self._arms(), self.rows, self.seeds, lower_is_better=self.lower_is_better):
            self.progress.say(found)

    # What is left to do -------------------------------------------------------------------------------------------------

    def result(self, run: _Run) -> dict[str, Any] | None:
        """What a run came to, or None where it is not finished."""
        path = self.output / RUNS / f"{run.name}.json"
        return self._read(path) if path in self._found or path.is_file() else None

    def _read(self, path: Path) -> dict[str, Any]:
        """What the run of a file came to. A finished run does not change, so its file is read once."""
        if path not in self._found:
            self._found[path] = _result(path)
        return self._found[path]

    def _trial(self, arm: Arm, trial: Trial) -> _Run:
        step, seed = trial
        return _Run(arm, rate_at(arm.recipe.training.learning_rate, step), seed)

    def _score(self, arm: Arm, trial: Trial) -> Score | None:
        result = self.result(self._trial(arm, trial))
        return None if result is None else _score(result, self.lower_is_better)

    def _finals(self, arm: Arm, step: int) -> list[_Run]:
        return [self._trial(arm, (step, seed)) for seed in range(self.seeds)]

    def _wanted(self) -> list[_Run]:
        """The runs that can be made now, in order: rates first, then seed by seed, so that there are pairs whenever it stops."""
        tuning: list[_Run] = []
        finals: list[_Run] = []
        for arm in self.arms:
            trials, step = best_rate(self.rates, partial(self._score, arm))
            tuning += [self._trial(arm, trial) for trial in trials]
            finals += [] if step is None else self._finals(arm, step)
        return [run for run in (*tuning, *sorted(finals, key=lambda run: run.seed)) if self.result(run) is None]

    def _left(self, arm: Arm) -> int:
        """How many runs an arm has left, if its grid does not grow."""
        imagined: dict[Trial, Score] = {}

        def score(trial: Trial) -> Score | None:
            return self._score(arm, trial) or imagined.get(trial)

        while True:
            trials, step = best_rate(self.rates, score)
            if step is not None:
                return len(imagined) + sum(self.result(run) is None for run in self._finals(arm, step))
            within = range(1 - self.rates // 2, (self.rates - 1) // 2)
            imagined |= {trial: (1e9 if trial[0] in within else -1e9, -abs(trial[0])) for trial in trials}

    def _to_do(self) -> tuple[int, float]:
        """How many runs are left, and about how many seconds they take one after the other."""
        left = [self._left(arm) for arm in self.arms]
        return sum(left), sum(count * self._takes(arm) for arm, count in zip(self.arms, left, strict=True))

    def _seconds(self, arm: Arm) -> list[float]:
        """What finished runs of an arm took."""
        return [one["whole_seconds"] for one in self._found.values() if one["arm"] == arm.name and one["whole_seconds"] is not None]

    def _takes(self, arm: Arm, of: Callable[[list[float]], float] = statistics.median) -> float:
        """What a run of an arm takes, by those that are finished, or by steps that were tried."""
        known = self._seconds(arm)
        return of(known) if known else self._tried.get(arm.name, 0.0)

    # The runs -----------------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Makes the runs that are left, and waits for those that other processes do, as long as there is time."""
        waits = False
        while wanted := self._wanted():
            rest = math.inf if self.deadline is None else self.deadline - time.monotonic()
            in_time = [run for run in wanted if self._takes(run.arm, max) < rest]
            if not in_time:
                break
            for run in in_time:
                with self._claimed(run) as is_free:
                    if is_free:
                        waits = False
                        self._make(run)
                        break
            else:
                if not waits:
                    self.progress.say("waiting for runs that other processes do")
                waits = True
                time.sleep(0.5)

    @contextmanager
    def _claimed(self, run: _Run) -> Iterator[bool]:
        """Whether the run is this process's to make. Asked of the folder once it is claimed: another may have ended it just now.

        Raises:
            GatewiseError: meanwhile the rows have changed, or the arm in the plan.
        """
        path = self.output / WORK / f"{run.name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        with self._planning():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                is_free = False
            else:
                is_free = True
                one = _read(self.output / PLAN, self._plan)["arms"].get(run.arm.name, {"method": None})
                before, now = by_key(one), by_key(self._plan["arms"][run.arm.name])
                if any(before[key] != now[key] for key in before.keys() & now.keys()):
                    lock.release()
                    raise GatewiseError(
                        f"{run.arm.name} is no longer in the plan of {self.output} as it was: another process changed it"
                    )
        if not is_free:
            yield False
            return
        try:
            if _fingerprints(run.recipe) != self._plan["files"]:
                raise GatewiseError(
                    f"the files of data are not those that the comparison in {self.output} began with: put them back, or give "
                    "another folder"
                )
            yield self.result(run) is None
        finally:
            lock.release()

    def _make(self, run: _Run) -> None:
        """Trains, measures, and writes what came of it. A run that was interrupted goes on from its last checkpoint."""
        work, begun = self.output / WORK / run.name, time.monotonic()
        if (work / METRICS).is_file() or what_is_kept(work, run.recipe.parts()[1]) is None:
            shutil.rmtree(work, ignore_errors=True)
        _make_room()
        resumed, measured = work.is_dir(), ("dev", "test") if run.is_final else ("tuning",)
        self.progress.say(f"{run.arm.name} at {run.rate:.3g}, seed {run.seed}{', from its last checkpoint' if resumed else ''}")
        result: dict[str, Any] = {
            "arm": run.arm.name,
            "learning_rate": run.rate,
            "seed": run.seed,
            "for": "seed" if run.is_final else "rate",
            "metric": self.metric,
            "machine": machine(run.recipe.device),
        }
        try:
            done = train(run.recipe, work, resume=resumed, console=_SILENT, measured=measured, before=False)
        except DivergedError as error:
            result["diverged"], told = True, f"diverged: {error}"
        except GatewiseError:
            if not resumed:
                raise
            # What was left of it is of another version, or damaged. If it cannot be made anew either, that is not why.
            aside = work.with_name(f"{work.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            if work.is_dir():
                work.rename(aside)
            try:
                self._make(run)
            except GatewiseError:
                if aside.is_dir():
                    shutil.rmtree(work, ignore_errors=True)
                    aside.rename(work)
                raise
            shutil.rmtree(aside, ignore_errors=True)
            return
        else:
            metrics = {name: both["after"] for name, both in done.metrics.items()}
            told = ", ".join(f"{name} {self.metric} {one[self.metric]:.4f}" for name, one in metrics.items())
            result |= {
                "metrics": metrics,
                "rows": done.rows,
                "parameters": done.parameters["adapter"],
                "peak_memory": done.peak_memory,
                "steps": done.steps,
                "seconds": round(done.seconds["total"] - done.seconds["evaluation"], 1),
            }
            if run.is_final:
                _make_room()
                try:
                    result["forgotten"] = forgotten(done.adapter, device=run.recipe.device)
                except (GatewiseError, torch.OutOfMemoryError) as error:  # the run is whole without it
                    self.progress.say(f"warning: what was forgotten could not be measured: {error}")
            if run.is_final and self.keep_adapters:
                kept = self.output / ADAPTERS / run.arm.name / str(run.seed)
                shutil.rmtree(kept, ignore_errors=True)
                kept.parent.mkdir(parents=True, exist_ok=True)
                done.adapter.rename(kept)
        result["whole_seconds"] = round(time.monotonic() - begun, 1)
        if resumed:  # only a part of it was made here
            result["seconds"] = result["whole_seconds"] = None
        write_json(self.output / RUNS / f"{run.name}.json", finite(result))
        shutil.rmtree(work, ignore_errors=True)
        left, seconds = self._to_do()
        self.progress.say(f"  {told}; {left} left, about {duration(seconds)}" if left else f"  {told}")
        if not run.is_final and all(arm["learning_rate"] for arm in self._arms()):
            self._tell_outlook()

    # What came out ------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Writes ``compare.json``, and draws ``compare.png`` where rates were tried. Returns what the first holds."""
        missing, _ = self._to_do()
        content = report(self._finished(), self._arms(), lower_is_better=self.lower_is_better, missing=missing)
        plan = _read(self.output / PLAN, self._plan)
        if (plan["seeds"], plan["rates"], len(plan["arms"])) != (self.seeds, self.rates, len(self.arms)):
            self.progress.say(f"another process has added to the comparison: {RESULT} is left to it")
            return content
        write_json(self.output / RESULT, finite(content))
        if not any(arm["rates"] for arm in content["arms"]):
            return content
        try:
            draw(content, self.output / PICTURE)
        except GatewiseError as error:  # there is no matplotlib
            self.progress.say(f"warning: no {PICTURE}: {error}")
        return content

    def _finished(self) -> list[dict[str, Any]]:
        """What the finished runs of all arms came to."""
        paths = [path for arm in self.arms for path in sorted((self.output / RUNS / arm.name).glob("*.json"))]
        return [self._read(path) for path in paths]

    def _arms(self) -> list[dict[str, Any]]:
        """The arms, with the rates that were found for them."""
        told = []
        for arm in self.arms:
            own, (_, step) = arm.recipe.training.learning_rate, best_rate(self.rates, partial(self._score, arm))
            rate = None if step is None else rate_at(own, step)
            told.append({"name": arm.name, "parameters": arm.parameters, "learning_rate": rate, "recipe_rate": own})
        return told


def _make_room() -> None:
    """Gives back the memory of the last model: models are in cycles, and the next one wants their place."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _result(path: Path) -> dict[str, Any]:
    """What the run that a file is named after came to."""
    found = _read(path, _ALWAYS)
    if (found["arm"], f"{found['learning_rate']:.3g}-{found['seed']}") != (path.parent.name, path.stem):
        raise GatewiseError(f"{path} has another name than its run: remove it if it is a copy")
    return found


def _read(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Reads a file that a comparison wrote.

    Raises:
        GatewiseError: it is not whole.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        again = "give another folder" if path.name == PLAN else "remove it, and the same command makes the run again"
        raise GatewiseError(f"{path} is damaged: {again}")
    return found


def _score(result: Mapping[str, Any], lower_is_better: bool) -> Score:
    """How good the run of a rate was on the tuning rows; of equals, the one with the smaller loss. One that diverged is worst."""
    if result.get("diverged"):
        return -math.inf, -math.inf
    metrics, name = result["metrics"]["tuning"], result["metric"]
    signs = ((name, -1 if lower_is_better else 1), ("loss", -1))
    value, loss = (-math.inf if metrics.get(key) is None else sign * metrics[key] for key, sign in signs)
    return value, loss


def _fingerprints(recipe: Recipe) -> dict[str, str]:
    """Of the files that the rows come from."""
    files = {key: Path(str(getattr(recipe.data, key))) for key in ("train", "dev", "test")}
    return {f"data.{key}": hashlib.sha256(path.read_bytes()).hexdigest() for key, path in files.items() if path.is_file()}


def _at_odds(before: Mapping[str, Any], now: Mapping[str, Any], given: Mapping[str, Any], begun: set[str]) -> Iterator[str]:
    """Why one plan does not go on with another: only arms, seeds and rates may be added, and arms that have not begun changed.

    Args:
        given: what is no default in the recipes. Another version of gatewise may have written a plan without keys of this one, or
            with others.
    """
    if not begun:
        return
    for name in ("seeds", "rates"):
        if now[name] < before[name]:
            yield f"{name} was {before[name]}, now {now[name]}"
    for key in before["files"].keys() | now["files"].keys():
        if before["files"].get(key) != now["files"].get(key):
            yield f"the rows of {key} are others"
    if next(iter(before["arms"])) != next(iter(now["arms"])):
        yield f"the first arm was {next(iter(before['arms']))}, now {next(iter(now['arms']))}"
    for arm, recipe in before["arms"].items():
        if arm not in begun:
            continue
        if arm not in now["arms"]:
            yield f"arm {arm} was there, now it is not"
            continue
        one, other, own = by_key(recipe), by_key(now["arms"][arm]), by_key(given[arm])
        for key in other:
            if (key in one or key in own) and one.get(key) != other[key]:
                yield f"{key} of {arm} was {one.get(key)!r}, now {other[key]!r}"


def _tried(arm: Arm, output: Path, progress: ConsoleProgress) -> float:
    """About the seconds of one run: of loading, and of a step that is tried; measuring a row is half of training with it.

    Raises:
        GatewiseError: the arm cannot be trained.
    """
    _make_room()
    begun, recipe = time.monotonic(), arm.recipe
    with quiet(bars=True):
        try:
            run, method = ready(recipe, output, progress)
        except GatewiseError as error:
            raise GatewiseError(f"arm {arm.name}: {error}") from error
        loading = time.monotonic() - begun
        step, usual, _ = timed_step(run, method)
    rows = sum(len(run.task.measured[part]) for part in ("dev", "test") if part in run.task.measured)
    return loading + step * (run.steps + 0.5 * rows / len(usual) / recipe.training.gradient_accumulation)
