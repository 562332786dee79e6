"""What is being done with a model."""

import copy

from gatewise.internals.call_tracking import CallState


def test_a_copy_begins_anew():
    state = CallState()
    state.opened_by = 3
    assert (copy.deepcopy(state).opened_by, state.opened_by) == (None, 3)
