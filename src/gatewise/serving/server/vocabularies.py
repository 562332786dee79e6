"""The tokenizer of each adapter: its own where its folder has one, else the base model's. Equal ones are kept once."""

import hashlib
from collections import OrderedDict

from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.models.loading import load_tokenizer
from gatewise.serving.server.catalogue import Version

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
_MOST = 16  # that are kept


class Tokenizers:
    """For one thread at a time; the engine's may decode with what it gives.

    Args:
        base: the base model's tokenizer.

    Raises:
        GatewiseError: it is none of the tokenizers library.
    """

    def __init__(self, base: PreTrainedTokenizerBase) -> None:
        self._base = _ready(base)
        self._contents: dict[str, str] = {}  # of each version's files
        self._by_content: OrderedDict[str, PreTrainedTokenizerBase] = OrderedDict()

    def of(self, version: Version | None) -> PreTrainedTokenizerBase:
        """A version's, None for the base model's.

        Raises:
            ReplacedError: its folder is being replaced.
            GatewiseError: it cannot be read.
        """
        if version is None or not {"tokenizer.json", "tokenizer_config.json"} <= {name for name, *_ in version.signature}:
            return self._base
        content = self._contents.get(version.key, "")
        if content not in self._by_content:
            with version.copy() as folder:
                files = [folder / name for name in _FILES if (folder / name).is_file()]
                content = hashlib.sha256(
                    b"".join(hashlib.sha256(one.name.encode() + one.read_bytes()).digest() for one in files)
                ).hexdigest()
                if content not in self._by_content:
                    self._by_content[content] = _ready(load_tokenizer(folder))
            if len(self._contents) > 64 * _MOST:
                self._contents.clear()
            self._contents[version.key] = content
        self._by_content.move_to_end(content)
        while len(self._by_content) > _MOST:
            self._by_content.popitem(last=False)
        return self._by_content[content]


def _ready(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer after its first text: it may change settings of its own by that, and must not while another thread decodes."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise GatewiseError(
            f"the tokenizer ({type(tokenizer).__name__}) is none of the tokenizers library, by which answers are written here: "
            "take --engine vllm"
        )
    tokenizer("a", verbose=False)
    return tokenizer
