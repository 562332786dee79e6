"""Adapters of every kind, exported: stock PEFT loads plain LoRA with the logits of the original, and what is lost is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from saved_models import IDS, bert_config, llama_config, saved
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from typer.testing import CliRunner

from gatewise.adapters.difference import compare, plain_lora
from gatewise.adapters.export import to_lora
from gatewise.adapters.files import read_lora
from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.models import load_model
from gatewise.serving.engines import serving_settings

LINEAR = ["q_proj", "v_proj", "down_proj"]
Made = tuple[PeftModel, Path, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output weights are those of its embeddings, as in SmolLM2."""
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(llama_config()), tmp_path_factory.mktemp("base"))


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Callable[..., Made]:
    """made(kind, **settings) -> a model with an adapter that looks trained, the folder it is saved in, and its logits."""

    def make(kind: str = "Lora", **settings: Any) -> Made:
        if kind != "PromptTuning":
            settings = {"target_modules": LINEAR, **settings}
        config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings)
        model = get_peft_model(load_model(base, dtype=torch.float32), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
            logits = model(IDS).logits
        model.save_pretrained(tmp_path / "in", save_embedding_layers=False)
        return model, tmp_path / "in", logits

    return make


def logits_in_peft(base: Path, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(load_model(base, dtype=torch.float32), str(folder)).eval()(IDS).logits


EXACT: list[tuple[str, dict[str, Any]]] = [
    ("Lora", {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}),
    ("AdaLora", {"init_r": 4, "target_r": 2, "total_step": 10}),
]
DIFFERENCES: list[tuple[str, dict[str, Any]]] = [
    ("Lora", {"use_dora": True}),
    ("Lora", {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    ("Lora", {"r": 2, "init_lora_weights": "pissa"}),
    ("Lora", {"r": 2, "init_lora_weights": "olora", "use_rslora": True}),
    ("Lora", {"modules_to_save": ["lm_head"]}),
    ("Lora", {"trainable_token_indices": [2, 5]}),
    ("TrainableTokens", {"token_indices": [2, 5], "target_modules": ["embed_tokens"]}),
    ("LoHa", {"r": 2}),
    ("LoKr", {"r": 2}),
    ("OFT", {"oft_block_size": 4}),
    ("IA3", {"feedforward_modules": ["down_proj"]}),
    ("Vera", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    ("Miss", {"r": 4}),
]


@pytest.mark.parametrize(("kind", "settings"), [*EXACT, *DIFFERENCES])
@pytest.mark.filterwarnings("ignore:.*(tied|merge|save_embedding_layers|tie_word_embeddings):UserWarning")
def test_it_is_plain_lora_with_the_same_logits(
    made: Callable[..., Made], base: Path, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    model, folder, expected = made(kind, **settings)
    exact = (kind, settings) in EXACT
    for source in (folder, model):
        out = to_lora(source, tmp_path / type(source).__name__, base="nowhere" if exact else None)
        torch.testing.assert_close(logits_in_peft(base, out), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    plain = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none", "modules_to_save": None}
    plain |= {"init_lora_weights": True, "trainable_token_indices": None}
    assert plain.items() <= config.items()
    assert all(".lora_" in name for name in load_file(out / "adapter_model.safetensors"))
    assert serving_settings(read_lora(out), "llama")["vllm"] is not None
    assert (out / "export.json").exists() == (not exact)


def test_adalora_leaves_out_what_its_rounds_have_masked(made: Callable[..., Made], base: Path, tmp_path: Path) -> None:
    model, folder, _ = made("AdaLora", init_r=4, target_r=2, total_step=10)
    layers = [module for module in model.modules() if hasattr(module, "lora_E") and "default" in module.lora_E]
    with torch.no_grad():
        layers[0].lora_E["default"][1:] = 0
        layers[1].lora_E["default"].zero_()
        expected = model(IDS).logits
    model.save_pretrained(folder)
    out = to_lora(folder, tmp_path / "out")
    torch.testing.assert_close(logits_in_peft(base, out), expected, rtol=1e-5, atol=1e-5)
    assert sorted(module.rank for module in read_lora(out).modules) == [1, 4, 4, 4, 4]


def test_cut_differences_say_what_is_lost(made: Callable[..., Made], base: Path, tmp_path: Path) -> None:
    """Against the numbers, worked out from the merged weights."""
    _, folder, _ = made("LoHa", r=3)
    merged = dict(PeftModel.from_pretrained(load_model(base), str(folder)).merge_and_unload().named_parameters())
    before = dict(load_model(base).named_parameters())
    said: list[str] = []
    for settings in ({"rank": 2}, {"keep": 0.9}):
        out = to_lora(folder, tmp_path / str(settings), say=said.append, **settings)
        told = json.loads((out / "export.json").read_text())
        assert told["from"] == "LOHA"
        for module in read_lora(out).modules:
            delta = (merged[f"{module.path}.weight"] - before[f"{module.path}.weight"]).detach()
            lost = float((delta - module.scaling * module.b @ module.a).norm() / delta.norm())
            assert told["modules"][module.path] == {"rank": module.rank, "lost": pytest.approx(lost, abs=1e-5)}
            assert lost > 0.01
            assert module.rank == 2 if "rank" in settings else lost**2 <= 0.1
        worst = max(one["lost"] for one in told["modules"].values())
        assert f"{worst:.2g}" in said[-1]
    assert json.loads((tmp_path / "{'rank': 2}" / "adapter_config.json").read_text())["rank_pattern"] == {}
    with pytest.raises(GatewiseError, match=r"^keep is 1.5, expected a share of the energy in \(0, 1\], such as 0.9999$"):
        plain_lora(folder, keep=1.5)


def test_on_data_it_tells_logits_and_losses(made: Callable[..., Made], base: Path, tmp_path: Path) -> None:
    _, folder, _ = made("LoHa", r=2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{word} good bad", "label": word}) + "\n" for word in ("good", "bad")))
    whole = compare(folder, to_lora(folder, tmp_path / "whole"), str(rows))
    assert (whole.logits, whole.after) == (pytest.approx(0, abs=1e-5), pytest.approx(whole.before, abs=1e-5))
    cut = compare(folder, to_lora(folder, tmp_path / "cut", rank=1), str(rows))
    assert cut.before == whole.before
    assert min(cut.logits, abs(cut.after - cut.before)) > 1e-4
    wrong = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "told"), "--data", "sample:nothing"])
    assert (wrong.exit_code, (tmp_path / "told").exists()) == (2, False)
    (folder / "gatewise.json").write_text('{"quantization": "nf4"}')
    told = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "told"), "--rank", "1", "--data", str(rows)])
    assert (told.exit_code, "largest share of a difference that is lost: 0." in told.stderr) == (0, True), told.output
    assert "it was trained on weights in nf4, and the difference is that to the weights as they are" in told.stderr
    assert f"largest difference of a logit: {cut.logits:.2g}; loss {cut.before:.4f} before, {cut.after:.4f} after" in told.stdout


def test_a_model_in_bfloat16_is_not_taken_for_a_change_of_all_weights(made: Callable[..., Made], tmp_path: Path) -> None:
    model, _, _ = made(use_dora=True)
    out = to_lora(model.to(torch.bfloat16), tmp_path / "out")
    assert {module.path.rpartition(".")[2] for module in read_lora(out).modules} == set(LINEAR)


@pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tie_word_embeddings|tied):UserWarning")
def test_base_weights_in_the_file_are_left_out_or_a_difference(made: Callable[..., Made], base: Path, tmp_path: Path) -> None:
    """PEFT puts those of embeddings with LoRA there, and engines pass over them."""
    model, folder, expected = made(target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(folder)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert name in load_file(folder / "adapter_model.safetensors")
    for at, changed in enumerate((False, True)):
        if changed:
            with torch.no_grad():
                model.get_input_embeddings().base_layer.weight[3] += 1
                expected = model(IDS).logits
            model.save_pretrained(folder)
        out = to_lora(folder, tmp_path / str(at))
        torch.testing.assert_close(logits_in_peft(base, out), expected, rtol=1e-5, atol=2e-5)
        assert name not in load_file(out / "adapter_model.safetensors")
        assert serving_settings(read_lora(out), "llama")["vllm"] is not None


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_lora_beside_whole_modules_is_kept_as_it_is(tmp_path: Path) -> None:
    """Also on GPT-2's square weights, which are the other way round."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=1))
    model = load_model(saved(gpt2, tmp_path / "base"), dtype=torch.float32)
    config = LoraConfig(
        r=3, target_modules=["attn.c_proj"], modules_to_save=["lm_head"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    torch.nn.init.normal_(model.base_model.model.transformer.h[0].attn.c_proj.lora_B["default"].weight)
    torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "in")
    (own,) = read_lora(tmp_path / "in").modules
    found = {module.path: module for module in plain_lora(tmp_path / "in").file.modules}
    assert found.keys() == {own.path, "lm_head"}
    torch.testing.assert_close(found[own.path].a, own.a, rtol=0, atol=0)


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = saved(BertForSequenceClassification(bert_config()), tmp_path / "base")
    model = get_peft_model(
        load_model(base, task="classification", num_labels=2),
        LoraConfig(use_dora=True, target_modules=["query"], task_type="SEQ_CLS"),
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        expected = model(IDS).logits
        model.save_pretrained(tmp_path / "in")
        out = to_lora(tmp_path / "in", tmp_path / "out")
        loaded = PeftModel.from_pretrained(load_model(base, task="classification", num_labels=2), str(out)).eval()
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (
            "LNTuning",
            {"target_modules": ["norm"]},
            r"changes model\.norm\.weight, which LoRA on linear layers and embeddings cannot",
        ),
        ("Lora", {"alora_invocation_tokens": [2]}, r"cannot be merged .*: aLoRA does not support merging"),
        ("Lora", {"lora_bias": True}, r"cannot be merged .*`lora_bias=True`"),
        ("Lora", {"init_lora_weights": "lora_ga"}, r"took something out of the base model that is in no file: save it with"),
        ("Lora", {"init_lora_weights": "pissa_niter_4", "r": 2}, r"'pissa_niter_4', which took something out of the base model"),
        ("PromptTuning", {"num_virtual_tokens": 2}, "PROMPT_TUNING: it adds prompt tokens, not weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias:UserWarning")
def test_what_would_be_lost_is_refused(
    made: Callable[..., Made], tmp_path: Path, kind: str, settings: dict[str, Any], said: str
) -> None:
    _, folder, _ = made(kind, **settings)
    with pytest.raises(GatewiseError, match=said):
        to_lora(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
