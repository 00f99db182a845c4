"""Looking at the clusters that the attention of ClusTR goes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.clustr import ClusteredAttention, ClusTR
from ..ops import DPCKNN, merge_tokens
from .attention import attention_maps, cluster_shares, token_at

#: What the two scales of a block are called, in their order.
SCALES = ('coarse', 'fine')


@dataclass
class ClusterMap:
    """The clusters of one image at one scale of one block.

    Attributes:
        stage (int): Stage from 0.
        block (int): Block of the stage, from 0.
        scale (int): 0 for the coarse clusters, 1 for the fine ones.
        stride (int): Pixels per side of a token.
        num_clusters (int): M.
        labels (Tensor): (h, w) int64, from 0 to M - 1, the cluster of each token.
        centres (Tensor): (h, w) bool, a token of every cluster: for DPC-kNN the one
            that it grew from, else the one nearest to its mean.
        shares (Tensor): (h, w) float32, the share of each token in its merged
            cluster, see :func:`cluster_shares`.
        attention (Tensor, optional): (heads, h, w) float32, how much one query
            gets from each token, see :func:`attention_maps`; None without a query.
    """

    stage: int
    block: int
    scale: int
    stride: int
    num_clusters: int
    labels: Tensor
    centres: Tensor
    shares: Tensor
    attention: Tensor | None = None

    @property
    def is_trivial(self) -> bool:
        """Whether every token is a cluster by itself."""
        return self.num_clusters == self.labels.numel()

    @property
    def relative_weights(self) -> Tensor:
        """Weight of each token over the mean weight in its cluster, (h, w) float32."""
        sizes = self.labels.flatten().bincount(minlength=self.num_clusters)
        return self.shares * sizes[self.labels]


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
    stages = clustered_stages(backbone)
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without gradient or dropout, and leave its modes as they were.

    Args:
        model (nn.Module): Its modules need not all be in the same mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # Not train(), which would put all of them in one mode.
        for module, training in modes:
            module.training = training


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
        tokens, hw = inputs[:2]
        labels = attention.cluster(tokens, hw).labels
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
    with (
        evaluating(backbone),
        record_clusters(backbone, stage, block, scale) as labels,
    ):
        backbone(images)
    return labels[0]


def compute_maps(
    backbone: ClusTR,
    image: Tensor,
    stages: Sequence[int] | None = None,
    block: int = -1,
    point: tuple[float, float] | None = None,
) -> list[ClusterMap]:
    """Compute all there is to see of one image, without gradient or dropout.

    Args:
        backbone (ClusTR): The backbone; its training mode is left as it was.
        image (Tensor): (1, C, H, W), floating point, normalised as for the
            backbone's training, on the backbone's device.
        stages (Sequence[int], optional): Stages from 0, by default all with
            clusters.
        block (int): Block of each of these stages; negative counts from the last.
            Defaults to -1.
        point (tuple[float, float], optional): x and y, in pixels from the upper
            left corner of the image, of a place whose token is to be the query of
            the attention. Defaults to None.

    Returns:
        list[ClusterMap]: Coarse and fine clusters of each stage, on the CPU.

    Raises:
        ValueError: If there is no such stage or block, the point is not in the
            image, or there is not one image.
    """
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(
            f'image must have shape (1, C, H, W), got {tuple(image.shape)}'
        )
    stages = clustered_stages(backbone) if stages is None else list(stages)
    modules = [clustered_attention(backbone, stage, block) for stage in stages]
    size = (image.shape[2], image.shape[3])
    if point is not None:
        token_at(point, size, size)  # raises before the long computation
    records = {}

    def record(module: nn.Module, inputs: tuple[Tensor, tuple[int, int]]) -> None:
        records[module] = inputs[:2]

    handles = [module.register_forward_pre_hook(record) for module in modules]
    maps = []
    try:
        with evaluating(backbone):
            backbone(image)
            for stage, module in zip(stages, modules):
                position = block % len(backbone.stages[stage].blocks)
                place = dict(stage=stage, block=position, stride=4 * 2**stage)
                tokens, hw = records[module]
                query = None if point is None else token_at(point, size, hw)
                maps += _map_scales(module, tokens, hw, query, place)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def _map_scales(
    attention: ClusteredAttention,
    tokens: Tensor,
    hw: tuple[int, int],
    query: int | None,
    place: dict[str, int],
) -> Iterator[ClusterMap]:
    """Both scales of a block for tokens (1, h * w, C)."""
    clusters = attention.cluster(tokens, hw)
    seen = (None, None)
    if query is not None:
        seen = attention_maps(attention, tokens, hw, query)
    ranks = None
    if isinstance(attention.clusterer, DPCKNN):
        # With as many clusters as tokens all are centres, numbered by rank.
        ranks = RankedDPCKNN.of(attention.clusterer)(tokens, hw, [tokens.shape[1]])
        ranks = ranks.labels[0]
    for scale, (labels, count, weights) in enumerate(
        zip(clusters.labels, clusters.counts, seen)
    ):
        shares = cluster_shares(attention, tokens, labels, count)[0]
        centres = _first_of_clusters(tokens, labels, count, ranks)
        yield ClusterMap(
            **place,
            scale=scale,
            num_clusters=count,
            labels=labels[0].unflatten(0, hw).cpu(),
            centres=centres[0].unflatten(0, hw).cpu(),
            shares=shares.unflatten(0, hw).cpu(),
            attention=None if weights is None else weights[0].unflatten(1, hw).cpu(),
        )


class RankedDPCKNN(DPCKNN):
    """DPC-kNN that ranks tokens where all of them are wanted as clusters."""

    @classmethod
    def of(cls, clusterer: DPCKNN) -> RankedDPCKNN:
        """With the settings of another clusterer."""
        ranked = cls(clusterer.k, clusterer.window)
        ranked.stride = clusterer.stride
        return ranked

    def _cluster(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        return self.find(tokens, counts)


def _first_of_clusters(
    tokens: Tensor, labels: Tensor, count: int, ranks: Tensor | None
) -> Tensor:
    """Mark one token of every cluster.

    Args:
        tokens (Tensor): (B, N, C).
        labels (Tensor): (B, N) int64.
        count (int): M.
        ranks (Tensor, optional): (B, N) int64, rank as a centre. Without it the token
            nearest to the mean of its cluster is marked.

    Returns:
        Tensor: (B, N) bool.
    """
    if ranks is None:
        means = merge_tokens(tokens, labels, count, torch.ones_like(tokens[..., 0]))
        index = labels.unsqueeze(2).expand_as(tokens)
        distances = (tokens - means.gather(1, index)).square().sum(dim=2)
        # As ranks: no two are equal.
        order = distances.argsort(dim=1, stable=True)
        ranks = order.argsort(dim=1)
    best = ranks.new_full((len(tokens), count), tokens.shape[1])
    best = best.scatter_reduce(1, labels, ranks, 'amin')
    return ranks == best.gather(1, labels)
