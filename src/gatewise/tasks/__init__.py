"""What is trained and measured: rows, prompts, token ids, metrics."""

from gatewise.tasks.encoding import PadCollator, encode, encode_classification, score_batch
from gatewise.tasks.metrics import evaluate
from gatewise.tasks.records import Records, final_number, load_records, sample_names
from gatewise.tasks.template import Template, default_template

__all__ = [
    "PadCollator",
    "Records",
    "Template",
    "default_template",
    "encode",
    "encode_classification",
    "evaluate",
    "final_number",
    "load_records",
    "sample_names",
    "score_batch",
]
