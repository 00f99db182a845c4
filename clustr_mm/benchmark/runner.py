"""Runs cases side by side and makes a row of each, failed ones included."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..models.clustr import ClusTR
from .cases import Case, Prepared
from .memory import Limits, Usage, describe, free_memory, probe_cpu, probe_cuda
from .stages import Clock, StageSplit, split_by_stage

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        limits (Limits): When to give a case up.
        rounds (int): Timed calls of each case.
        warmup (int): Calls of each case before that.
        split (bool): Whether to time the parts of ClusTR backbones.
    """

    limits: Limits
    rounds: int = 10
    warmup: int = 2
    split: bool = False


@dataclass
class Row:
    """Result of a case.

    Attributes:
        section (str): 'backbones', 'operator' or 'sweep'.
        name (str): Name of the backbone or implementation.
        input (str): Size or shape as text.
        pixels (int): Pixels of an image.
        batch (int): Images at a time.
        mode (str): 'forward' or 'train'.
        device (str): Device.
        amp (str, optional): 'bf16' or 'fp16'.
        parameters (int, optional): Parameters of the backbone.
        rounds (int): Timed calls.
        milliseconds (float, optional): Median duration of a call.
        iqr_ms (float, optional): Interquartile range of the durations.
        images_per_second (float, optional): Batch over median.
        peak_mib (float, optional): Peak memory, see :class:`Usage`.
        imports_mib (float, optional): Part of it held before.
        speedup (float, optional): Duration of the baseline over this one.
        memory_ratio (float, optional): ``case_mib`` over the baseline's.
        split (list[StageSplit], optional): Parts of the forward pass.
        error (str, optional): Why numbers are missing.
    """

    section: str
    name: str
    input: str
    pixels: int
    batch: int
    mode: str
    device: str
    amp: str | None
    parameters: int | None = None
    rounds: int = 0
    milliseconds: float | None = None
    iqr_ms: float | None = None
    images_per_second: float | None = None
    peak_mib: float | None = None
    imports_mib: float | None = None
    speedup: float | None = None
    memory_ratio: float | None = None
    split: list[StageSplit] | None = None
    error: str | None = None

    @property
    def case_mib(self) -> float | None:
        """Peak memory without what the imports of the process took."""
        if self.peak_mib is None:
            return None
        return self.peak_mib - (self.imports_mib or 0)

    @classmethod
    def of(cls, case: Case) -> 'Row':
        """A row without results."""
        names = ('section', 'name', 'input', 'pixels', 'batch', 'mode', 'device', 'amp')
        return cls(**{name: getattr(case, name) for name in names})

    def add_times(self, seconds: Sequence[float]) -> None:
        """Fill in what follows from the durations of the calls, if any."""
        if not seconds:
            return
        median = statistics.median(seconds)
        self.rounds = len(seconds)
        self.milliseconds = 1e3 * median
        self.images_per_second = self.batch / median if median else None
        self.iqr_ms = 0.0
        if len(seconds) > 1:
            low, _, high = statistics.quantiles(seconds, n=4, method='inclusive')
            self.iqr_ms = 1e3 * (high - low)


def add_ratios(rows: Sequence[Row], baselines: Mapping[str, str]) -> None:
    """Compare every row with the baseline in the same circumstances.

    Args:
        rows (Sequence[Row]): Changed in place.
        baselines (Mapping[str, str]): Name of the baseline of each section.
    """

    def circumstances(row: Row) -> tuple:
        return row.section, row.input, row.batch, row.mode, row.device, row.amp

    found = {
        circumstances(row): row for row in rows if row.name == baselines[row.section]
    }
    for row in rows:
        base = found.get(circumstances(row))
        if base and base.milliseconds and row.milliseconds:
            row.speedup = base.milliseconds / row.milliseconds
        if base and base.case_mib and row.case_mib:
            row.memory_ratio = row.case_mib / base.case_mib


def count_steps(groups: Sequence[Sequence[Case]], settings: Settings) -> int:
    """Steps of progress that :func:`run` will report."""
    each = 1 + settings.warmup + settings.rounds + int(settings.split)
    return each * sum(len(group) for group in groups)


def run(
    groups: Sequence[Sequence[Case]],
    settings: Settings,
    progress: Progress = lambda steps, text: None,
    clock: Clock = time.perf_counter,
) -> Iterator[Row]:
    """Measure cases; those of a group take turns, round by round.

    On the CPU each case first runs in a process of its own, which tells its
    peak memory; one that does not survive there is not timed.

    Args:
        groups (Sequence[Sequence[Case]]): Cases to be compared.
        settings (Settings): How to measure.
        progress (Callable): Gets steps done and what comes next.
        clock (Callable): Gives seconds. Defaults to ``time.perf_counter``.

    Yields:
        Row: For each case, as soon as its group is done. When the user
        interrupts, the rows of the group come first, then KeyboardInterrupt.
    """
    for group in groups:
        rows = [Row.of(case) for case in group]
        interrupted = False
        try:
            _run_group(group, rows, settings, progress, clock)
        except KeyboardInterrupt:
            interrupted = True
            for row in rows:
                if not row.rounds and not row.error:
                    row.error = 'interrupted'
        yield from rows
        if interrupted:
            raise KeyboardInterrupt
        free_memory()


def _run_group(
    group: Sequence[Case],
    rows: Sequence[Row],
    settings: Settings,
    progress: Progress,
    clock: Clock,
) -> None:
    """Fill in the rows of the cases."""
    ready: dict[int, Prepared] = {}
    for i, (case, row) in enumerate(zip(group, rows)):
        progress(0, f'{case.name} {case.input} {case.mode}: memory')
        try:
            ready[i], usage = _prepare(case, settings.limits)
        except Exception as error:
            row.error = describe(error)
            # An exception's traceback keeps the tensors of its frames.
            del error
            free_memory()
        else:
            row.peak_mib, row.imports_mib = usage
            if ready[i].model is not None:
                row.parameters = sum(p.numel() for p in ready[i].model.parameters())
        progress(1, '')

    seconds: dict[int, list[float]] = {i: [] for i in ready}
    try:
        for turn in range(-settings.warmup, settings.rounds):
            for i, (case, row) in enumerate(zip(group, rows)):
                progress(0, f'{case.name} {case.input} {case.mode}: time')
                if row.error is None:
                    try:
                        passed = time_call(ready[i].run, case.device, clock)
                    except Exception as error:
                        row.error = describe(error)
                    else:
                        seconds[i] += [passed] if turn >= 0 else []
                progress(1, '')
    finally:
        for i, row in enumerate(rows):
            if row.error is None:
                row.add_times(seconds.get(i, ()))

    if settings.split:
        for i, (case, row) in enumerate(zip(group, rows)):
            progress(0, f'{case.name} {case.input}: parts')
            if row.error is None and case.mode == 'forward':
                try:
                    row.split = _split(ready[i], case.device, settings.rounds, clock)
                except Exception as error:
                    row.error = f'parts not timed: {describe(error)}'
            progress(1, '')


def _prepare(case: Case, limits: Limits) -> tuple[Prepared, Usage]:
    if torch.device(case.device).type == 'cuda':
        return probe_cuda(case)
    usage = probe_cpu(case, limits)
    return case.prepare(), usage


def _split(
    prepared: Prepared, device: str, rounds: int, clock: Clock
) -> list[StageSplit] | None:
    if not isinstance(prepared.model, ClusTR):
        return None
    return split_by_stage(prepared.model, prepared.run, rounds, device, clock)


def time_call(
    run: Callable[[], object], device: str, clock: Clock = time.perf_counter
) -> float:
    """Seconds of a call, until the device has finished."""
    cuda = torch.device(device).type == 'cuda'
    if cuda:
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - start
