"""What tests of runs share."""

from pathlib import Path

import pytest


@pytest.fixture
def pictures() -> None:
    """Asked for by tests that look at a run's pictures."""


@pytest.fixture(autouse=True)
def _rendered_where_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made by every run. To render them takes as long as to train a tiny model."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **settings: Path(path).touch())
