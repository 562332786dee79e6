"""Makes the pictures of the guides in docs/pictures from what gatewise itself prints and draws.

    python tools/pictures.py                 # all of them
    python tools/pictures.py ranks compare   # some

They are of the quickstart, of forty steps of recipes/milora-support.yaml, of what `gatewise compress` and `gatewise serve` make of
the quickstart's adapter, and of a comparison in benchmarks/results. What runs/ has already is not made again; all of it takes ten
minutes on two cores. A recording shows every line that was printed and some states of each progress bar; its waits are left out.
"""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES, RUNS = ROOT / "docs" / "pictures", ROOT / "runs"
WIDTH = 720
"""Of a picture, in pixels."""
QUICKSTART = "gatewise train recipes/quickstart.yaml"
WIDE, HIGH = 7.8, 18
"""Of a character in a terminal."""


def gatewise(*words: str) -> list[str]:
    return [sys.executable, "-m", "gatewise.cli.main", *words]


def run(*words: str) -> None:
    subprocess.run(gatewise(*words), cwd=ROOT, check=True)


def printed(typed: str, columns: int = 112) -> str:
    """What a command of gatewise writes to a terminal of so many columns. It is run once, and its words are kept in runs/."""
    kept = RUNS / f"{typed.split()[1]}-session.txt"
    if not kept.exists():
        here, there = pty.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        surroundings = {**os.environ, "TERM": "xterm", "COLORTERM": ""}  # sixteen colours
        command = subprocess.Popen(
            gatewise(*typed.replace("\\", "").split()[1:]), cwd=ROOT, stdout=there, stderr=there, env=surroundings
        )
        os.close(there)
        written = b""
        try:
            while part := os.read(here, 1 << 16):
                written += part
        except OSError:  # so Linux says that nobody writes any more
            pass
        if command.wait():
            raise SystemExit(written.decode())
        kept.write_bytes(written)
    return kept.read_bytes().decode()


def quickstart() -> str:
    return printed(QUICKSTART)


def heatmap(name: str, *words: str) -> None:
    """What `gatewise inspect` draws, in the width of a page and as many colours as it needs."""
    from PIL import Image

    picture = PICTURES / f"{name}.png"
    picture.unlink(missing_ok=True)
    run("inspect", *words, "--plot", str(picture))
    with Image.open(picture) as image:
        small = image.convert("RGB").resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    small.quantize(64).save(picture, optimize=True)


def ranks() -> None:
    quickstart()
    heatmap("ranks", "runs/quickstart/adapter")


def routing() -> None:
    if not (RUNS / "milora-support/adapter").exists():
        run("train", "recipes/milora-support.yaml", "--set", "training.max_steps=40")
    heatmap("routing", "runs/milora-support/adapter", "--routing", "--data", "sample:support-dev")


def compare() -> None:
    from gatewise.comparing.report import draw

    content = json.loads((ROOT / "benchmarks/results/compare/trec-r1.json").read_text(encoding="utf-8"))
    draw(content, PICTURES / "compare.png")


def compress() -> None:
    quickstart()
    typed = "gatewise compress runs/quickstart/adapter --data sample:support-dev \\\n    --parameters 1.2M --out runs/small"
    still("compress", "Half of an adapter's parameters, and how much worse it is", (typed, printed(typed, 80)))


def serve() -> None:
    quickstart()
    typed = "gatewise serve smollm2-135m-instruct --adapters 'runs/*/adapter'"
    content = json.dumps(
        {"model": "quickstart", "temperature": 0, "messages": [{"role": "user", "content": "Where is my parcel?"}]}
    )
    asked = f"curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{content}'"
    server = subprocess.Popen(
        gatewise("serve", "smollm2-135m-instruct", "--adapters", "runs/*/adapter"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said = ""
    try:
        assert server.stdout is not None
        for line in server.stdout:
            said += line
            if line.startswith("serving"):
                break
        else:
            raise SystemExit(said)
        answer = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout
    finally:
        server.terminate()
        server.wait()
    still("serve", "A server with an adapter, and a question to it", (typed, said), (asked, answer))


# Terminals -------------------------------------------------------------------------------------------------------------

Cell = tuple[str, str]  # a character and its classes
Line = tuple[Cell, ...]

STYLES = {"1": "b", "2": "d", "3": "i", "31": "red", "32": "green", "33": "yellow", "34": "blue", "35": "pink", "36": "cyan"}
STYLES |= {"90": "grey", "91": "red", "92": "green", "93": "yellow", "94": "blue", "95": "pink", "96": "cyan"}
STYLES |= {"97": "white", "43": "on-yellow", "100": "on-grey"}
CODES = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


@dataclass
class Terminal:
    """As much of one as rich writes for: colours, bars that are drawn over, lines that are taken back. It never forgets a line."""

    lines: list[list[Cell]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    style: str = ""

    def write(self, text: str) -> Iterator[bool]:
        """Yields whenever a line is left: True if by a line feed, False if it is about to be drawn again."""
        for codes, verb, control, plain in CODES.findall(text):
            if control == "\n":
                yield True
                self.row += 1
                self.lines += [[]] * (self.row - len(self.lines) + 1)
            elif control == "\r":
                self.column = 0
            elif plain:
                line = [*self.lines[self.row]]
                line += [(" ", "")] * (self.column - len(line))
                line[self.column : self.column + len(plain)] = [(one, self.style) for one in plain]
                self.lines[self.row] = line
                self.column += len(plain)
            elif verb == "A":
                self.row -= int(codes or 1)
            elif verb == "K":
                if self.lines[self.row]:
                    yield False
                self.lines[self.row] = []
            elif verb == "m":
                for code in (codes or "0").split(";"):
                    self.style = "" if code == "0" else f"{self.style} {STYLES[code]}".strip()


def prompt(typed: str) -> list[Line]:
    """A command as it stands in a terminal."""
    return [
        tuple((one, "" if place < 2 and row == 0 else "b") for place, one in enumerate(line))
        for row, line in enumerate(f"$ {typed}".split("\n"))
    ]


def frames(typed: str, text: str) -> list[tuple[float, list[Line]]]:
    """When each screen appears, in seconds, and its lines."""
    terminal, at, bar, begin = Terminal(), 1.0, "", prompt(typed)
    shown = [(0.0, prompt("")), (at, begin)]
    for line_feed in terminal.write(text.rstrip().replace("\r\n", "\n").replace("\n", "\n\r") + "\n"):
        written = max((row for row, line in enumerate(terminal.lines, 1) if line), default=0)
        screen = [*begin, *map(tuple, terminal.lines[:written])]
        now = "".join(one for one, _ in terminal.lines[terminal.row])
        if not line_feed:
            done = re.search(r"(\d+)/(\d+)", now)
            step = f"{now[:20]} {int(done[1]) * 6 // int(done[2])}" if done else bar
            if step == bar:  # six of a bar's states are shown
                continue
            bar = step
        if screen != shown[-1][1]:
            at += 0.25 if not line_feed else 0.5 if now.startswith(("step", "loading")) else 0.06
            shown.append((at, screen))
    return shown


def drawn(line: Line, y: int) -> str:
    """A line as SVG: a piece for each style, as wide as its characters in any font."""
    behind, pieces, place = "", "", 0
    for style, cells in groupby(line, key=lambda cell: cell[1]):
        text = "".join(one for one, _ in cells)
        if "on-" in style:
            behind += f'<rect class="{style}" x="{place * WIDE:.4g}" y="{y}" width="{len(text) * WIDE:.4g}" height="{HIGH}"/>'
        named = f' class="{style}"' if style else ""
        for words in re.finditer(r"\S+( \S+)*", text):  # of several blanks a browser would show one
            at, wide = (place + words.start()) * WIDE, len(words[0]) * WIDE
            pieces += f'<tspan{named} x="{at:.4g}" textLength="{wide:.4g}">{escape(words[0])}</tspan>'
        place += len(text)
    return f'{behind}<text y="{y + 13}">{pieces}</text>' if pieces else ""


def window(name: str, title: str, columns: int, rows: int, last: Sequence[Line], body: Sequence[str], styles: str = "") -> None:
    """A terminal as an SVG file. Its last screen is told in words too."""
    width, height = round(columns * WIDE) + 32, rows * HIGH + 56
    told = "\n".join("".join(one for one, _ in line).rstrip() for line in last)
    buttons = "".join(
        f'<circle cx="{x}" cy="18" r="5.5" fill="{it}"/>' for x, it in ((20, "#ff6159"), (38, "#ffbd2e"), (56, "#28c941"))
    )
    lines = "\n".join(body)
    (PICTURES / f"{name}.svg").write_text(
        f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>{escape(title)}</title>
<desc>{escape(told)}</desc>
<style>
text{{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace;fill:#dbe3ea}}
.b{{font-weight:bold}}.d{{fill:#a3b3c1}}.i{{font-style:italic}}.grey{{fill:#5d6d7c}}.red{{fill:#ff7b86}}.green{{fill:#7fd88f}}
.yellow{{fill:#e6c365}}.blue{{fill:#7db7ff}}.pink{{fill:#e08be0}}.cyan{{fill:#6fd3d8}}.white{{fill:#fff}}
rect.on-yellow{{fill:#a8560f}}rect.on-grey{{fill:#33404c}}
{styles}
</style>
<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="9" fill="#111a22" stroke="#3a4855"/>
{buttons}
<svg x="16" y="40" width="{width - 32}" height="{rows * HIGH + 4}"><g class="lines">
{lines}
</g></svg>
</svg>
""",
        encoding="utf-8",
    )


def still(name: str, title: str, *sessions: tuple[str, str], columns: int = 80) -> None:
    """Commands and what they printed."""
    lines: list[Line] = []
    for typed, text in sessions:
        *_, (_, screen) = frames(typed, text)
        lines += [line[at : at + columns] for line in screen for at in range(0, max(len(line), 1), columns)]
    window(name, title, columns, len(lines), lines, [drawn(line, row * HIGH) for row, line in enumerate(lines)])


def film(name: str, title: str, typed: str, text: str, columns: int = 112, rows: int = 30) -> None:
    """A command that prints, in CSS that GitHub plays too: a line is there from when it was written until it was drawn over."""
    shown = frames(typed, text)
    end = shown[-1][0] + 12  # the last screen stays
    rules: dict[str, str] = {}

    def rule(name: str, *steps: tuple[float, str]) -> str:
        rules[name] = f"@keyframes {name}{{{''.join(f'{100 * at / end:.2f}%{{{what}}}' for at, what in steps)}}}"
        return f"animation-name:{name}"

    body = []
    for row in range(max(len(screen) for _, screen in shown)):
        versions = [(at, screen[row] if row < len(screen) else ()) for at, screen in shown]
        changes = [next(group) for _, group in groupby(versions, key=lambda one: one[1])]
        for (at, line), (until, _) in pairwise([*changes, (end, ())]):
            if not (picture := drawn(line, row * HIGH)):
                continue
            steps, named = [(0.0, "visibility:hidden")] * (at > 0) + [(at, "visibility:visible")], f"f{round(at * 100)}"
            if until < end:
                steps, named = [*steps, (until, "visibility:hidden")], f"{named}t{round(until * 100)}"
            hidden = ";visibility:hidden" if until < end else ""
            body.append(f'<g style="{rule(named, *steps)}{hidden}">{picture}</g>')
    tops = [(at, max(0, len(screen) - rows) * HIGH) for at, screen in shown]
    moves = [next(group) for _, group in groupby(tops, key=lambda one: one[1])]
    rule("scroll", *((at, f"transform:translateY(-{top}px)") for at, top in moves))
    plays = (
        f"g{{animation:{end:.2f}s step-end infinite}}\n.lines{{transform:translateY(-{moves[-1][1]}px);animation-name:scroll}}\n"
    )
    stands = "@media (prefers-reduced-motion:reduce){g{animation:none!important}}\n"
    window(name, title, columns, rows, shown[-1][1], body, plays + stands + "".join(rules.values()))


def recording() -> None:
    film("first-run", "The quickstart in a terminal", QUICKSTART, quickstart())


if __name__ == "__main__":
    MADE = {one.__name__: one for one in (recording, ranks, routing, compare, compress, serve)}
    for name in sys.argv[1:] or MADE:
        MADE[name]()
