"""The register of scores: a score is one file, and everything that knows scores by name finds it there."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from functools import partial

import pytest

from gatewise import RankAllocation
from gatewise.allocation import scores
from gatewise.errors import GatewiseError
from gatewise.scores import ablation, path_integral


def test_every_file_is_a_score_that_says_what_it_means():
    assert scores.NAMES == ("ablation", "path_integral", "path_moments", "random", "sensitivity", "taylor")
    for name in scores.NAMES:
        score = scores.as_score(name)
        assert score.name == name
        assert score.meaning
        assert score.unit in ("nats", "")
        known = set(inspect.signature(score.function).parameters) - {"model", "batch", "adapter"}
        assert set(score.options) | set(score.takes) == known
    assert {name for name in scores.NAMES if not scores.as_score(name).idle_is_zero} == {"ablation", "taylor"}
    assert scores.as_score("ablation").options["mode"] == "screened"


def test_a_function_is_a_score_whose_numbers_are_counted_from_a_rank_that_does_nothing():
    score = scores.as_score(lambda model, batch, adapter, anything: {}, {"anything": 1})
    assert (score.idle_is_zero, score.takes, score.unit) == (True, (), "")
    assert score.of(None, None, "default", progress=print) == {}


def test_a_partial_is_the_score_inside_with_other_options():
    score = scores.as_score(partial(partial(path_integral), points=2))
    assert (score.name, score.unit, score.options) == ("path_integral", "nats", {"points": 2})
    with pytest.raises(GatewiseError, match="ablation mode 'fast' is not known"):
        scores.as_score(partial(ablation, mode="fast"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:score", r"'no_such_module:score' names no function \(ModuleNotFoundError: .*expected module:function"),
        ("gatewise.scores:no_score", r"names no function \(AttributeError"),
        ("gatewise:__version__", "is no function but a str"),
    ],
)
def test_a_text_that_names_no_function_is_refused(name, message):
    with pytest.raises(GatewiseError, match=message):
        scores.as_score(name)


def test_there_is_one_default():
    assert scores.DEFAULT in scores.NAMES
    assert RankAllocation().score.name == scores.DEFAULT


def test_a_score_that_is_added_is_one_new_file(tmp_path, monkeypatch):
    """A file in the folder is all: the callback knows it by name."""
    (tmp_path / "weight_norm.py").write_text(
        "from functools import partial\nfrom gatewise.allocation.scoring import Score\n\n\n"
        "@partial(Score, meaning='how large it is', options={'power': 2})\n"
        "def weight_norm(model, batch, *, adapter=None, power=2):\n    return {}\n"
    )
    real = pkgutil.iter_modules
    monkeypatch.setattr("gatewise.allocation.scores", scores)  # which the import below replaces, until the test has ended
    monkeypatch.delitem(sys.modules, "gatewise.allocation.scores")
    with monkeypatch.context() as patch:
        patch.setattr(pkgutil, "iter_modules", lambda paths, *rest: real([*paths, str(tmp_path)], *rest))
        anew = importlib.import_module("gatewise.allocation.scores")
    anew.__path__.append(str(tmp_path))
    assert anew is not scores
    assert "weight_norm" in anew.NAMES
    assert anew.as_score("weight_norm", {"power": 1}).meaning == "how large it is"
    del sys.modules["gatewise.allocation.scores.weight_norm"]


def test_names_need_no_torch():
    code = "import sys; from gatewise.allocation.scores import NAMES, DEFAULT; print(DEFAULT in NAMES, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", "False"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("path-moments", {}, "score 'path-moments' is not known; expected one of ablation"),
        (
            "ablation",
            {"mod": "exact"},
            r"score_options has 'mod', but score 'ablation' takes mode, max_exact$",
        ),
        ("taylor", {"points": 2}, "but score 'taylor' takes no options"),
        ("path_integral", {"points": 0}, "points is 0; expected a whole number of at least 1"),
        ("path_integral", {"points": 2.5}, "points is 2.5; expected a whole number"),
        ("ablation", {"mode": "fast"}, "ablation mode 'fast' is not known"),
    ],
)
def test_what_no_score_has_is_refused_before_training(name, options, message):
    with pytest.raises(GatewiseError, match=message):
        scores.as_score(name, options)
