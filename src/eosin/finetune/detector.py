"""A detector on the patch tokens of an encoder: tokens, a small convolutional head, one heat map.

Points as in CenterNet (Zhou et al. 2019, arXiv 1904.07850). The target of a cell p of the map is the largest of the
bumps of all figures, Y_p = max_k exp(-|p - c_k|² / (2 sigma²)), and 1 in the cell that holds a centre (section 3). The
loss is the penalty-reduced focal loss (equation 1), with N figures in the batch, alpha = 2 and beta = 4:

    L = -1/N sum_p  (1 - P_p)^alpha log P_p                    where Y_p = 1
                    (1 - Y_p)^beta P_p^alpha log(1 - P_p)      elsewhere

Where CenterNet rounds c_k to a cell and learns an offset, our bumps keep the exact centre and the offset is read from
the map (`peaks`). Cells that look like figures (hard negatives) have no bump: they are background like all the rest.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional

from eosin.encoders.network import Backbone
from eosin.encoders.spec import EncoderSpec
from eosin.errors import ConfigError
from eosin.finetune.adapters import AdaptConfig, adapt
from eosin.finetune.classifier import TransformersBackbone

ALPHA, BETA = 2, 4
# A new head says 0.1 everywhere, as CenterNet's: the background does not drown the first steps.
PRIOR = 0.1
STRIDE_PX = 4


class Detector(nn.Module):
    """Normalised images to the logits of a heat map.

    Args:
        backbone: images to `Tokens`; its network is adapted in place.
        config: what of the network trains; "head" leaves it as it is.
        width: channels of the head.
        seed: of adapters and head.

    Attributes:
        stride_px: side of a cell of the map in input pixels: the patch halved until it is about 4 px.

    Raises:
        ConfigError: the encoder has no patch tokens, or cannot be adapted so.
    """

    def __init__(
        self, backbone: Backbone | TransformersBackbone, config: AdaptConfig, *, width: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        self.spec: EncoderSpec = backbone.spec
        if not self.spec.patch_px:
            raise ConfigError(f"{self.spec.name} gives no patch tokens to find cells on; choose a vision transformer")
        self.config = config
        self.backbone = backbone
        adapt(backbone.network, config, seed=seed)
        doublings = max(0, round(math.log2(self.spec.patch_px / STRIDE_PX)))
        self.stride_px = self.spec.patch_px / 2**doublings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = _head(self.spec.width, width, doublings)
        self.head = head.to(next(backbone.parameters()).device)

    @property
    def branches(self) -> list[Detector]:
        """The parts that hold an encoder, as `saving.trained_state` asks for them: itself."""
        return [self]

    def tokens(self, images: Tensor) -> Tensor:
        """Return the patch tokens (B, W, h, w) of normalised images (B, 3, H, W).

        Raises:
            GeometryError: a side is no multiple of the patch.
        """
        self.backbone.fit(images.shape[-2], images.shape[-1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.mode != "head"):
            return self.backbone(images).patches.permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, H / stride, W / stride) of normalised images (B, 3, H, W)."""
        return self.head(self.tokens(images)).squeeze(1)

    def train(self, mode: bool = True) -> Detector:
        """Switch between training and use; an encoder that is left as it is stays in use."""
        super().train(mode)
        if self.config.mode == "head":
            self.backbone.eval()
        return self


def _head(inputs: int, width: int, doublings: int) -> nn.Sequential:
    """Return the head: tokens (B, inputs, h, w) to logits (B, 1, h 2^doublings, w 2^doublings).

    Nothing in it is a statistic over the window, and its borders repeat, so that a figure's score hardly depends on
    where in a window it lies.
    """
    layers: list[nn.Module] = [nn.Conv2d(inputs, width, 1), LayerNorm2d(width), nn.GELU()]
    for _ in range(doublings):
        layers += [_conv(width, 4 * width), nn.PixelShuffle(2), LayerNorm2d(width), nn.GELU()]
    last = nn.Conv2d(width, 1, 1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.constant_(cast(Tensor, last.bias), math.log(PRIOR / (1 - PRIOR)))
    return nn.Sequential(*layers, _conv(width, width), nn.GELU(), last)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="replicate")


def heat_target(
    points_px: npt.NDArray[np.float64], grid: tuple[int, int], *, stride_px: float, sigma_px: float
) -> npt.NDArray[np.float32]:
    """Return the heat map that figures should give, float32 (rows, columns), 0 to 1.

    Args:
        points_px: (n, 2) centres in the window, pixel i reaching from i to i + 1; those off it leave the tail of their
            bump.
        grid: rows and columns of the map.
        stride_px: side of a cell.
        sigma_px: of a bump.
    """
    points = np.asarray(points_px, dtype=np.float64).reshape(-1, 2) / stride_px
    y, x = ((np.arange(size) + 0.5) for size in grid)
    squared = (x[None, None, :] - points[:, 0, None, None]) ** 2 + (y[None, :, None] - points[:, 1, None, None]) ** 2
    heat = np.exp(-squared * stride_px**2 / (2 * sigma_px**2)).max(axis=0, initial=0).astype(np.float32)
    column, row = np.floor(points).astype(np.int64).T
    inside = (row >= 0) & (row < grid[0]) & (column >= 0) & (column < grid[1])
    heat[row[inside], column[inside]] = 1
    return heat


def heat_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the penalty-reduced focal loss of the module's docstring, a scalar.

    Args:
        logits: (B, h, w).
        target: (B, h, w) of `heat_target`; cells of exactly 1 are the figures. Without any, N counts as 1.
    """
    p, figure = logits.sigmoid(), target == 1
    on = (1 - p) ** ALPHA * functional.logsigmoid(logits)
    off = (1 - target) ** BETA * p**ALPHA * functional.logsigmoid(-logits)
    return -torch.where(figure, on, off).sum() / figure.sum().clamp(min=1)


def peaks(log_p: Tensor, *, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the local maxima of heat maps: which map (n,), places (n, 2) as x and y in cells, and scores (n,).

    A maximum is at least its eight neighbours (max-pooling, as in CenterNet's section 4). Its place is the top of the
    parabola through it and its two neighbours in log P, along x and along y: exact for a Gaussian bump, and at most
    half a cell from the cell's centre. At the border of the map the cell's centre counts.

    Args:
        log_p: (B, h, w) log P of each cell.
        floor: least score.
    """
    top = functional.max_pool2d(log_p[:, None], 3, stride=1, padding=1)[:, 0]
    which, row, column = torch.nonzero((log_p == top) & (log_p.exp() >= floor), as_tuple=True)
    score = log_p[which, row, column]
    height, width = log_p.shape[1:]
    x = _summit(
        log_p[which, row, (column - 1).clamp(min=0)], score, log_p[which, row, (column + 1).clamp(max=width - 1)]
    )
    y = _summit(
        log_p[which, (row - 1).clamp(min=0), column], score, log_p[which, (row + 1).clamp(max=height - 1), column]
    )
    x = torch.where((column > 0) & (column < width - 1), x, 0.0)
    y = torch.where((row > 0) & (row < height - 1), y, 0.0)
    return which, torch.stack((column + 0.5 + x, row + 0.5 + y), dim=1), score.exp()


def _summit(before: Tensor, here: Tensor, after: Tensor) -> Tensor:
    """Return where the parabola through three values at -1, 0 and 1 is highest, 0 where it is flat."""
    bend = before - 2 * here + after
    return torch.where(bend < 0, (before - after) / (2 * bend.clamp(max=-1e-12)), 0.0).clamp(-0.5, 0.5)
