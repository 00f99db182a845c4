"""Compare backbones, and the clustering operator with a textbook one.

Examples:
    python tools/analysis_tools/benchmark.py --sizes 224 512 800x1344 --split
    python tools/analysis_tools/benchmark.py --backbones clustr-s clustr-s-textbook --sizes 512
    python tools/analysis_tools/benchmark.py --operator 1x16384x64 4x3136x64
    python tools/analysis_tools/benchmark.py --sweep 224 448 896 1344
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from clustr_mm.benchmark import (
    BackboneCase,
    OperatorCase,
    Report,
    Settings,
    SweepCase,
    find_backbone,
    presets,
    run,
)
from clustr_mm.benchmark.cases import OPERATORS, SWEEP
from clustr_mm.benchmark.memory import GIB, Limits, available_memory
from clustr_mm.benchmark.runner import count_steps

BACKBONES = (
    *('clustr-s', 'clustr-s-w224'),
    *('pvtv2-b2', 'swin-t', 'resnet-50', 'convnext-t'),
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit."""
        self.exit(2, f'{self.prog}: {message}\n')


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog='benchmark.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        '--backbones',
        nargs='+',
        help=f'presets ({", ".join(presets())}; -w<pixels> takes any number) or '
        f'config files; by default {" ".join(BACKBONES)}, unless --operator or '
        '--sweep is given',
    )
    add('--sizes', nargs='+', default=['224', '512'], help='S, or HxW, in pixels')
    add('--batch', type=int, default=1, help='images at a time')
    add('--mode', choices=('forward', 'train', 'both'), default='forward')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--amp', choices=('off', 'bf16', 'fp16'), default='off')
    add('--rounds', type=int, default=10, help='timed calls of each case')
    add('--warmup', type=int, default=2, help='calls of each case before that')
    add('--baseline', help='one of the backbones, by default the first')
    add('--split', action='store_true', help='time the parts of ClusTR, by stage')
    add(
        '--operator',
        nargs='+',
        metavar='BxNxC',
        default=[],
        help='compare the clustering with a textbook implementation',
    )
    add(
        '--sweep',
        nargs='+',
        metavar='SIZE',
        default=[],
        help='time the clustering of stage 1, of the whole map and in windows',
    )
    add('--threads', type=int, help='CPU threads')
    add(
        '--memory-limit',
        type=float,
        metavar='GIB',
        help='give up cases that need more on the CPU, by default 80 %% of what '
        'is available',
    )
    add(
        '--max-seconds',
        type=float,
        default=600,
        help='give up cases whose first call takes longer on the CPU',
    )
    add('--out', type=Path, default=Path('work_dirs/benchmark'))
    return parser


def parse_numbers(text: str) -> tuple[int, ...]:
    """Read '800x1344' and the like; nothing if it is not like that."""
    numbers = re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', text) and text.split('x')
    return tuple(int(number) for number in numbers or ())


def parse_size(text: str) -> tuple[int, int]:
    """Read '512' or '800x1344', height first."""
    numbers = parse_numbers(text)
    if len(numbers) not in (1, 2):
        raise ValueError(
            f'a size must be like 512 or 800x1344 (height first), got {text!r}'
        )
    return numbers[0], numbers[-1]


def parse_shape(text: str) -> tuple[int, int, int]:
    """Read '1x16384x64': batch, tokens, channels."""
    numbers = parse_numbers(text)
    if len(numbers) != 3:
        raise ValueError(
            f'a shape must be like 1x16384x64 (batch, tokens, channels), got {text!r}'
        )
    return numbers


def make_groups(args: argparse.Namespace) -> list[list]:
    """Cases to be compared with each other, group by group."""
    device, batch = args.device, args.batch
    groups = []
    for shape in args.operator:
        n, tokens, channels = parse_shape(shape)
        shared = dict(batch=n, tokens=tokens, channels=channels, device=device)
        groups.append([OperatorCase(name=name, **shared) for name in OPERATORS])
    for size in map(parse_size, args.sweep):
        shared = dict(batch=batch, size=size, device=device)
        groups.append([SweepCase(name=name, **shared) for name in SWEEP])
    backbones = [find_backbone(name) for name in args.backbones]
    amp = None if args.amp == 'off' else args.amp
    for mode in ('forward', 'train') if args.mode == 'both' else (args.mode,):
        for size in map(parse_size, args.sizes):
            shared = dict(size=size, batch=batch, mode=mode, device=device, amp=amp)
            groups.append([BackboneCase(backbone=b, **shared) for b in backbones])
    return [group for group in groups if group]


def check(args: argparse.Namespace) -> None:
    """Fill in defaults that depend on others, and refuse what cannot be."""
    if args.backbones is None:
        args.backbones = [] if args.operator or args.sweep else list(BACKBONES)
    for name, least in [('batch', 1), ('rounds', 1), ('warmup', 0), ('threads', 1)]:
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f'--{name} must be at least {least}, got {value}')
    for name in ('memory_limit', 'max_seconds'):
        value = getattr(args, name)
        if value is not None and not value > 0:
            option = name.replace('_', '-')
            raise ValueError(f'--{option} must be above 0, got {value:g}')
    try:
        kind = torch.device(args.device).type
    except RuntimeError:
        kind = None
    if kind not in ('cpu', 'cuda'):
        raise ValueError(f'--device must be cpu or cuda, got {args.device!r}')
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ValueError('--device is cuda, but PyTorch sees no GPU')


def find_baselines(args: argparse.Namespace) -> dict[str, str]:
    """Name of the baseline of each section."""
    names = [find_backbone(name).name for name in args.backbones]
    if len(set(names)) < len(names):
        raise ValueError(f'backbones must have different names, got {names}')
    baseline = names[0] if names else ''
    if args.baseline is not None:
        baseline = args.baseline
        if Path(baseline).is_file():
            baseline = Path(baseline).stem
        if baseline not in names:
            raise ValueError(
                f'--baseline must be one of the backbones {", ".join(names)}, got '
                f'{args.baseline!r}'
            )
    return dict(
        backbones=baseline,
        operator=next(iter(OPERATORS)),
        sweep=next(iter(SWEEP)),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        argv (Sequence[str], optional): Arguments, by default the command line's.

    Returns:
        int: Exit status.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
        groups = make_groups(args)
        baselines = find_baselines(args)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_limit is None:
        memory = 0.8 * available_memory()
    else:
        memory = args.memory_limit * GIB
    limits = Limits(int(memory), args.max_seconds, args.threads)
    settings = Settings(limits, args.rounds, args.warmup, args.split)
    command = shlex.join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    report = Report(settings, baselines, command, args.device)
    return measure(groups, settings, report, args.out)


def measure(groups: list[list], settings: Settings, report: Report, out: Path) -> int:
    """Run the cases with a progress bar and keep the files up to date."""
    columns = (
        TextColumn('{task.description}'),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
    )
    status = 0
    # A thread that redraws the bar would take time from what is measured.
    with Progress(*columns, auto_refresh=False) as bar:
        task = bar.add_task('', total=count_steps(groups, settings))

        def progress(steps: int, text: str) -> None:
            bar.update(task, advance=steps, description=text or None, refresh=True)

        try:
            for row in run(groups, settings, progress):
                report.add(row)
                report.save(out)
            bar.update(task, description='done', refresh=True)
        except KeyboardInterrupt:
            bar.update(task, description='interrupted', refresh=True)
            status = 130
    report.save(out, picture=True)
    print(report.to_markdown())
    print('wrote', *sorted(str(path) for path in out.glob('benchmark.*')))
    return status


if __name__ == '__main__':
    sys.exit(main())
