"""A clusterer that only the experiment needs, see :mod:`clustr_mm.ops.clusterers`."""

from collections.abc import Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import Clusters
from ..ops.clusterers import cut_order


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
        return cut_order(numbers.argsort(dim=1), counts)
