"""A bug in the code that students edit shows its traceback, and is never reported as a user's mistake."""

import inspect
import shutil
import sys

import pytest
from conftest import SMALL

import data
import model
import sanity_check
import stage1_align
import stage2_instruct


class Bug(NameError, TypeError, IndexError):
    """Whoever catches one of the three catches this."""


def functions_of(*owners):
    """Returns (module or class, name) of the constructors and public functions of modules and classes."""
    return [(owner, name) for owner in owners for name, value in vars(owner).items()
            if inspect.isfunction(value) and value.__module__ == getattr(owner, "__module__", owner.__name__)
            and (name.endswith("__") or not name.startswith("_"))]


TRAINING = functions_of(model, model.Llava, data, data.ChatTemplate, data.ChatDataset)
CHECKING = functions_of(sanity_check)
assert len(TRAINING) > 25 and len(CHECKING) > 7


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """The folder of a tiny run that has finished both stages."""
    run = tmp_path_factory.mktemp("trained")
    stage1_align.main(flags(1, run=run, max_steps=1))
    stage2_instruct.main(flags(2, run=run, max_steps=1))
    return run


@pytest.mark.parametrize("owner, name", TRAINING + CHECKING)
def test_a_bug_in_a_function_shows_itself(script, flags, trained, tmp_path, monkeypatch, owner, name):
    def raise_bug(*args, **kwargs):
        raise Bug

    function, run = vars(owner)[name], shutil.copytree(trained, tmp_path / "run")
    for place in [owner, *sys.modules.values()]:  # also where it was imported to
        if getattr(place, "__dict__", {}).get(name) is function:
            monkeypatch.setattr(place, name, raise_bug)
    with pytest.raises(Bug):  # the first of these commands that calls the function ends with it
        if (owner, name) in TRAINING:
            script("stage1_align", *flags(1, max_steps=1))
            script("stage2_instruct", *flags(2, max_steps=1, run=run), "--restart")
        for words in (["--sample", 0], ["--nearest-tokens", 0], ["--every-stage"]):
            script("sanity_check", "--run", run, *words, *SMALL[2:4])
