"""Does a small head on frozen patch tokens find mitotic figures, and is it the encoder that does it?

    python benchmarks/detector.py DATA                  (DATA holds labels/MIDOGpp.json and tiles/amf; one core)
    python benchmarks/detector.py --table               (writes the table of docs/detector.md again, from the results)
    python benchmarks/detector.py --check               (exit 1 where it differs)

Crops of 128 px, each cut around a mitotic figure, at most four a slide; three folds of whole slides. All lines see the
same crops and folds; seeds change head and windows. Differences are paired by slide, the counts of all seeds added.
Controls: the same head on an encoder of random weights; boxes put anywhere on their crop; a head that was not trained;
and no network at all, but the darkest spots.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from end_to_end import commit, machine
from eosin.encoders import load_encoder
from eosin.encoders.spec import Tokens
from eosin.evaluation.bootstrap import bootstrap
from eosin.finetune.detections import Detections
from eosin.finetune.detector import Detector
from eosin.finetune.detector_data import Picture, read_pictures
from eosin.finetune.detector_files import DetectConfig, TrainedDetector
from eosin.finetune.detector_train import held_out, judge, plan_folds, train_fold
from eosin.finetune.joins import read_boxes
from eosin.finetune.matching import f1_metric
from marked import fill

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "finetune" / "detector.json"
PAGE = HERE.parent / "docs" / "detector.md"
SEEDS = (0, 1, 2)
A_SLIDE = 4
CONFIG = DetectConfig(window_px=64, steps=60, batch=32, lr=2e-3, folds=3)
ENCODERS = {"eosin-tiny": "eosin-tiny", "random": "random:eosin-tiny@0"}
LINES = {
    "trained": "eosin-tiny, frozen; head trained",
    "random": "control: encoder of random weights; head trained",
    "shuffled": "control: eosin-tiny; trained on boxes put anywhere",
    "untrained": "control: eosin-tiny; head not trained",
    "darkest": "control: no network, the darkest spots",
}


class Remembered(nn.Module):
    """A frozen encoder that encodes the windows of held-out crops once for all lines and seeds."""

    def __init__(self, name: str) -> None:
        super().__init__()
        encoder: Any = load_encoder(name, device="cpu", precision="fp32", backend="torch")
        self.inner = encoder.backbone
        self.spec, self.network = self.inner.spec, self.inner.network
        self.known: dict[bytes, Tensor] = {}
        self.keep = False

    def fit(self, height_px: int, width_px: int) -> None:
        self.inner.fit(height_px, width_px)

    def forward(self, images: Tensor) -> Tokens:
        if not self.keep:
            return self.inner(images)
        key = hashlib.blake2b(images.numpy().tobytes(), digest_size=16).digest()
        if key not in self.known:
            self.known[key] = self.inner(images).patches
        patches = self.known[key]
        return Tokens(patches[:, 0, 0], patches[:, 0, :0], patches)


class Darkness:
    """Optical density, blurred to the size of a figure: what a detector without a network could go by."""

    window_px, mpp = CONFIG.window_px, CONFIG.mpp

    def heat(self, tiles: npt.NDArray[np.uint8]) -> Tensor:
        density = -np.log10((tiles.astype(np.float64) + 1) / 256).mean(axis=3)
        sigma = CONFIG.sigma_um / CONFIG.mpp
        smooth = gaussian_filter(density, (0, sigma, sigma), mode="nearest")
        cells = smooth.reshape(len(tiles), 16, 4, 16, 4).mean(axis=(2, 4))
        return torch.from_numpy(cells / 1.2).clamp(0.001, 0.999).logit()


def chosen(pictures: Sequence[Picture]) -> list[Picture]:
    """Return at most `A_SLIDE` crops of each slide, the same in every run."""
    rng, seen, kept = np.random.default_rng(0), {}, []
    for at in rng.permutation(len(pictures)).tolist():
        group = pictures[at].group
        seen[group] = seen.get(group, 0) + 1
        if seen[group] <= A_SLIDE:
            kept.append(at)
    return [pictures[at] for at in sorted(kept)]


def anywhere(picture: Picture, rng: np.random.Generator) -> Picture:
    """Return a crop with its boxes put anywhere on it."""
    return replace(picture, xy=rng.uniform(0, 128, picture.xy.shape))


def found_by(
    line: str, seed: int, encoder: Remembered | None, pictures: list[Picture], fold: npt.NDArray[np.int64]
) -> list[Detections]:
    """Return what the detectors of each fold find on its held-out crops."""
    out: dict[int, Detections] = {}
    settled = replace(CONFIG, seed=seed)
    rng = np.random.default_rng(seed)
    taught = [anywhere(picture, rng) for picture in pictures] if line == "shuffled" else pictures
    for at in range(CONFIG.folds):
        rows = np.flatnonzero(fold == at)
        maker: Any = Darkness()
        if encoder is not None:
            encoder.keep = False
            model = Detector(encoder, settled.adapt, width=settled.width, seed=seed)  # type: ignore[arg-type]
            if line != "untrained":
                train_fold(
                    model, [one for one, of in zip(taught, fold.tolist(), strict=True) if of != at], settled, fold=at
                )
            encoder.keep = True
            maker = TrainedDetector([model], window_px=settled.window_px, mpp=settled.mpp, threshold=0.0)
        out |= dict(zip(rows.tolist(), held_out(maker, [pictures[row] for row in rows]), strict=True))
    return [out[at] for at in range(len(pictures))]


def run(data: Path) -> None:
    """Train and judge every line, and keep the numbers."""
    torch.set_num_threads(1)
    begun = time.process_time()
    everything, _ = read_pictures(read_boxes(data / "labels" / "MIDOGpp.json"), data / "tiles" / "amf")
    pictures = chosen(everything)
    fold = plan_folds(pictures, folds=CONFIG.folds)
    encoders = {name: Remembered(source) for name, source in ENCODERS.items()}
    of = {
        "trained": "eosin-tiny",
        "shuffled": "eosin-tiny",
        "untrained": "eosin-tiny",
        "random": "random",
        "darkest": "",
    }
    rows: list[dict[str, Any]] = []
    summed: dict[str, npt.NDArray[np.int64]] = {}
    for line in LINES:
        for seed in SEEDS if line != "darkest" else SEEDS[:1]:
            found = found_by(line, seed, encoders.get(of[line]), pictures, fold)
            judged = judge(pictures, found, fold)
            counts = asdict(judged.counts) | {"precision": judged.counts.precision, "recall": judged.counts.recall}
            row = {"line": line, "seed": seed, "threshold": judged.threshold, "f1": judged.f1.to_dict(), **counts}
            rows.append(row)
            summed[line] = summed.get(line, 0) + judged.slide_counts
            sys.stderr.write(f"{line}, seed {seed}: F1 {judged.f1} ({time.process_time() - begun:.0f} s)\n")
    result = {
        "command": "python benchmarks/detector.py DATA",
        "machine": machine(),
        "commit": commit(),
        "config": asdict(CONFIG),
        "crops": len(pictures),
        "slides": len({picture.group for picture in pictures}),
        "figures": int(sum(picture.mitotic.sum() for picture in pictures)),
        "hard_negatives": int(sum((~picture.mitotic).sum() for picture in pictures)),
        "core_seconds": round(time.process_time() - begun),
        "rows": rows,
        "trained_minus": {line: difference(summed["trained"], summed[line]) for line in LINES if line != "trained"},
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def difference(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return the difference of two F1 with its interval over slides, from counts (slides, 3)."""
    first, second = f1_metric(one), f1_metric(other)
    return bootstrap(lambda weights: first(weights) - second(weights), np.arange(len(one))).to_dict()


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table: mean and range over seeds, the interval of the first."""
    lines = [
        "| | F1, mean of seeds (range) | 95 % CI over slides, seed 0 | precision | recall |",
        "|---|---:|---:|---:|---:|",
    ]
    for line, words in LINES.items():
        mine = [row for row in result["rows"] if row["line"] == line]
        f1 = [row["f1"]["point"] for row in mine]
        spread = f"{np.mean(f1):.3f}" + (f" ({min(f1):.3f}-{max(f1):.3f})" if len(f1) > 1 else "")
        low, high = mine[0]["f1"]["low"], mine[0]["f1"]["high"]
        shares = [f"{np.mean([row[name] for row in mine]):.3f}" for name in ("precision", "recall")]
        lines.append("| " + " | ".join([words, spread, f"{low:.3f}-{high:.3f}", *shares]) + " |")
    told = (
        f"{result['crops']} crops of {result['slides']} slides; figures on them: {result['figures']}, hard negatives: "
        f"{result['hard_negatives']}. {result['core_seconds']} s of one core. "
        f"`{result['command']}`, commit {result['commit']}."
    )
    gaps = [
        f"- {gap['point']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f}) against {LINES[line]}"
        for line, gap in result.get("trained_minus", {}).items()
    ]
    paired = ["", "The first line's F1 less another's, paired by slide (95 % CI):", "", *gaps] if gaps else []
    return "\n".join((*lines, *paired, "", told, ""))


def main() -> None:
    """Run, or write the table from the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.data is not None:
        run(options.data)
    body = table(json.loads(RESULT.read_text(encoding="utf-8"))) if RESULT.is_file() else "No results yet.\n"
    fill(PAGE, "detector", body, check=options.check)


if __name__ == "__main__":
    main()
