"""Looking at the clusters that the attention of ClusTR goes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from .models.clustr import ClusteredAttention, ClusTR

Labels = np.ndarray | Tensor


def clustered_attention(
    backbone: ClusTR, stage: int, block: int = -1
) -> ClusteredAttention:
    """Find the attention module of a block, which must cluster its tokens.

    Args:
        backbone (ClusTR): The backbone.
        stage (int): Stage from 0.
        block (int): Block of the stage; negative counts from the last.
            Defaults to -1.

    Returns:
        ClusteredAttention: The module.

    Raises:
        ValueError: If there is no such block, or the stage has full attention.
    """
    stages = [
        index
        for index, candidate in enumerate(backbone.stages)
        if isinstance(candidate.blocks[0].attn, ClusteredAttention)
    ]
    if stage not in stages:
        raise ValueError(
            f'stage must be one of {stages}, the stages with clusters, got {stage}'
        )
    blocks = backbone.stages[stage].blocks
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(
            f'block must be from {-len(blocks)} to {len(blocks) - 1} in stage '
            f'{stage}, got {block}'
        )
    return blocks[block].attn


@contextmanager
def record_clusters(
    backbone: ClusTR, stage: int, block: int = -1, scale: int = 0
) -> Iterator[list[Tensor]]:
    """Record which cluster each token joins whenever the backbone runs.

    Args:
        backbone (ClusTR): The backbone, by itself or inside a larger model.
        stage (int): Stage from 0.
        block (int): Block of the stage; negative counts from the last.
            Defaults to -1.
        scale (int): 0 for the coarse clusters, 1 for the fine ones. Defaults
            to 0.

    Yields:
        list[Tensor]: Grows by one item per forward pass while the context is
        open: labels (B, h, w) int64 from 0 to the number of clusters - 1,
        for images of h x w tokens.

    Raises:
        ValueError: If there is no such stage, block or scale.

    Examples:
        >>> import torch
        >>> from clustr_mm import ClusTR
        >>> model = ClusTR('tiny').eval()
        >>> with torch.no_grad(), record_clusters(model, stage=0) as labels:
        ...     _ = model(torch.rand(1, 3, 64, 96))
        >>> labels[0].shape, int(labels[0].max())
        (torch.Size([1, 16, 24]), 5)
    """
    attention = clustered_attention(backbone, stage, block)
    if scale not in (0, 1):
        raise ValueError(f'scale must be 0 (coarse) or 1 (fine), got {scale}')
    records: list[Tensor] = []

    def record(
        module: nn.Module, inputs: tuple[Tensor, tuple[int, int]], _: Tensor
    ) -> None:
        tokens, hw = inputs
        labels, _ = attention.cluster(tokens, hw)
        records.append(labels[scale].unflatten(1, hw))

    handle = attention.register_forward_hook(record)
    try:
        yield records
    finally:
        handle.remove()


def compute_clusters(
    backbone: ClusTR, images: Tensor, stage: int, block: int = -1, scale: int = 0
) -> Tensor:
    """Cluster labels of normalised images, without gradient or dropout.

    Args:
        backbone (ClusTR): The backbone; its training mode is left as it was.
        images (Tensor): (B, 3, H, W), floating point, normalised as for the
            backbone's training, on the backbone's device.
        stage (int): See :func:`record_clusters`.
        block (int): See :func:`record_clusters`. Defaults to -1.
        scale (int): See :func:`record_clusters`. Defaults to 0.

    Returns:
        Tensor: Labels (B, h, w) int64.
    """
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad(), record_clusters(backbone, stage, block, scale) as labels:
            backbone(images)
    finally:
        backbone.train(training)
    return labels[0]


def resize_labels(labels: Labels, height: int, width: int) -> np.ndarray:
    """Enlarge a label map to (height, width): each pixel gets its token's label.

    Args:
        labels (np.ndarray or Tensor): (h, w), integer, covering the image.
        height (int): Rows of the result.
        width (int): Columns of the result.

    Returns:
        np.ndarray: (height, width) of the same integer type.

    Raises:
        ValueError: If ``labels`` is no map of integers.
    """
    if isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            'labels must be integers of shape (h, w), got '
            f'{labels.dtype} of shape {labels.shape}'
        )
    rows = np.arange(height) * labels.shape[0] // height
    columns = np.arange(width) * labels.shape[1] // width
    return labels[rows[:, None], columns]


def find_borders(labels: np.ndarray) -> np.ndarray:
    """Mark the pixels whose right or lower neighbour has another label.

    Args:
        labels (np.ndarray): (H, W), integer.

    Returns:
        np.ndarray: (H, W), bool.
    """
    borders = np.zeros(labels.shape, dtype=bool)
    borders[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    borders[:-1] |= labels[:-1] != labels[1:]
    return borders


def draw_clusters(
    image: np.ndarray,
    labels: Labels,
    colours: str = 'mean',
    opacity: float = 0.8,
    border: tuple[int, int, int] | None = (255, 255, 255),
) -> np.ndarray:
    """Tint each cluster of tokens in an image and outline it.

    Args:
        image (np.ndarray): (H, W, 3) uint8 RGB.
        labels (np.ndarray or Tensor): (h, w), integer, not negative; the label
            of each token. The tokens cover the image.
        colours (str): 'mean' tints a cluster with the mean colour of its
            pixels, 'distinct' with a colour far from those of the clusters
            next in number. Defaults to 'mean'.
        opacity (float): Share of the tint in the result, in [0, 1]. Defaults
            to 0.8.
        border (tuple[int, int, int], optional): RGB of the outline, None for
            none. Defaults to white.

    Returns:
        np.ndarray: (H, W, 3) uint8 RGB, a new array.

    Raises:
        ValueError: If an argument is not as stated.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            'image must be uint8 of shape (H, W, 3), got '
            f'{image.dtype} of shape {image.shape}'
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f'opacity must be in [0, 1], got {opacity}')
    labels = resize_labels(labels, *image.shape[:2])
    if labels.min() < 0:
        raise ValueError(f'labels must not be negative, got {labels.min()}')
    if colours == 'mean':
        palette = _mean_colours(image, labels)
    elif colours == 'distinct':
        palette = _distinct_colours(int(labels.max()) + 1)
    else:
        raise ValueError(f"colours must be 'mean' or 'distinct', got {colours!r}")
    drawn = (1 - opacity) * image + opacity * palette[labels]
    drawn = drawn.round().astype(np.uint8)
    if border is not None:
        drawn[find_borders(labels)] = border
    return drawn


def _mean_colours(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean colour (K, 3) of the pixels of each label."""
    flat = labels.ravel()
    sums = [np.bincount(flat, image[..., channel].ravel()) for channel in range(3)]
    return np.stack(sums, axis=1) / np.maximum(np.bincount(flat), 1)[:, None]


def _distinct_colours(count: int) -> np.ndarray:
    """Colours (count, 3) in [0, 255] whose hues step by the golden ratio."""
    index = np.arange(count)
    hue = index * 0.618034 % 1
    value = np.array([255, 200, 150])[index % 3]
    offset = (np.array([5, 3, 1]) + 6 * hue[:, None]) % 6
    chroma = np.clip(np.minimum(offset, 4 - offset), 0, 1)
    return value[:, None] * (1 - 0.75 * chroma)
