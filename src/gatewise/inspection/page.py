"""One HTML page that needs no network: facts, a heatmap of whichever numbers are chosen, and a list of all modules."""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from gatewise.inspection.budget import BudgetMap, ModuleBudget, Value
from gatewise.inspection.grid import Grid, finite_or_zero, places_of, short_number
from gatewise.inspection.text import facts_of, importance_facts

if TYPE_CHECKING:
    from gatewise.inspection.importance import Importance, ModuleImportance


@dataclass(frozen=True)
class Page:
    """What a page shows. Texts are plain; they are escaped here.

    Attributes:
        title: the heading.
        facts: (name, text) pairs under the heading.
        grids: the numbers to choose from, all over the same modules; their names must be plain words.
        shown: the name of the grid shown first.
        tips: (row label, column label) -> what is said of a cell when it is pointed at.
        caption: what the numbers and their totals are.
        sections: HTML between the heatmap and the list.
        columns: heads of the list of modules, after the path.
        modules: the rows of that list: path, then one text a column.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    grids: Sequence[Grid]
    shown: str
    tips: Mapping[tuple[str, str], str]
    caption: str
    sections: str
    columns: Sequence[str]
    modules: Sequence[Sequence[str]]


def _html_of(page: Page) -> str:
    """The page as HTML."""
    facts = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_unbroken(text))}</dd></div>" for name, text in page.facts)
    choices = "".join(
        f'<label><input type="radio" name="value" value="{grid.name}"{" checked" if grid.name == page.shown else ""}>'
        f"{grid.name}</label>"
        for grid in page.grids
    )
    return _PAGE.format(
        title=html.escape(page.title),
        value=page.shown,
        style=_STYLE + _value_style({grid.name: grid.signed for grid in page.grids}),
        script=_SCRIPT,
        facts=facts,
        choices=choices,
        least=_spans(page.grids, (-grid.most if grid.signed else 0 for grid in page.grids)),
        most=_spans(page.grids, (grid.most for grid in page.grids)),
        caption=html.escape(page.caption),
        heat=_heat_rows(page),
        sections=page.sections,
        columns="".join(f'<th scope="col">{html.escape(name)}</th>' for name in page.columns),
        modules="".join(map(_module_row, page.modules)),
    )


def _unbroken(text: str) -> str:
    """Keeps a number on the line of the word it belongs to."""
    return re.sub(r" (?=\(?\d)", "\N{NO-BREAK SPACE}", text)


def _spans(grids: Sequence[Grid], numbers: Iterable[float | None]) -> str:
    """One span a grid with its number; the style sheet shows that of the chosen one."""
    return "".join(
        f'<span class="{grid.name}">{html.escape(grid.write(number))}</span>' for grid, number in zip(grids, numbers, strict=True)
    )


def _heat_rows(page: Page) -> str:
    grids, layers, kinds = page.grids, page.grids[0].layers, page.grids[0].kinds
    lines = ['<thead><tr><th scope="col">layer</th>']
    lines += [f'<th scope="col">{html.escape(kind)}</th>' for kind in kinds]
    lines.append('<th scope="col" class="sum">total</th></tr></thead><tbody>')
    for y, layer in enumerate(layers):
        lines.append(f'<tr><th scope="row">{layer}</th>')
        for x, kind in enumerate(kinds):
            if (layer, kind) not in page.tips:
                lines.append('<td class="none" tabindex="-1"><span aria-label="no module">·</span></td>')
                continue
            numbers = [finite_or_zero(grid.cells[y][x]) for grid in grids]
            heat = ";".join(
                f"--{grid.name}:{abs(number) / (grid.most or 1.0):.3f}" for grid, number in zip(grids, numbers, strict=True)
            )
            below = "".join(f" minus-{grid.name}" for grid, number in zip(grids, numbers, strict=True) if number < 0)
            shown = _spans(grids, (grid.cells[y][x] for grid in grids))
            tip = html.escape(page.tips[layer, kind])
            lines.append(f'<td class="cell{below}" tabindex="-1" style="{heat}" data-tip="{tip}">{shown}</td>')
        shown = _spans(grids, (grid.rows[y] for grid in grids))
        lines.append(f'<td class="sum">{shown}</td></tr>')
    lines.append('</tbody><tfoot><tr><th scope="row">total</th>')
    for x in range(len(kinds)):
        shown = _spans(grids, (grid.columns[x] for grid in grids))
        lines.append(f'<td class="sum">{shown}</td>')
    lines.append(f'<td class="sum">{_spans(grids, (grid.total for grid in grids))}</td></tr></tfoot>')
    return "".join(lines)


def _module_row(texts: Sequence[str]) -> str:
    path, *cells = map(html.escape, texts)
    return f'<tr><th scope="row">{path}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def budget_page(budget: BudgetMap, value: Value, title: str) -> str:
    """The page of a budget; ``value`` is shown first."""
    return _html_of(
        Page(
            title=title,
            facts=facts_of(budget),
            grids=[budget.grid(each) for each in get_args(Value)],
            shown=value,
            tips={place: "\n".join(map(_tip, here)) for place, here in places_of(budget.modules).items()},
            caption="Totals of norms are roots of summed squares.",
            sections=_rounds_section(budget),
            columns=("rank", "slots", "parameters", "allocated", "norm", "scaling"),
            modules=[
                (
                    m.path,
                    str(m.rank),
                    str(m.capacity),
                    f"{m.parameters:,}",
                    f"{m.allocated:,}",
                    short_number(m.norm),
                    f"{m.scaling:.4g}",
                )
                for m in budget.modules
            ],
        )
    )


def _tip(module: ModuleBudget) -> str:
    return (
        f"{module.path}\nrank {module.rank} of {module.capacity}\n"
        f"{module.parameters:,} of {module.allocated:,} parameters\n"
        f"norm {short_number(module.norm)}, scaling {module.scaling:.4g}"
    )


def _rounds_section(budget: BudgetMap) -> str:
    if not budget.rounds:
        return ""
    by = f", ranks scored by {html.escape(budget.score)}" if budget.score else ""
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("round", "step", "budget before", "pruned", "grown", "budget after", "loss before", "loss after")
    )

    def loss(number: float | None) -> str:
        return "·" if number is None else f"{number:.4f}"

    body = ""
    for entry in budget.rounds:
        numbers = [
            "·" if entry.step is None else str(entry.step),
            f"{entry.budget_before:,}",
            f"{entry.pruned:,}",
            f"{entry.grown:,}",
            f"{entry.budget_after:,}",
            loss(entry.loss_before),
            loss(entry.loss_after),
        ]
        cells = "".join(f"<td>{html.escape(number)}</td>" for number in numbers)
        body += f'<tr><th scope="row">{entry.round}</th>{cells}</tr>'
    return (
        f'<section><h2>Rounds</h2><div class="wide"><table class="list"><caption>{len(budget.rounds)} rounds{by}. '
        "Budgets are total ranks; losses are those of the validation batch.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def importance_page(importance: "Importance", title: str, suggested: Mapping[str, int] | None = None) -> str:
    """The page of what modules are worth, with the ranks suggested (path -> rank) where there are any."""
    grids = [importance.score_grid(), importance.rank_grid()]
    if suggested is not None:
        grids.append(importance.rank_grid(suggested, "suggested"))

    def tip(module: "ModuleImportance") -> str:
        lines = [module.path, f"score {module.total:.4g} {importance.unit}".rstrip(), f"rank {module.rank}"]
        if suggested is not None:
            lines.append(f"suggested {suggested[module.path]}")
        return "\n".join(lines)

    def row(module: "ModuleImportance") -> list[str]:
        mean = module.total / module.rank if module.rank else math.nan
        spread = (min(module.scores), max(module.scores)) if module.rank else (math.nan, math.nan)
        texts = [module.path, f"{module.total:.4g}", str(module.rank)]
        texts += ["·" if math.isnan(number) else f"{number:.3g}" for number in (mean, *spread)]
        return texts if suggested is None else [*texts, str(suggested[module.path])]

    columns = ["score", "rank", "mean of its ranks", "lowest", "highest"]
    return _html_of(
        Page(
            title=title,
            facts=importance_facts(importance),
            grids=grids,
            shown="score",
            tips={place: "\n".join(map(tip, here)) for place, here in places_of(importance.modules).items()},
            caption=f"Shown as score: {grids[0].title}, summed over the ranks of a module.",
            sections="",
            columns=columns if suggested is None else [*columns, "suggested"],
            modules=[row(module) for module in importance.modules],
        )
    )


def _value_style(signed: Mapping[str, bool]) -> str:
    """The rules that show the numbers of the chosen value and hide the others; value -> whether it has signs."""
    rules = []
    for name, has_signs in signed.items():
        chosen = f"[data-value={name}]"
        rules.append(f"{chosen} .cell{{--h:var(--{name})}}")
        if others := ",".join(f"span.{other}" for other in signed if other != name):
            rules.append(f"{chosen} :is({others}){{display:none}}")
        if has_signs:
            rules.append(f"{chosen} .minus-{name}{{--hot:var(--minus);--cold:var(--minus-cold)}}")
            sides = "linear-gradient(90deg,var(--minus),var(--minus-cold) 50%,var(--cold) 50%,var(--hot))"
            rules.append(f"{chosen} .scale i{{background:{sides}}}")
    return "\n".join(rules) + "\n"


# ---------------------------------------------------------------- the style sheet, the script, and the frame that both go into

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b2733;--faint:#5c6b7a;--line:#dde3e9;--cold:#eef4fa;--hot:#0b4a85;
--minus:#7a3500;--minus-cold:#fbf2ea;--on-cold:#000;--on-hot:#fff;--turn:.74;--accent:#0b63b0}
@media (prefers-color-scheme:dark){:root{--paper:#12181f;--ink:#e4eaf0;--faint:#98a6b5;--line:#2b3642;--cold:#1b2733;
--hot:#9bd0ff;--minus:#ffbf8f;--minus-cold:#2b211a;--on-cold:#fff;--on-hot:#000;--turn:.46;--accent:#7cbcf5}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.75rem 1.25rem 4rem}
h1{font-size:1.5rem;line-height:1.2;margin:0 0 1rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2.25rem 0 .5rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(24rem,100%),1fr));gap:.6rem 1.5rem;margin:0 0 1.5rem}
dt{color:var(--faint);font-size:.8rem}dd{margin:0;overflow-wrap:anywhere}
.bar{display:flex;flex-wrap:wrap;gap:.75rem 1.5rem;align-items:center;justify-content:space-between;
margin-bottom:.75rem}
fieldset{border:1px solid var(--line);border-radius:.5rem;margin:0;padding:0;display:flex;overflow:hidden}
fieldset[hidden]{display:none}
legend{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
label{padding:.35rem .9rem;cursor:pointer;border-left:1px solid var(--line)}label:first-of-type{border-left:0}
label:has(:checked){background:var(--accent);color:var(--paper)}label:has(:focus-visible){outline:2px solid var(--ink);
outline-offset:-3px;border-radius:.5rem}
input{position:absolute;opacity:0;pointer-events:none}
.scale{display:flex;gap:.5rem;align-items:center;color:var(--faint);font-size:.85rem}
.scale i{width:9rem;height:.7rem;border-radius:.2rem;background:linear-gradient(90deg,var(--cold),var(--hot))}
table{border-collapse:separate;border-spacing:2px;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--faint);font-size:.85rem;padding-bottom:.4rem}
.heat{table-layout:fixed}.heat th{font-weight:500;color:var(--faint);font-size:.85rem;padding:.1rem .3rem}
.heat thead th{position:sticky;top:0;background:var(--paper);z-index:1;overflow-wrap:anywhere}
.heat th:first-child{width:4rem;text-align:right;padding-right:.6rem;white-space:nowrap}
.heat td{text-align:center;padding:.1rem .2rem;border-radius:3px;font-size:.85rem}
.heat td.sum{font-weight:600}.heat td.none{color:var(--faint)}
.heat td:focus{outline:2px solid var(--ink);outline-offset:1px}
.cell{background:color-mix(in srgb,var(--hot) calc(var(--h)*100%),var(--cold));
color:color-mix(in srgb,var(--on-hot) clamp(0%,calc((var(--h) - var(--turn))*100000%),100%),var(--on-cold))}
.list{border-collapse:collapse;border-spacing:0;font-size:.85rem}
.list th,.list td{text-align:right;padding:.25rem .6rem;
border-bottom:1px solid var(--line)}.list thead th{color:var(--faint);font-weight:500;vertical-align:bottom}
.list th:first-child{text-align:left;font-weight:400;overflow-wrap:anywhere}
.wide{overflow-x:auto}summary{cursor:pointer;color:var(--accent);margin-top:2.25rem}
#tip{position:fixed;z-index:2;max-width:min(34rem,94vw);padding:.5rem .7rem;border-radius:.4rem;background:var(--ink);
color:var(--paper);font-size:.8rem;white-space:pre-line;overflow-wrap:anywhere;pointer-events:none}
@media (max-width:40rem){.heat td,.heat th{font-size:.7rem}.heat th:first-child{width:2.8rem;
padding-right:.3rem}}
"""

_SCRIPT = """
const main = document.querySelector("main"), heat = document.querySelector(".heat");
const tip = document.getElementById("tip"), choice = document.querySelector("fieldset");
choice.hidden = false;
choice.addEventListener("change", event => { main.dataset.value = event.target.value; });
// A restored page may remember another choice than the one it was written with.
main.dataset.value = choice.querySelector(":checked").value;

function show(cell) {
  if (!cell || !cell.dataset.tip) return hide();
  tip.textContent = cell.dataset.tip;
  tip.hidden = false;
  cell.setAttribute("aria-describedby", "tip");
  const at = cell.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const above = at.top - box.height - 6;
  const left = at.left + at.width / 2 - box.width / 2;
  tip.style.left = Math.max(6, Math.min(left, innerWidth - box.width - 6)) + "px";
  tip.style.top = (above > 6 ? above : at.bottom + 6) + "px";
}
function hide() { tip.hidden = true; }
heat.addEventListener("pointerover", event => show(event.target.closest("td")));
heat.addEventListener("pointerleave", hide);
heat.addEventListener("focusin", event => show(event.target.closest("td")));
heat.addEventListener("focusout", hide);
addEventListener("scroll", hide, {passive: true});

// One stop for the Tab key; the arrow keys walk from cell to cell.
const grid = [...heat.tBodies[0].rows].map(row => [...row.querySelectorAll("td[tabindex]")]);
if (grid.length && grid[0].length) grid[0][0].tabIndex = 0;
const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
heat.addEventListener("keydown", event => {
  if (event.key === "Escape") return hide();
  const step = steps[event.key], y = grid.findIndex(row => row.includes(event.target));
  if (!step || y < 0) return;
  const next = (grid[y + step[0]] || [])[grid[y].indexOf(event.target) + step[1]];
  event.preventDefault();
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none';style-src 'unsafe-inline';script-src 'unsafe-inline';img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main data-value="{value}">
<h1>{title}</h1>
<dl>{facts}</dl>
<div class="bar">
<fieldset hidden><legend>Show</legend>{choices}</fieldset>
<div class="scale" aria-hidden="true">{least}<i></i>{most}</div>
</div>
<table class="heat">
<caption>Layer by kind of module; a dot marks a place without a module.
{caption}</caption>
{heat}
</table>
{sections}
<details>
<summary>All modules</summary>
<div class="wide"><table class="list">
<thead><tr><th scope="col">module</th>{columns}</tr></thead>
<tbody>{modules}</tbody>
</table></div>
</details>
</main>
<div id="tip" role="tooltip" hidden></div>
<script>{script}</script>
</body>
</html>
"""
