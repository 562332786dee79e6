"""Runs what the guides show, in order, as a reader would who pastes it, and says how many of the commands ran.

    python tools/guides.py                             # all guides, in the order of the navigation
    python tools/guides.py docs/guides/own-data.md     # one of them
    python tools/guides.py --quick                     # training stops after three steps
    python tools/guides.py --print PAGE                # shows what each command printed, to compare with the page

Each page has a fresh clone of the last commit with the quickstart's run in it, and the environment of this Python. A page's
commands are its indented blocks and its blocks of bash. A block with a title (```` ```yaml title="my.yaml" ````) is a file that
the reader writes. A server that a page starts runs until the next one or the end of the page. `<!-- not run: why -->` before a
block leaves it out; pip and make are left out too. A command that fails ends its page, and the exit code is 1.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDES = re.compile(r"(docs/(?:index|guides/\S+|methods/\S+)\.md|mdt/docs/(?!reference)[a-z]+\.md)$", re.MULTILINE)
SETS_UP = "it sets up"
LEFT = re.compile(r"(?:pip|make|git clone|\. \.venv|source|cd|python3? -m venv)\b")
SERVER = re.compile(r"gatewise (?:serve|mdt review) (?!.*--add-user)")
PROGRAMS = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:gatewise|python|curl|accelerate|torchrun|tensorboard|vllm|sudo|journalctl)\b|"
    r"(?:echo|cat|cp|mv|mkdir|rm|export|printf)\b"
)


@dataclass
class Step:
    """A file to write (``name`` and ``text``), or a command to run; with ``why``, one that is not run."""

    text: str
    name: str | None = None
    why: str | None = None


def blocks(page: str) -> Iterator[tuple[str, str, str | None]]:
    """The blocks of a page: what stands behind the three quotes (or ``indented``), the text, and why it is not run."""
    lines, why = page.splitlines(), None
    at = 0
    while at < len(lines):
        line, begin = lines[at], at + 1
        if line.startswith("```"):
            at = lines.index("```", begin)
            yield line[3:], "\n".join(lines[begin:at]), why
        elif line.startswith("    ") and not lines[at - 1].strip():
            while begin < len(lines) and (not lines[begin].strip() or lines[begin].startswith("    ")):
                begin += 1
            yield "indented", "\n".join(one[4:] for one in lines[at:begin]).strip("\n"), why
            at = begin - 1
        if line.strip():
            why = match[1] if (match := re.fullmatch(r"<!-- not run: (.*) -->", line)) else None
        at += 1


def commands(block: str) -> Iterator[str]:
    """Its commands; one that ends with a backslash or has a here-document goes over several lines."""
    lines = iter(block.splitlines())
    for line in lines:
        command = re.sub(r"\s+# .*", "", line)
        end = match[1] if (match := re.search(r"<<-?['\"]?(\w+)", line)) else None
        while command.endswith("\\") or (end and command.splitlines()[-1] != end):
            command += "\n" + next(lines)
        if command and not command.startswith("#"):
            yield command


def steps(page: str) -> Iterator[Step]:
    """What a page has its reader do, in order."""
    for kind, text, why in blocks(page):
        if title := re.search(r'title="(.+)"', kind):
            yield Step(text + "\n", title[1], why)
        elif kind in ("bash", "sh", "indented"):
            for command in commands(text):
                if kind == "indented" and not (PROGRAMS.match(command) or LEFT.match(command)):
                    continue  # what a command printed, or a file
                own = SETS_UP if LEFT.match(command) else "changes the machine" if command.startswith("sudo ") else None
                yield Step(command, why=why or own)


def quick(command: str, folder: Path) -> str:
    """The command with three steps of training, before which the rounds of its recipe find their place by themselves."""
    if not (match := re.match(r"gatewise train (\S+)", command)):
        return command
    recipe = folder / match[1]
    keys = re.findall(r"^  (first_round|recover):", recipe.read_text(encoding="utf-8") if recipe.is_file() else "", re.MULTILINE)
    left = "".join(f" --set allocation.{key}=null" for key in keys)
    return f"{match[0]} --set training.max_steps=3{left}{command[match.end() :]}"


def script(command: str, exported: Path) -> list[str]:
    """The command with what the page has exported, kept for the next one. In it, curl fails when it is answered with an error."""
    command = re.sub(r"^curl ", "curl --fail-with-body ", command)
    if SERVER.match(command):
        command = f"exec {command}"
    return ["bash", "-c", f". {exported}\nset -o pipefail\n{command}\nstatus=$?\nexport -p > {exported}\nexit $status"]


def clone(folder: Path) -> None:
    """A fresh clone, with the quickstart's run, which is made once."""
    run = ROOT / "runs" / "quickstart"
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    if not (run / "metrics.json").is_file():
        subprocess.run([Path(sys.executable).parent / "gatewise", "train", "recipes/quickstart.yaml"], cwd=ROOT, check=True)
    shutil.copytree(run, folder / "runs" / "quickstart")


def stop(server: subprocess.Popen[bytes] | None) -> None:
    """Ends a server, if there is one."""
    if server:
        server.terminate()
        server.wait()


def serving(port: str, process: subprocess.Popen[bytes]) -> bool:
    """Waits until the server answers, two minutes at most."""
    for _ in range(120):
        if process.poll() is not None:
            return False
        if subprocess.run(["curl", "-s", "-o", "/dev/null", f"http://127.0.0.1:{port}/"], check=False).returncode == 0:
            return True
        time.sleep(1)
    return False


def tried(page: Path, is_quick: bool, is_told: bool = False) -> tuple[int, int, list[str]]:
    """Runs a page: how many commands ran, how many there are, and what was left out."""
    found = list(steps(page.read_text(encoding="utf-8")))
    left = [f"{step.text.splitlines()[0]}  ({step.why})" for step in found if step.why not in (None, SETS_UP) and not step.name]
    todo = [step for step in found if step.why is None]
    ran, all_of_them = 0, sum(step.name is None for step in todo)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    server: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryDirectory() as temporary:
        folder, exported = Path(temporary) / "gatewise", Path(temporary) / "exported"
        exported.touch()
        if all_of_them:
            clone(folder)
        try:
            for step in todo:
                if step.name:
                    (folder / step.name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / step.name).write_text(step.text, encoding="utf-8")
                    continue
                command = quick(step.text, folder) if is_quick else step.text
                print(f"  $ {command}", flush=True)
                start = time.perf_counter()
                if SERVER.match(command):
                    stop(server)
                    server = subprocess.Popen(script(command, exported), cwd=folder, env=environment)
                    default = "8765" if "review" in command else "8000"
                    port = match[1] if (match := re.search(r"--port[= ](\d+)", command)) else default
                    is_right = serving(port, server)
                else:
                    words = script(command, exported)
                    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
                    is_right = done.returncode == 0
                    if is_told or not is_right:
                        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
                print(f"    {'ran' if is_right else 'FAILED'}, {time.perf_counter() - start:.0f} s", flush=True)
                if not is_right:
                    break
                ran += 1
        finally:
            stop(server)
    return ran, all_of_them, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="pages; all guides where none is given")
    parser.add_argument("--quick", action="store_true", help="three steps of training")
    parser.add_argument("--print", action="store_true", help="show what each command printed")
    given = parser.parse_args()
    pages = given.pages or [ROOT / page for page in GUIDES.findall((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))]
    ran, of, left = 0, 0, list[str]()
    for page in pages:
        print(page.resolve().relative_to(ROOT), flush=True)
        start = time.perf_counter()
        one, all_of_page, left_of_page = tried(page, given.quick, given.print)
        print(f"  {one} of {all_of_page} commands ran, {(time.perf_counter() - start) / 60:.1f} minutes")
        ran, of, left = ran + one, of + all_of_page, left + left_of_page
    print(f"{ran} of {of} commands ran", *(f"not run: {one}" for one in left), sep="\n")
    sys.exit(ran < of)


if __name__ == "__main__":
    main()
