"""Test checkpoints and put the figures beside the published ones.

Give checkpoints, or folders such as the work_dirs/ of `mim train`, of which the best
checkpoint of each training is taken, or else the last. Each is tested by `mim test`
with the config of configs/ that it or its folder is named after.

Examples:
    python tools/evaluate.py work_dirs
    python tools/evaluate.py work_dirs --launcher pytorch --gpus 8
    python tools/evaluate.py epoch_12.pth --configs mask-rcnn_clustr-s-w224_fpn_1x_coco
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mmengine.config import DictAction

import clustr_mm  # noqa: F401 (lets the safe loader read a runner's checkpoints)
from clustr_mm.evaluation import (
    Plan,
    Report,
    describe,
    evaluate,
    find_configs,
    make_plan,
)

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'

#: What an interruption leaves as the reason of a config without a figure.
UNFINISHED = 'not finished'


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit."""
        self.exit(2, f'{self.prog}: {message}\n')


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog='evaluate.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('paths', nargs='+', type=Path, metavar='CHECKPOINT_OR_FOLDER')
    add(
        '--configs',
        nargs='+',
        metavar='CONFIG',
        help='files, or names of configs of configs/; by default all that are not on '
        'toy data. A single one is used for every checkpoint given as a file',
    )
    add('--work-dir', type=Path, default=Path('work_dirs/evaluate'), help='for logs')
    add('--out', type=Path, help='for the table, by default the work dir')
    add('--launcher', choices=('none', 'pytorch', 'slurm'), default='none')
    add('--gpus', type=int, help='GPUs in all')
    add('--gpus-per-node', type=int, help='GPUs per node, for slurm')
    add('--partition', help='for slurm')
    add('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be."""
    for path in args.paths:
        if not path.exists():
            raise ValueError(f'there is no checkpoint or folder {str(path)!r}')
    for name in ('gpus', 'gpus_per_node'):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = name.replace('_', '-')
            raise ValueError(f'--{option} must be at least 1, got {value}')
    needed = dict(
        none=(), pytorch=('gpus',), slurm=('gpus', 'gpus_per_node', 'partition')
    )
    for name in needed[args.launcher]:
        if getattr(args, name) is None:
            option = name.replace('_', '-')
            raise ValueError(f'--launcher {args.launcher} needs --{option}')
    for item in args.cfg_options:
        if '=' not in item:
            raise ValueError(f'--cfg-options must be like key=value, got {item!r}')


def parse_overrides(items: Sequence[str]) -> dict:
    """Read ``--cfg-options`` as the runner does."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    line = ['--cfg-options', *items] if items else []
    try:
        return parser.parse_args(line).cfg_options
    except AssertionError as error:
        raise ValueError(f'--cfg-options: {error}') from error


def make_options(args: argparse.Namespace) -> list[str]:
    """Arguments that all calls of ``mim test`` share."""
    options = ['--launcher', args.launcher]
    for name in ('gpus', 'gpus_per_node', 'partition'):
        value = getattr(args, name)
        if value is not None:
            options += [f'--{name.replace("_", "-")}', str(value)]
    if args.cfg_options:
        options += ['--cfg-options', *args.cfg_options]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate checkpoints.

    Args:
        argv (Sequence[str], optional): Arguments, by default the command line's.

    Returns:
        int: Exit status: 0 if all that was asked for has a figure.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    out = args.out or args.work_dir
    try:
        check(args)
        overrides = parse_overrides(args.cfg_options)
        configs = find_configs(CONFIGS, args.configs)
        out.mkdir(parents=True, exist_ok=True)
        args.work_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    command = shlex.join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    report = Report(command, configs)
    only = args.configs is not None
    report.reasons = dict.fromkeys((config.stem for config in configs), UNFINISHED)
    status = 130
    try:
        plan = make_plan(args.paths, configs, only, args.work_dir, overrides, say)
        status = run(plan, report, make_options(args), out)
    except KeyboardInterrupt:
        say('interrupted')
    report.save(out)
    print(report.to_markdown())
    print('wrote', out / 'evaluation.md', out / 'evaluation.json')
    if only and report.not_run:
        status = status or 1
    return status


def run(plan: Plan, report: Report, options: Sequence[str], out: Path) -> int:
    """Run the evaluations one by one and keep the files up to date.

    Args:
        plan (Plan): What to run.
        report (Report): Gets the results.
        options (Sequence[str]): More arguments of ``mim test``.
        out (Path): Where the report is saved.

    Returns:
        int: 0 if there is something to run and all of it ran.
    """
    report.rows += plan.rows
    report.reasons = dict.fromkeys((job.config.stem for job in plan.jobs), UNFINISHED)
    report.reasons.update(plan.reasons)
    report.strays += plan.strays
    for row in plan.rows:
        say(f'{row.checkpoint}: {row.error}')
    for name, reason in plan.reasons.items():
        say(f'{name}: {reason}')
    report.save(out)
    for number, job in enumerate(plan.jobs, 1):
        name = f'[{number}/{len(plan.jobs)}] {job.config.stem}'
        say(f'{name}: testing {job.checkpoint}, output in {job.work_dir}')
        start = time.monotonic()
        rows = evaluate(job, options)
        report.rows += rows
        if job.config not in [later.config for later in plan.jobs[number:]]:
            report.reasons.pop(job.config.stem, None)
        report.save(out)
        say(f'{name}: {describe(rows)}, took {time.monotonic() - start:.0f} s')
    complete = plan.jobs and not plan.reasons and not any(r.error for r in report.rows)
    return 0 if complete else 1


def say(text: str) -> None:
    """Print at once, for whoever reads a log of this."""
    print(text, flush=True)


if __name__ == '__main__':
    # Slurm and kill end it as Ctrl-C does, with what is finished.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
