"""Methods side by side on one's own rows: each at the learning rate that suits it, with the same rows, steps and size.

``running.py`` carries a comparison out, with arms from ``arms.py`` and learning rates as ``rates.py`` finds them.
"""

from gatewise.comparing.running import compare

__all__ = ["compare"]
