"""Pages to look at: one a slide, one a cohort. Self-contained HTML, pictures inside."""

from __future__ import annotations

import html
import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eosin.features.store import Features, FeatureStore, TileTable
from eosin.slides import Slide
from eosin.tasks.pictures import (
    OUTLINE_COLOR,
    REASON_COLORS,
    Pixels,
    data_uri,
    jpeg_bytes,
    mask_layer,
    outline_layer,
    overlay,
    paint,
    png_bytes,
    principal_colors,
    tiles_layer,
)
from eosin.tiles import TissueMask
from eosin.tiles.qc import REASONS
from eosin.version import __version__

THUMBNAIL_PX = 1400
HOVER_TILES = 6000
EXAMPLE_PX = 112
PLOTTED = {
    "tissue": "share of the tile that is tissue",
    "focus": "focus (low is blurred)",
    "white": "share of glass-like pixels",
    "saturation": "mean saturation",
    "od_hematoxylin": "hematoxylin, mean optical density",
    "od_eosin": "eosin, mean optical density",
    "fold": "share of dark, saturated blocks",
    "pen": "share of ink-coloured pixels",
}


def slide_page(
    store: FeatureStore,
    slide_id: str,
    slide: Slide,
    *,
    dense: FeatureStore | None = None,
    similar: tuple[Pixels, str] | None = None,
) -> str:
    """Return the page of one slide as HTML.

    Args:
        store: features of the slide.
        slide_id: which slide of the store.
        slide: the slide, open, for its thumbnail and example tiles.
        dense: a store of the same encoder with overlapping tiles, for a finer picture of
            the features; `store` itself when None.
        similar: a picture of tiles that are alike, and its caption.
    """
    tiles = store.tiles(slide_id)
    thumbnail, downsample = slide.thumbnail(THUMBNAIL_PX)
    size = (thumbnail.shape[1], thumbnail.shape[0])
    mask = TissueMask.from_geojson(store.path / "tissue" / f"{slide_id}.geojson", slide)
    features = (store if dense is None else dense)[slide_id]
    painted = _paint_features(features, mask, size, downsample)
    tile_um = (tiles.tile_px or 0) * (tiles.mpp or 0)
    encoder = store.recipe.encoder
    page = {
        "title": f"eosin: {slide_id}",
        "heading": slide_id,
        "lead": f"{len(tiles)} tiles of {tiles.tile_px} px at {tiles.mpp:g} microns per pixel "
        f"({tile_um:.0f} µm), each turned into {features.x.shape[1]} numbers by the encoder {encoder['name']}.",
        "cards": _cards(tiles),
        "thumbnail": data_uri(jpeg_bytes(thumbnail), "image/jpeg"),
        "layers": _layers(tiles, mask, painted, size, downsample),
        "pca": data_uri(jpeg_bytes(overlay(thumbnail, painted)), "image/jpeg"),
        "pca_caption": f"The first three principal components of {len(features)} feature vectors as red, green "
        "and blue, painted back where the tiles lie. Like colours mean that the encoder finds the tissue alike; the "
        "colours themselves mean nothing.",
        "similar": data_uri(jpeg_bytes(similar[0]), "image/jpeg") if similar else "",
        "similar_caption": similar[1] if similar else "",
        "plots": _plots(tiles),
        "examples": _examples(tiles, slide),
        "record": _record(store, tiles),
        "tiles_json": Markup(_hover(tiles)),
        "footer": f"Made by eosin {__version__}.",
    }
    return _render("slide.html.j2", page)


def summary_page(store: FeatureStore, table: pd.DataFrame) -> str:
    """Return the page of a cohort: the table of `cohort_summary` with failures first."""
    has_failed = table["failure"].notna().to_numpy() if "failure" in table else np.zeros(len(table), dtype=np.bool_)
    failed, good = pd.DataFrame(table.loc[has_failed]), pd.DataFrame(table.loc[~has_failed])
    columns = [c for c in good.columns if c != "failure" and not bool(good[c].isna().to_numpy().all())]
    page = {
        "title": "eosin: cohort summary",
        "heading": "Cohort summary",
        "lead": f"Features of the encoder {store.recipe.encoder['name']}, tiles of {store.recipe.tile['tile_px']} px "
        f"at {store.recipe.tile['mpp']:g} microns per pixel. Medians and shares are over a slide's embedded tiles.",
        "cards": [
            (len(good), "slides with features"),
            (len(failed), "slides that failed"),
            (int(good["tiles"].sum()) if len(good) else 0, "tiles"),
            (int(good["kept"].sum()) if len(good) else 0, "tiles that pass the default rules"),
        ],
        "failures": list(zip(failed["slide_id"], failed["failure"], strict=True)) if len(failed) else [],
        "plot": _cohort_plot(good),
        "columns": columns,
        "rows": [[_cell(value) for value in row] for row in good.loc[:, columns].to_numpy(dtype=object)],
        "footer": f"Made by eosin {__version__}.",
    }
    return _render("summary.html.j2", page)


def _render(template: str, page: dict[str, Any]) -> str:
    environment = Environment(loader=PackageLoader("eosin.tasks"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(page)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    return "" if value is None or value is pd.NA else str(value)


def _cards(table: TileTable) -> list[tuple[str, str]]:
    slide = table.slide
    ledger = slide.get("mpp") or {}
    width, height = slide["size_px"]
    area = (slide.get("tissue") or {}).get("area_mm2")
    return [
        (f"{width} × {height}", "level-0 pixels"),
        (f"{ledger.get('x'):.4g}", f"microns per pixel, from {ledger.get('source')}"),
        (f"{area:.3g} mm²" if area is not None else "-", "tissue"),
        (f"{int(table.kept.sum())} of {len(table)}", "tiles pass the default quality rules"),
        (str(len(table.background_xy)), "positions are background"),
        (str(len(table.unreadable_xy)), "tiles could not be read"),
    ]


def _paint_features(
    features: Features, mask: TissueMask, size_px: tuple[int, int], downsample: tuple[float, float]
) -> Pixels:
    """Paint each tile's colour on the middle of the tile, as wide as the step to the next one."""
    assert features.size0_px is not None
    kept = features.kept if features.kept.sum() >= 4 else np.ones(len(features), dtype=np.bool_)
    colors = principal_colors(features.x[kept])
    size0 = np.asarray(features.size0_px)
    step0 = size0 * (1 - features.recipe["tile"]["overlap_px"] / features.recipe["tile"]["tile_px"])
    corners = np.round(features.xy[kept] + (size0 - step0) / 2).astype(np.int64)
    painted = paint(colors, corners, (float(step0[0]), float(step0[1])), size_px, downsample)
    painted[~mask_layer(mask, size_px, downsample)] = 0
    return painted


def _layers(
    table: TileTable,
    mask: TissueMask,
    painted: Pixels,
    size: tuple[int, int],
    downsample: tuple[float, float],
) -> list[dict[str, Any]]:
    assert table.size0_px is not None

    def layer(name: str, pixels: Pixels, color: tuple[int, int, int], count: object, on: bool) -> dict[str, Any]:
        uri = data_uri(png_bytes(pixels), "image/png")
        return {"name": name, "uri": uri, "color": f"rgb{color}", "count": count, "on": on}

    layers = [layer("features (PCA)", painted, (150, 90, 190), "", False)]
    groups = [(REASONS[code], table.xy[table.reason == code]) for code in range(len(REASONS))]
    groups[REASONS.index("background")] = (
        "background",
        np.concatenate([table.background_xy, groups[REASONS.index("background")][1]]),
    )
    groups[REASONS.index("unreadable")] = ("unreadable", table.unreadable_xy)
    for name, xy in groups:
        if len(xy):
            color = REASON_COLORS[name]
            pixels = tiles_layer(size, downsample, [(xy, color)], table.size0_px)
            layers.append(layer(name, pixels, color, len(xy), on=name != "background"))
    layers.append(layer("tissue outline", outline_layer(mask, size, downsample), OUTLINE_COLOR, "", on=True))
    return layers


def _figure_uri(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return data_uri(file.getvalue(), "image/svg+xml")


def _plots(table: TileTable) -> list[dict[str, str]]:
    """Return a histogram a quality number, stacked by reason, with no trace of when it was drawn."""
    from matplotlib.figure import Figure

    present = [code for code in range(len(REASONS)) if (table.reason == code).any()]
    plots = []
    for name, caption in PLOTTED.items():
        if name not in table.qc:
            continue
        values = table.qc[name]
        figure = Figure(figsize=(3.4, 2.1), layout="constrained")
        axes = figure.subplots()
        bins = np.histogram_bin_edges(values, bins=24)
        axes.hist(
            [values[table.reason == code] for code in present],
            bins=list(bins),
            stacked=True,
            color=[f"#{bytes(REASON_COLORS[REASONS[code]]).hex()}" for code in present],
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_ylabel("tiles", fontsize=8)
        plots.append({"name": name, "uri": _figure_uri(figure), "caption": f"{name}: {caption}"})
    return plots


def _examples(table: TileTable, slide: Slide) -> list[dict[str, str]]:
    """Return a strip of example tiles for each reason, kept ones from least to most in focus."""
    if table.tile_px is None or table.mpp is None:
        return []
    plan = slide.plan(tile_px=table.tile_px, mpp=table.mpp)
    rows = []
    for code, reason in enumerate(REASONS):
        where = np.flatnonzero(table.reason == code)
        if not len(where):
            continue
        where = where[np.argsort(table.qc["focus"][where], kind="stable")]
        picked = where[np.unique(np.linspace(0, len(where) - 1, 9).astype(int))]
        tiles = [slide.read_tile((int(x), int(y)), plan).rgb for x, y in table.xy[picked]]
        strip = _strip(tiles)
        order = ", from least to most in focus" if len(picked) > 1 else ""
        caption = f"{reason}: {len(picked)} of {len(where)} tiles{order}."
        rows.append({"name": reason, "uri": data_uri(jpeg_bytes(strip), "image/jpeg"), "caption": caption})
    return rows


def _strip(tiles: list[Pixels]) -> Pixels:
    from PIL import Image

    gap = 6
    strip = Image.new("RGB", (len(tiles) * (EXAMPLE_PX + gap) - gap, EXAMPLE_PX), (255, 255, 255))
    for i, tile in enumerate(tiles):
        small = Image.fromarray(tile).resize((EXAMPLE_PX, EXAMPLE_PX), Image.Resampling.LANCZOS)
        strip.paste(small, (i * (EXAMPLE_PX + gap), 0))
    return np.asarray(strip)


def _record(store: FeatureStore, table: TileTable) -> list[tuple[str, str]]:
    recipe = store.recipe
    encoder, ledger = recipe.encoder, table.slide.get("mpp") or {}
    rows = [
        (
            "encoder",
            f"{encoder['name']} ({encoder.get('licence')}), {encoder['dim']} numbers, pooling {encoder.get('pooling')}",
        ),
        ("weights", encoder.get("weights_hash") or "none"),
        ("precision", recipe.precision),
        ("tiles", json.dumps(recipe.tile)),
        ("tissue", json.dumps(table.slide.get("tissue"))),
        ("quality rules", "; ".join(recipe.qc.get("rules", []))),
        ("stain", json.dumps(recipe.stain) if recipe.stain else "as scanned"),
        ("microns per pixel", json.dumps(ledger)),
        ("reader", str(table.slide.get("reader"))),
        ("slide fingerprint", str(table.slide.get("slide_fingerprint"))),
        ("recipe hash", recipe.hash),
    ]
    return [(name, html.unescape(str(value))) for name, value in rows]


def _hover(table: TileTable) -> str:
    """Return what the page's pointer needs, as JSON safe inside a script element."""
    count = min(len(table), HOVER_TILES)
    names = [name for name in PLOTTED if name in table.qc]
    content = {
        "size": table.slide["size_px"],
        "tile": list(table.size0_px or (0, 0)),
        "xy": table.xy[:count].tolist(),
        "reason": table.reason[:count].tolist(),
        "reasons": list(REASONS),
        "names": names,
        "qc": [[round(float(v), 3) for v in table.qc[name][:count]] for name in names],
    }
    return json.dumps(content).replace("<", "\\u003c")


def _cohort_plot(table: pd.DataFrame) -> str | None:
    """Return strips of the slides' medians, one dot a slide, or None for fewer than two slides."""
    names = [c for c in table.columns if c.startswith("median_")]
    if len(table) < 2 or not names:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes: npt.NDArray[Any] = np.atleast_1d(figure.subplots(1, len(names)))
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(table))
    for axis, name in zip(axes, names, strict=True):
        axis.scatter(jitter, table[name], s=14, color="#8f3f71", alpha=0.7, linewidths=0)
        axis.set_title(name.removeprefix("median_"), fontsize=8)
        axis.set_xlim(-1, 1)
        axis.set_xticks([])
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    return _figure_uri(figure)
