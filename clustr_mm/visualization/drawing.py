"""Drawing of clusters and of values over pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

Labels = np.ndarray | Tensor


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
    border_opacity: float = 1.0,
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
        border_opacity (float): Share of that colour in the outline, in [0, 1].
            Defaults to 1.

    Returns:
        np.ndarray: (H, W, 3) uint8 RGB, a new array.

    Raises:
        ValueError: If an argument is not as stated.
    """
    _check_image(image)
    for name, value in [('opacity', opacity), ('border_opacity', border_opacity)]:
        if not 0 <= value <= 1:
            raise ValueError(f'{name} must be in [0, 1], got {value}')
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
    if border is not None:
        edges = find_borders(labels)
        drawn[edges] *= 1 - border_opacity
        drawn[edges] += border_opacity * np.array(border)
    return drawn.round().astype(np.uint8)


def draw_heat(
    image: np.ndarray,
    values: np.ndarray | Tensor,
    low: float,
    high: float,
    colours: str = 'inferno',
    opacity: float = 0.7,
) -> np.ndarray:
    """Draw a value of each token as a colour over the image, which turns grey.

    Args:
        image (np.ndarray): (H, W, 3) uint8 RGB.
        values (np.ndarray or Tensor): (h, w), real. The tokens cover the image.
        low (float): Value of the first colour, and of all values below.
        high (float): Value of the last colour, above ``low``.
        colours (str): Name of a colour map of Matplotlib. Defaults to 'inferno'.
        opacity (float): Share of the colour in the result, in [0, 1]. Defaults
            to 0.7.

    Returns:
        np.ndarray: (H, W, 3) uint8 RGB, a new array.

    Raises:
        ValueError: If an argument is not as stated.
    """
    _check_image(image)
    if not low < high:
        raise ValueError(f'low must be below high, got {low:g} and {high:g}')
    if not 0 <= opacity <= 1:
        raise ValueError(f'opacity must be in [0, 1], got {opacity}')
    values = np.asarray(values, dtype=np.float64)
    tokens = np.arange(values.size).reshape(values.shape)
    tokens = resize_labels(tokens, *image.shape[:2])
    heat = apply_colours((values.ravel() - low) / (high - low), colours)[tokens]
    grey = image @ np.array([0.299, 0.587, 0.114])
    drawn = (1 - opacity) * grey[..., None] + opacity * heat
    return drawn.round().astype(np.uint8)


def apply_colours(values: np.ndarray, name: str) -> np.ndarray:
    """Colours (..., 3) float64 in [0, 255] for values of any shape in [0, 1]."""
    # Only here: drawing clusters needs no Matplotlib.
    from matplotlib import colormaps

    return 255 * colormaps[name](np.clip(values, 0, 1))[..., :3]


def draw_dots(
    image: np.ndarray, tokens: np.ndarray | Tensor, colour: tuple[int, int, int]
) -> np.ndarray:
    """Mark the middle of some tokens by a dot, with a dark rim if there is room.

    Args:
        image (np.ndarray): (H, W, 3) uint8 RGB.
        tokens (np.ndarray or Tensor): (h, w) bool. The tokens cover the image.
        colour (tuple[int, int, int]): RGB of the dots.

    Returns:
        np.ndarray: (H, W, 3) uint8 RGB, a new array.
    """
    drawn = image.copy()
    height, width = image.shape[:2]
    tokens = np.asarray(tokens)
    h, w = tokens.shape
    rows, columns = np.nonzero(tokens)
    ys, xs = ((2 * rows + 1) * height // (2 * h), (2 * columns + 1) * width // (2 * w))
    if min(height / h, width / w) < 12:
        # Smaller than a token, lest many dots hide the picture.
        drawn[ys, xs] = colour
        return drawn
    for radius, paint in [(2, (0, 0, 0)), (1, colour)]:
        for y, x in zip(ys, xs):
            drawn[y - radius : y + radius + 1, x - radius : x + radius + 1] = paint
    return drawn


def draw_point(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Mark a point by a ring that leaves the point itself free.

    Args:
        image (np.ndarray): (H, W, 3) uint8 RGB.
        x (float): From the left edge, in pixels.
        y (float): From the upper edge, in pixels.

    Returns:
        np.ndarray: (H, W, 3) uint8 RGB, a new array.
    """
    drawn = image.copy()
    ys, xs = np.ogrid[: image.shape[0], : image.shape[1]]
    distance = np.hypot(xs + 0.5 - x, ys + 0.5 - y)
    drawn[(distance > 4) & (distance < 10)] = (0, 0, 0)
    drawn[(distance > 5) & (distance < 9)] = (90, 255, 90)
    return drawn


def resize_image(image: np.ndarray, longer: int, enlarge: bool = True) -> np.ndarray:
    """Scale an image so that its longer side gets a given length.

    Args:
        image (np.ndarray): (H, W, 3) uint8 RGB.
        longer (int): Length in pixels.
        enlarge (bool): Whether a smaller image grows to it. Defaults to True.

    Returns:
        np.ndarray: (H', W', 3) uint8 RGB, no side below 1.
    """
    height, width = image.shape[:2]
    scale = longer / max(height, width)
    if scale == 1 or (scale > 1 and not enlarge):
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            'image must be uint8 of shape (H, W, 3), got '
            f'{image.dtype} of shape {image.shape}'
        )


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
