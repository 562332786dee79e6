"""Tiny random models that write trees, and files of documents, for the tests of extraction."""

from pathlib import Path
from typing import Any

import torch
from tiny_run import SIZES, byte_tokenizer, write_adapter, write_base
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

POSITIONS = 2048


def random_model(seed: int = 0) -> tuple[Any, Any]:
    """A model of random weights, large enough that it does not write one letter for ever, and its tokenizer of bytes."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    sizes = SIZES | {"vocab_size": len(tokenizer) + 5, "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.8)), tokenizer


class Dictated(torch.nn.Module):
    """Stands in for a model that has learnt its task: after a prompt that ends in the first text of a pair, it writes the second.

    What the constraint forbids it does not write: it takes the first token that is allowed.
    """

    def __init__(self, outputs: dict[str, str], tokenizer: Any) -> None:
        super().__init__()
        self.outputs, self.tokenizer = outputs, tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = LlamaConfig(max_position_embeddings=POSITIONS)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any, logits_processor: Any) -> Tensor:
        """Token ids (b, t) of prompts and outputs, as Transformers gives them."""
        end = self.tokenizer.eos_token_id
        rests = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            said = self.tokenizer.decode(ids[mask.bool()])
            rest = next(output for prompt, output in self.outputs.items() if said.endswith(prompt))
            rests.append([*self.tokenizer(f" {rest}", add_special_tokens=False)["input_ids"], end])
        for step in range(generation_config.max_new_tokens):
            scores = torch.zeros(len(rests), len(self.tokenizer))
            for row, rest in enumerate(rests):
                scores[row, rest[step] if step < len(rest) else end] = 1.0
            chosen = logits_processor(input_ids, scores).argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, chosen], dim=1)
            if step >= max(map(len, rests)):
                break
        return input_ids


def dictated(outputs: dict[str, str]) -> tuple[Any, Any]:
    """A model that writes what it is told, and its tokenizer."""
    tokenizer = byte_tokenizer()
    return Dictated(outputs, tokenizer), tokenizer


def random_adapter_folder(folder: Path) -> Path:
    """An adapter with its base in a folder."""
    base = write_base(folder / "base", max_position_embeddings=POSITIONS, initializer_range=0.8)
    return write_adapter(folder / "adapter", base)


def pdf(*pages: str) -> bytes:
    """A PDF with a line of text a line, made by hand, and white for empty ones; an empty page has no text, as a scanned one."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for page in pages:
        escape = str.maketrans({"(": "\\(", ")": "\\)"})
        shown = "".join(f"({line.translate(escape)}) Tj 0 -14 Td " if line else "0 -14 Td " for line in page.split("\n"))
        stream = f"BT /F1 11 Tf 40 780 Td {shown}ET" if page else "q Q"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >>"
            f" /Contents {len(objects)} 0 R >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    made, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(made))
        made += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    count = len(objects) + 1
    made += (
        f"xref\n0 {count}\n0000000000 65535 f \n{table}trailer\n<< /Size {count} /Root 1 0 R >>\nstartxref\n{len(made)}\n%%EOF\n"
    )
    return made.encode("latin-1")
