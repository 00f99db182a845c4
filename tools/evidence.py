"""Train and test lists of networks on small tasks, and keep the results.

Runs that are finished are not trained again, and interrupted ones go on. What is known
of a list so far stands in <out>/<list>.json, from which tables and figures are made.

Examples:
    python tools/evidence.py quick
    python tools/evidence.py main --jobs 2
    python tools/evidence.py quick main --table --figure
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import last_error
from matplotlib.figure import Figure
from mmengine.config import DictAction
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from tabulate import tabulate

from clustr_mm.files import read_checkpoint, read_config, shorten, write_whole

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / 'tools/analysis_tools'))

from common import device_name, to_png, versions  # noqa: E402
from get_flops import count_flops  # noqa: E402

#: Task -> what toolboxes call its figure, what we call it, and its unit in percent.
FIGURES = {
    'cue_task': ('IoU.target', 'IoU', 1),
    'camvid': ('mIoU', 'mIoU', 1),
    'bccd': ('pascal_voc/AP50', 'AP50', 100),
}
MAIN = (
    *('dpcknn', 'kmeans1', 'kmeans3', 'kmeans3-quarter', 'dpcknn-windows', 'grid'),
    *('sorted', 'random', 'all', 'none', 'strided'),
)
BACKBONES = ('dpcknn', 'dualvit', 'linglo', 'stt', 'pvtv2', 'swin', 'resnet')
CLUSTERED = ('dpcknn', 'kmeans3', 'grid')
PHOTOGRAPHS = ('clustr-t', 'clustr-t-linear', 'pvtv2-b1', 'r18')
#: Learning rates that are tried for each of them, and options for training on a part
#: of CamVid's train and testing on the rest.
RATE = 'optim_wrapper.optimizer.lr'
RATES = (3e-4, 6e-4, 1.2e-3)
HELD_OUT = {
    'train_dataloader.dataset.ann_file': 'fit.txt',
    'val_dataloader.dataset.ann_file': 'held_out.txt',
    'val_dataloader.dataset.data_prefix.img_path': 'images/train',
    'val_dataloader.dataset.data_prefix.seg_map_path': 'annotations/train',
}
#: Networks that are tested with the clusters of OTHERS; parameters are the same.
EXCHANGED = ('dpcknn', 'kmeans3')
OTHERS = MAIN[:7]

#: Target IoU in percent that is more than taking all shapes for targets would have, 33;
#: with which a network has learnt the task; and the iterations at which tables look.
BEGUN = 40
LEARNT = 80
STEPS = (250, 500)


@dataclass(frozen=True)
class Run:
    """One training, or test.

    Attributes:
        variant (str): Which config, ``<method>_<variant>_...py``.
        seed (int): Of weights and order.
        point (str): What the options are called; empty if there are none.
        options (Mapping): ``--cfg-options``.
        weights (str): The variant whose network, of the same seed and task and without
            options, it begins with; empty for none.
        is_test (bool): Whether these weights are tested as they are.
        task (str): A key of ``FIGURES``, the folder of the config.
    """

    variant: str
    seed: int
    point: str = ''
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weights: str = ''
    is_test: bool = False
    task: str = 'cue_task'

    @property
    def name(self) -> str:
        """Name of its folder, in that of its task."""
        parts = filter(None, [self.variant, self.point, f'seed{self.seed}'])
        return f'{self.task}/{"_".join(parts)}'

    def find_network(self, work_dir: Path) -> Path:
        """The last checkpoint that it left; a path of none if there is none yet."""
        folder = work_dir / self.name
        return max(
            folder.glob('iter_*.pth'),
            key=lambda path: int(path.stem[5:]),
            default=folder / 'iter.pth',
        )

    @property
    def source(self) -> Run:
        """The run that left ``weights``."""
        return Run(self.weights, self.seed, task=self.task)

    @property
    def config(self) -> Path:
        """Its config."""
        (path,) = (ROOT / 'configs').glob(f'*/{self.task}/*_{self.variant}_*.py')
        return path


def picture(**settings: int) -> dict[str, int]:
    """Options that change the pictures, see ``CueTask``."""
    return {
        f'{part}_dataloader.dataset.{key}': value
        for part in ('train', 'val', 'test')
        for key, value in settings.items()
    }


def backbone(**settings: Any) -> dict[str, Any]:
    """Options that change the backbone."""
    return {f'model.backbone.{key}': value for key, value in settings.items()}


def schedule(iterations: int, warm_up: int, interval: int) -> dict[str, int]:
    """Options for so many iterations; validation and checkpoint every ``interval``."""
    return {
        'train_cfg.max_iters': iterations,
        'train_cfg.val_interval': interval,
        'default_hooks.checkpoint.interval': interval,
        'param_scheduler.0.end': warm_up,
        'param_scheduler.1.begin': warm_up,
        'param_scheduler.1.end': iterations,
    }


def clusters(number: int) -> dict[str, Any]:
    """Options for so many coarse clusters in each stage, as far as it has tokens."""
    return backbone(**{'arch.sr_ratios': [4, 2, 2, 1], 'max_clusters': number})


def make_lists() -> dict[str, list[Run]]:
    """The lists by name; of each the first seed comes first."""
    every = (*CLUSTERED, 'all')
    longer = schedule(3000, 900, 250)
    #: List -> number of seeds, and (variants, point, options) of each point.
    lists = {
        'quick': (1, [(MAIN, '', {})]),
        'main': (5, [(MAIN, '', {})]),
        'longer': (
            2,
            [
                ((*CLUSTERED, 'all', 'strided'), 'longer', longer),
                (['kmeans3'], 'longer-cue-10', {**longer, **picture(cue_size=10)}),
            ],
        ),
        'backbones': (3, [(BACKBONES, '', {})]),
        # Points without a name are runs of 'main', which are not made twice.
        'cue-sizes': (
            3,
            [
                (every, '', {}),
                (['dpcknn-windows'], '', {}),
                *((every, f'cue-{n}', picture(cue_size=n)) for n in (4, 6, 10, 16)),
                *(
                    (['dpcknn-windows'], f'cue-{n}', picture(cue_size=n))
                    for n in (6, 10)
                ),
                (
                    ['kmeans3'],
                    'cue-10-clusters-36',
                    {**picture(cue_size=10), **clusters(36)},
                ),
            ],
        ),
        'cluster-counts': (
            3,
            [
                (CLUSTERED, '', {}),
                *((CLUSTERED, f'clusters-{n}', clusters(n)) for n in (2, 4, 18)),
            ],
        ),
        'picture-sizes': (
            3,
            [
                (every, '', {}),
                *(
                    point
                    for n in (64, 128, 192, 256)
                    for point in (
                        (['dpcknn', 'kmeans3', 'all'], f'size-{n}', picture(size=n)),
                        (
                            CLUSTERED,
                            f'size-{n}-clusters-9',
                            {**picture(size=n), **clusters(9)},
                        ),
                    )
                ),
            ],
        ),
        'parts': (
            3,
            [
                (CLUSTERED, '', {}),
                (['dpcknn'], 'k-1', backbone(**{'clusterer.k': 1})),
                (['dpcknn'], 'k-15', backbone(**{'clusterer.k': 15})),
                (['dpcknn'], 'coarse', backbone(type='ControlClusTR', scale=0)),
                (['dpcknn'], 'fine', backbone(type='ControlClusTR', scale=1)),
                (
                    CLUSTERED,
                    'plain-means',
                    backbone(type='ControlClusTR', learned_weights=False),
                ),
            ],
        ),
    }
    runs = {
        name: [
            Run(variant, seed, point, options)
            for seed in range(seeds)
            for variants, point, options in points
            for variant in variants
        ]
        for name, (seeds, points) in lists.items()
    }
    exchanged = [
        (seed, weights, variant)
        for seed in range(5)
        for weights in EXCHANGED
        for variant in OTHERS
    ]
    runs['exchanged'] = [
        Run(variant, seed, f'weights-{weights}', {}, weights, is_test=True)
        for seed, weights, variant in exchanged
    ]
    tuning = {**schedule(200, 20, 100), RATE: 2e-4}
    runs['tuned'] = [
        Run(variant, seed, f'tuned-{weights}', tuning, weights)
        for seed, weights, variant in exchanged
        if variant in CLUSTERED and weights != variant
    ]
    runs['one-target'] = [
        Run(to, seed, 'one-target', picture(num_targets=1), to, is_test=True)
        for seed in range(5)
        for to in (*MAIN, 'linglo')
    ]
    runs['larger'] = [
        Run(variant, seed, point, options, variant, is_test=True)
        for seed in (1, 2)
        for n in (96, 128, 192, 256)
        for variant in EXCHANGED
        for point, options in (
            (f'at-{n}', picture(size=n)),
            (f'at-{n}-clusters-9', {**picture(size=n), **clusters(9)}),
        )
    ]
    short = {**HELD_OUT, **schedule(300, 30, 300)}
    runs['camvid-rates'] = [
        Run(variant, 0, f'lr-{rate:g}', {**short, RATE: rate}, task='camvid')
        for rate in RATES
        for variant in PHOTOGRAPHS
    ]
    runs['camvid'] = [
        Run(variant, seed, task='camvid') for seed in (0, 1) for variant in PHOTOGRAPHS
    ]
    runs['bccd'] = [
        Run(variant, seed, task='bccd')
        for seed in (0, 1)
        for variant in PHOTOGRAPHS[1:3]
    ]
    runs['camvid-exchanged'] = [
        Run(to, seed, f'weights-{weights}', {}, weights, is_test=True, task='camvid')
        for seed in (0, 1)
        for weights in PHOTOGRAPHS[:2]
        for to in PHOTOGRAPHS[:2]
    ]
    return runs


def start(run: Run, work_dir: Path, options: Mapping[str, Any]) -> subprocess.Popen:
    """Start a run, or let a training go on, in a process group of its own."""
    folder = work_dir / run.name
    folder.mkdir(parents=True, exist_ok=True)
    options = {**run.options, **options, 'randomness.seed': run.seed}
    way = ['train', '--resume']
    if run.is_test:
        way = ['test', '--checkpoint', str(run.source.find_network(work_dir))]
    elif run.weights:
        # With --resume MMEngine would go on where these weights stopped.
        way = ['train']
        # From where it runs: MMEngine takes spaces out of the value of an option.
        options['load_from'] = os.path.relpath(run.source.find_network(work_dir), ROOT)
    command = [
        *(sys.executable, '-m', 'mim', way[0], run.config.parts[-3]),
        *(str(run.config), *way[1:]),
        *('--work-dir', str(folder), '--cfg-options'),
        *(f'{key}={value}' for key, value in options.items()),
    ]
    with (folder / 'log.txt').open('a') as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
            close_fds=False,  # or it would not inherit the lock of claim()
            start_new_session=True,
            preexec_fn=lambda: os.nice(10),
        )


def measure(run: Run, folder: Path, code: int, options: Mapping[str, Any]) -> dict:
    """What a run came to, whichever way it ended."""
    scalars = [
        json.loads(line)
        for file in sorted(folder.glob('*/vis_data/scalars.json'))
        for line in file.read_text().splitlines()
        if line.endswith('}')  # or its training was killed while it was written
    ]
    # Of a step that was trained twice, after an interruption, the later counts.
    trained = {line['step']: line for line in scalars if 'loss' in line}.values()
    key, name, percent = FIGURES[run.task]
    tested = {line['step']: line for line in scalars if key in line}
    for file in sorted(folder.glob('*/*.json')) if run.is_test else ():
        tested[0] = json.loads(file.read_text())
    record = dict(
        variant=run.variant,
        point=run.point,
        seed=run.seed,
        options={**run.options, **options},
        status='finished',
        figure=name,
        scores={str(x): round(tested[x][key] * percent, 2) for x in sorted(tested)},
    )
    if run.task == 'camvid':
        last = tested[max(tested)] if tested else {}
        record['classes'] = {k[4:]: v for k, v in last.items() if k[:4] == 'IoU.'}
    if code:
        reason = last_error((folder / 'log.txt').read_text(), code)
        record.update(status='failed', error=shorten(reason))
    elif not all(math.isfinite(line['loss']) for line in trained):
        record['status'] = 'diverged'
    if trained:
        # Of the fastest ten that the log has: other work on the machine only adds.
        record['seconds_per_iteration'] = round(min(x['time'] for x in trained), 4)
    return {**record, **count(run, options)}


def count(run: Run, options: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of the whole network, and its multiply-adds for a training picture."""
    config = read_config(run.config)
    config.merge_from_dict({**run.options, **options})
    init_default_scope(config.default_scope)
    # Of the pictures, what is cut out of them, or what they are resized to.
    side = config.train_dataloader.dataset.get('size', 96)
    width, height = config.get('scale', (side, side))
    height, width = config.get('crop_size', (height, width))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the toolbox's own, about its own names
        flops = count_flops(MODELS.build(config.model), height, width)
    return dict(parameters=flops.parameters, multiply_adds=flops.total)


def circumstances() -> dict[str, Any]:
    """Of what and where a run was made."""
    commit, changes = (
        subprocess.run(
            ['git', *command], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        for command in (
            ('describe', '--always', '--exclude=*'),
            ('status', '--porcelain', 'clustr_mm', 'configs', 'tools'),
        )
    )
    return dict(
        versions=versions(),
        commit=commit + ('-dirty' if changes else ''),
        machine=device_name('cuda')
        if torch.cuda.is_available()
        else f'{os.cpu_count()} x {device_name("cpu")}',
    )


def slim(network: Path) -> None:
    """Leave of a run's checkpoints the last, and of that what is needed for testing."""
    for path in network.parent.glob('iter_*.pth'):
        if path != network:
            path.unlink()
            continue
        content = read_checkpoint(path)
        weights = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
        file = io.BytesIO()
        torch.save(dict(meta=content['meta'], state_dict=weights), file)
        write_whole(path, file.getbuffer())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=1) + '\n').encode())


def read_record(run: Run, work_dir: Path) -> dict | None:
    """The record of a run, if there is one."""
    path = work_dir / run.name / 'record.json'
    return json.loads(path.read_text()) if path.exists() else None


def is_finished(run: Run, work_dir: Path) -> bool:
    """Whether a run came to an end; one that failed did not.

    Nor did one whose weights have been trained anew since.
    """
    record = read_record(run, work_dir)
    if record is None or record['status'] == 'failed':
        return False
    network = run.source.find_network(work_dir)
    if not run.weights or not network.exists():
        return True
    ended = (work_dir / run.name / 'record.json').stat().st_mtime
    return network.stat().st_mtime <= ended


def has_network(run: Run, work_dir: Path) -> bool:
    """Whether a run is finished and its network is still there."""
    return is_finished(run, work_dir) and run.find_network(work_dir).exists()


def gather(name: str, work_dir: Path, out: Path) -> None:
    """Put the records of a list into its file, in its order.

    Others there stay; so do those of runs that have only failed here.
    """
    path, runs = out / f'{name}.json', make_lists()[name]
    known = json.loads(path.read_text()) if path.exists() else []
    records = {(r['variant'], r['point'], r['seed']): r for r in known}
    order = [(run.variant, run.point, run.seed) for run in runs]
    for key, run in zip(order, runs):
        record = read_record(run, work_dir)
        if record and (
            record['status'] != 'failed'
            or records.get(key, record)['status'] == 'failed'
        ):
            records[key] = record
    keys = dict.fromkeys([*order, *records])
    if records:
        write_json(path, [records[key] for key in keys if key in records])


@contextmanager
def claim(work_dir: Path) -> Iterator[None]:
    """Hold a folder; ends the program if that cannot be.

    Each ``mim``, which waits for its training, inherits the lock: a training that
    outlives a driver that was killed has it still.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        folder = os.open(work_dir, os.O_RDONLY)
    except OSError as error:
        sys.exit(f'evidence.py: {shorten(error)}')
    os.set_inheritable(folder, True)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(
                f'evidence.py: {work_dir} is held by another driver, or by a training '
                'that outlived one'
            )
        yield
    finally:
        os.close(folder)


def train(
    name: str, work_dir: Path, out: Path, jobs: int, options: Mapping[str, Any]
) -> int:
    """Train what is not finished of a list; returns how many runs failed.

    One that failed before is tried again; ends the program if one was made with
    other options, or if there are no data.
    """
    runs = make_lists()[name]
    for path in {run.config for run in runs}:
        config = read_config(path)
        config.merge_from_dict(dict(options))
        root = config.train_dataloader.dataset.get('data_root', '.')
        if not (ROOT / root).is_dir():
            sys.exit(
                f'evidence.py: there is no folder {root} for {path.name}: '
                'docs/evidence.md says where its data are from'
            )
    for run in runs:
        record = read_record(run, work_dir)
        # As JSON has it: tuples are lists there.
        asked = json.loads(json.dumps({**run.options, **options}))
        if record and record['options'] != asked:
            sys.exit(
                f'evidence.py: {work_dir / run.name} is of the options '
                f'{record["options"]}, not {asked}: remove that folder or choose '
                'another --work-dir'
            )
    waiting = [run for run in runs if not is_finished(run, work_dir)]
    number, begin, failures = len(waiting), time.time(), 0
    print(f'{name}: {len(runs)} runs, {len(runs) - number} finished before', flush=True)
    gather(name, work_dir, out)
    running: dict[Run, tuple[subprocess.Popen, dict]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                if run.weights and not has_network(run.source, work_dir):
                    print(
                        f'{run.name}: left out, its weights are not trained yet',
                        flush=True,
                    )
                    continue
                made_of = circumstances()
                running[run] = start(run, work_dir, options), made_of
                print(f'{run.name}: started', flush=True)
            time.sleep(0.2)
            for run in [run for run in running if running[run][0].poll() is not None]:
                folder, (ended, made_of) = work_dir / run.name, running.pop(run)
                code = ended.returncode
                record = {**measure(run, folder, code, options), **made_of}
                write_json(folder / 'record.json', record)
                gather(name, work_dir, out)
                if code:
                    failures += 1
                else:
                    slim(run.find_network(work_dir))
                left = len(waiting) + len(running)
                minutes = (time.time() - begin) / (number - left) * left / 60
                scores = ' '.join(f'{score:.0f}' for score in record['scores'].values())
                print(
                    f'{run.name}: {record["status"]}, {record["figure"]} '
                    f'{scores or "unknown"}; {left} left, about {minutes:.0f} min',
                    flush=True,
                )
    finally:
        for child, _ in running.values():
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
        for child, _ in running.values():
            child.wait()
    return failures


def group(records: Iterable[dict]) -> dict[tuple[str, str], list[dict]]:
    """Records by variant and point, seeds together."""
    groups = defaultdict(list)
    for record in records:
        groups[record['variant'], record['point']].append(record)
    return groups


def spread(values: Iterable[float | None], digits: int = 1) -> str:
    """Mean and, of several, standard deviation, of those that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return '–'
    text = f'{statistics.mean(known):.{digits}f}'
    return text + (f' ± {statistics.stdev(known):.{digits}f}' if known[1:] else '')


def make_table(records: Iterable[dict]) -> str:
    """Markdown table of a list, seeds together; scores are in percent.

    They are the IoU of the cue task's target, or what ``figure`` of the records says.
    """
    records = list(records)
    # Of a test there is one score, at 0 iterations.
    seen = {int(step) for record in records for step in record['scores']}
    classes = dict.fromkeys(name for r in records for name in r.get('classes', ()))
    rows = []
    for (variant, point), runs in group(records).items():
        figure = runs[0]['figure']
        ended = [run for run in runs if run['status'] == 'finished']
        curves = [run['scores'] for run in ended]
        learnt = [[int(step) for step in c if c[step] >= LEARNT] for c in curves]
        row = {'network': f'{variant} {point}'.strip()}
        for step in sorted(seen.intersection(STEPS)):
            row[f'{figure} at {step}'] = spread(c.get(str(step)) for c in curves)
        row[f'final {figure}'] = spread([*c.values()][-1] for c in curves)
        for name in classes:
            row[name] = spread(run['classes'].get(name) for run in ended)
        if figure == 'IoU':
            if seen != {0}:
                first = (steps[0] for steps in learnt if steps)
                row[f'iterations to {LEARNT}'] = spread(first, digits=0)
                begun = sum(max(c.values(), default=0) >= BEGUN for c in curves)
                row['left the plateau'] = f'{begun} of {len(runs)}'
            row['learnt'] = f'{sum(map(bool, learnt))} of {len(runs)}'
        row['diverged or failed'] = len(runs) - len(ended)
        row['parameters, M'] = f'{runs[0]["parameters"] / 1e6:.2f}'
        row['multiply-adds, M'] = f'{runs[0]["multiply_adds"] / 1e6:.0f}'
        rows.append(row)
    return tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)


def put_table(page: Path, name: str, table: str) -> None:
    """Put a table between the markers of its list in a page."""
    begin, end = f'<!-- {name} -->\n', f'<!-- end of {name} -->'
    text = re.sub(
        f'(?s)(?<={begin}).*?(?={end})', lambda _: f'\n{table}\n\n', page.read_text()
    )
    write_whole(page, text.encode())


def draw(records: Sequence[dict], path: Path) -> None:
    """Draw scores over iterations: each seed (thin), and their mean.

    A panel is a point of the list; of a list with one point, it is a network.
    """
    points = {record['point'] for record in records}
    key = 'point' if len(points) > 1 else 'variant'
    titles = list(dict.fromkeys(record[key] for record in records))
    variants = list(dict.fromkeys(record['variant'] for record in records))
    columns = min(4, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure((1 + 2.4 * columns, 1 + 2 * rows), layout='constrained')
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    lines = {}
    for (variant, _), runs in group(records).items():
        axis = grid.flat[titles.index(runs[0][key])]
        colour = f'C{variants.index(variant)}'
        curves = [{int(k): v for k, v in run['scores'].items()} for run in runs]
        for curve in curves:
            axis.plot(curve.keys(), curve.values(), color=colour, lw=0.8, alpha=0.6)
        steps = sorted(set().union(*curves))
        means = [statistics.mean(c[x] for c in curves if x in c) for x in steps]
        (lines[variant],) = axis.plot(steps, means, '.-', color=colour, lw=2.5)
        axis.set(title=runs[0][key] or 'as in main', ylim=(-3, 103))
    for axis in grid.flat[len(titles) :]:
        axis.remove()
    # The last in its column has the numbers, also where the panel below it is gone.
    for axis in grid.flat[max(0, len(titles) - columns) : len(titles)]:
        axis.tick_params(labelbottom=True)
    if key == 'point':
        figure.legend(lines.values(), lines, loc='outside right')
    figure.supxlabel('iterations')
    of = ' of the target' if records[0]['figure'] == 'IoU' else ''
    figure.supylabel(f'{records[0]["figure"]}{of}, %')
    write_whole(path, to_png(figure))


def draw_predictions(
    runs: Iterable[Run], work_dir: Path, path: Path, number: int = 10
) -> None:
    """Draw pictures of the validation, their labels, and what networks make of them.

    Runs that are not finished or have no checkpoint are left out.
    """
    from mmseg.apis import init_model

    networks = {
        f'{run.variant} {run.point}'.strip(): run
        for run in runs
        if has_network(run, work_dir)
    }
    if not networks:
        sys.exit(f'evidence.py: there is no checkpoint of these runs in {work_dir}')
    if any(run.task != 'cue_task' for run in networks.values()):
        sys.exit('evidence.py: --predictions is for lists of the cue task')
    if any('.dataset.' in key for run in networks.values() for key in run.options):
        sys.exit('evidence.py: the networks of this list have other pictures each')
    rows = {}
    for name, run in networks.items():
        config = read_config(run.config)
        config.merge_from_dict(read_record(run, work_dir)['options'])
        model = init_model(config, str(run.find_network(work_dir)), 'cpu')
        data = DATASETS.build(config.val_dataloader.dataset)
        number = min(number, len(data))
        drawn = [data.draw(index) for index in range(number)]
        colours = np.array(data.metainfo['palette'], np.uint8)
        rows.setdefault('picture', [image for image, _ in drawn])
        rows.setdefault('label', [colours[labels] for _, labels in drawn])
        samples = model.test_step(pseudo_collate([data[i] for i in range(number)]))
        rows[name] = [colours[sample.pred_sem_seg.data[0]] for sample in samples]
    # Rows x columns of tiles, with a line of white around each.
    border = [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)]
    tiles = np.pad(np.array([*rows.values()]), border, constant_values=255)
    side = tiles.shape[2]
    figure = Figure((1.1 * number + 2, 1.1 * len(rows)), layout='constrained')
    axis = figure.subplots()
    axis.imshow(np.vstack([np.hstack([*row]) for row in tiles]))
    axis.set_yticks([(row + 0.5) * side for row in range(len(rows))], rows)
    axis.set(xticks=[], frame_on=False)
    write_whole(path, to_png(figure))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    lists = ', '.join(f'{name} ({len(runs)})' for name, runs in make_lists().items())
    add(
        'lists',
        nargs='+',
        choices=[*make_lists()],
        metavar='LIST',
        help=f'and the number of its runs: {lists}',
    )
    add('--jobs', type=int, default=os.cpu_count(), help='runs at a time')
    add('--work-dir', type=Path, default='work_dirs/evidence')
    add('--out', type=Path, default='docs/evidence')
    add('--table', action='store_true', help='only print tables, and fill <out>.md')
    add('--figure', action='store_true', help='only draw <out>/<list>.png')
    add(
        '--predictions',
        type=int,
        metavar='SEED',
        help='only draw what networks of this seed make of ten pictures, as '
        '<out>/<list>-predictions.png',
    )
    add('--cfg-options', nargs='+', action=DictAction, default={}, help='of all runs')
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, got {args.jobs}')
    if not (args.table or args.figure or args.predictions is not None):
        # As on Ctrl-C, the trainings end with the driver; under nohup they go on.
        for way in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(way) != signal.SIG_IGN:
                signal.signal(way, lambda *_: sys.exit('evidence.py: stopped'))
        work_dir, out = args.work_dir.resolve(), args.out
        with claim(work_dir):
            failures = sum(
                train(name, work_dir, out, args.jobs, args.cfg_options)
                for name in args.lists
            )
        sys.exit(f'evidence.py: {failures} runs failed' if failures else None)
    page = args.out.with_name(f'{args.out.name}.md')
    for name in args.lists:
        path = args.out / f'{name}.json'
        if not path.exists():
            parser.error(f'there is no {path}: train the list {name} first')
        records = json.loads(path.read_text())
        if args.predictions is not None:
            of_seed = [r for r in make_lists()[name] if r.seed == args.predictions]
            drawing = args.out / f'{name}-predictions.png'
            draw_predictions(of_seed, args.work_dir, drawing)
        if args.figure:
            draw(records, path.with_suffix('.png'))
        if args.table:
            table = make_table(records)
            print(f'{name}\n\n{table}\n')
            if page.exists():
                put_table(page, name, table)


if __name__ == '__main__':
    main()
