"""Where backbones, weights and pictures come from, and how pixels are normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import MODELS
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..files import read_checkpoint, read_config, shorten
from ..models.clustr import ClusTR

#: What the data preprocessors of the toolboxes call the exchange of red and blue, as
#: arguments and as attributes.
CONVERSIONS = (
    *('bgr_to_rgb', 'rgb_to_bgr', 'to_rgb'),
    *('channel_conversion', '_channel_conversion'),
)


@dataclass(frozen=True)
class Pixels:
    """How the pixels of a picture become the input of a network, and back.

    Attributes:
        mean (Sequence[float]): Subtracted from each channel, in [0, 255]. The default
            is ImageNet's, as is ``std``.
        std (Sequence[float]): Each channel is divided by it.
        rgb (bool): Whether red is the first channel of the input, not blue.
    """

    mean: Sequence[float] = (123.675, 116.28, 103.53)
    std: Sequence[float] = (58.395, 57.12, 57.375)
    rgb: bool = True

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Pixels:
        """Read the data preprocessor of a config of any toolbox.

        It stands in the model or beside it, and may be wrapped in another. Without one,
        or if it has no ``mean`` and ``std``, ImageNet's numbers are taken.
        """
        model = config.get('model') or {}
        found = model.get('data_preprocessor') or config.get('data_preprocessor') or {}
        while 'data_preprocessor' in found:
            found = found['data_preprocessor']
        return cls._read(found.get)

    @classmethod
    def of_model(cls, model: nn.Module) -> Pixels:
        """Read the data preprocessor of a model, wrapped or not; see `of_config`."""
        inside = (getattr(m, 'data_preprocessor', None) for m in model.modules())
        found = next((module for module in inside if module is not None), None)
        while hasattr(found, 'data_preprocessor'):
            found = found.data_preprocessor
        return cls._read(lambda name: getattr(found, name, None))

    @classmethod
    def _read(cls, get: Callable[[str], Any]) -> Pixels:
        mean, std = get('mean'), get('std')
        if mean is None or std is None:
            return cls()
        mean, std = (tuple(torch.as_tensor(v).flatten().tolist()) for v in (mean, std))
        # Files are read with blue first.
        return cls(mean, std, any(map(get, CONVERSIONS)))

    def normalise(self, image: np.ndarray) -> Tensor:
        """Make the input (1, 3, H, W) float32 of a picture (H, W, 3) uint8 RGB."""
        pixels = torch.from_numpy(image[..., :: 1 if self.rgb else -1].copy()).float()
        inputs = (pixels - torch.tensor(self.mean)) / torch.tensor(self.std)
        return inputs.permute(2, 0, 1)[None].contiguous()

    def restore(self, inputs: Tensor) -> np.ndarray:
        """Make a picture (H, W, 3) uint8 RGB of an input (C, H, W).

        Of other than 3 channels the first is shown, in grey.
        """
        number = 3 if len(inputs) == 3 else 1
        pixels = inputs[:number].detach().cpu().float().permute(1, 2, 0)
        mean, std = (torch.tensor(v[:number]) for v in (self.mean, self.std))
        pixels = (pixels * std + mean).nan_to_num(0).clamp(0, 255).round().byte()
        return pixels.expand(-1, -1, 3).numpy()[..., :: 1 if self.rgb else -1].copy()


def load_backbone(
    config: Path | str | None = None,
    checkpoint: Path | str | None = None,
    arch: str = 'tiny',
    **changes: Any,
) -> tuple[ClusTR, Pixels]:
    """Build a backbone alone, in evaluation mode on the CPU.

    Args:
        config (Path or str, optional): Config of a backbone, detector, segmentor, pose
            estimator or classifier. Weights that it names are not loaded.
        checkpoint (Path or str, optional): Of the backbone or of a model that has it,
            read by the safe loader. Without one the weights are random, the same
            every time.
        arch (str): What is built without a config. Defaults to 'tiny'.
        **changes (Any): Arguments of ClusTR that take the place of the config's.

    Returns:
        tuple[ClusTR, Pixels]: The backbone, and what its input is like.

    Raises:
        ValueError: If a file is missing or does not have what it should, or the
            checkpoint is not of this backbone; in one line.
    """
    cfg, pixels = dict(type='ClusTR', arch=arch), Pixels()
    if config is not None:
        whole = read_config(Path(config)).to_dict()
        cfg, pixels = next(_find_cfgs(whole), None), Pixels.of_config(whole)
        if cfg is None:
            raise ValueError(f'{config} has no ClusTR backbone')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            backbone = MODELS.build({**cfg, **changes}).eval()
        except Exception as error:
            where = f'{config}: ' if config else ''
            raise ValueError(where + shorten(error)) from error
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise ValueError(f'there is no checkpoint {str(checkpoint)!r}')
        try:
            with backbone.complete_weights():
                backbone.load_state_dict(
                    read_checkpoint(Path(checkpoint)), strict=False
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f'{checkpoint}: {shorten(error)}') from error
    return backbone, pixels


def _find_cfgs(config: Any) -> Iterator[dict[str, Any]]:
    """Configs of ClusTR or a subclass, the outer before the inner."""
    if isinstance(config, Mapping):
        kind = config.get('type')
        if isinstance(kind, str):
            kind = MODELS.module_dict.get(kind.split('.')[-1])
        if isinstance(kind, type) and issubclass(kind, ClusTR):
            yield dict(config)
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from _find_cfgs(value)


def read_image(path: Path | str) -> np.ndarray:
    """Read a picture of any format that Pillow reads, upright.

    Returns:
        np.ndarray: (H, W, 3) uint8 RGB.

    Raises:
        ValueError: If that is not possible, in one line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'there is no picture {str(path)!r}')
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert('RGB'))
    # What a broken file raises depends on its format.
    except Exception as error:
        raise ValueError(f'cannot read the picture {path}: {shorten(error)}') from error


def resize_image(image: np.ndarray, longer: int, enlarge: bool = True) -> np.ndarray:
    """Scale a picture so that its longer side gets a given length, in pixels.

    Args:
        image (np.ndarray): (H, W, 3) uint8 RGB.
        longer (int): Length in pixels.
        enlarge (bool): Whether a smaller picture grows to it. Defaults to True.

    Returns:
        np.ndarray: (H', W', 3) uint8 RGB, no side below 1.
    """
    height, width = image.shape[:2]
    scale = longer / max(height, width)
    if scale == 1 or (scale > 1 and not enlarge):
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
