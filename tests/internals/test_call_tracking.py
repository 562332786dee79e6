"""What is being done with a model."""

import copy
import pickle

import pytest

from gatewise.internals.call_tracking import CallState


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_begins_anew(twin):
    state = CallState()
    state.opened_by = 3
    assert (twin(state).opened_by, state.opened_by) == (None, 3)
