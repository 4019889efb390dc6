"""How well is tissue found? Synthetic overviews with known masks, against plain Otsu in the same run.

    python benchmarks/tissue.py [--out benchmarks/results/tissue.json] [--pictures FOLDER]

Each case is drawn at 8 µm per pixel with several seeds; the figure is the intersection over union
with the drawn mask (for blank slides: 1 when "no tissue" is reported, else 0).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from eosin.errors import NoTissueError
from eosin.tiles.tissue import segment_tissue

SIZE = (600, 800)
UM = 8.0
SEEDS = range(5)
HEMATOXYLIN, EOSIN, DAB = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11]), np.array([0.27, 0.57, 0.78])
Case = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


def noise_field(rng: np.random.Generator, sigma_px: float) -> np.ndarray:
    """Smooth noise with zero mean and unit deviation."""
    field = cv2.GaussianBlur(rng.standard_normal(SIZE).astype(np.float32), (0, 0), sigma_px)
    return (field - field.mean()) / field.std()


def blob(rng: np.random.Generator, share: float) -> np.ndarray:
    """A wavy tissue outline covering about `share` of the picture, in one or a few pieces."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    center = (SIZE[0] * rng.uniform(0.42, 0.58), SIZE[1] * rng.uniform(0.42, 0.58))
    dome = -(((rows - center[0]) / SIZE[0]) ** 2 + ((columns - center[1]) / SIZE[1]) ** 2) * 12
    height = dome + 0.5 * noise_field(rng, 35) + 0.08 * noise_field(rng, 6)
    found = (height > np.quantile(height, 1 - share)).astype(np.uint8)
    found = cv2.morphologyEx(found, cv2.MORPH_OPEN, np.ones((9, 9), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(found)
    keep = stats[:, cv2.CC_STAT_AREA] * UM * UM > 100_000
    keep[0] = False
    return keep[labels]


def render(
    rng: np.random.Generator, od: np.ndarray, glass: np.ndarray, noise: float = 1.5, jpeg: int = 90
) -> np.ndarray:
    """Light through densities (h, w, 3) on glass, blurred as a scan is, with sensor noise and JPEG."""
    od = cv2.GaussianBlur(od.astype(np.float32), (0, 0), 0.6)
    light = glass * 10.0**-od + rng.normal(0, noise, (*SIZE, 3))
    rgb = np.clip(np.round(light), 0, 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, jpeg])
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])


def stained(
    rng: np.random.Generator, mask: np.ndarray, first: np.ndarray, second: np.ndarray, strength: float
) -> np.ndarray:
    """Densities of two stains that vary over the tissue on scales of cells and of lobules."""
    a = np.clip(0.5 + 0.35 * noise_field(rng, 12) + 0.35 * noise_field(rng, 1), 0.02, None)
    b = np.clip(0.5 + 0.35 * noise_field(rng, 15) + 0.25 * noise_field(rng, 1.5), 0.05, None)
    return mask[..., None] * strength * (a[..., None] * first + b[..., None] * second)


def flat(color: tuple[float, float, float]) -> np.ndarray:
    return np.broadcast_to(np.array(color, dtype=np.float64), (*SIZE, 3))


def fat_density(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Adipocytes of about 90 µm as thin pale membranes: the cell borders of a jittered lattice."""
    pitch = 90 / UM
    points = np.stack(np.meshgrid(np.arange(0, SIZE[1], pitch), np.arange(0, SIZE[0], pitch)), -1).reshape(-1, 2)
    points = np.clip(points + rng.uniform(-0.35, 0.35, points.shape) * pitch, 0, [SIZE[1] - 1, SIZE[0] - 1])
    seeds = np.ones(SIZE, np.uint8)
    seeds[points[:, 1].astype(int), points[:, 0].astype(int)] = 0
    _, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    border = (labels != np.roll(labels, 1, 0)) | (labels != np.roll(labels, 1, 1))
    return (mask & border)[..., None] * 0.11 * (EOSIN + 0.15 * HEMATOXYLIN)


def stroke(rng: np.random.Generator, od: np.ndarray, color: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Ink of about 0.8 mm round the tissue; returns where it lies and adds its density to `od`."""
    ring = np.zeros(SIZE, np.uint8)
    contours, _ = cv2.findContours(near.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = cv2.convexHull(np.vstack(contours))[:, 0, :].astype(np.float64)
    hull = hull.mean(0) + (hull - hull.mean(0)) * rng.uniform(1.12, 1.2)
    cv2.polylines(ring, [hull[: int(len(hull) * 0.7)].astype(np.int32)], False, 1, thickness=int(800 / UM))
    ink = ring.astype(bool)
    od += ink[..., None] * (-np.log10(color / 255) * (0.9 + 0.15 * noise_field(rng, 3)[..., None]))
    return ink


def he(rng: np.random.Generator):
    mask = blob(rng, 0.35)
    return render(rng, stained(rng, mask, HEMATOXYLIN, EOSIN, 0.35), flat((243, 242, 244))), mask


def pale_he(rng: np.random.Generator):
    mask = blob(rng, 0.35)
    return render(rng, stained(rng, mask, HEMATOXYLIN, EOSIN, 0.10), flat((238, 238, 240))), mask


def fat(rng: np.random.Generator):
    mask = blob(rng, 0.45)
    core = cv2.erode(blob(rng, 0.15).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool) & mask
    od = fat_density(rng, mask & ~core) + stained(rng, core, HEMATOXYLIN, EOSIN, 0.3)
    return render(rng, od, flat((243, 243, 244))), mask


def ihc_brown(rng: np.random.Generator):
    mask = blob(rng, 0.35)
    return render(rng, stained(rng, mask, DAB, 0.5 * HEMATOXYLIN, 0.35), flat((236, 236, 238))), mask


def ihc_blue(rng: np.random.Generator):
    mask = blob(rng, 0.35)
    counterstain = np.array([0.75, 0.45, 0.18])
    return render(rng, stained(rng, mask, counterstain, 0.3 * HEMATOXYLIN, 0.18), flat((228, 228, 230))), mask


def pen(color: tuple[int, int, int]) -> Case:
    def draw(rng: np.random.Generator):
        mask = blob(rng, 0.22)
        od = stained(rng, mask, HEMATOXYLIN, EOSIN, 0.35)
        ink = stroke(rng, od, np.array(color, dtype=np.float64), mask)
        return render(rng, od, flat((243, 242, 244))), mask & ~ink

    return draw


def all_tissue(rng: np.random.Generator):
    mask = np.ones(SIZE, dtype=bool)
    return render(rng, stained(rng, mask, HEMATOXYLIN, EOSIN, 0.35) + 0.05 * EOSIN, flat((243, 242, 244))), mask


def blank(rng: np.random.Generator):
    return render(rng, np.zeros((*SIZE, 3)), flat((241, 240, 242))), np.zeros(SIZE, dtype=bool)


def dust(rng: np.random.Generator):
    """Tissue beside dust, a hair and the edge of the coverslip, all grey."""
    mask = blob(rng, 0.25)
    od = stained(rng, mask, HEMATOXYLIN, EOSIN, 0.35)
    dirt = np.zeros(SIZE, np.uint8)
    for _ in range(60):
        cv2.circle(dirt, (int(rng.integers(SIZE[1])), int(rng.integers(SIZE[0]))), int(rng.integers(1, 4)), 1, -1)
    cv2.line(dirt, (0, 30), (SIZE[1], 44), 1, 3)
    cv2.line(dirt, (40, 0), (34, SIZE[0]), 1, 3)
    return render(rng, od + (dirt.astype(bool) & ~mask)[..., None] * np.full(3, 0.3), flat((243, 242, 244))), mask


def noisy(rng: np.random.Generator):
    mask = blob(rng, 0.35)
    od = stained(rng, mask, HEMATOXYLIN, EOSIN, 0.3)
    return render(rng, od, flat((234, 233, 236)), noise=7, jpeg=45), mask


def vignette(rng: np.random.Generator):
    mask = blob(rng, 0.35)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    far = ((rows / SIZE[0] - 0.5) ** 2 + (columns / SIZE[1] - 0.5) ** 2) / 0.5
    glass = (225 - 45 * far)[..., None] * np.array([1.0, 0.995, 1.005])
    return render(rng, stained(rng, mask, HEMATOXYLIN, EOSIN, 0.3), glass), mask


def filler(rng: np.random.Generator):
    """Unscanned corners filled with exact white beside grey glass."""
    mask = blob(rng, 0.3)
    rgb = render(rng, stained(rng, mask, HEMATOXYLIN, EOSIN, 0.35), flat((226, 224, 228)))
    near = cv2.dilate(mask.astype(np.uint8), np.ones((81, 81), np.uint8)).astype(bool)
    rgb[~near] = 255
    return rgb, mask


CASES: dict[str, Case] = {
    "H&E": he,
    "H&E, pale": pale_he,
    "fat": fat,
    "IHC, brown": ihc_brown,
    "IHC, blue": ihc_blue,
    "pen, green": pen((40, 150, 80)),
    "pen, blue": pen((35, 60, 170)),
    "pen, black": pen((30, 30, 34)),
    "pen, red": pen((205, 30, 40)),
    "all tissue": all_tissue,
    "blank": blank,
    "dust and coverslip": dust,
    "noise, JPEG 45": noisy,
    "grey vignette": vignette,
    "white filling": filler,
}


def eosin_method(rgb: np.ndarray) -> np.ndarray:
    try:
        return segment_tissue(rgb, pixel_um=(UM, UM))[0]
    except NoTissueError:
        return np.zeros(rgb.shape[:2], dtype=bool)


def otsu_grey(rgb: np.ndarray) -> np.ndarray:
    grey = cv2.GaussianBlur(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (5, 5), 0)
    return cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)[1] > 0


def otsu_saturation(rgb: np.ndarray) -> np.ndarray:
    saturation = cv2.GaussianBlur(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1], (5, 5), 0)
    return cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1] > 0


METHODS = {"eosin": eosin_method, "otsu grey": otsu_grey, "otsu saturation": otsu_saturation}


def iou(found: np.ndarray, truth: np.ndarray) -> float:
    union = np.count_nonzero(found | truth)
    return 1.0 if union == 0 else float(np.count_nonzero(found & truth) / union)


def overlay(rgb: np.ndarray, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    picture = rgb.copy()
    for mask, color in ((truth, (255, 220, 0)), (found, (0, 160, 0))):
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, color, 2)
    return picture


def run(pictures: Path | None) -> list[dict]:
    rows = []
    for index, (name, case) in enumerate(CASES.items()):
        row: dict = {"case": name, "iou": {m: [] for m in METHODS}, "seconds": {m: [] for m in METHODS}}
        for seed in SEEDS:
            rgb, truth = case(np.random.default_rng([index, seed]))
            for method, function in METHODS.items():
                start = time.perf_counter()
                found = function(rgb)
                row["seconds"][method].append(round(time.perf_counter() - start, 4))
                row["iou"][method].append(round(iou(found, truth), 4))
                if pictures is not None and method == "eosin" and seed == 0:
                    pictures.mkdir(parents=True, exist_ok=True)
                    path = pictures / f"{index:02d}.png"
                    cv2.imwrite(str(path), overlay(rgb, found, truth)[..., ::-1])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tissue.json")
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    rows = run(options.pictures)
    print(f"{'case':20s}" + "".join(f"{m:>17s}" for m in METHODS))
    for row in rows:
        print(f"{row['case']:20s}" + "".join(f"{np.mean(row['iou'][m]):17.3f}" for m in METHODS))
    mean = {m: round(float(np.mean([row["iou"][m] for row in rows])), 4) for m in METHODS}
    worst = {m: round(float(np.min([np.mean(row["iou"][m]) for row in rows])), 4) for m in METHODS}
    print(f"{'mean':20s}" + "".join(f"{mean[m]:17.3f}" for m in METHODS))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "command": "python benchmarks/tissue.py",
        "question": "intersection over union of the tissue mask with the drawn one, 800 x 600 at 8 µm per pixel",
        "commit": commit,
        "machine": {"platform": platform.platform(), "cpu": platform.machine()},
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__, "opencv": cv2.__version__},
        "seeds": list(SEEDS),
        "mean_iou": mean,
        "worst_case_iou": worst,
        "cases": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
