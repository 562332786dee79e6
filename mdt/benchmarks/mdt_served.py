"""Many passages through a server, against one process: seconds, and whether the trees are the same.

The passages are published training texts and copies of them with other phrases (gatewise_mdt.training.swapping), so that none comes
twice. One adapter that writes trees reads all of them verbatim, in this process (`Extractor`, --batch-size passages at a time), and
through `gatewise serve` (`ServedExtractor`, --together requests under way). Seconds are those of a passage after the first ones.

    python mdt/benchmarks/mdt_served.py --data-dir DATA --adapter ADAPTER --base BASE --engine transformers
    python mdt/benchmarks/mdt_served.py --data-dir DATA --adapter ADAPTER --base BASE --engine vllm --python .venv-serve/bin/python
    python mdt/benchmarks/mdt_served.py --report
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from campaign import append, read
from gatewise_mdt import Extractor, read_trees, swapped_copies
from gatewise_mdt.extraction.served import ServedExtractor

from gatewise.models.device import machine

RESULTS_FILE = Path(__file__).parent / "results" / "mdt_served.jsonl"
MAX_NEW_TOKENS = 384
NAME = "trees"


def passages(data_dir: Path, language: str, count: int) -> list[str]:
    """Texts, none twice."""
    records = list(read_trees(data_dir / "text2mdt" / f"{language}_train.json", repair=True).records)
    copies = count // len(records) + 1
    texts = list(dict.fromkeys(record.text for record in [*records, *swapped_copies(records, copies, seed=0)]))
    return texts[:count]


def timed(extractor: Any, texts: Sequence[str], language: str) -> tuple[list[Any], float]:
    """The trees, or what is wrong, as JSON, and the seconds that each took after the first ones."""
    found: dict[int, Any] = {}
    times = []
    for number, one in extractor.as_they_come(texts, language=language):
        times.append(time.perf_counter())
        tree = getattr(one, "tree", None)
        found[number] = str(one) if tree is None else tree.to_preorder()
        if len(found) % 50 == 0:
            print(f"  {len(found)} of {len(texts)}", flush=True)
    first = extractor.batch_size
    return [found[number] for number in range(len(texts))], (times[-1] - times[first - 1]) / (len(times) - first)


@contextmanager
def served(options: argparse.Namespace) -> Iterator[str]:
    """A server of the adapter, of this machine's own; its address."""
    command = [sys.executable, "-m", "gatewise", "serve", options.base, "--adapters", f"{NAME}={options.adapter}"]
    command += ["--engine", options.engine, "--port", "0", "--max-running", str(options.together), "--dtype", "float32"]
    command += ["--constraint", "gatewise_tree"]
    command += ["--python", str(options.python)] if options.python else []
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if line.startswith("serving: "):
                    yield line.split()[1].removesuffix("/v1")
                    return
            log.seek(0)
            raise SystemExit(f"the server did not start:\n{log.read()[-3000:]}")
        finally:
            os.killpg(server.pid, signal.SIGINT)
            server.wait(60)


def report(runs: Sequence[dict[str, Any]]) -> None:
    """A line a run."""
    for one in runs:
        print(f"{one['language']}, {one['passages']} passages, {one['processor']}, {one['threads']} threads:")
        print(
            f"  one process {one['alone']:.2f} s a passage, {one['engine']} {one['served']:.2f}"
            f" ({one['alone'] / one['served']:.2f} times as fast), {one['same']} trees the same"
            + (f", {one['refused']} refused by both" if one.get("refused") else "")
        )


def main() -> None:
    """Measures, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--language", choices=["en", "zh"], default="en")
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--together", type=int, default=32)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--python", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS_FILE)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process, and its children, would ignore it
    if not options.report:
        if options.data_dir is None or options.adapter is None:
            parser.error("--data-dir and --adapter are needed")
        texts = passages(options.data_dir, options.language, options.passages)
        ways = {"verbatim": True, "max_new_tokens": MAX_NEW_TOKENS}
        alone, seconds_alone = timed(
            Extractor.load(options.adapter, base=options.base, batch_size=options.batch_size, **ways), texts, options.language
        )
        with served(options) as url:
            extractor = ServedExtractor.connect(url, NAME, batch_size=options.together, **ways)
            through, seconds_served = timed(extractor, texts, options.language)
        pairs = list(zip(alone, through, strict=True))
        same = sum(one == other for one, other in pairs)
        refused = sum(isinstance(one, str) and isinstance(other, str) for one, other in pairs)  # in other words
        made = {
            "language": options.language, "base": options.base, "engine": options.engine, "passages": len(texts),
            "batch_size": options.batch_size, "together": options.together, "alone": round(seconds_alone, 4),
            "served": round(seconds_served, 4), "same": same, "refused": refused, **machine(),
        }  # fmt: skip
        append(made, options.results)
    report(read(options.results))


if __name__ == "__main__":
    main()
