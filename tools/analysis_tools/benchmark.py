"""Compare backbones, and the clustering operator with a textbook one.

Results are written after every input: an interruption leaves those before it.

Examples:
    benchmark.py --sizes 224 512 800x1344
    benchmark.py --backbones clustr-s clustr-s-linear pvtv2-b2 --baseline pvtv2-b2
    benchmark.py --operator 1x16384x64 4x3136x64
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import resource
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from backbones import PEERS, Backbone, find_backbone, presets
from common import (
    at_least,
    command_line,
    describe,
    device_name,
    import_extra,
    parse_shape,
    to_png,
    versions,
)
from textbook import textbook_dpc_knn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Measurement, TaskSpec, timer

from clustr_mm.files import write_whole
from clustr_mm.ops import dpc_knn

MIB, GIB = 2**20, 2**30
AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}
#: What --operator compares; the first is what the others are measured by.
OPERATORS = {'textbook': textbook_dpc_knn, 'dpc_knn': dpc_knn}

COLUMNS = ('name', 'input', 'batch', 'ms', '±', 'images/s', 'MiB')
RATIOS = ('speed', 'memory')
NOTE = (
    'Medians of rounds in which the rows of one input took turns; ± is half the '
    'interquartile range. MiB: the peak of a process that runs the case alone, without '
    'what its imports took; on a GPU, of tensors.'
)
TITLES = {'backbones': 'Backbones', 'operator': 'Clustering operator'}

Row = dict[str, Any]


class Case(NamedTuple):
    """What makes a row of a table, in a form that another process can be sent.

    Attributes:
        row (dict): Its section (a key of ``TITLES``), name, input, batch and mode.
        make (Callable): Makes the call that is measured.
        backbone (Backbone, optional): What has to be imported before.
    """

    row: Row
    make: Callable[[], Callable[[], object]]
    backbone: Backbone | None = None


class Pass:
    """Runs a backbone with random weights on smooth noise, whenever it is called.

    Args:
        backbone (Backbone): What to build.
        batch (int): Images at a time.
        size (tuple[int, int]): Their height and width.
        mode (str): 'forward' (evaluation mode, no gradients) or 'train' (training
            mode, forward and backward pass, no optimizer). Defaults to 'forward'.
        device (str): 'cpu' or a CUDA device. Defaults to 'cpu'.
        amp (str): 'bf16' or 'fp16' for autocast. Defaults to 'off'.
    """

    def __init__(
        self,
        backbone: Backbone,
        batch: int,
        size: tuple[int, int],
        mode: str = 'forward',
        device: str = 'cpu',
        amp: str = 'off',
    ) -> None:
        torch.manual_seed(0)
        self.trains = mode == 'train'
        self.model = backbone.build().to(device)
        self.model.train(self.trains)  # which not every backbone returns itself from
        self.images = smooth_noise(batch, 3, *size).to(device)
        kind, dtype = torch.device(device).type, AMP_DTYPES.get(amp)
        self.autocast = partial(torch.autocast, kind, dtype, enabled=dtype is not None)

    def __call__(self) -> None:
        """Run it once."""
        with torch.set_grad_enabled(self.trains), self.autocast():
            outs = self.model(self.images)
        if self.trains:
            outs = [outs] if isinstance(outs, Tensor) else outs
            sum(out.float().mean() for out in outs).backward()
            self.model.zero_grad(set_to_none=True)


def smooth_noise(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Random maps (B, C, H, W) with detail at every scale, as images have.

    White noise has no neighbourhoods, and the work of a clustering depends on the data.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(batch, channels, height, width)
    for power in range(int(math.log2(min(height, width))) + 1):
        scale = 2**power
        shape = (batch, channels, -(-height // scale), -(-width // scale))
        noise = torch.randn(shape, generator=generator)
        total += scale**0.5 * F.interpolate(noise, (height, width), mode='bilinear')
    return total / total.std().clamp(min=1e-6)


def make_operator(
    name: str, batch: int, length: int, channels: int, device: str = 'cpu'
) -> Callable[[], object]:
    """A clustering of tokens (B, N, C) with the counts of stage 1."""
    height = next(n for n in range(math.isqrt(length), 0, -1) if length % n == 0)
    maps = smooth_noise(batch, channels, height, length // height)
    tokens = F.layer_norm(maps.flatten(2).transpose(1, 2), (channels,)).contiguous()
    counts = max(1, length // 64), max(1, length // 16)
    return partial(OPERATORS[name], tokens.to(device), counts)


def read_kib(file: str, field: str) -> int | None:
    """A size in bytes out of a table that the kernel of Linux shows, if it does."""
    path = Path('/proc', file)
    found = path.exists() and re.search(rf'{field}:\s*(\d+) kB', path.read_text())
    return int(found[1]) * 1024 if found else None


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    # Not ru_maxrss, which on Linux starts from the size of the parent.
    on_linux = read_kib('self/status', 'VmHWM')
    return on_linux or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_alone(case: Case, limit: float, threads: int) -> Row:
    """Peak memory of a case beyond its imports, or a note; for a process of its own."""
    torch.set_num_threads(threads)
    try:
        if case.backbone:
            case.backbone.load()
        # Starts the threads: their stacks shall not count against the limit.
        torch.rand(512, 512).mm(torch.rand(512, 512))
        imports = peak_memory()
        if held := read_kib('self/status', 'VmData'):
            most = int(held + limit * GIB) if limit < math.inf else -1
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        case.make()()
        return dict(MiB=(peak_memory() - imports) / MIB)
    except Exception as error:
        return dict(note=describe(error))


def probe_cpu(case: Case, limit: float) -> tuple[Callable | None, Row]:
    """Run a case in a process with ``limit`` GiB for it; what to time, and memory."""
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        try:
            done = pool.submit(run_alone, case, limit, torch.get_num_threads())
            found = done.result()
        except BrokenProcessPool:  # by the system, or by C++ that got no memory
            found = dict(
                note='skipped: its process was ended, maybe for lack of memory'
            )
    if found.get('note') == 'out of memory':
        found['note'] = f'skipped: needs more than {limit:.3g} GiB of memory'
    return (None if 'note' in found else case.make()), found


def probe_cuda(make: Callable, device: str) -> tuple[Callable, Row]:
    """Make a call on a GPU and run it once: what to time, and MiB of its tensors."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call = make()
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return call, dict(MiB=(peak - before) / MIB)


def measure(cases: Sequence[Case], args: argparse.Namespace) -> list[Row]:
    """Measure cases of one input: the memory of each, then their times in turns."""
    rows, ready = [], []
    for case in cases:
        row = case.row
        print(f'{row["name"]}, {row["input"]}, {row["mode"]} ...', file=sys.stderr)
        call = None
        try:
            if args.device == 'cpu':
                call, found = probe_cpu(case, args.memory_limit)
            else:
                call, found = probe_cuda(case.make, args.device)
        except Exception as error:
            found = dict(note=describe(error))
        rows.append(row | found)
        ready += [(rows[-1], call, [])] if call else []
    for _ in range(args.warmup + args.rounds):
        for row, call, times in ready:
            try:
                start = timer()
                call()
                times.append(timer() - start)
            except Exception as error:
                row['note'] = describe(error)
        ready = [entry for entry in ready if 'note' not in entry[0]]
    for row, _, times in ready:
        found = Measurement(1, times[args.warmup :], TaskSpec('', ''))
        row.update({'ms': 1e3 * found.median, '±': 1e3 * found.iqr / 2})
        row['images/s'] = row['batch'] / found.median
    return rows


def add_ratios(report: Row) -> None:
    """Compare every row with the baseline of its section on the same input."""
    bases = {}
    for row in report['rows']:
        if row['name'] == report['baselines'][row['section']]:
            bases[row['section'], row['input'], row['mode']] = row
    for row in report['rows']:
        base = bases.get((row['section'], row['input'], row['mode']), {})
        if 'ms' in row and 'ms' in base:
            row['speed'] = base['ms'] / row['ms']
        if row.get('MiB') and base.get('MiB'):
            row['memory'] = row['MiB'] / base['MiB']


def to_markdown(report: Row) -> str:
    """A table for each section and mode, and what they were taken on."""
    tabulate = import_extra('tabulate').tabulate
    lines = [f'- {key}: {value}' for key, value in report['about'].items()]
    blocks = ['# Benchmark', '\n'.join(lines), NOTE]
    formats = ('', '', '', '.2f', '.2f', '.2f', '.0f', '.2f', '.2f', '')
    for (section, title), mode in product(TITLES.items(), ('forward', 'train')):
        lines = [
            [*(row.get(key) for key in (*COLUMNS, *RATIOS)), row.get('note', '')]
            for row in report['rows']
            if (row['section'], row['mode']) == (section, mode)
        ]
        if lines:
            base = report['baselines'][section]
            head = [*COLUMNS, *(f'{ratio} / {base}' for ratio in RATIOS), 'note']
            table = tabulate(lines, head, 'pipe', floatfmt=formats, missingval='–')
            blocks += [f'## {title}, {mode}', table]
    return '\n\n'.join(blocks) + '\n'


def draw(rows: Sequence[Row], title: str) -> bytes:
    """Draw time and memory of backbones over pixels, as a PNG file."""
    import_extra('matplotlib')
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11, 5), layout='constrained')
    names = list(dict.fromkeys(row['name'] for row in rows))
    ticks = {row['pixels']: row['input'] for row in rows}
    units = {'ms': 'time', 'MiB': 'peak memory without imports'}
    for axis, unit in zip(figure.subplots(1, 2), units):
        for name, mode in product(names, ('forward', 'train')):
            line = sorted(
                (row['pixels'], row[unit])
                for row in rows
                if (row['name'], row['mode']) == (name, mode)
            )
            style = f'C{names.index(name)}o' + ('-' if mode == 'forward' else '--')
            if line:
                axis.plot(*zip(*line), style, markersize=4, label=f'{name}, {mode}')
        axis.set(xscale='log', yscale='log', title=units[unit], ylabel=unit)
        axis.set_xticks(list(ticks), list(ticks.values()), rotation=45, ha='right')
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter('{x:g}')
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize='small', frameon=False)
    figure.suptitle(title)
    return to_png(figure)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; what is wrong with it takes one line."""
    parser = command_line('benchmark.py', __doc__)
    default = ['clustr-s', 'clustr-s-w224', *PEERS]
    names = (
        f'presets ({", ".join(presets())}; -w<pixels> takes any number) or config '
        f'files; by default {" ".join(default)}, unless --operator is given'
    )
    many = dict(nargs='+', default=[])
    size = dict(type=partial(parse_shape, like='800x1344'), metavar='SIZE')
    shape = dict(type=partial(parse_shape, like='1x16384x64'), metavar='BxNxC')
    add = parser.add_argument
    add('--backbones', **many, help=names)
    add('--sizes', nargs='+', default=[(224, 224), (512, 512)], **size)
    add('--batch', type=at_least(1), default=1, help='images at a time')
    add('--mode', choices=('forward', 'train', 'both'), default='forward')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--amp', choices=('off', *AMP_DTYPES), default='off')
    add('--rounds', type=at_least(1), default=10, help='timed calls of each')
    add('--warmup', type=at_least(0), default=2, help='calls before that')
    add('--baseline', help='one of the backbones, by default the first')
    add('--operator', **many, **shape, help='the clustering beside a textbook one')
    threads = torch.get_num_threads()
    add('--threads', type=at_least(1), default=threads, help='of the CPU')
    limit = dict(type=at_least(0.001, float), metavar='GIB')
    limit['help'] = 'skip what needs more on the CPU; by default 80 %% of what is free'
    add('--memory-limit', **limit)
    add('--out', type=Path, default=Path('work_dirs/benchmark'))
    args = parser.parse_args(argv)
    if not (args.backbones or args.operator):
        args.backbones = default
    try:
        args.backbones = [find_backbone(name) for name in args.backbones]
        args.baselines = find_baselines(args)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.memory_limit is None:
        free = read_kib('meminfo', 'MemAvailable')
        args.memory_limit = 0.8 * free / GIB if free else math.inf
    return args


def find_baselines(args: argparse.Namespace) -> dict[str, str]:
    """Name of the baseline of each section; refuses what cannot be compared."""
    if not re.fullmatch(r'cpu|cuda(:\d+)?', args.device):
        raise ValueError(f'--device must be cpu or cuda, got {args.device!r}')
    if args.device != 'cpu' and not torch.cuda.is_available():
        raise ValueError('--device is cuda, but PyTorch sees no GPU')
    names = [backbone.name for backbone in args.backbones]
    if len(set(names)) < len(names):
        raise ValueError(f'backbones must have different names, got {names}')
    baseline = args.baseline or (names or [''])[0]
    if Path(baseline).is_file():
        baseline = Path(baseline).stem
    if args.baseline and baseline not in names:
        raise ValueError(
            f'--baseline must be one of the backbones {names}, got {args.baseline!r}'
        )
    return dict(backbones=baseline, operator=[*OPERATORS][0])


def plan(args: argparse.Namespace) -> Iterator[list[Case]]:
    """Cases of one input, to be compared with each other."""
    for shape in args.operator:
        row = dict(section='operator', mode='forward', batch=shape[0])
        row.update(input='x'.join(map(str, shape)))
        rest = (*shape, args.device)
        yield [
            Case(
                dict(row, name=name),
                partial(make_operator, name, *rest),
            )
            for name in OPERATORS
        ]
    modes = ('forward', 'train') if args.mode == 'both' else (args.mode,)
    for mode, size in product(modes, args.sizes if args.backbones else ()):
        row = dict(section='backbones', mode=mode, batch=args.batch)
        row.update(input='x'.join(map(str, size)), pixels=math.prod(size))
        rest = (args.batch, size, mode, args.device, args.amp)
        yield [
            Case(dict(row, name=each.name), partial(Pass, each, *rest), each)
            for each in args.backbones
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, and return the exit status."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    about = dict(
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        command=shlex.join(['benchmark.py', *(sys.argv[1:] if argv is None else argv)]),
        device=device_name(args.device),
        threads=args.threads,
        rounds=args.rounds,
        versions=', '.join(f'{name} {number}' for name, number in versions().items()),
    )
    report = dict(about=about, baselines=args.baselines, rows=[])

    def save(name: str, content: str | bytes) -> None:
        content = content.encode() if isinstance(content, str) else content
        write_whole(args.out / f'benchmark.{name}', content)

    status = 0
    try:
        for cases in [[], *plan(args)]:  # the first shows what is missing here
            report['rows'] += measure(cases, args)
            add_ratios(report)
            save('json', json.dumps(report, indent=1))
            save('md', to_markdown(report))
    except KeyboardInterrupt:
        status = 130
    rows = [r for r in report['rows'] if r['section'] == 'backbones' and 'ms' in r]
    if rows:
        title = f'{about["device"]}, {args.threads} CPU threads'
        save('png', draw(rows, title))
    print(to_markdown(report))
    print('wrote', *sorted(str(path) for path in args.out.glob('benchmark.*')))
    return status


if __name__ == '__main__':
    sys.exit(main())
