"""Results as Markdown, JSON and a picture."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..files import write_whole
from .runner import Row, Settings, add_ratios

PACKAGES = (
    *('torch', 'numpy', 'mmengine', 'mmcv', 'mmcv-lite'),
    *('mmdet', 'mmsegmentation', 'mmpose', 'mmpretrain', 'clustr_mm'),
)

TITLES = {
    'backbones': 'Backbones',
    'operator': 'Clustering operator',
    'sweep': 'Clustering of stage 1 over the size of the image',
}

MODES = {'forward': 'forward', 'train': 'forward + backward'}


@dataclass
class Report:
    """All results of a run, and what they were taken on.

    Attributes:
        settings (Settings): How it was measured.
        baselines (dict[str, str]): Name of the baseline of each section.
        command (str): The command line.
        device (str): Device of the run.
        rows (list[Row]): Results so far.
        about (dict): Date, device name and versions.
    """

    settings: Settings
    baselines: dict[str, str]
    command: str
    device: str = 'cpu'
    rows: list[Row] = field(default_factory=list)
    about: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.about = dict(
            date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
            command=self.command,
            device=self.device,
            device_name=device_name(self.device),
            threads=torch.get_num_threads(),
            versions=versions(),
        )

    def add(self, row: Row) -> None:
        """Take in a result and compare it."""
        self.rows.append(row)
        add_ratios(self.rows, self.baselines)

    def to_json(self) -> str:
        """Everything, as JSON."""
        content = dict(
            **self.about,
            settings=asdict(self.settings),
            baselines=self.baselines,
            rows=[asdict(row) for row in self.rows],
        )
        return json.dumps(content, indent=2, allow_nan=False) + '\n'

    def to_markdown(self) -> str:
        """Tables, as Markdown."""
        about = self.about
        packages = ', '.join(f'{name} {v}' for name, v in about['versions'].items())
        parts = [
            '# Benchmark',
            f'`{about["command"]}`',
            f'{about["date"]}, {about["device_name"]}, CPU threads: '
            f'{about["threads"]}. {packages}.',
            f'Medians over {self.settings.rounds} rounds, after '
            f'{self.settings.warmup} of warm-up, in which the rows of a table with '
            'the same input took turns; ± is half the interquartile range. '
            + _memory_note(self.device),
        ]
        for section, title in TITLES.items():
            for mode, mode_title in MODES.items():
                rows = [r for r in self.rows if (r.section, r.mode) == (section, mode)]
                if rows:
                    suffix = f', {mode_title}' if section == 'backbones' else ''
                    parts.append(f'## {title}{suffix}')
                    parts.append(_result_table(rows, self.baselines[section]))
        split = [row for row in self.rows if row.split]
        if split:
            parts += ['## Parts of the forward pass, ms', _split_table(split)]
        return '\n\n'.join(parts) + '\n'

    def save(self, folder: Path, picture: bool = False) -> None:
        """Write ``benchmark.md``, ``benchmark.json`` and perhaps the picture.

        Args:
            folder (Path): Made if missing.
            picture (bool): Whether to draw ``benchmark.png`` too. Defaults to
                False.
        """
        folder.mkdir(parents=True, exist_ok=True)
        texts = {'benchmark.md': self.to_markdown(), 'benchmark.json': self.to_json()}
        for name, text in texts.items():
            write_whole(folder / name, text.encode())
        if picture and any(row.milliseconds for row in self.rows):
            from .plot import draw

            image = draw(self.rows, self.about)
            if image:
                write_whole(folder / 'benchmark.png', image)


def device_name(device: str) -> str:
    """What the device calls itself."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of what is installed of ``PACKAGES``."""
    found = dict(python=platform.python_version())
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _memory_note(device: str) -> str:
    if torch.device(device).type == 'cuda':
        return 'Memory: the peak of what tensors take on the device.'
    return (
        'Memory: the peak resident size of a process that runs this case alone, '
        'once; "imports" is what it held before the case was built, and left out of '
        'the ratio.'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Words on the left, numbers on the right.
    rule = [
        '---' if title in ('name', 'input', 'remark') else '---:' for title in header
    ]
    lines = (header, rule, *rows)
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _result_table(rows: Sequence[Row], baseline: str) -> str:
    header = [
        *('name', 'input', 'batch', 'AMP', 'ms', '±', 'images/s'),
        *('peak MiB', 'of it imports', f'speed / {baseline}', f'memory / {baseline}'),
        'remark',
    ]
    return _table(header, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    half_range = None if row.iqr_ms is None else row.iqr_ms / 2
    return [
        *(row.name, row.input, str(row.batch), row.amp or 'off'),
        *(_number(row.milliseconds), _number(half_range)),
        _number(row.images_per_second),
        *(_number(row.peak_mib, '.0f'), _number(row.imports_mib, '.0f')),
        *(_number(row.speedup, '.2f', '×'), _number(row.memory_ratio, '.2f', '×')),
        (row.error or '').replace('|', '\\|'),
    ]


def _number(value: float | None, form: str = '', unit: str = '') -> str:
    if value is None:
        return '–'
    if not form:
        form = '.0f' if value >= 100 else '.1f' if value >= 10 else '.2f'
    return f'{value:{form}}{unit}'


def _split_table(rows: Sequence[Row]) -> str:
    header = ('name', 'input', 'batch', 'stage', 'clustering', 'attention', 'rest')
    lines = []
    for row in rows:
        for part in row.split:
            numbers = (part.clustering, part.attention, part.rest)
            lines.append(
                [row.name, row.input, str(row.batch), str(part.stage)]
                + [_number(number) for number in numbers]
            )
    return _table(header, lines)
