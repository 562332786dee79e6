"""How a command reads the data that a saved adapter is run on, and where: the options that ``eval`` and ``inspect`` share."""

from dataclasses import dataclass

from gatewise.errors import GatewiseError


@dataclass(frozen=True)
class DataOptions:
    """All of them may be left out: the adapter's note says how its run did it.

    Attributes:
        base: the base model, if not the one that the adapter names.
        split: the split of a Hugging Face data set; of a file "train", "dev" or "test", as the adapter's run dealt its rows out.
        prompt: a prompt template in place of the run's; an adapter from elsewhere has none and gets the plain one for the data.
        labels: ``"no,yes"``, the labels in the order of the classes, or ``"no=bad,yes=good"``, with the words written for them.
        limit: only the first rows.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        columns: ``"text=message,label=category"``, the columns that fields are read from, in place of the run's.
    """

    base: str | None = None
    split: str | None = None
    prompt: str | None = None
    labels: str | None = None
    limit: int | None = None
    device: str = "auto"
    columns: str | None = None

    def __post_init__(self) -> None:
        for name in ("base", "split", "prompt", "labels", "columns"):
            if getattr(self, name) == "":  # as an unset variable of a shell script gives it
                raise GatewiseError(f"{name} is an empty text: give a value, or leave it out")
