"""What a causal model reads before it writes a tree."""

from gatewise_mdt.relations import Language

_WORDS: dict[Language, tuple[str, str, str]] = {
    "en": ("Population: ", "Passage: ", "Decision tree:"),
    "zh": ("人群：", "原文：", "诊疗决策树："),
}


def prompt(text: str, language: Language) -> str:
    """What the model reads.

    Args:
        text: "population@passage"; without an "@" all of it is the passage.
    """
    before, passage, tree = _WORDS[language]
    population, said = parted(text)
    return "\n".join([*([before + population] if population else []), passage + said, tree])


def parted(text: str) -> tuple[str, str]:
    """Population and passage of a text, each on one line."""
    before, at, after = text.partition("@")
    return (" ".join(before.split()) if at else "", " ".join((after if at else before).split()))
