"""What the HTML page is made of: its style sheet, its script, and the frame that both go into."""

from collections.abc import Mapping

STYLE = """
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


def value_style(signed: Mapping[str, bool]) -> str:
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


SCRIPT = """
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

PAGE = """<!doctype html>
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
