"""What is measured: one case is one call, ready to be repeated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from backbones import Backbone
from textbook import textbook_dpc_knn
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import DPCKNN, KMeans, dpc_knn

AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}

#: Implementations that ``OperatorCase`` compares, the baseline first.
OPERATORS = {'textbook': textbook_dpc_knn, 'dpc_knn': dpc_knn}

#: Clusterings that ``SweepCase`` compares, and the most coarse clusters of each.
SWEEP = {
    'whole map': (dict(k=5), None),
    'windows of 224 px': (dict(k=5, window=224), None),
    'k-means, 49': (dict(), 49),
}

#: Stride and channels of stage 1, where clustering costs most.
STRIDE, CHANNELS = 4, 64


class Prepared(NamedTuple):
    """A case with its model and input in place.

    Attributes:
        run (Callable): The call to be timed.
        model (nn.Module, optional): The backbone, if the case has one.
    """

    run: Callable[[], object]
    model: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all cases share.

    Attributes:
        batch (int): Images at a time.
        device (str): 'cpu' or a CUDA device.
    """

    batch: int
    device: str = 'cpu'

    mode = 'forward'
    amp = None

    def load(self) -> None:
        """Import what the case needs, so that it can be told from its use."""


@dataclass(frozen=True, kw_only=True)
class BackboneCase(Case):
    """A backbone on images of one size.

    Attributes:
        backbone (Backbone): What to build.
        size (tuple[int, int]): Height and width in pixels.
        mode (str): 'forward' (evaluation mode, no gradient) or 'train'
            (training mode, forward and backward pass, no optimizer).
        amp (str, optional): 'bf16' or 'fp16' for autocast.
    """

    backbone: Backbone
    size: tuple[int, int]
    mode: str = 'forward'
    amp: str | None = None

    section = 'backbones'

    @property
    def name(self) -> str:
        """Name of the backbone."""
        return self.backbone.name

    @property
    def input(self) -> str:
        """The size as text, like 800x1344."""
        return f'{self.size[0]}x{self.size[1]}'

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.size[0] * self.size[1]

    def load(self) -> None:
        """Import the toolbox of the backbone."""
        self.backbone.load()

    def prepare(self) -> Prepared:
        """Build the backbone and an input."""
        torch.manual_seed(0)
        model = self.backbone.build().to(self.device)
        # Separately: not every backbone's train() returns itself.
        model.train(self.mode == 'train')
        images = smooth_noise(self.batch, 3, *self.size).to(self.device)

        def run() -> None:
            if self.mode == 'train':
                with self._autocast():
                    outs = _tensors(model(images))
                    loss = sum(out.float().mean() for out in outs)
                loss.backward()
                model.zero_grad(set_to_none=True)
            else:
                with torch.no_grad(), self._autocast():
                    _tensors(model(images))

        return Prepared(run, model)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            torch.device(self.device).type,
            AMP_DTYPES.get(self.amp),
            enabled=self.amp is not None,
        )


@dataclass(frozen=True, kw_only=True)
class OperatorCase(Case):
    """Clustering of tokens with the counts of stage 1, N // 64 and N // 16.

    Attributes:
        name (str): Key of ``OPERATORS``.
        tokens (int): N.
        channels (int): C.
    """

    name: str
    tokens: int
    channels: int

    section = 'operator'

    @property
    def input(self) -> str:
        """The shape as text, like 1x16384x64."""
        return f'{self.batch}x{self.tokens}x{self.channels}'

    @property
    def pixels(self) -> int:
        """Pixels of an image with as many tokens in stage 1."""
        return self.tokens * STRIDE**2

    def prepare(self) -> Prepared:
        """Make the tokens."""
        height = int(self.tokens**0.5)
        while self.tokens % height:
            height -= 1
        tokens = _tokens(self.batch, self.channels, height, self.tokens // height)
        tokens = tokens.to(self.device)
        counts = stage_counts(self.tokens)
        return Prepared(lambda: OPERATORS[self.name](tokens, counts))


@dataclass(frozen=True, kw_only=True)
class SweepCase(Case):
    """Clustering in stage 1 of images of one size, at least 224 x 224.

    Attributes:
        name (str): Key of ``SWEEP``.
        size (tuple[int, int]): Height and width of the image in pixels.
    """

    name: str
    size: tuple[int, int]

    section = 'sweep'

    input = BackboneCase.input
    pixels = BackboneCase.pixels

    def prepare(self) -> Prepared:
        """Make the tokens."""
        height, width = (-(-side // STRIDE) for side in self.size)
        tokens = _tokens(self.batch, CHANNELS, height, width).to(self.device)
        kwargs, most = SWEEP[self.name]
        clusterer = (KMeans if most else DPCKNN)(**kwargs)
        clusterer.stride = STRIDE
        counts = (most, 4 * most) if most else stage_counts(height * width)
        return Prepared(lambda: clusterer(tokens, (height, width), counts))


def stage_counts(num_tokens: int) -> tuple[int, int]:
    """Coarse and fine cluster count of stage 1."""
    return max(1, num_tokens // 64), max(1, num_tokens // 16)


def smooth_noise(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Random maps (B, C, H, W) with detail at every scale, as images have.

    White noise would have no neighbourhoods in space, and the work of the
    clustering depends on the data.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(batch, channels, height, width)
    scale = 1
    while scale <= min(height, width):
        noise = torch.randn(
            (batch, channels, -(-height // scale), -(-width // scale)),
            generator=generator,
        )
        total += scale**0.5 * F.interpolate(noise, (height, width), mode='bilinear')
        scale *= 2
    return total / total.std().clamp(min=1e-6)


def _tokens(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Normalised tokens (B, H * W, C) of smooth maps."""
    tokens = smooth_noise(batch, channels, height, width)
    return F.layer_norm(tokens.flatten(2).transpose(1, 2), (channels,)).contiguous()


def _tensors(outs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    outs = (outs,) if isinstance(outs, Tensor) else outs
    if not isinstance(outs, (tuple, list)) or not all(
        isinstance(out, Tensor) for out in outs
    ):
        raise TypeError(f'a backbone must return tensors, got {type(outs).__name__}')
    return outs
