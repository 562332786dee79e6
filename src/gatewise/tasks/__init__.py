"""What is trained and measured: rows, prompts, token ids, metrics."""

from gatewise.tasks.chat import ChatFormat
from gatewise.tasks.encoding import (
    PadCollator,
    Prompting,
    Template,
    default_template,
    encode,
    encode_classification,
    prompt_ids,
)
from gatewise.tasks.metrics import end_ids, evaluate, generate_ids, measuring, most_positions
from gatewise.tasks.records import Records, final_number, load_records

__all__ = [
    "ChatFormat",
    "PadCollator",
    "Prompting",
    "Records",
    "Template",
    "default_template",
    "encode",
    "encode_classification",
    "end_ids",
    "evaluate",
    "final_number",
    "generate_ids",
    "load_records",
    "measuring",
    "most_positions",
    "prompt_ids",
]
