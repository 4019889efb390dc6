"""Targets are plain numbers; the package imports without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
from make_default_target import default_targets

from eosin.errors import StainError
from eosin.stain import LabTarget, StainTarget, default_target, target_from_dict

METHODS = ("macenko", "vahadane", "reinhard")


@pytest.mark.parametrize("method", METHODS)
def test_targets_survive_json(method):
    target = default_target(method)
    again = target_from_dict(json.loads(json.dumps(target.to_dict())))
    assert again == target
    assert type(again) is (LabTarget if method == "reinhard" else StainTarget)
    assert hash(again) == hash(target)


@pytest.mark.parametrize(
    "change",
    [
        {"matrix": [[1, 1, 0], [0, 1, 0]]},
        {"matrix": [[1, 0, 0], [1, 0, 0]]},
        {"matrix": [[1, 0, 0], [0, 1]]},
        {"matrix": [[float("nan"), 0, 0], [0, 1, 0]]},
        {"concentrations": [0.0, 1.0]},
        {"concentrations": [1.0, float("inf")]},
        {"light": -1.0},
        {"method": "ruifrok"},
        {"colour": "pink"},
        {"method": "vahadane", "matrix": [[0.8, 0.6, 0], [-0.6, 0.8, 0]]},
    ],
)
def test_impossible_targets_are_refused(change):
    with pytest.raises(StainError):
        target_from_dict({**default_target("macenko").to_dict(), **change})


def test_missing_and_unknown_are_named():
    values = default_target("reinhard").to_dict()
    del values["std"]
    with pytest.raises(StainError, match="std"):
        target_from_dict(values)
    with pytest.raises(StainError, match="positive deviations"):
        LabTarget(mean=(1.0, 2.0, 3.0), std=(1.0, 0.0, 1.0))
    with pytest.raises(StainError, match="macenko, vahadane, reinhard"):
        default_target("pink")


@pytest.mark.real
def test_fitted_defaults_are_what_the_slide_gives(real_data):
    fitted = default_targets(real_data / "slides" / "CMU-1-Small-Region.svs")
    for method, target in fitted.items():
        stored, found = default_target(method).to_dict(), target.to_dict()
        for name in ("matrix", "concentrations", "mean", "std"):
            if name in stored:
                np.testing.assert_allclose(found[name], stored[name], atol=2e-3, err_msg=f"{method} {name}")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_leaves_torch_alone():
    done = run("import sys, eosin.stain; eosin.stain.default_target('macenko'); sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_missing_torch_says_what_to_install():
    done = run("import sys; sys.modules['torch'] = None\nfrom eosin.stain import Macenko")
    assert "MissingDependencyError" in done.stderr
    assert "eosin[torch]" in done.stderr


def test_unknown_name_is_an_attribute_error():
    import eosin.stain

    with pytest.raises(AttributeError, match="Pink"):
        eosin.stain.Pink  # noqa: B018
