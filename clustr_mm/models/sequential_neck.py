"""Several necks in a row, for toolboxes that take one."""

from collections.abc import Sequence

from mmengine.model import Sequential
from mmengine.registry import MODELS


@MODELS.register_module()
class SequentialNeck(Sequential):
    """Necks one after another, each on what the one before returns.

    MMDetection takes a list of necks, MMPose only one: with this, for example,
    its ``FPN`` and its ``FeatureMapProcessor``.
    An empty list is a ValueError.
    """

    def __init__(self, necks: Sequence[dict], init_cfg: dict | None = None) -> None:
        if not necks:
            raise ValueError(f'necks must hold at least one config, got {necks!r}')
        super().__init__(*map(MODELS.build, necks), init_cfg=init_cfg)
