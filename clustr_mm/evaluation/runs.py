"""Runs ``mim test`` and reads what comes of it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ..files import shorten
from .published import NOT_THIS_CONFIG, Task, find_task

LOG = 'test.log'

#: A line that ends a traceback, or the message of a command line.
ERROR = re.compile(r'(?:\[rank\d+\]:\s*)?((?:[\w.]*\.)?\w*(?:Error|Exception)\b.*)')
#: Launchers say these of every failure of what they launched.
LAUNCHERS = ('CalledProcessError', 'ChildFailedError')


@dataclass(frozen=True)
class Job:
    """One evaluation.

    Attributes:
        config (Path): The config, in a folder named after its toolbox.
        checkpoint (Path): The checkpoint.
        work_dir (Path): Gets the log and the metrics.
    """

    config: Path
    checkpoint: Path
    work_dir: Path

    @property
    def toolbox(self) -> str:
        """The toolbox that runs it."""
        return self.config.parent.name

    @property
    def task(self) -> Task:
        """The benchmark that it belongs to."""
        return find_task(f'{self.toolbox}/{self.config.stem}')


@dataclass
class Row:
    """A line of the table: a measured figure, or why there is none.

    Attributes:
        config (str): Name of the config.
        task (str): Title of the benchmark.
        checkpoint (str): Path of the checkpoint.
        metric (str): Name of the figure. Defaults to none.
        measured (float, optional): In percent.
        paper (float, optional): What the paper has, in percent.
        remark (str): On the paper's figure. Defaults to none.
        error (str, optional): Why nothing was measured.
        seconds (float, optional): Time of the evaluation.
        log (str, optional): What the evaluation printed.
        difference (float, optional): Measured less paper.
    """

    config: str
    task: str
    checkpoint: str
    metric: str = ''
    measured: float | None = None
    paper: float | None = None
    remark: str = ''
    error: str | None = None
    seconds: float | None = None
    log: str | None = None
    difference: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.measured is not None and self.paper is not None:
            self.difference = round(self.measured - self.paper, 2)


def evaluate(job: Job, options: Sequence[str] = ()) -> list[Row]:
    """Test a checkpoint.

    Args:
        job (Job): What to test.
        options (Sequence[str]): More arguments of ``mim test``. Defaults to none.

    Returns:
        list[Row]: A row for each figure, or one that says what went wrong.
    """
    start = time.monotonic()
    about = dict(
        config=job.config.stem, task=job.task.title, checkpoint=str(job.checkpoint)
    )
    log = job.work_dir / LOG
    about['log'] = str(log)
    # A file of an earlier run must not be taken for a result of this one.
    earlier = _metric_files(job.work_dir)
    try:
        status = run_mim(
            [
                *('test', job.toolbox, str(job.config)),
                *('--checkpoint', str(job.checkpoint)),
                *('--work-dir', str(job.work_dir), *options),
            ],
            log,
        )
        if status:
            raise ValueError(last_error(log, status))
        figures = _read_figures(job, _metric_files(job.work_dir) - earlier)
        error = None
    except (ValueError, OSError) as problem:
        figures, error = [], shorten(problem)
    about['seconds'] = round(time.monotonic() - start, 1)
    if error:
        return [Row(**about, error=error)]
    name = f'{job.toolbox}/{job.config.stem}'
    rows = []
    for metric, value in figures:
        paper, remark = metric.paper, job.task.remark
        if paper is not None and not fnmatchcase(name, metric.paper_configs):
            paper, remark = None, NOT_THIS_CONFIG
        figure = dict(metric=metric.name, paper=paper, remark=remark)
        if value is None:
            # COCO's -1, or NaN: nothing to find in this data.
            figure.update(error=f'{metric.key} is not defined on this data')
        rows.append(Row(**about, **figure, measured=value))
    return rows


def run_mim(arguments: Sequence[str], log: Path) -> int:
    """Run ``mim`` and keep what it prints.

    Args:
        arguments (Sequence[str]): The command line after ``mim``.
        log (Path): Gets the output.

    Returns:
        int: Exit status, negative if a signal ended it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('wb') as stream:
        process = subprocess.Popen(
            [sys.executable, '-m', 'mim', *arguments],
            # mim asks whether to install a toolbox that is missing.
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:
            if process.returncode is None:
                _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def last_error(log: Path, status: int) -> str:
    """Find the line of a log that says why a run failed.

    Args:
        log (Path): Output of ``mim test``.
        status (int): Its exit status.

    Returns:
        str: The last line of an error other than the launchers' own, or what ended
        the run otherwise.
    """
    lines = [line.strip() for line in log.read_text(errors='replace').splitlines()]
    lines = [line for line in lines if line]
    killed = re.search(r'died with <Signals\.(\w+)', lines[-1]) if lines else None
    name = killed[1] if killed else signal.Signals(-status).name if status < 0 else None
    if name:
        hint = ', perhaps for want of memory' if name == 'SIGKILL' else ''
        return f'ended by {name}{hint}'
    for line in reversed(lines):
        error = ERROR.match(line)
        if error and not any(launcher in line for launcher in LAUNCHERS):
            return error[1]
    return lines[-1] if lines else f'ended with status {status} and no message'


def _metric_files(folder: Path) -> set[tuple[Path, int]]:
    """Files of metrics of ``mim test``, and when each was written."""
    return {(file, file.stat().st_mtime_ns) for file in folder.glob('*/*.json')}


def _read_figures(job: Job, files: set[tuple[Path, int]]) -> list[tuple]:
    """Metrics of the task and their values in percent, None if undefined."""
    if not files:
        raise ValueError('mim test wrote no metrics')
    newest = max(files, key=lambda file: file[1])[0]
    content = json.loads(newest.read_text())
    metrics = [metric for metric in job.task.metrics if metric.key in content]
    if not metrics:
        keys = ', '.join(metric.key for metric in job.task.metrics)
        raise ValueError(f'{newest} has none of {keys}')
    figures = []
    for metric in metrics:
        value = content[metric.key]
        defined = isinstance(value, (int, float)) and math.isfinite(value)
        percent = round(value * metric.factor, 2) if defined and value >= 0 else None
        figures.append((metric, percent))
    return figures
