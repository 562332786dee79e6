"""How a row becomes text: the prompt a model reads and the continuations it may or should write after it."""

from dataclasses import dataclass
from functools import lru_cache
from string import Formatter

from gatewise.errors import GatewiseError
from gatewise.tasks.records import Records, Row

# What the model is asked for, by kind: a prompt that showed it would give the answer away.
_ANSWERS = {"label": ("label",), "choice": ("answer",), "number": ("answer",), "generation": ("target", "targets")}


@dataclass(frozen=True)
class Template:
    """A prompt and the words written for labels.

    Attributes:
        prompt: text with the fields of a row in braces, such as ``"Review: {text}\\nSentiment:"``. ``{{`` writes a
            brace. A list, such as ``{choices}``, is written one entry a line. Spaces at the end are dropped: every
            continuation brings its own.
        labels: label -> the word written for it; None writes the labels themselves.

    Raises:
        GatewiseError: the braces of the prompt do not match, or hold more than a field's name.
    """

    prompt: str
    labels: dict[str, str] | None = None

    def __post_init__(self) -> None:
        _parts(self.prompt)

    def check(self, records: Records) -> None:
        """Raises GatewiseError when the template cannot serve these records (see `render` and `candidates`)."""
        for _, field in _parts(self.prompt):
            if field in _ANSWERS[records.kind]:
                raise GatewiseError(f"the prompt {self.prompt!r} shows {{{field}}}, which is the answer; leave it out")
        if not any(field for _, field in _parts(self.prompt)):
            fields = [f"{{{name}}}" for name in records.rows[0] if name not in _ANSWERS[records.kind]]
            raise GatewiseError(
                f"the prompt {self.prompt!r} shows nothing of the row; write its fields in braces: {', '.join(fields)}"
            )
        self.render(records.rows[0])
        if records.labels is not None and self.labels is not None:
            missing = [label for label in records.labels if not self.labels.get(label, "").strip()]
            if missing:
                raise GatewiseError(f"the template's labels have no word for {missing[0]!r}; they have {_quoted(self.labels)}")
            words = [self.labels[label].strip() for label in records.labels]
            twice = [word for word in words if words.count(word) > 1]
            if twice:
                raise GatewiseError(f"the template's labels write {twice[0]!r} for more than one label; give each its own word")

    def render(self, row: Row) -> str:
        """The prompt of a row; of a field that is null nothing is written.

        Raises:
            GatewiseError: the prompt names a field that the row does not have.
        """
        pieces = []
        for text, field in _parts(self.prompt):
            pieces.append(text)
            if field is not None:
                if field not in row:
                    raise GatewiseError(f"the prompt {self.prompt!r} has {{{field}}}, but the row's fields are {_quoted(row)}")
                value = "" if row[field] is None else row[field]
                pieces.append("\n".join(map(str, value)) if isinstance(value, list) else str(value))
        return "".join(pieces).rstrip(" ")

    def candidates(self, records: Records, row: Row) -> list[str]:
        """The continuations to choose from (kinds "label" and "choice"), each beginning with a space."""
        if records.labels is not None:
            return [" " + (label if self.labels is None else self.labels[label]).strip() for label in records.labels]
        if records.kind == "choice":
            return [" " + choice.strip() for choice in row["choices"]]
        raise ValueError(f"rows of kind {records.kind!r} have no candidates")

    def target(self, records: Records, row: Row) -> str:
        """The right continuation, beginning with a space. Of several targets it is the first."""
        if records.kind in ("label", "choice"):
            return self.candidates(records, row)[records.gold_index(row)]
        if records.kind == "number":
            return " " + row["answer"].strip()
        return " " + references(row)[0].strip()


def default_template(records: Records) -> Template:
    """A plain template for records of this shape."""
    if records.kind == "label":
        pair = "premise" in records.rows[0]
        return Template("Premise: {premise}\nHypothesis: {hypothesis}\nLabel:" if pair else "Text: {text}\nLabel:")
    if records.kind == "generation":
        return Template("Input: {source}\nOutput:")
    return Template("Question: {question}\nAnswer:")


def references(row: Row) -> list[str]:
    """All the right texts of a generation row."""
    return list(row["targets"]) if "targets" in row else [row["target"]]


@lru_cache(maxsize=64)
def _parts(prompt: str) -> tuple[tuple[str, str | None], ...]:
    """The prompt as (text, field after it) pairs; a field is a plain name, without attributes or format codes."""
    try:
        parts = list(Formatter().parse(prompt))
    except ValueError as error:
        raise GatewiseError(f"the prompt {prompt!r} has unmatched braces ({error}); write {{{{ for a brace") from error
    for _, field, code, conversion in parts:
        if field is not None and (not field.isidentifier() or code or conversion):
            raise GatewiseError(
                f"the prompt {prompt!r}: braces may hold only a field's name, such as {{text}}; write {{{{ for a brace"
            )
    return tuple((text, field) for text, field, _, _ in parts)


def _quoted(names: dict[str, str] | Row) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
