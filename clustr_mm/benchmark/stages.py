"""Where the time of a ClusTR backbone goes, stage by stage."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.clustr import ClusteredAttention, ClusTR

Clock = Callable[[], float]


@dataclass(frozen=True)
class StageSplit:
    """Medians of the parts of a stage's forward pass, in milliseconds.

    Attributes:
        stage (int): From 1, as in the paper.
        clustering (float): Finding the clusters.
        attention (float): The rest of the attention modules: projections,
            merging, attention itself.
        rest (float): Patch embedding, norms and feed-forward layers.
    """

    stage: int
    clustering: float
    attention: float
    rest: float


class Timers:
    """Adds up the time between pairs of marks, by key.

    On a GPU the marks are events, read only at the end of a pass: nothing
    waits for the device in between.

    Args:
        device (str): 'cpu' or a CUDA device.
        clock (Callable): Gives seconds; for the CPU.
    """

    def __init__(self, device: str, clock: Clock = time.perf_counter) -> None:
        self.cuda = torch.device(device).type == 'cuda'
        self.clock = clock
        self.spans: list[tuple[Any, Any, Any]] = []

    def mark(self) -> Any:
        """A moment."""
        if not self.cuda:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def span(self, key: Any, start: Any) -> None:
        """Count the time from ``start`` until now under ``key``."""
        self.spans.append((key, start, self.mark()))

    def collect(self) -> dict[Any, float]:
        """Milliseconds by key since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
        total: dict[Any, float] = {}
        for key, start, end in self.spans:
            passed = start.elapsed_time(end) if self.cuda else 1e3 * (end - start)
            total[key] = total.get(key, 0.0) + passed
        self.spans.clear()
        return total


def split_by_stage(
    model: ClusTR,
    run: Callable[[], object],
    rounds: int,
    device: str = 'cpu',
    clock: Clock = time.perf_counter,
) -> list[StageSplit]:
    """Time clustering, attention and the rest of every stage.

    Args:
        model (ClusTR): The backbone.
        run (Callable): Runs a forward pass of it.
        rounds (int): Passes that are timed; one more comes first.
        device (str): Device of the model. Defaults to 'cpu'.
        clock (Callable): Gives seconds. Defaults to ``time.perf_counter``.

    Returns:
        list[StageSplit]: Medians for each stage.
    """
    timers = Timers(device, clock)
    passes = []
    with _watch(model, timers):
        run()
        timers.collect()
        for _ in range(rounds):
            run()
            passes.append(timers.collect())
    return [_median_split(passes, number) for number in range(1, len(model.stages) + 1)]


def _median_split(passes: list[dict], stage: int) -> StageSplit:
    parts = []
    for total in passes:
        clustering = total.get((stage, 'clustering'), 0.0)
        attention = total[stage, 'attention']
        rest = total[stage, 'stage'] - attention
        parts.append((clustering, attention - clustering, rest))
    return StageSplit(stage, *(statistics.median(part) for part in zip(*parts)))


@contextmanager
def _watch(model: ClusTR, timers: Timers) -> Iterator[None]:
    """Have stages, their attention modules and their clustering timed."""
    with ExitStack() as stack:
        for number, stage in enumerate(model.stages, 1):
            _watch_module(stage, (number, 'stage'), timers, stack)
            for block in stage.blocks:
                _watch_module(block.attn, (number, 'attention'), timers, stack)
            # The blocks of a stage share one.
            if isinstance(block.attn, ClusteredAttention):
                key = (number, 'clustering')
                _watch_module(block.attn.clusterer, key, timers, stack)
        yield


def _watch_module(
    module: nn.Module, key: tuple[int, str], timers: Timers, stack: ExitStack
) -> None:
    starts = []

    def before(*_: Any) -> None:
        starts.append(timers.mark())

    def after(*_: Any) -> None:
        timers.span(key, starts.pop())

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)
