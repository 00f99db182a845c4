"""The clusters that the attention of ClusTR goes to, and where a token looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.clustr import MAX_IMPORTANCE, ClusteredAttention, ClusTR
from ..ops import DPCKNN, Clusters

#: What the two scales of a block are called, in their order.
SCALES = ('coarse', 'fine')


@dataclass
class ClusterMap:
    """The clusters of one image at one scale of one block, on the CPU.

    Attributes:
        stage, block (int): From 0.
        scale (int): 0 for the coarse clusters, 1 for the fine ones.
        stride (int): Pixels per side of a token.
        num_clusters (int): M; k-means may leave a cluster without tokens.
        labels (Tensor): (h, w) int64, from 0 to M - 1, the cluster of each token.
        shares (Tensor): (h, w) float32, ``w_i / sum(w)`` over the cluster, with ``w``
            the exponential of the learned importance.
        centres (Tensor, optional): (h, w) bool, the tokens that the clusters of DPC-kNN
            grew from; None for other clusterers, whose clusters have no such token.
        attention (Tensor, optional): (heads, h, w) float32, what one query gets from
            each token, see :func:`compute_maps`; None without a query.
    """

    stage: int
    block: int
    scale: int
    stride: int
    num_clusters: int
    labels: Tensor
    shares: Tensor
    centres: Tensor | None = None
    attention: Tensor | None = None

    @property
    def is_trivial(self) -> bool:
        """Whether every token is a cluster by itself."""
        return self.num_clusters == self.labels.numel()

    @property
    def sizes(self) -> Tensor:
        """Tokens in each cluster, (M,) int64."""
        return self.labels.flatten().bincount(minlength=self.num_clusters)

    @property
    def relative_weights(self) -> Tensor:
        """Weight of each token over the mean weight in its cluster, (h, w) float32."""
        return self.shares * self.sizes[self.labels]


def find_clustr(model: nn.Module) -> ClusTR:
    """Find the first backbone in a model, wrapped or not, or raise ValueError."""
    for module in model.modules():
        if isinstance(module, ClusTR):
            return module
    raise ValueError(f'there is no ClusTR in this {type(model).__name__}')


def clustered_stages(backbone: ClusTR) -> list[int]:
    """Stages, from 0, whose attention goes to clusters."""
    return [
        index
        for index, stage in enumerate(backbone.stages)
        if isinstance(stage.blocks[0].attn, ClusteredAttention)
    ]


def clustered_attention(
    backbone: ClusTR, stage: int, block: int = -1
) -> ClusteredAttention:
    """Find the attention of a block, by default the last, of a stage from 0.

    Raises:
        ValueError: If there is no such block, or the stage has full attention.
    """
    stages = clustered_stages(backbone)
    if stage not in stages:
        raise ValueError(
            f'stage must be one of {stages}, the stages with clusters, got {stage!r}'
        )
    blocks = backbone.stages[stage].blocks
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(
            f'block must be from {-len(blocks)} to {len(blocks) - 1} in stage '
            f'{stage}, got {block!r}'
        )
    return blocks[block].attn


def token_at(
    point: tuple[float, float], size: tuple[int, int], hw: tuple[int, int]
) -> int:
    """Find the token of a map (h, w), row by row, that is drawn at a point x, y.

    It is in pixels from the upper left corner of a picture, ``size`` high and wide; the
    pixel in that corner goes from 0 to 1.

    Raises:
        ValueError: If the point is not in the picture.
    """
    (x, y), (height, width), (h, w) = point, size, hw
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f'the point {x:g}, {y:g} is outside the image of {width} x {height} pixels'
        )
    return int(y) * h // height * w + int(x) * w // width


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without gradient or dropout, and leave its modes as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # Not train(), which would put all of them in one mode.
        for module, training in modes:
            module.training = training


def _run(backbone: ClusTR, images: Tensor, modules: list[nn.Module]) -> dict:
    """Run a backbone, and return the tokens and (h, w) that each of its modules got."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda key, x: seen.update({key: x[:2]}))
        for module in modules
    ]
    try:
        with evaluating(backbone):
            backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _find_source(backbone: ClusTR, stage: int, block: int) -> ClusteredAttention:
    """The attention whose tokens are clustered for that of a block."""
    shared = backbone.stages[stage].share_clusters
    return clustered_attention(backbone, stage, 0 if shared else block)


def compute_clusters(
    backbone: ClusTR, images: Tensor, stage: int, block: int = -1, scale: int = 0
) -> Tensor:
    """Cluster labels of normalised images, without gradient or dropout.

    Args:
        backbone (ClusTR): The backbone; its training mode is left as it was.
        images (Tensor): (B, C, H, W), floating point, normalised as for the
            backbone's training, on its device.
        stage (int): Stage from 0.
        block (int): Block of the stage, negative from the last. Defaults to -1.
        scale (int): 0 for the coarse clusters, 1 for the fine ones. Defaults to 0.

    Returns:
        Tensor: Labels (B, h, w) int64 for h x w tokens.

    Raises:
        ValueError: If there is no such stage, block or scale.
    """
    if scale not in (0, 1):
        raise ValueError(f'scale must be 0 (coarse) or 1 (fine), got {scale!r}')
    clustered_attention(backbone, stage, block)  # raises if there is none
    source = _find_source(backbone, stage, block)
    tokens, hw = _run(backbone, images, [source])[source]
    return source.cluster(tokens, hw).labels[scale].unflatten(1, hw)


@torch.no_grad()
def compute_maps(
    backbone: ClusTR,
    image: Tensor,
    stages: Sequence[int] | None = None,
    block: int = -1,
    point: tuple[float, float] | None = None,
) -> list[ClusterMap]:
    """Compute all there is to see of one image, without gradient or dropout.

    With a point, the query is the token there. If it attends to cluster m with weight
    ``a_m``, of a softmax over the clusters of one scale and for one head, it gets
    ``a_m * w_i / sum(w)`` from token i of the cluster. These sum to 1 over the tokens,
    and multiplied with their values give the output of the attention, exactly but for
    the 1e-6 that the model adds to ``sum(w)``, and for clusters without tokens.

    Args:
        backbone (ClusTR): The backbone; its training mode is left as it was.
        image (Tensor): (1, C, H, W), see :func:`compute_clusters`.
        stages (Sequence[int], optional): Stages from 0, by default all with clusters.
        block (int): Block of each of them, negative from the last. Defaults to -1.
        point (tuple[float, float], optional): x and y of the query, see
            :func:`token_at`. Defaults to None.

    Returns:
        list[ClusterMap]: Coarse and fine clusters of each stage.

    Raises:
        ValueError: If there is no such stage or block, the point is not in the
            image, or there is not one image.
    """
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(
            f'image must have shape (1, C, H, W), got {tuple(image.shape)}'
        )
    stages = clustered_stages(backbone) if stages is None else list(stages)
    modules = [clustered_attention(backbone, stage, block) for stage in stages]
    size = (image.shape[2], image.shape[3])
    if point is not None:
        token_at(point, size, size)  # raises before the long computation
    sources = [_find_source(backbone, stage, block) for stage in stages]
    seen = _run(backbone, image, modules + sources)
    maps = []
    for stage, module, source in zip(stages, modules, sources):
        place = dict(
            stage=stage,
            block=block % len(backbone.stages[stage].blocks),
            stride=4 * 2**stage,
        )
        tokens, hw = seen[source]
        clusters = source.cluster(tokens, hw)
        ranks = _rank(source.clusterer, tokens, hw)
        query = None if point is None else token_at(point, size, hw)
        for found in _scales(module, seen[module][0], clusters, ranks, query):
            tensors = {
                key: value.unflatten(-1, hw) if isinstance(value, Tensor) else value
                for key, value in found.items()
            }
            maps.append(ClusterMap(**place, **tensors))
    return maps


def _rank(clusterer: object, tokens: Tensor, hw: tuple[int, int]) -> Tensor | None:
    """Rank (h * w,) of each token as a centre of DPC-kNN; None for other clusterers."""
    if not isinstance(clusterer, DPCKNN):
        return None
    ranked = _RankedDPCKNN(clusterer.k, clusterer.window)
    ranked.stride = clusterer.stride
    return ranked(tokens, hw, [tokens.shape[1]]).labels[0][0].cpu()


class _RankedDPCKNN(DPCKNN):
    """With as many clusters as tokens, numbers them by rank, not in their order."""

    def _cluster(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        return self.find(tokens, counts)


def _scales(
    module: ClusteredAttention,
    tokens: Tensor,
    clusters: Clusters,
    ranks: Tensor | None,
    query: int | None,
) -> Iterator[dict]:
    """What a :class:`ClusterMap` holds of tokens (1, N, C), scale by scale."""
    importance = module.importance(tokens).flatten().cpu().double()
    # In float64, or all weights of a cluster might be too small to tell from 0.
    weights = importance.clamp(-600, MAX_IMPORTANCE).exp()
    merged = module.merge(tokens, clusters)
    for scale, kv in enumerate((module.kv1, module.kv2)):
        labels, count = clusters.labels[scale][0].cpu(), clusters.counts[scale]
        if count == len(labels):  # then merge() leaves the tokens in their order
            labels = torch.arange(count)
        sums = weights.new_zeros(count).index_add(0, labels, weights)
        shares = (weights / sums[labels]).float()
        found = dict(scale=scale, num_clusters=count, labels=labels, shares=shares)
        if ranks is not None:
            best = ranks.new_full((count,), len(ranks))
            best = best.scatter_reduce(0, labels, ranks, 'amin')
            found['centres'] = ranks == best[labels]
        if query is not None:
            heads = (module.num_heads, -1)
            q = module.q(tokens[0, query]).unflatten(0, heads)
            k = kv(merged[scale][0]).chunk(2, dim=-1)[0].unflatten(1, heads)
            scores = torch.einsum('hd,mhd->hm', q, k).float() * q.shape[1] ** -0.5
            found['attention'] = scores.softmax(dim=1).cpu()[:, labels] * shares
        yield found
