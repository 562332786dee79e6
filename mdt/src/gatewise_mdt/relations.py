"""The six relations of Text2MDT (arXiv 2401.02034) in English and Chinese, and the short words a model writes for them."""

from typing import Literal, get_args

from gatewise.errors import GatewiseError

Language = Literal["en", "zh"]

RELATIONS: dict[str, str] = {
    "clinical manifestation": "临床表现",
    "drug therapy": "治疗药物",
    "therapeutic schedule": "治疗方案",
    "dosage and administration": "用法用量",
    "prohibited drugs": "禁用药物",
    "basic condition": "基本情况",
}
GIVES = ("drug therapy", "therapeutic schedule")
AVOIDS = "prohibited drugs"
DOSE = "dosage and administration"
# One word each, so that a model spends few tokens on them; the Chinese names are short as they are.
SHORT: dict[str, str] = {
    "clinical manifestation": "sign",
    "drug therapy": "drug",
    "therapeutic schedule": "plan",
    "dosage and administration": "dose",
    "prohibited drugs": "avoid",
    "basic condition": "basic",
}
_ENGLISH = {chinese: english for english, chinese in RELATIONS.items()}
_FROM_SHORT = {short: name for name, short in SHORT.items()}


def is_relation(name: str) -> bool:
    """Whether this is, letter by letter, one of the twelve names."""
    return name in RELATIONS or name in _ENGLISH


def language_of(relation: str) -> Language:
    """The language of a relation's name; every name that is not one of the Chinese counts as English."""
    return "zh" if relation in _ENGLISH else "en"


def relation_in(relation: str, language: Language) -> str:
    """The name of a relation in a language.

    Raises:
        GatewiseError: the relation is not known.
    """
    if not is_relation(relation):
        raise GatewiseError(f"{relation!r} is no relation: expected {expected_relations()}")
    english = _ENGLISH.get(relation, relation)
    return RELATIONS[english] if language == "zh" else english


def check_language(language: str) -> None:
    """Refuses every language but the two.

    Raises:
        GatewiseError: the language is not known.
    """
    if language not in get_args(Language):
        raise GatewiseError(f"the language is {language!r}: expected 'en' (English) or 'zh' (Chinese)")


def expected_relations() -> str:
    """The twelve names, for error messages."""
    return "one of " + ", ".join(f"{english} ({chinese})" for english, chinese in RELATIONS.items())


def short(relation: str) -> str:
    """The word that stands for a relation in what a model writes; in Chinese the name itself."""
    return SHORT.get(relation, relation)


def from_short(word: str) -> str | None:
    """The relation that a short word or a name stands for, exactly; None for any other."""
    name = _FROM_SHORT.get(word, word)
    return name if is_relation(name) else None
