"""A finished LoRA adapter -> a smaller one that is as good on some data, checked.

from gatewise.compress import Goal, compress

compress("runs/mine/adapter", "dev.jsonl", "small", Goal(tolerance=0.01))
"""

from gatewise.compress.compressing import Compressed, compress
from gatewise.compress.recovery import Recovery
from gatewise.compress.search import Goal

__all__ = ["Compressed", "Goal", "Recovery", "compress"]
