"""The output head of a frozen model, given the last position of every prompt."""

import pytest
import torch
from counted import Operations
from mixed_models import BASE, mixed_model, prompts
from torch import Tensor, nn

from gatewise import fast_lora
from gatewise.serving.head import side_by_side

NAMES = ["all", "some", BASE, "other", "some"]


class WithHead(nn.Module):
    """What has a head, as Transformers' models have."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False).requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def last_positions(rows: int) -> Tensor:
    return torch.randn(rows, 5, 4)[:, -1:]


@pytest.mark.parametrize("rows", [1, 3])
def test_weights_are_not_copied_for_every_row(rows: int) -> None:
    model, x = WithHead(), last_positions(rows)
    with torch.no_grad():
        with Operations() as before:
            expected = model.head(x)
        with side_by_side(model), Operations() as inside:
            got = model.head(x)
        with Operations() as after:
            model.head(x)
    torch.testing.assert_close(got, expected)
    assert before.counts == after.counts
    assert inside.counts["bmm"] == 0
    if not before.counts["bmm"]:
        pytest.skip("this version of PyTorch copies no weights here, and has no need of this")


def test_models_without_a_head() -> None:
    for model in (nn.Linear(2, 2), type("None", (WithHead,), {"get_output_embeddings": lambda self: None})()):
        with side_by_side(model):
            pass


def test_the_head_is_as_it_was_after_a_call() -> None:
    model = mixed_model()
    head = model.get_base_model().get_output_embeddings()
    seen: list[int] = []
    with fast_lora(model):
        handle = head.register_forward_hook(lambda *_: seen.append(len(head._forward_pre_hooks)))
        model.generate(**prompts(5), adapter_names=NAMES, max_new_tokens=2, do_sample=False, pad_token_id=0)
        handle.remove()
    assert seen == [1, 1]
    assert not head._forward_pre_hooks
