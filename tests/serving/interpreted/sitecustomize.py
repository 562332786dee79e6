"""On a PYTHONPATH: has Triton's kernels interpreted, where nothing compiles them for a processor, and vLLM believe in them.

vLLM's model runner V2 has its kernels in Triton alone. Where it runs on a processor it wants a build of Triton for processors.
"""

import os
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import SimpleNamespace

if find_spec("triton") and "cpu" not in entry_points(group="triton.backends").names:
    os.environ["TRITON_INTERPRET"] = "1"  # read while Triton is imported

    from triton.backends import backends

    # For vLLM it is enough that there is one; to PyTorch, which would compile with an active one, it shows none.
    backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: False))
