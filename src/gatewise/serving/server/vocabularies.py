"""The tokenizer of each adapter: its own where its folder has one, else the base model's. Equal ones are kept once."""

import hashlib
from collections import OrderedDict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gatewise.models.loading import load_tokenizer
from gatewise.serving.server.catalogue import Version

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
_MOST = 16  # that are kept


class Tokenizers:
    """For one thread at a time; the engine's may decode with what it gives.

    Args:
        base: the base model's tokenizer.
    """

    def __init__(self, base: PreTrainedTokenizerBase) -> None:
        self._base = _ready(base)
        self._by_version: OrderedDict[str, str] = OrderedDict()
        self._by_content: OrderedDict[str, PreTrainedTokenizerBase] = OrderedDict()

    def of(self, version: Version | None) -> PreTrainedTokenizerBase:
        """A version's, None for the base model's.

        Raises:
            ReplacedError: its folder is being replaced.
            GatewiseError: it cannot be read.
        """
        if version is None or not {"tokenizer.json", "tokenizer_config.json"} <= {name for name, *_ in version.signature}:
            return self._base
        content = self._by_version.get(version.key)
        if content is None or content not in self._by_content:
            with version.copied() as folder:
                content = _content(folder)
                if content not in self._by_content:
                    self._by_content[content] = _ready(load_tokenizer(folder))
            self._by_version[version.key] = content
            while len(self._by_version) > 64 * _MOST:
                self._by_version.popitem(last=False)
        self._by_content.move_to_end(content)
        while len(self._by_content) > _MOST:
            self._by_content.popitem(last=False)
        return self._by_content[content]


def _ready(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer after its first text: it may change settings of its own by that, and must not while another thread decodes."""
    tokenizer("a", verbose=False)
    return tokenizer


def _content(folder: Path) -> str:
    made = hashlib.sha256()
    for name in _FILES:
        if (folder / name).is_file():
            made.update(f"{name} ".encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return made.hexdigest()
