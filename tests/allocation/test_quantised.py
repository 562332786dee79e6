"""RankAllocation on quantised bases: every score, rounds, compacting, saving, loading, merging; the base stays as it is.

GPTQ and AWQ need a package of their own; docs/reference/limits.md says what was tried with it.
"""

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from tiny_models import random_adapter, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.utils.quantization_config import TorchAoConfig

from gatewise import ConstantBudget, RankAllocation, ranks, scores
from gatewise.allocation.scoring import scoring
from gatewise.errors import GatewiseError

FOUR_BITS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4 double": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
}
KINDS = [*FOUR_BITS, "int8", "torchao int8", "torchao int4"]
SCORES = ["path_moments", "ablation", "sensitivity"]  # by rows of gates, by losses, and by gradients of the factors too


@pytest.fixture(scope="module")
def float_base(tmp_path_factory):
    """The folder of a model whose widths quantisers take."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def base(float_base):
    """base(kind, dtype) -> the model, quantised."""

    def load(kind, dtype=torch.float32):
        how = None
        if kind in FOUR_BITS:
            how = BitsAndBytesConfig(load_in_4bit=True, **FOUR_BITS[kind])
        elif kind == "int8":
            how = BitsAndBytesConfig(load_in_8bit=True)
        elif kind == "torchao int8":
            how = TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
        model = AutoModelForCausalLM.from_pretrained(float_base, dtype=dtype, quantization_config=how)
        if kind == "torchao int4":  # Transformers trains no model that it has loaded in 4 bits of torchao
            ao = pytest.importorskip("torchao.quantization")
            width = ao.granularity.PerGroup(32)
            ao.quantize_(model.model, ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=width))
        return model

    return load


@pytest.fixture
def rows():
    ids = torch.randint(1, 60, (24, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": one, "labels": one} for one in ids]


@pytest.fixture
def held_out(rows):
    return {key: torch.stack([row[key] for row in rows[:6]]) for key in rows[0]}


def with_lora(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))


def parts(tensor):
    """The plain tensors that a weight is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [one for name in tensor.__tensor_flatten__()[0] for one in parts(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    return [tensor.data] + ([] if state is None else [state.absmax])


def of_the_base(model):
    """Path -> the plain tensors of each quantised weight."""
    return {path: parts(layer.get_base_layer().weight) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def copied(weights):
    return {path: [one.clone() for one in tensors] for path, tensors in weights.items()}


def assert_same(found, expected):
    for path in found:
        for one, other in zip(found[path], expected[path], strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def places(weights):
    return {path: [(one.data_ptr(), one.dtype) for one in tensors] for path, tensors in weights.items()}


def logits(model, batch):
    """In training's mode: in evaluation's, bitsandbytes rounds what goes into 8-bit layers."""
    with torch.no_grad():
        return model.train()(batch["input_ids"]).logits


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("nf4 double", torch.bfloat16), ("int8", torch.bfloat16)]
)
def test_ends_as_a_plain_adapter_on_an_untouched_base(base, rows, held_out, tmp_path, kind, dtype):
    model = base(kind, dtype)
    if kind in FOUR_BITS:
        model = prepare_model_for_kbit_training(model)
    model = with_lora(model)
    weights = of_the_base(model)
    before, before_places = copied(weights), places(weights)
    while_scoring = []

    def looking_score(model, batch, adapter=None):
        while_scoring.append(places(of_the_base(model)))
        return scores.path_moments(model, batch, adapter=adapter)

    allocation = RankAllocation(looking_score, ConstantBudget(rounds=2, first_round=3, recover=3), held_out, budget="ranks")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=9,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        eval_strategy="steps",  # on some processors, bitsandbytes would pack its weights for good
        eval_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[allocation]).train()
    assert [one.step for one in allocation.history] == [3, 6]
    assert while_scoring == [before_places, before_places]
    left = of_the_base(model)
    assert left  # of modules that kept a rank
    assert_same(left, before)
    assert sum(ranks(model).values()) <= allocation.budget
    assert all(one.pruned and one.grown for one in allocation.history)

    expected = logits(model, held_out)
    model.save_pretrained(tmp_path / "adapter")
    fresh = base(kind, dtype)
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(fresh) if kind in FOUR_BITS else fresh, tmp_path / "adapter")
    assert ranks(loaded) == {path: rank for path, rank in allocation.history[-1].ranks.items() if rank}
    assert torch.equal(logits(loaded, held_out), expected)
    if kind == "torchao int4":
        with pytest.raises(ValueError, match="get_apply_tensor_subclass"):  # PEFT's own
            loaded.merge_and_unload()
    else:
        with loaded.disable_adapter():
            bare = logits(loaded, held_out)
        merged = logits(loaded.merge_and_unload(), held_out)
        # A merged weight is rounded again.
        assert (merged - expected).norm() < 0.4 * (bare - expected).norm()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nf4 double"])  # whose products are in bfloat16
@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_the_same_weights_in_float32(base, held_out, kind, score):
    torch.manual_seed(1)
    model = random_adapter(with_lora(base(kind)), scale=0.05)
    weights = of_the_base(model)
    before, before_places = copied(weights), places(weights)
    with scoring(model):
        assert places(of_the_base(model)) == before_places
    found = getattr(scores, score)(model.eval(), held_out)
    assert places(of_the_base(model)) == before_places
    assert_same(of_the_base(model), before)
    for layer in [one for one in model.modules() if isinstance(one, LoraLayer)]:
        layer.base_layer = plain(layer.get_base_layer())
    expected = getattr(scores, score)(model, held_out)
    for path, values in expected.items():
        torch.testing.assert_close(found[path], values, rtol=2e-3, atol=2e-3 * float(values.abs().max()))


def plain(quantised):
    """A linear layer with the numbers that a quantised one stands for."""
    weight = quantised.weight
    if isinstance(weight, bnb.nn.Params4bit):
        values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    elif isinstance(weight, bnb.nn.Int8Params):
        scale = weight.SCB if quantised.state.SCB is None else quantised.state.SCB
        values = weight.data * scale[:, None] / 127
    else:
        values = weight.dequantize()
    made = torch.nn.Linear(values.shape[1], values.shape[0], bias=False)
    made.weight = torch.nn.Parameter(values.detach().float(), requires_grad=False)
    return made


class Dynamic(torch.nn.Module):
    """As torchao's layers with dynamic activations: integers, and a product that no gradient passes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", linear.weight.detach().round().to(torch.int8))

    @torch.no_grad()
    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


def test_a_base_that_passes_no_gradient_is_refused(base, rows, held_out, tmp_path):
    model = with_lora(base("plain"))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    settings = {"args": arguments, "train_dataset": rows}
    Trainer(model=model, callbacks=[RankAllocation(validation_batch=held_out)], **settings)
    model = with_lora(base("plain"))
    layer = next(one for path, one in model.named_modules() if path.endswith("layers.0.self_attn.q_proj"))
    layer.base_layer = Dynamic(layer.base_layer)
    with pytest.raises(GatewiseError, match=r"^model\.layers\.0\.self_attn\.q_proj is quantised .* no gradient passes"):
        Trainer(model=model, callbacks=[RankAllocation(validation_batch=held_out)], **settings)


def test_trls_sft_trainer_that_makes_the_adapter_itself(base, held_out, tmp_path):
    """QLoRA as TRL runs it: in bfloat16, on a 4-bit base, with gradient checkpointing and a paged 8-bit optimiser."""
    trl = pytest.importorskip("trl")
    allocation = RankAllocation(schedule=ConstantBudget(rounds=2, first_round=2, recover=2), validation_batch=held_out)
    trainer = trl.SFTTrainer(
        model=base("nf4 double", torch.bfloat16),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            optim="paged_adamw_8bit",
            gradient_checkpointing=True,
            bf16=True,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(16)]),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[allocation],
    )
    before = copied(of_the_base(trainer.model))
    trainer.train()
    assert [one.step for one in allocation.history] == [2, 4]
    assert all(one.pruned and one.grown for one in allocation.history)
    assert_same(of_the_base(trainer.model), before)
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base("nf4 double", torch.bfloat16), tmp_path / "adapter")
    assert ranks(loaded) == {path: rank for path, rank in allocation.history[-1].ranks.items() if rank}
