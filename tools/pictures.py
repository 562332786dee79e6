"""Makes the pictures of the guides in docs/pictures from what gatewise itself prints and draws.

    python tools/pictures.py                 # all of them
    python tools/pictures.py ranks compare   # some

They are of the quickstart and of forty steps of recipes/milora-support.yaml, which are trained first where runs/ does not have them
(some minutes on two cores), and of a comparison in benchmarks/results. The recording is what the quickstart printed: every line
is shown, its progress bars in part, and its waits are left out.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
QUICKSTART, ROUTED = ROOT / "runs/quickstart", ROOT / "runs/milora-support"
SESSION = QUICKSTART / "session.txt"
"""What the quickstart wrote to its terminal."""
TYPED = "gatewise train recipes/quickstart.yaml"
COLUMNS, ROWS = 112, 30
"""Of the terminal."""
WIDTH = 720
"""Of a picture."""
WIDE, HIGH = 7.8, 18
"""Of a character in it, in pixels."""


def gatewise(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "gatewise.cli.main", *words], cwd=ROOT, check=True)


def quickstart() -> None:
    """Trains it in a terminal of its own, and keeps what it wrote there."""
    if SESSION.exists() and (QUICKSTART / "adapter").exists():
        return
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "gatewise.cli.main", *TYPED.split()[1:], "--overwrite"]
    surroundings = {**os.environ, "TERM": "xterm", "COLORTERM": ""}  # sixteen colours
    running = subprocess.Popen(command, cwd=ROOT, stdout=there, stderr=there, env=surroundings)
    os.close(there)
    written = b""
    try:
        while part := os.read(here, 1 << 16):
            written += part
    except OSError:  # so Linux says that nobody writes any more
        pass
    if running.wait():
        raise SystemExit(written.decode())
    SESSION.write_bytes(written)


def shrink(picture: Path) -> None:
    """To the width of a page, and to as many colours as it needs."""
    from PIL import Image

    with Image.open(picture) as image:
        small = image.convert("RGB").resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    small.quantize(64).save(picture, optimize=True)


def ranks() -> None:
    quickstart()
    (PICTURES / "ranks.png").unlink(missing_ok=True)
    gatewise("inspect", str(QUICKSTART / "adapter"), "--plot", str(PICTURES / "ranks.png"))
    shrink(PICTURES / "ranks.png")


def routing() -> None:
    if not (ROUTED / "adapter").exists():
        gatewise("train", "recipes/milora-support.yaml", "--set", "training.max_steps=40", "--output", str(ROUTED), "--overwrite")
    (PICTURES / "routing.png").unlink(missing_ok=True)
    words = ("--routing", "--data", "sample:support-dev", "--plot", str(PICTURES / "routing.png"))
    gatewise("inspect", str(ROUTED / "adapter"), *words)
    shrink(PICTURES / "routing.png")


def compare() -> None:
    from gatewise.comparing.report import draw

    content = json.loads((ROOT / "benchmarks/results/compare/trec-r1.json").read_text(encoding="utf-8"))
    draw(content, PICTURES / "compare.png")


# The recording --------------------------------------------------------------------------------------------------------

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


def frames(text: str) -> list[tuple[float, list[Line]]]:
    """When each screen appears, in seconds, and its lines."""
    terminal, at, shown = Terminal(), 1.0, []
    shown.append((0.0, [tuple((one, "") for one in "$ ")]))
    typed = [tuple((one, "b" if place > 1 else "") for place, one in enumerate(f"$ {TYPED}"))]
    shown.append((at, typed))
    bar = ""
    for line_feed in terminal.write(text.replace("\r\n", "\n\r")):
        screen = [*typed, *(tuple(line) for line in terminal.lines)]
        if screen == shown[-1][1]:
            continue
        now = "".join(one for one, _ in terminal.lines[terminal.row])
        if not line_feed:
            done = re.search(r"(\d+)/(\d+)", now)
            step = f"{now[:20]} {int(done[1]) * 6 // int(done[2])}" if done else ""
            if step == bar or not done:  # six of a bar's screens are shown
                continue
            bar = step
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


def recording() -> None:
    """A film in CSS, which GitHub plays too: each line is there from when it was written until it was drawn over."""
    quickstart()
    shown = frames(SESSION.read_bytes().decode())
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
            steps, name = [(0.0, "visibility:hidden")] * (at > 0) + [(at, "visibility:visible")], f"f{round(at * 100)}"
            if until < end:
                steps, name = [*steps, (until, "visibility:hidden")], f"{name}t{round(until * 100)}"
            hidden = ";visibility:hidden" if until < end else ""
            body.append(f'<g style="{rule(name, *steps)}{hidden}">{picture}</g>')
    tops = [(at, max(0, len(screen) - ROWS) * HIGH) for at, screen in shown]
    moves = [next(group) for _, group in groupby(tops, key=lambda one: one[1])]
    rule("scroll", *((at, f"transform:translateY(-{top}px)") for at, top in moves))
    width, height = round(COLUMNS * WIDE) + 32, ROWS * HIGH + 56
    told = "\n".join("".join(one for one, _ in line).rstrip() for line in shown[-1][1])
    styles, film = "".join(rules.values()), "\n".join(body)
    buttons = "".join(
        f'<circle cx="{x}" cy="18" r="5.5" fill="{it}"/>' for x, it in ((20, "#ff6159"), (38, "#ffbd2e"), (56, "#28c941"))
    )
    (PICTURES / "first-run.svg").write_text(
        f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>The quickstart in a terminal</title>
<desc>{escape(told)}</desc>
<style>
text{{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace;fill:#dbe3ea}}
g{{animation:{end:.2f}s step-end infinite}}
.lines{{transform:translateY(-{moves[-1][1]}px);animation-name:scroll}}
.b{{font-weight:bold}}.d{{fill:#a3b3c1}}.i{{font-style:italic}}.grey{{fill:#5d6d7c}}.red{{fill:#ff7b86}}.green{{fill:#7fd88f}}
.yellow{{fill:#e6c365}}.blue{{fill:#7db7ff}}.pink{{fill:#e08be0}}.cyan{{fill:#6fd3d8}}.white{{fill:#fff}}
rect.on-yellow{{fill:#a8560f}}rect.on-grey{{fill:#33404c}}
@media (prefers-reduced-motion:reduce){{g{{animation:none!important}}}}
{styles}
</style>
<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="9" fill="#111a22" stroke="#3a4855"/>
{buttons}
<svg x="16" y="40" width="{width - 32}" height="{ROWS * HIGH + 4}"><g class="lines">
{film}
</g></svg>
</svg>
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    MADE = {"ranks": ranks, "routing": routing, "compare": compare, "recording": recording}
    for name in sys.argv[1:] or MADE:
        MADE[name]()
