"""What keeps an answer to a form: found by name among the installed packages, in the entry-point group ``gatewise.constraints``.

A request names a constraint in ``vllm_xargs``, with a text that says what the answer has to be: {"vllm_xargs": {NAME: TEXT}}. A
package brings one as an object with the two members of ``Constraint``:

    [project.entry-points."gatewise.constraints"]
    my_form = "my_package.forms:FORM"
"""

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError, reason_of

GROUP = "gatewise.constraints"


class Constraint(Protocol):
    """A kind of forms that answers can be kept to."""

    logits_processor: str
    """MODULE:CLASS of what does the same in vLLM: a class for its ``--logits-processors``."""

    def limit(
        self, text: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], max_tokens: int, vocabulary: int
    ) -> Callable[[Sequence[int], Tensor], Tensor]:
        """For one answer, a function of the tokens written so far and the scores (v,) of the next one.

        It returns scores with -inf for tokens that may not come, and leaves those that it is given as they are.

        Args:
            text: of the request.
            ends: token ids that end a text.
            max_tokens: of the answer.
            vocabulary: v.

        Raises:
            GatewiseError: the text says nothing that an answer can be kept to, or a package is missing. The client is told.
        """
        ...


def find_constraints(names: Sequence[str] | None = None) -> dict[str, Constraint]:
    """The constraints of these names; None for all that are installed and can be imported.

    Raises:
        GatewiseError: there is none of a name, or it cannot be imported.
    """
    installed = {one.name: one for one in entry_points(group=GROUP)}
    found: dict[str, Constraint] = {}
    for name in installed if names is None else names:
        if name not in installed:
            known = ", ".join(sorted(installed)) or "none"
            raise GatewiseError(f"no installed package has a constraint {name!r}; those that are there: {known}")
        try:
            found[name] = installed[name].load()
        except Exception as error:  # a package that fails while it is imported may raise anything
            if names is not None:
                raise GatewiseError(
                    f"the constraint {name!r} cannot be imported ({reason_of(error)}): install what it needs"
                ) from error
            if not isinstance(error, ImportError):  # a package that it needs and nobody installed is no fault
                print(f"the constraint {name!r} is left out, it cannot be imported: {reason_of(error)}", file=sys.stderr)
    return found
