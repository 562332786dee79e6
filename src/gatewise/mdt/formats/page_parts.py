"""What the page of trees is made of: its style sheet, its script, and the frames that both go into."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--back:#f3f5f7;--ink:#18222d;--faint:#55636f;--line:#d5dce3;--warn:#9a4b00;
--warn-back:#fff4e5;--on:#ffd54a;--on-ink:#201800;--mark:#fff3c4;--accent:#0b63b0;
--condition:#e8f0fb;--condition-line:#2f6db5;--decision:#e6f4ea;--decision-line:#2d7d46;--nothing:#f5f6f7;--nothing-line:#7c8894;
--yes:#2d7d46;--no:#a23b3b}
@media (prefers-color-scheme:dark){:root{--paper:#141b22;--back:#0d1217;--ink:#e6ebf0;--faint:#9caab8;--line:#2c3844;
--warn:#ffb870;--warn-back:#2b2014;--on:#ffd54a;--on-ink:#201800;--mark:#3d3616;--accent:#7cbcf5;
--condition:#17293d;--condition-line:#6fa8e6;--decision:#15301f;--decision-line:#69bd85;--nothing:#1b232b;--nothing-line:#77848f;
--yes:#69bd85;--no:#e88484}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI","Noto Sans","Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif}
header,main{max-width:110rem;margin:0 auto;padding:0 1.5rem}header{padding-top:1.25rem}
h1{font-size:1.35rem;line-height:1.25;margin:0 0 .75rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 .75rem;overflow-wrap:anywhere}
h3{font-size:.8rem;font-weight:600;color:var(--faint);margin:0 0 .2rem}
.notice{margin:0 0 .5rem;padding:.5rem .8rem;border-radius:.4rem;background:var(--warn-back);color:var(--warn);font-weight:600}
.warnings{margin:0 0 1rem;padding:.6rem .9rem;border:1px solid var(--warn);border-left-width:5px;border-radius:.4rem;
color:var(--warn)}.warnings h3{color:inherit;font-size:.9rem}.warnings ul{margin:0;padding-left:1.2rem;overflow-wrap:anywhere}
.hint,.note{color:var(--faint);font-size:.9rem;margin:0 0 1rem}
nav{margin-bottom:1rem}summary{cursor:pointer;color:var(--accent)}a{color:var(--accent)}
article{background:var(--paper);border:1px solid var(--line);border-radius:.6rem;padding:1.25rem;margin-bottom:1.5rem}
.both{display:grid;grid-template-columns:minmax(16rem,24rem) minmax(0,1fr);gap:1.5rem;align-items:start}
.text{position:sticky;top:1rem}.text p{margin:0 0 1.1rem;white-space:pre-wrap;overflow-wrap:anywhere}
.tree{overflow:auto}.tree svg{display:block;max-width:100%;height:auto;margin:0 auto}
@media (max-width:60rem){.both{grid-template-columns:minmax(0,1fr)}.text{position:static}}
pre{overflow:auto;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
mark{background:var(--mark);color:inherit;border-radius:.2rem;cursor:pointer;padding:.05rem 0}
mark.on{background:var(--on);color:var(--on-ink)}
mark:focus-visible{outline:3px solid var(--accent);outline-offset:1px}
.node{cursor:pointer;outline:none}.node.on .box{stroke-width:4}
.node:focus-visible .box{stroke:var(--accent);stroke-width:4}
.triple.on .ink{text-decoration:underline;text-decoration-thickness:2px}
.paper{fill:var(--paper)}text.ink{fill:var(--ink)}text.faint{fill:var(--faint)}text.warn{fill:var(--warn)}
.condition .box{fill:var(--condition);stroke:var(--condition-line)}
.decision .box{fill:var(--decision);stroke:var(--decision-line)}
.nothing .box{fill:var(--nothing);stroke:var(--nothing-line)}
path.yes{stroke:var(--yes)}path.no{stroke:var(--no)}path.trunk{stroke:var(--faint)}text.yes{fill:var(--yes)}text.no{fill:var(--no)}
@media print{body{background:#fff}article{break-inside:avoid}.hint{display:none}}
"""
# Phrases and boxes mark each other; in a file of its own on the page of reviews.
MARKING = """
function marking(article) {
  const names = mark => mark.dataset.of.split(" ");
  const twins = (one, triple) =>
    one.dataset.triple ? one.dataset.triple === triple : one.dataset.node === triple.split(".")[0];
  function light(target) {
    const marks = article.querySelectorAll("mark");
    const parts = article.querySelectorAll(".node,.triple");
    const mark = target && target.closest("mark");
    const part = target && (target.closest(".triple") || target.closest(".node"));
    for (const one of marks) {
      let on = one === mark;
      if (part && part.dataset.triple) on = names(one).includes(part.dataset.triple);
      else if (part) on = names(one).some(name => name.split(".")[0] === part.dataset.node);
      one.classList.toggle("on", on);
    }
    for (const one of parts) {
      let on = one === part || (part && one.contains(part));
      // On the page of reviews a triple stands in the drawing and in the editor.
      if (part && part.dataset.triple) on ||= twins(one, part.dataset.triple);
      if (mark && one.dataset.triple) on = names(mark).includes(one.dataset.triple);
      else if (mark) on = names(mark).some(name => name.split(".")[0] === one.dataset.node);
      one.classList.toggle("on", Boolean(on));
    }
  }
  const back = () => light(article.contains(document.activeElement) ? document.activeElement : null);
  article.addEventListener("pointerover", event => {
    const target = event.target.closest("mark,.node,.triple");
    if (target) light(event.target); else back();
  });
  article.addEventListener("pointerleave", back);
  article.addEventListener("focusin", event => light(event.target));
  article.addEventListener("focusout", () => light(null));
  article.addEventListener("keydown", event => {
    if (event.key === "Escape") document.activeElement.blur();
  });
}
"""

SCRIPT = f"""{MARKING}
for (const article of document.querySelectorAll("article")) marking(article);
"""

ARTICLE = """<article id="{prefix}">
{heading}{note}{warnings}<div class="both">
<section class="text">{text}</section>
<section class="tree" aria-label="{tree}">{svg}</section>
</div>
<details><summary>{as_outline}</summary><pre>{outline}</pre></details>
</article>
"""

PAGE = """<!doctype html>
<html lang="{language}">
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
<header>
<h1>{title}</h1>
<p class="notice">{notice}</p>
<p class="hint">{hint}</p>
{records}
</header>
<main>
{articles}
</main>
<script>{script}</script>
</body>
</html>
"""
