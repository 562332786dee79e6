"""Tiny random models, and adapters that look trained."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

VOCABULARY = 60
EXPERTS = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
"""LoRA on the stacked experts of "mixtral" and "qwen3_moe", and on linear layers."""

OTHER_LAYERS = {
    "llama": ["embed_tokens", "q_proj"],
    "gpt2": ["wte", "wpe", "c_attn"],
}
"""Family -> targets of LoRA with embeddings among linear layers."""

ALL_KINDS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in ("llama", "gpt2", "bert", "t5", "bart")),
    *((family, {"target_modules": targets}) for family, targets in OTHER_LAYERS.items()),
    *((family, EXPERTS) for family in ("mixtral", "qwen3_moe")),
]
"""(family, settings of LoRA): a model of each kind with each kind of LoRA layer."""


def tiny_base(family: str) -> Any:
    """A two-layer random model.

    "llama" and "gpt2" write texts, and so do "mixtral" and "qwen3_moe", which have stacked experts, and "t5" and "bart", which have
    an encoder. "bert", "vit" (of images) and "wav2vec2" (of sounds) are classifiers with three classes.
    """
    if family == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    if family == "mixtral":
        sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=VOCABULARY,
                num_key_value_heads=1,
                num_local_experts=3,
                num_experts_per_tok=2,
                initializer_range=0.3,
                **sizes,
            )
        )
    if family == "qwen3_moe":
        sizes = {"hidden_size": 16, "moe_intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(vocab_size=VOCABULARY, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, **sizes)
        )
    if family == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        return T5ForConditionalGeneration(
            T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, feed_forward_proj="gated-gelu", **sizes)
        )
    if family == "bart":
        sides = {
            f"{side}_{name}": size
            for side in ("encoder", "decoder")
            for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
        }
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
        return BartForConditionalGeneration(
            BartConfig(vocab_size=VOCABULARY, d_model=16, max_position_embeddings=64, init_std=0.3, **sides, **ids)
        )
    if family == "vit":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))
    if family == "wav2vec2":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        front = {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4}
        config = Wav2Vec2Config(
            **sizes, **front, num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=3, initializer_range=0.4
        )
        return Wav2Vec2ForSequenceClassification(config)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def word_tokenizer(text: str | None = None) -> PreTrainedTokenizerFast:
    """Of the vocabulary of the tiny models: padding, the end of a text, and the words w0, w1, ... or those of a text."""
    inner = Tokenizer(WordLevel())
    inner.pre_tokenizer = Whitespace()
    text = " ".join(f"w{i}" for i in range(VOCABULARY - 2)) if text is None else text
    words = ["<pad>", "<eos>", *dict.fromkeys(word for word, _ in inner.pre_tokenizer.pre_tokenize_str(text))]
    inner.model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits in evaluation mode. Labels are given only to encoder-decoders, which make the decoder's input of them."""
    model.eval()
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels" or model.config.is_encoder_decoder}).logits


def load_in_peft(family: str, folder: str | Path) -> PeftModel:
    """The adapter in a folder, loaded by PEFT alone on the base that ``adapted(family)`` has."""
    torch.manual_seed(0)
    return PeftModel.from_pretrained(tiny_base(family), folder)


def random_adapter(model: PeftModel, scale: float = 0.3) -> PeftModel:
    """Gives B values, as training would, and A of embeddings, which PEFT starts at zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return model


def adapted(family: str = "llama", trained: bool = True, **settings: Any) -> PeftModel:
    """A tiny model with a random LoRA adapter, rank 3 on all linear layers by default."""
    tasks = {"bert": "SEQ_CLS", "vit": None, "wav2vec2": None, "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
    settings = {
        "r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": tasks.get(family, "CAUSAL_LM"), **settings
    }  # fmt: skip
    model = get_peft_model(tiny_base(family), LoraConfig(**settings))
    return random_adapter(model) if trained else model


def batch(family: str = "llama", rows: int = 5, width: int = 9, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded right (or left), labels on the last third.

    Images and sounds of one size for models that read those, and for those with an encoder and a decoder labels of their own.
    """
    generator = torch.Generator().manual_seed(1)
    if family in ("vit", "wav2vec2"):
        shape, name = ((3, 8, 8), "pixel_values") if family == "vit" else ((120,), "input_values")
        labels = torch.randint(0, 3, (rows,), generator=generator)
        return {name: torch.randn(rows, *shape, generator=generator), "labels": labels}
    ids = torch.randint(1, VOCABULARY, (rows, width), generator=generator)
    lengths = torch.randint(4, width + 1, (rows,), generator=generator)
    lengths[0] = width
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = ids * mask
    labels = ids.masked_fill((torch.arange(width) < lengths[:, None] - 3) | (mask == 0), -100)
    if side == "left":
        ids, mask, labels = ids.clone(), mask.clone(), labels.clone()
        for row, length in enumerate(lengths.tolist()):
            for tensor in (ids, mask, labels):
                tensor[row] = tensor[row].roll(width - length)
    if family in ("t5", "bart"):
        labels = torch.randint(3, VOCABULARY, (rows, 6), generator=generator)
        labels[torch.arange(6) >= torch.randint(2, 7, (rows, 1), generator=generator)] = -100
    if family == "bert":
        labels = torch.randint(0, 3, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
