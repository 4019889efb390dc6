"""Augmentation against torchvision, scipy, Pillow, eosin.stain and closed forms; draws, chances and physical ranges."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TV

from eosin.errors import CohortError, ConfigError, GeometryError, NonFiniteError, StainError
from eosin.finetune import photometry
from eosin.finetune.augment import FAMILIES, AugmentConfig, augment, stain_bank
from eosin.finetune.augment_picture import augmentation_picture, effects, main
from eosin.finetune.warp import affine, flip, warp
from eosin.stain import Macenko, StainTarget, default_target

PLAIN = AugmentConfig(
    **{f"{name}_chance": 0.0 for name in ("macenko", "he", "hed", "blur", "defocus", "colour", "grey", "jpeg")},
    flip_chance=0.0,
    warp_chance=0.0,
    dropout_chance=0.0,
)
TARGET = default_target("macenko")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tissue(count=4, size=48, seed=0):
    """Return uint8 (count, 3, size, size): smooth fields of hematoxylin and eosin, and a little noise."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(count, size, size, 2)), (0, 2, 2, 0))
    stains = (fields / fields.std() * 0.4 + [0.9, 0.6]).clip(0)
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    density = stains @ vectors + rng.normal(0, 0.02, (count, size, size, 3))
    return torch.from_numpy((240 * np.exp(-density) - 1).clip(0, 255).round().astype(np.uint8)).movedim(-1, 1)


def floats(count=4, size=48, seed=0):
    return tissue(count, size, seed).contiguous().float() / 255


def each(function, images, strengths):
    """Return one image at a time through a function of torchvision."""
    return torch.cat([function(image[None], strength) for image, strength in zip(images, strengths, strict=True)])


def test_flips_are_torchvisions():
    images = floats()
    out = flip(images, horizontal=torch.tensor([0, 1, 0, 1]).bool(), vertical=torch.tensor([0, 0, 1, 1]).bool())
    expected = [
        images[0],
        TV.horizontal_flip(images[1]),
        TV.vertical_flip(images[2]),
        torch.rot90(images[3], 2, (1, 2)),
    ]
    assert torch.equal(out, torch.stack(expected))


def motions():
    return {
        "angle_deg": torch.tensor([17.0, -120.0, 0.0, 63.0]),
        "shear_deg": torch.tensor([0.0, 4.0, -9.0, 5.0]),
        "scale": torch.tensor([1.0, 1.1, 0.9, 1.05]),
        "shift_px": torch.tensor([[3.0, -2.0], [0.5, 1.25], [-6.0, 4.0], [0.0, 7.5]]),
    }


def test_warp_is_torchvisions_affine_away_from_the_edges():
    images, moved = floats(), motions()
    out = warp(images, affine(**moved))
    inside = warp(torch.ones_like(images), affine(**moved))
    for at in range(4):
        keywords = {
            "angle": float(moved["angle_deg"][at]),
            "translate": moved["shift_px"][at].tolist(),
            "scale": float(moved["scale"][at]),
            "shear": [float(moved["shear_deg"][at]), 0.0],
            "interpolation": InterpolationMode.BILINEAR,
        }
        expected = TV.affine(images[at], **keywords)
        inside = TV.affine(torch.ones_like(images[at]), **keywords) > 0.999
        assert inside.float().mean() > 0.5
        torch.testing.assert_close(out[at][inside], expected[inside], atol=2e-4, rtol=0)


def test_warp_is_scipys_affine_transform_up_to_the_corners():
    """scipy's "reflect" repeats the edge pixel, (d c b a | a b c d), as mirrored tissue does."""
    images, matrix = floats(seed=1).double(), affine(**motions())
    out = warp(images, matrix)
    middle = (48 - 1) / 2
    for at in range(4):
        linear = matrix[at, :, :2].numpy()[::-1, ::-1]  # rows, columns
        offset = middle + matrix[at, :, 2].numpy()[::-1] - linear @ [middle, middle]
        for channel in range(3):
            expected = ndimage.affine_transform(
                images[at, channel].numpy(), linear, offset, order=1, mode="reflect", prefilter=False
            )
            np.testing.assert_allclose(out[at, channel], expected, atol=1e-9)


def test_a_quarter_turn_moves_pixels_and_alters_none():
    images = floats()
    angle = torch.tensor([90.0, 180.0, 270.0, 0.0])
    out = warp(images, affine(angle_deg=angle, shear_deg=0 * angle, scale=angle * 0 + 1, shift_px=torch.zeros(4, 2)))
    expected = torch.stack([torch.rot90(images[at], -(at + 1), (1, 2)) for at in range(4)])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_a_warp_never_brings_in_a_new_colour():
    """No black corner: every pixel is a mean of pixels that were there."""
    images = floats(8) * 0.5 + 0.4
    config = replace(PLAIN, warp_chance=1.0, shear_deg=30.0, scale=1.5, translate_um=8.0)
    out = augment(images, config, generator=seeded())
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    assert ((out >= low - 1e-6) & (out <= high + 1e-6)).all()
    assert not torch.equal(out, images)


FACTORS = torch.tensor([0.6, 0.95, 1.0, 1.3])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (photometry.brightness, TV.adjust_brightness),
        (photometry.contrast, TV.adjust_contrast),
        (photometry.saturation, TV.adjust_saturation),
    ],
)
def test_light_and_colour_are_torchvisions(ours, theirs):
    images = floats()
    torch.testing.assert_close(ours(images, FACTORS), each(theirs, images, FACTORS.tolist()), atol=1e-6, rtol=0)


def test_hue_is_torchvisions():
    images = torch.rand(4, 3, 32, 32, generator=seeded())
    degrees = torch.tensor([-170.0, -8.0, 40.0, 175.0])
    expected = each(TV.adjust_hue, images, (degrees / 360).tolist())
    torch.testing.assert_close(photometry.hue(images, degrees), expected, atol=2e-6, rtol=0)
    without_colour = images[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(photometry.hue(without_colour, degrees), without_colour)


def test_grey_is_torchvisions():
    images = floats()
    expected = TV.rgb_to_grayscale(images, num_output_channels=3)
    torch.testing.assert_close(photometry.grey(images), expected, atol=2e-4, rtol=0)  # torchvision rounds a weight


def test_blur_is_torchvisions():
    images, sigma = floats(), torch.tensor([0.4, 1.0, 1.6, 2.0])
    expected = each(lambda i, s: TV.gaussian_blur(i, [13, 13], [s, s]), images, sigma.tolist())
    torch.testing.assert_close(photometry.blur(images, sigma), expected, atol=2e-6, rtol=0)
    assert torch.equal(photometry.blur(images, torch.zeros(4)), images)


def test_defocus_is_a_disc():
    """Variance about r^2 / 4 on each axis; a finer disc has the same weights, and scipy the same image with it."""
    images, radius = floats(), torch.tensor([1.5, 2.0, 3.0, 2.6])
    kernels = photometry.disc(radius, 4)
    steps = torch.arange(-4.0, 5.0).double()
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(4).double())
    spread = (kernels.sum(1) * steps**2).sum(1)
    torch.testing.assert_close(spread, radius.double() ** 2 / 4, rtol=0, atol=0.15)  # the pixel adds up to 1 / 12
    out = photometry.defocus(images, radius)
    fine = (np.arange(-4.5, 4.5, 0.01) + 0.005)[:, None]
    for at in range(4):
        area = (np.hypot(fine, fine.T) <= float(radius[at])).reshape(9, 100, 9, 100).mean((1, 3))
        np.testing.assert_allclose(kernels[at], area / area.sum(), atol=0.002)
        for channel in range(3):
            expected = ndimage.convolve(images[at, channel].double().numpy(), area / area.sum(), mode="mirror")
            np.testing.assert_allclose(out[at, channel], expected, atol=3e-3)
    assert torch.equal(photometry.defocus(images, torch.zeros(4)), images)


def test_a_blur_wider_than_the_image_is_refused():
    with pytest.raises(GeometryError, match="too wide for images of 8 x 8"):
        photometry.blur(floats(1, 8), torch.tensor([4.0]))


def test_jpeg_loses_what_pillows_does():
    images, quality = floats(4, 64), torch.tensor([20, 50, 80, 95])
    out = photometry.jpeg(images, quality)
    errors = []
    for at, q in enumerate(quality.tolist()):
        buffer = io.BytesIO()
        pixels = (images[at] * 255).round().to(torch.uint8).movedim(0, -1).numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=q, subsampling=2)
        theirs = np.asarray(Image.open(buffer)).astype(float)
        ours = (out[at] * 255).movedim(0, -1).numpy()
        lost = np.abs(theirs - pixels).mean()
        errors.append(np.abs(ours - pixels).mean())
        assert errors[-1] == pytest.approx(lost, rel=0.05)
        assert np.abs(ours - theirs).mean() < min(1.3, 0.4 * lost)  # another DCT rounds some coefficients elsewhere
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1] > 0


def test_dropout_is_torchvisions_erase():
    images = floats(2)
    holes = torch.tensor(
        [[[3.0, 5.0, 11.0, 9.0], [30.0, 30.0, 60.0, 40.0]], [[0.0, 0.0, 0.0, 0.0], [7.0, 7.0, 8.0, 8.0]]]
    )
    out = photometry.dropout(images, holes)
    mean = images.mean((2, 3), keepdim=True)
    first = TV.erase(images[0], i=5, j=3, h=4, w=8, v=mean[0])
    first = TV.erase(first, i=30, j=30, h=10, w=18, v=mean[0])
    assert torch.equal(out, torch.stack([first, TV.erase(images[1], i=7, j=7, h=1, w=1, v=mean[1])]))


def test_random_macenko_gives_the_stains_of_the_bank():
    other = StainTarget(
        method="macenko",
        matrix=((0.6, 0.7483315, 0.2828427), (0.36, 0.8, 0.48)),
        concentrations=(1.2, 0.8),
        light=240.0,
    )
    images = floats(6, 64)
    config = replace(PLAIN, macenko_chance=1.0)
    out = augment(images, config, generator=seeded(), bank=[other])
    fit = Macenko().fit_each(out)
    assert fit.ok.all()
    np.testing.assert_allclose(fit.matrix, np.broadcast_to(np.array(other.matrix), (6, 2, 3)), atol=0.02)
    for density in -((out.flatten(2).double() * 255 + 1) / 240).log().numpy():
        amounts = np.linalg.lstsq(np.array(other.matrix).T, density, rcond=None)[0]
        np.testing.assert_allclose(np.percentile(amounts, 99, axis=1), [1.2, 0.8], rtol=0.05)  # of a quarter
    blank = torch.full((2, 3, 64, 64), 0.95)
    assert torch.equal(augment(blank, config, generator=seeded(), bank=[other]), blank)


@pytest.mark.parametrize("kind", ["he", "hed"])
def test_stain_jitter_stays_within_its_range_of_optical_density(kind):
    """A shift alone moves the OD along unit vectors: by no more than one shift a stain."""
    images = floats(16, 32).double()
    config = replace(PLAIN, **{f"{kind}_chance": 1.0, f"{kind}_scale": 0.0, f"{kind}_shift": 0.05})
    out = augment(images, config, generator=seeded()).double()
    moved = (((images * 255 + 1) / (out * 255 + 1)).log()).norm(dim=1).flatten(1).median(1).values
    assert moved.max() <= 0.05 * (2 if kind == "he" else 3)
    assert moved.max() > 0.05
    still = augment(images, replace(config, **{f"{kind}_shift": 0.0}), generator=seeded())
    torch.testing.assert_close(still, images.float(), atol=1e-5, rtol=0)


def test_a_bank_has_a_reference_for_each_domain_that_shows_two_stains():
    tiles = tissue(70, 32).movedim(1, -1).numpy()
    blank = np.full((2, 32, 32, 3), 240, dtype=np.uint8)
    domain = np.array(["b"] * 66 + ["a"] * 3 + ["one cell"] + ["glass"] * 2)
    bank = stain_bank(np.concatenate([tiles, blank]), domain)
    assert bank.domains == ("a", "b", "one cell")
    assert bank.targets[0].matrix == Macenko().fit(tiles[66:69]).target().matrix
    assert bank.targets[1].source == "b: 33 tiles"
    ((name, why),) = bank.left_out
    assert name == "glass"
    assert "no stain matrix can be estimated" in why
    with pytest.raises(StainError, match="none of the 1 domains"):
        stain_bank(blank, ["x", "x"])
    with pytest.raises(CohortError, match="one domain a tile"):
        stain_bank(blank, ["x"])


STRONG = AugmentConfig(
    macenko_chance=0.4, he_chance=0.3, hed_chance=0.3, blur_chance=0.5, defocus_chance=0.5, colour_chance=1.0,
    brightness=0.5, contrast=0.5, saturation=0.5, hue_deg=90, grey_chance=0.3, jpeg_chance=1.0, jpeg_quality=(1, 30),
    warp_chance=1.0, shear_deg=30, scale=1.5, translate_um=10, dropout_chance=1.0,
)  # fmt: skip


def test_everything_at_once_is_finite_seeded_and_leaves_its_input_alone():
    images = tissue(12)
    kept = images.clone()
    out = augment(images, STRONG, generator=seeded(5), bank=[TARGET])
    assert out.dtype == torch.float32
    assert out.shape == images.shape
    assert out.isfinite().all()
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.equal(images, kept)
    assert torch.equal(out, augment(images, STRONG, generator=seeded(5), bank=[TARGET]))
    assert torch.equal(out, augment(images.float() / 255, STRONG, generator=seeded(5), bank=[TARGET]))
    assert not torch.equal(out, augment(images, STRONG, generator=seeded(6), bank=[TARGET]))


def test_no_family_is_the_image():
    images = tissue(3)
    for config in (AugmentConfig().without(*FAMILIES), PLAIN):
        assert torch.equal(augment(images, config, generator=seeded()), images.float() / 255)


def test_switching_a_family_off_leaves_the_others_alone():
    """Without dropout, pixels differ inside the holes and nowhere else; without the rest, by exactly the rest."""
    images, bank = tissue(8), [TARGET]
    full = augment(images, STRONG, generator=seeded(2), bank=bank)
    whole = augment(images, STRONG.without("dropout"), generator=seeded(2), bank=bank)
    differs = (full != whole).any(1)
    assert differs.flatten(1).any(1).all()
    colours = [full[at, :, differs[at]] for at in range(8)]
    assert all((colour.amax(1) - colour.amin(1)).max() < 1e-6 for colour in colours)  # one colour a tile: its mean
    turned = augment(images, STRONG.without(*set(FAMILIES) - {"geometry"}), generator=seeded(2))
    quiet = replace(PLAIN, **{name: getattr(STRONG, name) for name in ("flip_chance", "warp_chance", "shear_deg")})
    quiet = replace(quiet, scale=STRONG.scale, translate_um=STRONG.translate_um)
    assert torch.equal(turned, augment(images, quiet, generator=seeded(2)))


def test_the_generator_moves_on_by_the_same_whatever_is_on():
    states = []
    for config in (PLAIN, STRONG, STRONG.without("stain", "jpeg")):
        generator = seeded(9)
        augment(tissue(2), config, generator=generator, bank=[TARGET])
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    "name",
    ["hed_chance", "blur_chance", "defocus_chance", "colour_chance", "grey_chance", "jpeg_chance", "dropout_chance"],
)
def test_a_chance_is_how_often(name):
    images = floats(400, 16)
    out = augment(images, replace(PLAIN, **{name: 0.3}), generator=seeded(11))
    changed = (out != images).flatten(1).any(1).double().mean()
    assert abs(changed - 0.3) < 3.5 * (0.3 * 0.7 / 400) ** 0.5  # weak blurs and qualities still change a pixel


def test_both_flips_come_half_of_the_time_and_independently():
    images = floats(1, 16).expand(400, -1, -1, -1)
    out = augment(images, replace(PLAIN, flip_chance=0.5), generator=seeded(1))
    kinds = torch.stack([images[0], images[0].flip(2), images[0].flip(1), images[0].flip(1, 2)])
    counts = (out[:, None] == kinds[None]).flatten(2).all(2).sum(0)
    assert counts.sum() == 400
    assert (counts > 70).all()


def test_translation_is_in_microns():
    """A dot of a tile at 0.5 mpp moves by up to 3 um = 6 px in x and in y, and nearly as far as that."""
    images = torch.zeros(200, 3, 33, 33)
    images[:, :, 15:18, 15:18] = 1.0
    config = replace(PLAIN, mpp=0.5, warp_chance=1.0, rotate_deg=0.0, shear_deg=0.0, scale=1.0, translate_um=3.0)
    out = augment(images, config, generator=seeded(4))[:, 0].double()
    steps = torch.arange(33.0).double() - 16
    for axis in (1, 2):
        centre = (out.sum(axis) * steps).sum(1) / out.sum((1, 2))
        assert 5.5 < centre.abs().max() <= 6 + 1e-4
        assert abs(centre.mean()) < 1.0


def test_holes_are_in_microns():
    images = floats(200, 64)
    config = replace(PLAIN, dropout_chance=1.0, holes=1, hole_um=(2.0, 3.0))
    sides = []
    painted = (augment(images, config, generator=seeded(3)) != images).any(1)
    for hole in painted:
        if not (hole[0].any() or hole[-1].any() or hole[:, 0].any() or hole[:, -1].any()):
            sides += [int(hole.any(0).sum()), int(hole.any(1).sum())]
    assert len(sides) > 200
    assert {8, 12} <= set(sides) <= set(range(8, 13))  # 2-3 um at 0.25 mpp


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (torch.zeros(3, 8, 8), GeometryError, "needs images"),
        (torch.zeros(2, 4, 8, 8), GeometryError, "needs images"),
        (torch.zeros(2, 3, 8, 9), GeometryError, "needs images"),
        (torch.zeros(0, 3, 8, 8), GeometryError, "needs images"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int16), GeometryError, "int16"),
        (torch.full((2, 3, 8, 8), 200.0), GeometryError, "lie in 200 to 200"),
        (torch.full((2, 3, 8, 8), -0.5), GeometryError, "before the encoder's mean"),
        (torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), torch.nan)]), NonFiniteError, r"images \[1\]"),
    ],
)
def test_images_that_cannot_be_are_refused(images, error, match):
    with pytest.raises(error, match=match):
        augment(images, PLAIN, generator=seeded())


def test_macenko_without_a_bank_is_refused():
    with pytest.raises(ConfigError, match="the bank is empty"):
        augment(tissue(2), AugmentConfig(), generator=seeded())
    augment(tissue(2), AugmentConfig().without("stain"), generator=seeded())


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"families": ("stains",)}, "closest are stain"),
        ({"jpeg_chance": 1.2}, "jpeg_chance is 1.2"),
        ({"macenko_chance": 0.6, "he_chance": 0.6}, "add up to 1.5"),
        ({"blur_chance": 0.6, "defocus_chance": 0.6}, "add up to 1.2"),
        ({"scale": 0.9}, "scale is 0.9"),
        ({"hue_deg": float("nan")}, "hue_deg is nan"),
        ({"jpeg_quality": (90, 40)}, "jpeg_quality"),
        ({"hole_um": (0.0, 1.0)}, "hole_um"),
        ({"mpp": 20.0}, "mpp is 20"),
    ],
)
def test_a_config_out_of_range_is_refused(bad, match):
    with pytest.raises(ConfigError, match=match):
        AugmentConfig(**bad)


def test_without_refuses_an_unknown_family():
    with pytest.raises(ConfigError, match="'blur'"):
        AugmentConfig().without("blur")


def test_the_picture_shows_every_augmentation(tmp_path):
    tiles = tissue(2, 40).movedim(1, -1).contiguous().numpy()
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    path = augmentation_picture(tiles, tmp_path / "out.png")
    with Image.open(path) as picture:
        pixels = np.asarray(picture).astype(int)
    assert pixels.shape == (2 * (2 * 44 + 16) + 4, 9 * 44 + 4, 3)
    shown = [
        pixels[4 + band * 104 + 16 : 4 + band * 104 + 56, 4 + at * 44 : 44 + at * 44]
        for band in (0, 1)
        for at in range(9)
    ]
    np.testing.assert_array_equal(shown[0], tiles[0])
    names = list(effects(floats(2, 64), AugmentConfig(), stain_bank(tiles, ["a", "b"]), generator=seeded()))
    assert len(names) == 18
    for name, changed in list(zip(names, shown, strict=True))[1:-3]:  # the last three may leave the first tile alone
        assert (changed != tiles[0]).any(), name
    for at, cell in enumerate(paths):
        Image.fromarray(np.tile(tiles[at], (4, 4, 1))[:128, :128]).save(cell)
    main([str(tmp_path / "cells.jpg"), *map(str, paths)])
    assert (tmp_path / "cells.jpg").stat().st_size > 10_000
    with pytest.raises(CohortError, match="two tiles or more"):
        augmentation_picture(tiles[:1], path)


@pytest.mark.real
def test_real_cells_of_every_scanner_give_a_bank_and_augmented_tiles(real_data):
    folder = real_data / "tiles" / "amf"
    rows = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines()[1:]]
    chosen = [row for scanner in sorted({r[3] for r in rows}) for row in [r for r in rows if r[3] == scanner][:8]]
    tiles = np.stack([np.asarray(Image.open(folder / row[0]).convert("RGB")) for row in chosen])
    bank = stain_bank(tiles, [row[3] for row in chosen])
    assert bank.left_out == ()
    images = torch.from_numpy(tiles).movedim(-1, 1)
    config = replace(PLAIN, macenko_chance=1.0)
    out = augment(images, config, generator=seeded(), bank=bank.targets)
    assert (out - images / 255).abs().flatten(1).mean(1).median() > 0.01
    assert out.isfinite().all()
    full = augment(images, AugmentConfig(), generator=seeded(), bank=bank.targets)
    assert full.shape == images.shape
    assert full.mean() > 0.4  # nothing black came in
