"""Clusterers that only the experiment needs, see :mod:`clustr_mm.ops.clusterers`."""

from collections.abc import Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import Clusters


def cut(order: Tensor, counts: Sequence[int]) -> Clusters:
    """Cut tokens in some order (B, N) into equal parts, for each scale.

    The parts of a scale differ by at most one token.
    """
    ranks = order.argsort(dim=1)
    length = order.shape[1]
    return Clusters(tuple(ranks * count // length for count in counts), tuple(counts))


@MODELS.register_module()
class SortedTokens(nn.Module):
    """Tokens sorted by their likeness to the mean token, and cut into equal parts.

    The semantic equitable clustering of SECViT (arXiv 2405.13337): one cosine a
    token. Tokens that differ from the mean in different ways share a part.
    """

    def forward(
        self, tokens: Tensor, hw: tuple[int, int], counts: Sequence[int]
    ) -> Clusters:
        """Find the parts."""
        likeness = F.cosine_similarity(tokens, tokens.mean(dim=1, keepdim=True), dim=2)
        return cut(likeness.argsort(dim=1, stable=True), counts)


@MODELS.register_module()
class RandomGroups(nn.Module):
    """Groups of equal size drawn anew at every call: the other control, beside a grid.

    So the same input does not give the same output.
    """

    def forward(
        self, tokens: Tensor, hw: tuple[int, int], counts: Sequence[int]
    ) -> Clusters:
        """Draw the groups."""
        numbers = torch.rand(tokens.shape[:2], device=tokens.device)
        return cut(numbers.argsort(dim=1), counts)
