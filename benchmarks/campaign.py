"""What the comparisons of methods share: a command line, and a JSON-lines file of runs that can be stopped and started at will."""

import argparse
import fcntl
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Run = dict[str, Any]
"""One finished run; it names its "task", "method" and "seed"."""


def campaign(
    about: str,
    file: str,
    tasks: Iterable[str],
    methods: Iterable[str],
    one_run: Callable[[str, str, int, Path], Run | None],
    tell: Callable[[Run], str],
    report: Callable[[list[Run]], None],
) -> None:
    """The command line of a benchmark: makes the runs that are missing, then reports all.

    Args:
        about: the help.
        file: the results file's name.
        tasks: those run unless told otherwise.
        one_run: (task, method, seed, data folder) -> its result, or None where a task has no such method.
        tell: a finished run in a line.
        report: prints the tables.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="the folder with a folder for each task")
    parser.add_argument("--results", type=Path, default=RESULTS / file)
    parser.add_argument("--tasks", nargs="+", default=list(tasks))
    parser.add_argument("--methods", nargs="+", default=list(methods))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="print the results, run nothing")
    options = parser.parse_args()
    if not options.report:
        if options.data_dir is None:
            parser.error("--data-dir is needed: the folder with a folder for each task")
        for seed, task, method in product(options.seeds, options.tasks, options.methods):
            key = (task, method, seed)
            with claimed(key, options.results) as free:
                # Asked once the run is claimed: another process may have ended it just now.
                if not free or any((run["task"], run["method"], run["seed"]) == key for run in read(options.results)):
                    continue
                print(f"{task} {method} seed {seed}", flush=True)
                run = one_run(task, method, seed, options.data_dir)
                if run is None:
                    continue
                append(run, options.results)
                print(f"  {tell(run)}", flush=True)
    report(read(options.results))


def work(missing: Callable[[list[Run]], list[Any]], one_run: Callable[..., Run], results: Path) -> None:
    """Makes runs until none is missing, beside other processes that do the same.

    Args:
        missing: finished runs -> the keys of those that can be made now; more may follow from what they come to.
        one_run: takes a key's parts.
    """
    while left := missing(read(results)):
        for key in left:
            with claimed(key, results) as free:
                if free and key in missing(read(results)):
                    print(*key, flush=True)
                    append(one_run(*key), results)
                    break
        else:
            time.sleep(10)  # other processes have the rest


@contextmanager
def claimed(key: Sequence[Any], results: Path) -> Iterator[bool]:
    """Whether this process may do the run: the lock of one that does it already is let go of by the system when that ends."""
    folder = Path(tempfile.gettempdir()) / f"{results.stem}-claims"
    folder.mkdir(exist_ok=True)
    with (folder / "-".join(map(str, key)).replace("/", "-")).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def read(results: Path) -> list[Run]:
    """The finished runs; a last line cut off by an interruption is left out."""
    runs = []
    for line in results.read_text(encoding="utf-8").splitlines() if results.is_file() else []:
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return runs


def append(run: Run, results: Path) -> None:
    """Adds a finished run; after a line that an interruption cut off, on a line of its own."""
    results.parent.mkdir(parents=True, exist_ok=True)
    held = results.read_bytes() if results.is_file() else b""
    cut_off = bool(held) and not held.endswith(b"\n")
    with results.open("a", encoding="utf-8") as out:
        out.write("\n" * cut_off + json.dumps(run) + "\n")


def spread(values: list[float], digits: int, sign: bool = False) -> str:
    """Mean and, of several, standard deviation."""
    mark = "+" if sign else ""
    deviation = f" (sd {statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{mark}.{digits}f}{deviation}"
