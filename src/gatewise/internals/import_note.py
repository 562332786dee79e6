"""What a saved adapter of our types says to somebody who loads it without gatewise.

PEFT then stops with a bare ``KeyError`` of the type's name, before any of our code could run. So the two files that people look at
next say what is missing: ``adapter_config.json`` under ``requires``, and the model card. Nothing here imports PEFT, which may be
importing us just now (see registry.py).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatewise.files import whole_file

REQUIRES = "gatewise: `import gatewise` before PEFT loads this adapter, or PEFT stops with a KeyError of its peft_type"

_HEADING = "## Needs gatewise"
_NOTE = f"""{_HEADING}

PEFT knows this type of adapter once the package gatewise has been imported. Without it PEFT stops with `KeyError: '{{name}}'`.

```python
import gatewise
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this-adapter")
```
"""


@dataclass
class SavedWithNote:
    """A configuration of PEFT that is saved with a note on what to import. It goes in front of PEFT's own class."""

    requires: str = field(
        default=REQUIRES,
        repr=False,
        compare=False,
        metadata={"help": "A note for those who load the adapter without gatewise; always the same."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.requires = REQUIRES

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT, and the note into the model card that PEFT has written, if there is one."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        # Of several adapters each has a folder of its own, below that of the card.
        for card in (folder / "README.md", folder.parent / "README.md"):
            text = card.read_text("utf-8") if card.is_file() else ""
            if "library_name: peft" in text:
                if _HEADING not in text:
                    with whole_file(card) as part:
                        part.write_text(with_note(text, str(self.peft_type.value)), "utf-8")  # type: ignore[attr-defined]
                break


def with_note(card: str, name: str) -> str:
    """A model card with the note on a ``peft_type`` under its title, or at its end where it has none."""
    lines, note = card.splitlines(), _NOTE.format(name=name)
    start = lines.index("---", 1) if lines[:1] == ["---"] and "---" in lines[1:] else 0  # after the metadata, where # is a comment
    title = next((index for index, line in enumerate(lines) if index >= start and line.startswith("# ")), len(lines) - 1)
    return "\n".join([*lines[: title + 1], "", note, *lines[title + 1 :]]) + "\n"
