"""Carries out a comparison: finds each arm's learning rate on rows taken out of training, then runs seeds that tuned nothing.

What it leaves in its folder:

    plan.json                the arms with their recipes, and how many rates and seeds: what the folder is for
    runs/ARM/RATE-SEED.json  what a finished run came to, whole or not at all
    adapters/ARM/RATE-SEED/  the adapters of the seeds, with ``keep_adapters``
    work/                    runs under way, and the locks of the processes that do them
    compare.json             what came out, and compare.png

Which runs are left to do follows from those that are there: a comparison that was stopped goes on, and several processes may share
a folder. A run belongs to the process that holds its lock, which the system lets go of when the process ends, however it ends.
"""

import gc
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from gatewise.comparing.arms import Arm, arms_of, same_answers, same_size
from gatewise.comparing.forgetting import forgotten
from gatewise.comparing.rates import FIRST_SEED, Score, Trial, best_rate, rate_at, runs_of_search
from gatewise.comparing.report import draw, outlook, report
from gatewise.errors import DivergedError, GatewiseError
from gatewise.files import check_new_file, finite, whole_folder, write_json
from gatewise.models.device import machine
from gatewise.parts import METHODS
from gatewise.progress import ConsoleProgress, quiet
from gatewise.runs.dry_run import duration, ready, timed_step
from gatewise.runs.launch import is_launched
from gatewise.runs.recipe import Recipe, by_key, checked
from gatewise.runs.run import train
from gatewise.tasks.records import files_of_source
from gatewise.tasks.splitting import set_aside

PLAN, RUNS, WORK, ADAPTERS, RESULT, PICTURE = "plan.json", "runs", "work", "adapters", "compare.json", "compare.png"
MOST_TUNING, LEAST_TUNING = 500, 32
_FREE_TO_CHANGE: Any = {"device": True, "launch": True, "training": {"log_every", "eval_batch_size"}}
_SILENT = Console(quiet=True)
_AGAIN, _NO_PLAN = "remove it, and give the same command again", "put it back, or give another folder"
_OF_A_RUN = ("arm", "learning_rate", "seed", "for", "metric", "machine", "whole_seconds")


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
    output, progress = Path(output), ConsoleProgress(console or Console(stderr=True))
    deadline = time.monotonic() + (math.inf if budget_minutes is None else 60 * budget_minutes)
    if not methods or rates < 1 or not 1 <= seeds <= FIRST_SEED:
        raise GatewiseError(
            f"expected methods, 1 or more rates and 1 to {FIRST_SEED} seeds, got {len(methods)}, {rates} and {seeds}"
        )
    if is_launched():
        raise GatewiseError("compare trains in one process: start it by itself; several processes may share its folder")
    arms = arms_of(recipe, methods, overrides)
    if (processes := arms[0].recipe.launch.processes) > 1:
        raise GatewiseError(
            f"launch.processes is {processes}, but compare trains each run in one process: leave it out, and start the same "
            "command several times to share the work"
        )
    progress.say("counting what each arm stores")
    with quiet(bars=True):
        arms = same_size(arms)
    task = arms[0].recipe.parts()[0]
    task.read(None)
    if getattr(task.train, "kind", None) == "chat":
        arms = same_answers(arms)
    tuning = arms[0].recipe.data.tuning
    if rates > 1 and tuning is None:
        tuning = min(MOST_TUNING, max(LEAST_TUNING, len(task.train) // 10), len(task.train) // 4)
    metric = task.metrics[0] if task.metrics else "loss"
    kept, taken = set_aside(task.units(task.train), task.asks(task.train), tuning or 0)
    comparison = _Comparison(
        [_one_of_many(arm, tuning, len(kept)) for arm in arms],
        seeds,
        rates,
        metric,
        lower_is_better=metric in ("loss", *task.lower_is_better),
        rows=len(task.measured.get("test", task.measured["dev"])),
        tuned=len(taken),
        trained=len(kept),
        measured=sum(map(len, task.measured.values())),
        files=_fingerprints(arms[0].recipe),
        output=output,
        progress=progress,
        keep_adapters=keep_adapters,
    )
    comparison.agree()
    comparison.look_ahead()
    comparison.work(deadline, is_short=bool(budget_minutes))
    return comparison.report()


def _one_of_many(arm: Arm, tuning: int | None, trained: int) -> Arm:
    """The arm with rows to tune on, and without what is not for a run that is one of many. Its own stage is told of."""
    method = METHODS[arm.recipe.method](arm.recipe)
    more = method.stage_steps(trained)
    told = (*arm.told, f"has a {method.stage} of {more:,} steps before its training") if more else arm.told
    if tuning is None and (arm.recipe.training.load_best or arm.recipe.training.early_stopping_patience is not None):
        told = (*told, "ends where it is best on dev, and is better there than on other rows: give data.tuning rows to choose by")
    data = arm.recipe.data.model_copy(update={"tuning": tuning})
    training = arm.recipe.training.model_copy(update={"report_to": []})
    changes = {"push_to_hub": None, "seed": 0, "data": data, "training": training}
    return replace(arm, recipe=arm.recipe.model_copy(update=changes), told=told)


@dataclass(frozen=True)
class _Run:
    """One run of an arm: of its search for a rate, or of its final seeds. ``step`` is on the grid of rates."""

    arm: Arm
    step: int
    seed: int

    @property
    def is_final(self) -> bool:
        return self.seed < FIRST_SEED

    @property
    def rate(self) -> float:
        return rate_at(self.arm.recipe.training.learning_rate, self.step)

    @property
    def name(self) -> str:
        return f"{self.arm.name}/{self.rate:.3g}-{self.seed}"

    @property
    def recipe(self) -> Recipe:
        training = self.arm.recipe.training.model_copy(update={"learning_rate": self.rate})
        return self.arm.recipe.model_copy(update={"seed": self.seed, "training": training})


@dataclass
class _Comparison:
    """A comparison, as one of the processes that share its folder sees it.

    Attributes:
        rows: how many there are to tell by, of test or dev.
        tuned, trained: rows that are taken out to tune on, and the others of train, held-out ones among them.
        measured: rows that final runs are measured on, of dev and test.
        files: fingerprints of the files that the rows come from, when this process began.
        found: what finished runs came to, by name.
        tried: seconds of a run of each arm that has no finished one, by steps that were tried.
    """

    arms: list[Arm]
    seeds: int
    rates: int
    metric: str
    lower_is_better: bool
    rows: int
    tuned: int
    trained: int
    measured: int
    files: dict[str, str]
    output: Path
    progress: ConsoleProgress
    keep_adapters: bool
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    tried: dict[str, float] = field(default_factory=dict)

    # The plan -----------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> dict[str, Any]:
        """What the folder is for."""
        arms = {arm.name: _fixed(arm.recipe) for arm in self.arms}
        return {"seeds": self.seeds, "rates": self.rates, "files": self.files, "arms": arms}

    def agree(self) -> None:
        """Writes the plan. Arms of an earlier one stay in it: another process may be making their first run.

        Raises:
            GatewiseError: the folder is for another comparison or for something else, or nothing says what its runs are of.
        """
        there = {one.name for one in self.output.iterdir()} if self.output.is_dir() else set()
        if there and not there & {PLAN, WORK}:
            raise GatewiseError(f"{self.output} is not empty and holds no comparison: give another folder")
        check_new_file(self.output / WORK / PLAN)  # there, so that no process sees a folder with something else alone
        with self._lock("plan"):
            begun = {run.parent.name for run in (self.output / RUNS).glob("*/*.json")}
            is_planned = (self.output / PLAN).is_file()
            if begun and not is_planned:
                raise GatewiseError(f"{self.output} has runs and no {PLAN}, which says of what they are: {_NO_PLAN}")
            arms = self._check(begun) if is_planned else {}
            write_json(self.output / PLAN, {**self.plan, "arms": arms | self.plan["arms"]})

    def _check(self, begun: Collection[str]) -> dict[str, Any]:
        """Returns the arms of the plan in the folder.

        Raises:
            GatewiseError: its rows, or its arms of those that have begun, are others.
        """
        before, plan = _read(self.output / PLAN, self.plan, _NO_PLAN if begun else _AGAIN), self.plan
        changed = []
        if begun:
            all_files = before["files"], self.files, _fingerprints(self.arms[0].recipe)
            keys = {key: None for files in all_files for key in files}
            changed = [f"the rows of {key} are others" for key in keys if len({files.get(key) for files in all_files}) > 1]
        for arm in [arm for arm in plan["arms"] if arm in begun and arm in before["arms"]]:
            was = by_key(_fixed(checked(before["arms"][arm], PLAN)))  # with defaults for keys that an older version had not
            mine = {key: value for key, value in by_key(plan["arms"][arm]).items() if key not in self.files}  # wherever they lie
            changed += [f"{key} of {arm} was {was.get(key)!r}, now {mine[key]!r}" for key in mine if was.get(key) != mine[key]]
        if changed:
            raise GatewiseError(
                f"{self.output} holds another comparison: {'; '.join(changed[:5])}. Put that back (sizes are those of the first of "
                "--methods, and --rates 1 takes out no rows to tune on), or give another folder: only arms without a finished run "
                "may change"
            )
        return before["arms"]

    def _lock(self, name: str) -> FileLock:
        """Of the plan, or of a run. The system lets go of it when its process ends, however it ends."""
        path = self.output / WORK / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def look_ahead(self) -> None:
        """Says what will be done and how long it takes, and tries what has not run yet.

        Raises:
            GatewiseError: an arm cannot be trained, of which none is then.
        """
        self._look()
        for name in self.found:  # left by a process that was killed when its run was finished
            shutil.rmtree(self.output / WORK / name, ignore_errors=True)
        for arm in self.arms:
            for line in (f"has {arm.parameters:,} parameters", *arm.told):
                self.progress.say(f"{arm.name} {line}")
        finals = [run for arm in self.arms for run in self._search(arm)[1] if "metrics" in self.found.get(run.name, {})]
        lost = [run for run in finals if not self._kept(run).is_dir()]
        if self.keep_adapters and lost:
            self.progress.say(f"{len(lost)} finished runs kept no adapter: remove their files in {RUNS} to have them made again")
        self._tell_outlook()
        if not self._wanted():
            return
        for arm in self.arms:
            # All have the same rows: what there is to tell of them is told once.
            if self._takes(arm, is_final=self.rates == 1) is None:
                self.tried[arm.name] = _tried(arm, self.output, ConsoleProgress(_SILENT) if self.tried else self.progress)
        more = ", more where a best rate is at the edge" if self.rates > 1 else ""
        self.progress.say(f"{self._what_is_left()}{more}")

    def _tell_outlook(self) -> None:
        """Says how large a difference has to be to be found."""
        if line := outlook([*self.found.values()], self._arms(), self.rows, self.seeds, lower_is_better=self.lower_is_better):
            self.progress.say(line)

    # What is left to do -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Reads what this or another process has finished since."""
        for path in sorted((self.output / RUNS).glob("*/*.json")):
            name = f"{path.parent.name}/{path.stem}"
            if name not in self.found:
                found = _read(path, _OF_A_RUN)
                if name != f"{found['arm']}/{found['learning_rate']:.3g}-{found['seed']}":
                    raise GatewiseError(f"{path} has another name than its run: remove it if it is a copy")
                self.found[name] = found

    def _score(self, arm: Arm, trial: Trial) -> Score | None:
        """How good a run was on the tuning rows; of equals, the one with the smaller loss. One that diverged is worst."""
        result = self.found.get(_Run(arm, *trial).name)
        if result is None:
            return None
        metrics = result.get("metrics", {}).get("tuning", {})
        signs = {self.metric: -1 if self.lower_is_better else 1, "loss": -1}
        return tuple(-math.inf if metrics.get(name) is None else sign * metrics[name] for name, sign in signs.items())

    def _search(self, arm: Arm) -> tuple[list[_Run], list[_Run]]:
        """The runs that the search for an arm's rate needs now; or, when it is found, the final ones at it."""
        trials, step = best_rate(self.rates, partial(self._score, arm))
        finals = [] if step is None else [_Run(arm, step, seed) for seed in range(self.seeds)]
        return [_Run(arm, *trial) for trial in trials], finals

    def _wanted(self) -> list[_Run]:
        """The runs that can be made now, in order: rates first, then seed by seed, so that there are pairs whenever it stops."""
        tuning, finals = zip(*map(self._search, self.arms), strict=True)
        runs = [*chain(*tuning), *sorted(chain(*finals), key=lambda run: run.seed)]
        return [run for run in runs if run.name not in self.found]

    def _left(self, arm: Arm) -> tuple[int, int]:
        """How many runs of an arm's search are left, if its grid does not grow, and how many final ones."""
        tuning, finals = self._search(arm)
        if finals:
            return 0, sum(run.name not in self.found for run in finals)
        tried = sum(one["arm"] == arm.name and one["for"] == "rate" for one in self.found.values())
        return max(runs_of_search(self.rates) - tried, len(tuning)), self.seeds

    def _takes(self, arm: Arm, is_final: bool) -> float | None:
        """At most the seconds of a run of an arm, by those that are finished, or by steps that were tried."""
        own = [one for one in self.found.values() if one["arm"] == arm.name and "metrics" in one]
        own = [one for one in own if one["whole_seconds"] is not None]
        known = [one["whole_seconds"] for one in own if (one["for"] == "seed") == is_final]
        if is_final and not known:  # those of the search were measured on the tuning rows alone
            longer = self.measured / max(1, self.tuned)
            known = [one["seconds"] + longer * (one["whole_seconds"] - one["seconds"]) for one in own]
        return max(known, default=self.tried.get(arm.name))

    def _what_is_left(self) -> str:
        count, seconds = 0, 0.0
        for arm in self.arms:
            tuning, finals = self._left(arm)
            count += tuning + finals
            seconds += tuning * (self._takes(arm, False) or 0) + finals * (self._takes(arm, True) or 0)
        return f"{count} runs left, about {duration(seconds)} in one process"

    # The runs -----------------------------------------------------------------------------------------------------------

    def work(self, deadline: float, is_short: bool) -> None:
        """Makes the runs that are left, and waits for those that other processes do, as long as there is time.

        Args:
            is_short: say so if there is none for any run.
        """
        if is_short and (wanted := self._wanted()) and not self._in_time(deadline):
            shortest = min(self._takes(run.arm, run.is_final) or 0 for run in wanted)
            self.progress.say(f"no run fits into the time: the shortest takes about {duration(shortest)}")
        has_waited = False
        while in_time := self._in_time(deadline):
            if not any(map(self._taken, in_time)):  # the first that is free is made
                if not has_waited:
                    self.progress.say("waiting for runs that other processes do")
                has_waited = True
                time.sleep(0.5)
                self._look()

    def _in_time(self, deadline: float) -> list[_Run]:
        """The runs that can be made now, and would end before the deadline."""
        rest = deadline - time.monotonic()
        return [run for run in self._wanted() if (self._takes(run.arm, run.is_final) or 0) < rest]

    def _taken(self, run: _Run) -> bool:
        """Makes a run, or returns False if another process is making it."""
        try:
            with self._lock(run.name).acquire(timeout=0):
                self._look()  # another process may have ended it just now
                if run.name not in self.found:
                    self._make(run)
        except Timeout:
            return False
        return True

    def _make(self, run: _Run) -> None:
        """Trains, measures, and writes what came of it. A run that was interrupted goes on from its last checkpoint."""
        work, begun = self.output / WORK / run.name, time.monotonic()
        resumed, measured = work.is_dir(), ("dev", "test") if run.is_final else ("tuning",)
        self.progress.say(f"{run.arm.name} at {run.rate:.3g}, seed {run.seed}{', from its last checkpoint' if resumed else ''}")
        _make_room()
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
        except GatewiseError as error:
            if not resumed:
                raise
            reason = re.split(": (?:resume it|take --overwrite|use --overwrite)", str(error))[0]  # which compare has not
            self.progress.say(f"  which cannot go on and begins again: {reason}")
            shutil.rmtree(work)
            return
        else:
            metrics = {name: both["after"] for name, both in done.metrics.items()}
            told = "; ".join(
                [", ".join(f"{name} {self.metric} {one[self.metric]:.4f}" for name, one in metrics.items()), *done.remarks]
            )
            result |= {
                "metrics": metrics,
                "rows": done.rows,
                "parameters": done.parameters["adapter"],
                "peak_memory": done.peak_memory,
                "steps": done.steps,
                "seconds": None if resumed else round(done.seconds["total"] - done.seconds["evaluation"], 1),
            }
            if run.is_final:
                _make_room()
                try:
                    result["forgotten"] = forgotten(done.adapter, device=run.recipe.device)
                except (GatewiseError, torch.OutOfMemoryError) as error:  # the run is whole without it
                    self.progress.say(f"warning: what was forgotten could not be measured: {error}")
            if run.is_final and self.keep_adapters:
                with whole_folder(self._kept(run), replace=True) as part:
                    shutil.copytree(done.adapter, part, dirs_exist_ok=True)
        result["whole_seconds"] = None if resumed else round(time.monotonic() - begun, 1)  # of a resumed run only a part is known
        with self._lock("plan"):
            self._check({run.arm.name})  # another process may have changed it meanwhile, or somebody the rows
            write_json(self.output / RUNS / f"{run.name}.json", finite(result))
        shutil.rmtree(work, ignore_errors=True)
        self._look()
        self.progress.say(f"  {told}; {self._what_is_left()}")
        if not run.is_final and all(arm["learning_rate"] for arm in self._arms()):
            self._tell_outlook()

    def _kept(self, run: _Run) -> Path:
        return self.output / ADAPTERS / run.name

    # What came out ------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Writes ``compare.json``, and draws ``compare.png`` where rates were tried. Returns what the first holds."""
        runs, left = [*self.found.values()], sum(sum(self._left(arm)) for arm in self.arms)
        content = report(runs, self._arms(), lower_is_better=self.lower_is_better, missing=left, trained=self.trained)
        write_json(self.output / RESULT, finite(content))
        if any(arm["rates"] for arm in content["arms"]):
            draw(content, self.output / PICTURE)
        return content

    def _arms(self) -> list[dict[str, Any]]:
        """The arms, with the rates that were found for them."""
        return [
            {
                "name": arm.name,
                "parameters": arm.parameters,
                "heads": arm.heads,
                "told": arm.told,
                "learning_rate": finals[0].rate if (finals := self._search(arm)[1]) else None,
                "recipe_rate": arm.recipe.training.learning_rate,
            }
            for arm in self.arms
        ]


def _make_room() -> None:
    """Gives back the memory of the last model: models are in cycles, and the next one wants their place."""
    gc.collect()
    torch.cuda.empty_cache()


def _read(path: Path, keys: Collection[str], advice: str = _AGAIN) -> dict[str, Any]:
    """Reads a file that a comparison wrote, which has these keys at least."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        raise GatewiseError(f"{path} is damaged: {advice}")
    return found


def _fingerprints(recipe: Recipe) -> dict[str, str]:
    """Of the files that the rows come from."""
    sources = {f"data.{key}": files_of_source(str(getattr(recipe.data, key))) for key in ("train", "dev", "test")}
    found = {key: [file.read_bytes() for file in files if file.is_file()] for key, files in sources.items()}
    return {key: hashlib.sha256(b"".join(files)).hexdigest() for key, files in found.items() if files}


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """What may not change of an arm that has begun."""
    return recipe.model_dump(mode="json", exclude=_FREE_TO_CHANGE)


def _tried(arm: Arm, output: Path, progress: ConsoleProgress) -> float:
    """About the seconds of one run: of loading, and of a step that is tried. Measuring a row is half of training with it, and a
    step of a search (SPT's) takes as long as four or five.

    Raises:
        GatewiseError: the arm cannot be trained.
    """
    _make_room()
    begun = time.monotonic()
    with quiet(bars=True):
        try:
            run, method = ready(arm.recipe, output, progress)
        except GatewiseError as error:
            raise GatewiseError(f"arm {arm.name}: {error}") from error
        loading = time.monotonic() - begun
        step, usual, _ = timed_step(run, method)
    rows = sum(len(run.task.measured.get(part, ())) for part in ("dev", "test"))
    return loading + step * (
        run.steps + 5 * method.stage_steps(len(run.train)) + 0.5 * rows / len(usual) / arm.recipe.training.gradient_accumulation
    )
