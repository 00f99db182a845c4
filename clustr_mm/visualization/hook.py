"""Pictures of the clusters during a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from .clusters import clustered_attention, clustered_stages, compute_maps, find_clustr
from .figure import draw_figure, import_libraries
from .loading import Pixels


class ClusterVisualizationHook(Hook):
    """Shows during a training what the backbone ClusTR clusters.

    Every ``interval`` iterations the first image of the batch, as the backbone gets
    it, is run through the backbone once more, in evaluation mode and without
    gradient, and a figure of its clusters and of the weights in them goes to the
    back-ends of the runner's visualizer. Parameters, modes and random numbers of
    the training stay as they are without the hook.

    Only the main process draws. The parameters must be whole in each process, as
    with distributed data parallel training, but not with FSDP.

    Args:
        draw (bool): Whether to draw at all. Defaults to True, other than in the
            stock hooks, which stand in every config.
        interval (int): Iterations from picture to picture. Defaults to 500.
        stages (Sequence[int], optional): Stages to show, from 0. Defaults to None,
            which is all with clusters, (0, 1, 2) in the three variants.
        block (int): Block of each stage; negative counts from the last. Defaults
            to -1.
        size (int): Longer side of each picture in the figure, in pixels. Defaults
            to 256.
        name (str): Name of the image in the back-ends. Defaults to
            'train_clusters'.

    Raises:
        ValueError: If ``interval`` or ``size`` is below 1.

    Examples:
        >>> custom_imports = dict(imports=['clustr_mm'])
        >>> custom_hooks = [dict(type='ClusterVisualizationHook', interval=500)]
    """

    def __init__(
        self,
        draw: bool = True,
        interval: int = 500,
        stages: Sequence[int] | None = None,
        block: int = -1,
        size: int = 256,
        name: str = 'train_clusters',
    ) -> None:
        for argument, value in [('interval', interval), ('size', size)]:
            if value < 1:
                raise ValueError(f'{argument} must be at least 1, got {value!r}')
        self.draw = draw
        self.interval = interval
        self.stages = stages
        self.block = block
        self.size = size
        self.name = name
        self._waiting = False
        self._image: Tensor | None = None
        self._handle: Any = None

    def before_train(self, runner: Runner) -> None:
        """Find the backbone, and raise now what would be raised when drawing."""
        if not self.draw:
            return
        import_libraries()
        backbone = find_clustr(runner.model)
        stages = clustered_stages(backbone) if self.stages is None else self.stages
        if not stages:
            raise ValueError('this ClusTR has no stage with clusters')
        for stage in stages:
            clustered_attention(backbone, stage, self.block)
        kinds = [base.__name__ for base in type(runner.model).__mro__]
        if 'FullyShardedDataParallel' in kinds:
            raise ValueError(
                f'{type(self).__name__} does not work with FSDP: no process has all '
                'parameters'
            )
        if is_main_process():
            # Here and not when it is wanted, because a compiled model knows of no
            # hook that comes later.
            self._handle = backbone.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._waiting and inputs:
            # The training might change the batch itself.
            self._image = inputs[0][:1].detach().clone()
            self._waiting = False

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Ask for the image if this iteration is one to draw."""
        self._image = None
        wanted = self._handle is not None
        self._waiting = wanted and self.every_n_train_iters(runner, self.interval)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Draw the image if there is one."""
        # The number that the logged losses and the checkpoints of this iteration have.
        step = runner.iter + 1
        if self._waiting:
            runner.logger.warning(
                f'{type(self).__name__}: the backbone got no image in iteration {step}'
            )
        if self._image is None:
            return
        image, self._image = self._image, None
        backbone = find_clustr(runner.model)
        image = image.to(next(backbone.parameters()).dtype)
        with torch.autocast(image.device.type, enabled=False):
            maps = compute_maps(backbone, image, self.stages, self.block)
        picture = Pixels.of_model(runner.model).restore(image[0])
        about = [f'{picture.shape[1]} × {picture.shape[0]} pixels']
        title = f'Iteration {step:,}'
        drawn = draw_figure(picture, maps, title, about, longer=self.size)
        runner.visualizer.add_image(self.name, drawn, step)

    def after_train(self, runner: Runner) -> None:
        """Take the hook of the backbone away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
