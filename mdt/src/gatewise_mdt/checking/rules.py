"""All rules: the kind of what each lists, how sure it is, and whether it asks for more than a look.

How sure a rule is was measured by ``mdt/benchmarks/check.py`` on the training passages of Text2MDT in both languages: of what it
lists there, the share that is right when every passage comes once with the annotators' tree and once with a mistake in it. That
counts what the annotators left out themselves against the rule.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gatewise_mdt.checking import branches, content, numbers, prohibitions
from gatewise_mdt.checking.cover import Cover
from gatewise_mdt.checking.finding import Finding
from gatewise_mdt.checking.marks import Marks


class Rule(NamedTuple):
    """A rule, how sure it is, and whether it errs too often to ask for a tick."""

    kind: str
    find: Callable[[Marks, Cover], Iterator[Finding]]
    sure: float
    is_hint: bool = False


RULES: tuple[Rule, ...] = (
    Rule("empty tree", content.empty_trees, 0.98),
    Rule("given though forbidden", prohibitions.given_though_forbidden, 0.6),
    Rule("forbidden though given", prohibitions.forbidden_though_given, 0.96),
    Rule("dose of another drug", numbers.other_drugs_doses, 0.62),
    Rule("number not in the text", numbers.other_numbers, 0.76),
    Rule("dose", numbers.lost_doses, 0.75),
    Rule("number", numbers.lost_numbers, 0.59),
    Rule("limit", numbers.lost_limits, 0.86),
    Rule("frequency", numbers.lost_frequencies, 0.56),
    Rule("route", numbers.lost_routes, 0.95),
    Rule("negation", prohibitions.lost_negations, 0.91),
    Rule("negation", prohibitions.added_negations, 0.98),
    Rule("negation", prohibitions.inner_negations, 0.91),  # by what the other lists; there are none in those passages
    Rule("prohibition", prohibitions.lost_prohibitions, 0.53),
    Rule("branches", branches.turned_branches, 0.85),
    Rule("branches", branches.other_rows, 0.85),
    Rule("empty leaf", content.empty_leaves, 0.96),
    Rule("heading", content.lost_headings, 0.5),
    Rule("otherwise", content.lost_otherwise, 0.8),
    Rule("condition", content.lost_conditions, 0.5),
    Rule("recommendation", content.lost_recommendations, 0.5),
    Rule("words", content.lost_words, 0.1, is_hint=True),
)
