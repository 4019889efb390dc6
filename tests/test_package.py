from __future__ import annotations

import subprocess
import sys
import time

import pytest

import eosin
from eosin import errors

HEAVY = ("torch", "timm", "transformers", "openvino", "cv2", "pandas", "matplotlib", "h5py", "openslide", "numpy")


def modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_is_light() -> None:
    assert not modules_after("import eosin").intersection(HEAVY)


@pytest.mark.parametrize(
    "module", ["slides", "tiles", "features.store", "encoders.registry", "stain", "features.extraction"]
)
def test_torch_free(module: str) -> None:
    assert "torch" not in modules_after(f"import eosin.{module}")


def test_the_api_is_what_it_says() -> None:
    for name in eosin.__all__:
        assert callable(getattr(eosin, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = eosin.nonsense


def test_errors_double_as_builtins_and_keep_their_words() -> None:
    assert str(errors.UnknownEncoderError("no 'x'")) == "no 'x'"
    assert issubclass(errors.MissingMppError, ValueError)
    assert issubclass(errors.CorruptSlideError, OSError)
    tree = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.EosinError):
            assert name in tree, f"{name} is missing from the drawn tree"


def test_help_is_quick() -> None:
    """The best of five, so that a busy machine does not decide; the promise is 0.3 s."""
    best = 9.0
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "eosin.cli", "--help"], capture_output=True, check=True)
        best = min(best, time.perf_counter() - started)
    assert best < 0.6
