"""Which patches of which crops the student does not see."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_BLOCK = 4
LARGEST_BLOCK = 0.5
ASPECT = (0.3, 1 / 0.3)
TRIES = 10


def block_masks(
    batch: int,
    grid: int,
    *,
    share: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    exact: bool = False,
    generator: torch.Generator,
) -> Tensor:
    """Return the block masks of a batch, (batch, grid * grid) bool, True where the patch is hidden from the student.

    int(batch * share) crops are masked. Their ratios are stratified: the range is cut into as many equal parts as there
    are masked crops, each takes the ratio of one part, and the crops are shuffled. A mask is a union of rectangles of 4
    to half of all patches, of log-uniform aspect 0.3 to 1/0.3, each within what is still to be masked; after 10
    rectangles in a row that do not fit, the crop keeps fewer patches than asked (iBOT, Zhou et al. 2022, section 3.1,
    as DINOv2 stratified it).

    Args:
        batch: crops in the batch.
        grid: patches along one side of a crop.
        share: of crops that are masked.
        ratio: smallest and largest share of a crop's patches to mask.
        exact: False as DINOv2: a crop's ratio is uniform in its part, and the count may fall short. True as DINOv3: the
            ratio is the upper end of its part, and single patches fill the mask up to exactly that count.
        generator: CPU generator; the same state gives the same masks.

    Raises:
        ValueError: settings that make no mask.
    """
    low, high = ratio
    if grid < 1 or not 0 < low <= high <= 1:
        raise ValueError(f"grid {grid} and ratio {ratio} make no mask; need grid >= 1 and 0 < low <= high <= 1")
    if not 0 < share <= 1 or int(batch * share) < 1:
        raise ValueError(f"share {share} of {batch} crops masks none; need 0 < share <= 1 and 1 / share crops or more")
    masked = int(batch * share)
    edges = torch.linspace(low, high, masked + 1, dtype=torch.float64)
    ratios = edges[1:] if exact else torch.lerp(edges[:-1], edges[1:], _uniform(generator, masked))
    counts = (grid * grid * ratios + 1e-9).long()  # 0.3 * 10 is 2.9999...
    masks = torch.zeros(batch, grid * grid, dtype=torch.bool)
    masks[:masked] = _blocks(counts, grid, generator).flatten(1)
    if exact:
        _fill(masks[:masked], counts, generator)
    return masks[torch.randperm(batch, generator=generator)]


def _blocks(counts: Tensor, grid: int, generator: torch.Generator) -> Tensor:
    """Return masks (n, grid, grid) of at most `counts` (n,) patches; every unfinished crop tries one block a round."""
    masks = torch.zeros(len(counts), grid, grid, dtype=torch.bool)
    left, tries = counts.clone(), torch.full_like(counts, TRIES)
    place = torch.arange(grid)
    while len(active := ((left > 0) & (tries > 0)).nonzero().flatten()):
        room = left[active].double().clamp(max=LARGEST_BLOCK * grid * grid)
        area, shape, y, x = _uniform(generator, 4, len(active))
        area = SMALLEST_BLOCK + area * (room - SMALLEST_BLOCK)
        aspect = torch.exp(math.log(ASPECT[0]) + shape * (math.log(ASPECT[1]) - math.log(ASPECT[0])))
        height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top, start = (y * (grid - height + 1)).long(), (x * (grid - width + 1)).long()
        rows = (place >= top[:, None]) & (place < (top + height)[:, None])
        columns = (place >= start[:, None]) & (place < (start + width)[:, None])
        added = rows[:, :, None] & columns[:, None, :] & ~masks[active]
        new = added.sum((1, 2))
        fits = (height < grid) & (width < grid) & (new > 0) & (new <= room)
        masks[active] |= added & fits[:, None, None]
        left[active] -= new * fits
        tries[active] = torch.where(fits, TRIES, tries[active] - 1)
    return masks


def _fill(masks: Tensor, counts: Tensor, generator: torch.Generator) -> None:
    """Hide random single patches of `masks` (n, N) in place until each has its count (n,)."""
    order = torch.where(masks, -1.0, _uniform(generator, *masks.shape)).argsort(dim=1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(masks.shape[1]).expand_as(order))
    masks |= rank < counts[:, None]


def _uniform(generator: torch.Generator, *size: int) -> Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float64)
