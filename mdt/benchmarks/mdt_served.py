"""Many passages through a server, against one process: seconds, and whether the trees are the same.

The passages are published training texts and copies of them with other phrases (gatewise_mdt.training.swapping), so that none comes
twice. One adapter that writes trees reads all of them verbatim, in this process (`Extractor`, --batch-size passages at a time), and
through `gatewise serve` (`ServedExtractor`, --together requests under way). What each makes is kept beside the results as it comes,
so that a run that is stopped goes on; seconds are those of passages that were read without a stop, the first left out.

    python mdt/benchmarks/mdt_served.py --data-dir DATA --adapter ADAPTER --base BASE --engine transformers
    python mdt/benchmarks/mdt_served.py --data-dir DATA --adapter ADAPTER --base BASE --engine vllm --python .venv-serve/bin/python
    python mdt/benchmarks/mdt_served.py --report
"""

import argparse
import json
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
from campaign import append, machine, read
from gatewise_mdt import Extractor, read_trees, swapped_copies
from gatewise_mdt.extraction.served import ServedExtractor

RESULTS_FILE = Path(__file__).parent / "results" / "mdt_served.jsonl"
RUNS = Path(__file__).parents[1] / "runs" / "mdt-served"
MAX_NEW_TOKENS = 384
NAME = "trees"


def passages(data_dir: Path, language: str, count: int) -> list[str]:
    """Texts, none twice."""
    records = list(read_trees(data_dir / "text2mdt" / f"{language}_train.json", repair=True).records)
    copies = count // len(records) + 1
    texts = list(dict.fromkeys(record.text for record in [*records, *swapped_copies(records, copies, seed=0)]))
    return texts[:count]


def told(one: Any) -> Any:
    """A tree, or what is wrong, as JSON."""
    tree = getattr(one, "tree", None)
    return str(one) if tree is None else tree.to_preorder()


def in_this_process(texts: Sequence[str], options: argparse.Namespace, file: Path) -> None:
    """Batches of like length, each kept with its seconds."""
    done = {one["number"] for one in read(file)}
    left = sorted((i for i in range(len(texts)) if i not in done), key=lambda i: len(texts[i]))
    extractor = Extractor.load(
        options.adapter, base=options.base, verbatim=True, max_new_tokens=MAX_NEW_TOKENS, batch_size=options.batch_size
    )
    for start in range(0, len(left), options.batch_size):
        batch = left[start : start + options.batch_size]
        began = time.perf_counter()
        found = extractor([texts[i] for i in batch], language=options.language)
        seconds = (time.perf_counter() - began) / len(batch)
        for i, one in zip(batch, found, strict=True):
            append({"number": i, "tree": told(one), "seconds": seconds if start else None}, file)
        print(f"  one process: {len(texts) - len(left) + start + len(batch)} of {len(texts)}, {seconds:.2f} s each", flush=True)


def through_the_server(texts: Sequence[str], options: argparse.Namespace, file: Path) -> None:
    """Each kept as it comes, with the seconds since the one before."""
    done = {one["number"] for one in read(file)}
    left = [i for i in range(len(texts)) if i not in done]
    with served(options) as url:
        extractor = ServedExtractor.connect(url, NAME, verbatim=True, max_new_tokens=MAX_NEW_TOKENS, batch_size=options.together)
        before = None
        for count, (k, one) in enumerate(extractor.as_they_come([texts[i] for i in left], language=options.language), start=1):
            now = time.perf_counter()
            append({"number": left[k], "tree": told(one), "seconds": None if before is None else now - before}, file)
            before = now
            if count % 50 == 0:
                print(f"  {options.engine}: {len(texts) - len(left) + count} of {len(texts)}", flush=True)


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
        RUNS.mkdir(parents=True, exist_ok=True)
        (RUNS / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
        files = {name: RUNS / f"{options.language}-{name}.jsonl" for name in ("alone", options.engine)}
        in_this_process(texts, options, files["alone"])
        through_the_server(texts, options, files[options.engine])
        found = {name: {one["number"]: one for one in read(file)} for name, file in files.items()}
        seconds = {}
        for name, rows in found.items():
            timed = [one["seconds"] for one in rows.values() if one["seconds"] is not None]
            seconds[name] = round(sum(timed) / len(timed), 4)
        pairs = [[found[name][i]["tree"] for name in files] for i in range(len(texts))]
        same = sum(one == other for one, other in pairs)
        refused = sum(isinstance(one, str) and isinstance(other, str) for one, other in pairs)  # in other words
        made = {
            "language": options.language, "base": options.base, "engine": options.engine, "passages": len(texts),
            "batch_size": options.batch_size, "together": options.together, "alone": seconds["alone"],
            "served": seconds[options.engine], "same": same, "refused": refused, **machine(),
        }  # fmt: skip
        append(made, options.results)
    report(read(options.results))


if __name__ == "__main__":
    main()
