"""The register of scores: a score is one file, and everything that knows scores by name finds it there."""

import subprocess
import sys

import pytest

from gatewise import RankAllocation
from gatewise.allocation import scores
from gatewise.errors import GatewiseError


def test_every_file_is_a_score_that_says_what_it_means():
    assert scores.NAMES == ("ablation", "path_integral", "path_moments", "sensitivity", "taylor")
    for name in scores.NAMES:
        assert scores.SCORES[name].__name__ == name
        about = scores.about(name)
        assert about.meaning
        assert about.unit in ("nats", "")
    assert {name for name in scores.NAMES if scores.about(name).from_base} == {"ablation", "taylor"}
    assert dict(scores.about("ablation").in_rounds) == {"mode": "screened"}
    assert scores.about("of_my_own") == scores.About()


def test_there_is_one_default():
    assert scores.DEFAULT in scores.NAMES
    assert RankAllocation().score_name == scores.DEFAULT


def test_a_score_that_is_added_is_one_new_file(tmp_path):
    """A file in the folder is all: the callback knows it by name."""
    (tmp_path / "weight_norm.py").write_text(
        'MEANING = "how large it is"\nUNIT = ""\nFROM_BASE = False\n\n\n'
        "def weight_norm(model, batch, *, adapter=None, power=2):\n    return {}\n"
    )
    code = (
        "import pkgutil, gatewise.allocation\n"
        "real = pkgutil.iter_modules\n"
        f"pkgutil.iter_modules = lambda paths, *rest: real([*paths, {str(tmp_path)!r}], *rest)\n"
        "import gatewise.allocation.scores as s\n"
        "pkgutil.iter_modules = real\n"
        f"s.__path__.append({str(tmp_path)!r})\n"
        "from gatewise import RankAllocation\n"
        "print('weight_norm' in s.NAMES, s.about('weight_norm').meaning, RankAllocation(score='weight_norm').score_name)\n"
        "s.check_score('weight_norm', {'power': 1})\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "True how large it is weight_norm"


def test_names_need_no_torch():
    code = "import sys; from gatewise.allocation.scores import NAMES, DEFAULT; print(DEFAULT in NAMES, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", "False"]


def test_a_module_is_a_module_and_a_score_a_function():
    import gatewise.allocation.scores.taylor as module
    from gatewise.scores import taylor

    assert callable(taylor)
    assert module.taylor is taylor


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("path-moments", {}, r"score 'path-moments' is not known; expected one of .*; did you mean path_moments\?$"),
        ("taylor", {"float16": True}, r"score_options has 'float16', but score 'taylor' takes float32; did you mean float32\?$"),
        ("path_moments", {"start": 2}, "start is 2; expected a point of the path"),
        ("path_moments", {"points": 0}, "points is 0; expected a whole number of at least 1"),
        ("path_integral", {"return_convergence": True}, "return_convergence, which a round has no use for"),
        ("ablation", {"mode": "fast"}, "ablation mode 'fast' is not known"),
        ("ablation", {"max_exact": "all"}, "max_exact is 'all'; expected a number of ranks, at least 0"),
        ("path_moments", {"start": "half"}, "score_options has start='half'; expected a number"),
        ("sensitivity", {"beta1": None}, "score_options has beta1=None; expected a number"),
        ("taylor", {"float32": "false"}, "score_options has float32='false'; expected true or false"),
    ],
)
def test_what_no_score_has_is_refused_before_training(name, options, message):
    with pytest.raises(GatewiseError, match=message):
        scores.check_score(name, options)
