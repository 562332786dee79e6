"""Whatever a document looks like, each of its words is in a passage, in the headings above one, or in a note."""

from collections.abc import Sequence

import pytest
from gatewise_mdt.documents.passages import split_passages
from gatewise_mdt.documents.reading import document_of
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import properties

from gatewise.errors import GatewiseError

# {} is a word that comes nowhere else.
_LINES = [
    "Give {} 5 mg daily.",
    "Do not give {} in renal failure",
    "{} is common in adults and children, who may have it for years without being told of it by anybody at all.",
    "if the patient has {}",
    "and {}",
    "- {}",
    "* {} 30 mg",
    "1. {}",
    "2.1 Adults with {}",
    "2. Treatment of {}",
    "Adults with {}",
    "Treatment of {}",
    "TREATMENT WITH {}",
    "{}",
    "30",
    "mg {} daily",
    "adults with {}@Give {} 5 mg.",
    "{} 10 mg @ night",
    "eGFR <{} and ALT >{}",
    "| {} | {} |",
    "|---|---|",
    "> {}",
    "---",
    "",
    "",
    "首选{}治疗。",
    "一、成人{}",
    "{}患者",
]
_MARKED = [
    "# {}",
    "## Adults with {}",
    "### 2.2 {}",
    "```",
    "    {} 5 mg",
    "[{}]: {}",
    "![{}](a.png)",
    "**{}** 5 mg",
    "<div>{}</div>",
    "<!-- {} -->",
]
_PAGE = [
    "<p>Give {} 5 mg.</p>",
    "<h2>Adults with {}</h2>",
    "<ul>",
    "<ol>",
    "<li>{}",
    "</li>",
    "</ul>",
    "<table>",
    "<tr>",
    "<th>{}",
    "<td colspan=2>{}",
    "<td rowspan=3>{}",
    "</table>",
    "<div>{}",
    "</div>",
    "<b>{}</b>",
    "<br>- {}",
    "<nav>{}</nav>",
    "<p hidden>{}</p>",
    "<dt>{}",
    "<dd>{}",
    "<main>",
    "<article>{}",
    "<footer>{}",
    "<h3><button>{}</button></h3>",
    "<button>{}</button>",
    "<dl><div>{}<dt>{}<dd>{}</div>",
    '<sup><a href="#f">1</a></sup>',
    "<p id=f>1. {}</p>",
    "<td>{}<nav>{}</nav>",
    "<tr>{}",
    "<caption>{}",
    "{}",
]


def _numbered(lines: Sequence[str]) -> tuple[str, list[str]]:
    words: list[str] = []
    made = []
    for line in lines:
        while "{}" in line:
            words.append(f"word{len(words)}x")
            line = line.replace("{}", words[-1], 1)
        made.append(line)
    return "\n".join(made), words


@pytest.mark.parametrize("suffix", [".txt", ".md", ".html"])
@properties
@given(data=st.data())
def test_every_word_is_somewhere(suffix: str, data: st.DataObject) -> None:
    kinds = _PAGE if suffix == ".html" else _LINES + (_MARKED if suffix == ".md" else ["\f"])
    text, words = _numbered(data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=25)))
    try:
        document = document_of(text.encode(), "a", suffix)
        passages = split_passages(document)
    except GatewiseError:
        # Only where there is nothing to say: a text with an instruction in it is never refused.
        assert "Give" not in text
        return
    held = [part for one in passages for part in (one.passage, one.population, *one.headings, *one.notes)]
    said = " ".join([*held, *document.notes]).lower()
    # Notes show so many of the texts that they name, and no more.
    if " more" not in said and "…" not in said:
        assert [word for word in words if word not in said] == []
