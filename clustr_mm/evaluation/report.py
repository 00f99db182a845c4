"""The table of an evaluation, as Markdown and JSON."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..benchmark.report import device_name, versions
from ..files import write_whole
from .published import TASKS, Task
from .runs import Row

NOTE = (
    'All figures are in percent. "Measured" is what this run found, "paper" what the '
    'paper of ClusTR has; – means that there is none.'
)

PEERS_NOTE = (
    'From the papers of these backbones, not measured here. Recipes and '
    'pre-training differ.'
)


@dataclass
class Report:
    """All results of an evaluation.

    Attributes:
        command (str): The command line.
        configs (list[Path]): What could have been evaluated.
        rows (list[Row]): Results so far.
        reasons (dict[str, str]): For names of configs, why they were not run.
        strays (list[str]): Checkpoints that belong to no config.
        about (dict): Date, device name and versions.
    """

    command: str
    configs: Sequence[Path]
    rows: list[Row] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        # Some settings of configs come from the environment.
        environment = {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith('CLUSTR_')
        }
        self.about = dict(
            date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
            command=self.command,
            device=device_name('cuda' if torch.cuda.is_available() else 'cpu'),
            environment=environment,
            versions=versions(),
        )

    @property
    def not_run(self) -> dict[str, str]:
        """For names of configs without a figure, why there is none."""
        measured = {row.config for row in self.rows if row.measured is not None}
        failed = {row.config for row in self.rows if row.error}
        reasons = {}
        for config in self.configs:
            if config.stem not in measured:
                reasons[config.stem] = self.reasons.get(
                    config.stem,
                    'failed, see above'
                    if config.stem in failed
                    else 'no checkpoint found',
                )
        return reasons

    def to_json(self) -> str:
        """Everything, as JSON."""
        content = dict(
            **self.about,
            rows=[asdict(row) for row in self.rows],
            not_run=self.not_run,
            checkpoints_of_no_config=self.strays,
            published=[asdict(task) for task in self._tasks()],
        )
        return json.dumps(content, indent=2, allow_nan=False) + '\n'

    def to_markdown(self) -> str:
        """Tables, as Markdown."""
        about = self.about
        packages = ', '.join(f'{name} {v}' for name, v in about['versions'].items())
        parts = [
            '# Evaluation',
            f'`{about["command"]}`',
            f'{about["date"]}, {about["device"]}. {packages}.',
        ]
        if about['environment']:
            parts.append(
                ', '.join(f'`{k}={v}`' for k, v in about['environment'].items())
            )
        parts += [NOTE, _results(self.rows) if self.rows else 'Nothing was evaluated.']
        not_run = [list(item) for item in self.not_run.items()]
        if not_run or self.strays:
            parts.append('## Not run')
        if not_run:
            parts.append(_table(['config', 'reason'], not_run))
        if self.strays:
            parts.append(f'Checkpoints of no benchmark: {", ".join(self.strays)}.')
        tasks = [task for task in self._tasks() if task.peers]
        if tasks:
            parts += ['## Published figures of other backbones', PEERS_NOTE]
        for task in tasks:
            parts += [f'### {task.title}', task.peers_note, _peers(task)]
        return '\n\n'.join(filter(None, parts)) + '\n'

    def save(self, folder: Path) -> None:
        """Write ``evaluation.md`` and ``evaluation.json``, each whole or not at all.

        Args:
            folder (Path): Made if missing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / 'evaluation.md', self.to_markdown().encode())
        write_whole(folder / 'evaluation.json', self.to_json().encode())

    def _tasks(self) -> list[Task]:
        """The benchmarks that results belong to."""
        titles = {row.task for row in self.rows}
        return [task for task in TASKS if task.title in titles]


def describe(rows: Sequence[Row]) -> str:
    """The results of an evaluation in a few words."""
    return ', '.join(
        f'failed: {row.error}'
        if row.measured is None
        else f'{row.metric} {row.measured:.2f}'
        for row in rows
    )


def _results(rows: Sequence[Row]) -> str:
    header = [
        *('config', 'checkpoint', 'metric'),
        *('measured', 'paper', 'difference', 'remark'),
    ]
    lines = []
    for row in rows:
        remark = row.remark
        if row.error:
            remark = f'failed: {row.error}' + (f'; log: {row.log}' if row.log else '')
        numbers = (
            _number(row.measured, '.2f'),
            _number(row.paper, '.1f'),
            _number(row.difference, '+.2f'),
        )
        names = (row.config or '–', row.checkpoint, row.metric or '–')
        lines.append([*names, *numbers, remark])
    return _table(header, lines, numbers=(3, 4, 5))


def _peers(task: Task) -> str:
    count = len(task.metrics)
    header = ['backbone', *(metric.name for metric in task.metrics), 'remark']
    lines = [
        [peer.name, *(f'{figure:.1f}' for figure in peer.figures), peer.note]
        for peer in task.peers
    ]
    return _table(header, lines, numbers=range(1, count + 1))


def _number(value: float | None, form: str) -> str:
    return '–' if value is None else f'{value:{form}}'


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int] = (),
) -> str:
    rule = ['---:' if index in numbers else '---' for index in range(len(header))]
    rows = [[cell.replace('|', '\\|') for cell in row] for row in rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in (header, rule, *rows))
