"""Where backbones, weights and pictures come from, and how pixels are normalised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import MODELS
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..benchmark.backbones import without_weights
from ..evaluation.checkpoints import load
from ..files import read_config, shorten
from ..models.clustr import ClusTR

#: What the data preprocessors of the toolboxes call the exchange of red and blue.
CONVERSIONS = (
    *('bgr_to_rgb', 'rgb_to_bgr', 'to_rgb'),
    *('channel_conversion', '_channel_conversion'),
)


@dataclass(frozen=True)
class Pixels:
    """How the pixels of a picture become the input of a network, and back.

    Attributes:
        mean (Sequence[float]): Subtracted from each channel, in [0, 255]; one number
            or one for each channel. The default is ImageNet's, as is ``std``.
        std (Sequence[float]): Each channel is divided by it.
        rgb (bool): Whether red is the first channel of the input, not blue.
    """

    mean: Sequence[float] = (123.675, 116.28, 103.53)
    std: Sequence[float] = (58.395, 57.12, 57.375)
    rgb: bool = True

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Pixels:
        """Read the data preprocessor of a config of any toolbox.

        Args:
            config (Mapping): A whole config; its data preprocessor stands inside the
                model or beside it, and may be wrapped in another.

        Returns:
            Pixels: What it says. Without a data preprocessor, or if that has no
            ``mean`` and ``std``, those of ImageNet.
        """
        model = config.get('model') or {}
        found = model.get('data_preprocessor') or config.get('data_preprocessor') or {}
        while 'data_preprocessor' in found:
            found = found['data_preprocessor']
        if not found.get('mean') or not found.get('std'):
            return cls()
        converts = any(found.get(name) for name in CONVERSIONS)
        # Files are read with blue first.
        return cls(tuple(found['mean']), tuple(found['std']), converts)

    @classmethod
    def of_model(cls, model: nn.Module) -> Pixels | None:
        """Read the data preprocessor of a model of any toolbox.

        Args:
            model (nn.Module): A model, wrapped or not.

        Returns:
            Pixels | None: How it normalises; None if it does not.
        """
        inside = (getattr(m, 'data_preprocessor', None) for m in model.modules())
        found = next((module for module in inside if module is not None), None)
        while hasattr(found, 'data_preprocessor'):
            found = found.data_preprocessor
        mean, std = (getattr(found, name, None) for name in ('mean', 'std'))
        if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
            return None
        names = [name for name in CONVERSIONS if hasattr(found, name)]
        converts = any(getattr(found, name) for name in names)
        return cls(
            tuple(mean.flatten().tolist()),
            tuple(std.flatten().tolist()),
            # One that knows of no conversion is not one of the toolboxes'.
            converts or not names,
        )

    def normalise(self, image: np.ndarray) -> Tensor:
        """Make the input of a network.

        Args:
            image (np.ndarray): (H, W, 3) uint8 RGB.

        Returns:
            Tensor: (1, 3, H, W) float32.
        """
        inputs = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
        if not self.rgb:
            inputs = inputs.flip(1)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (inputs - mean) / std

    def restore(self, inputs: Tensor) -> np.ndarray:
        """Make a picture of an input of a network.

        Args:
            inputs (Tensor): (C, H, W), floating point, on any device. Of other than
                3 channels the first is shown, in grey.

        Returns:
            np.ndarray: (H, W, 3) uint8 RGB.
        """
        inputs = inputs.detach().cpu().float()
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        if inputs.shape[0] != 3:
            inputs, mean, std = inputs[:1], mean[:1], std[:1]
        pixels = (inputs * std + mean).nan_to_num(0).clamp(0, 255).round()
        pixels = pixels.to(torch.uint8).expand(3, -1, -1)
        if not self.rgb:
            pixels = pixels.flip(0)
        return pixels.permute(1, 2, 0).contiguous().numpy()


def stretch(inputs: Tensor) -> np.ndarray:
    """Make a picture of an input whose normalisation is not known.

    Args:
        inputs (Tensor): (C, H, W), floating point, on any device.

    Returns:
        np.ndarray: (H, W, 3) uint8 from the least value, black, to the greatest.
    """
    finite = inputs.detach().float().nan_to_num(0)
    low, high = finite.min().item(), finite.max().item()
    scale = 255 / max(high - low, 1e-6)
    return Pixels((-low * scale,), (scale,)).restore(finite)


def find_clustr(model: nn.Module) -> ClusTR:
    """Find the backbone in a model.

    Args:
        model (nn.Module): A model of any toolbox, wrapped or not, or the backbone.

    Returns:
        ClusTR: The first one there is.

    Raises:
        ValueError: If there is none.
    """
    for module in model.modules():
        if isinstance(module, ClusTR):
            return module
    raise ValueError(f'there is no ClusTR in this {type(model).__name__}')


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
        cfg, pixels = _read_config(Path(config))
    cfg.update(changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            backbone = MODELS.build(cfg).eval()
        except Exception as error:
            where = f'{config}: ' if config else ''
            raise ValueError(where + shorten(error)) from error
    if checkpoint is not None:
        _load_weights(backbone, Path(checkpoint))
    return backbone, pixels


def _read_config(path: Path) -> tuple[dict[str, Any], Pixels]:
    config = read_config(path).to_dict()
    cfg = next(_find_cfgs(config.get('model') or config), None)
    if cfg is None:
        raise ValueError(f'{path} has no ClusTR backbone')
    return without_weights(cfg), Pixels.of_config(config)


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


def _load_weights(backbone: ClusTR, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f'there is no checkpoint {str(path)!r}')
    try:
        _, weights = load(path)
        with backbone.complete_weights():
            backbone.load_state_dict(dict(weights), strict=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f'{path}: {shorten(error)}') from error


def read_image(path: Path | str) -> np.ndarray:
    """Read a picture, upright.

    Args:
        path (Path or str): A file of any format that Pillow reads.

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
