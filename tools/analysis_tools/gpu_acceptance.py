"""Accept the package on a GPU: results, no waiting, speed, memory, training.

Needs torch, Triton and mmengine; peers come from mmdet or timm, where one is there.
Writes gpu_acceptance.json and .md. Exit status 1: something failed, 2: no GPU. Run it
by `make gpu`; `--device cpu --quick` tries the script.
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from backbones import WAYS, Backbone, find_backbone
from benchmark import OPERATORS, Pass, make_operator, probe_cuda, smooth_noise
from common import command_line, describe, device_name, versions
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import timer

from clustr_mm import ClusTR
from clustr_mm.files import write_whole
from clustr_mm.ops import dpc_knn, kmeans, search
from clustr_mm.ops.backend import VARIABLE

MODELS = {'DPC-kNN': {}, 'linear': WAYS['-linear']}
BASELINE = 'pvtv2-b2'
#: Names of peers in timm.
TIMM = {'pvtv2-b2': 'pvt_v2_b2', 'swin-t': 'swin_tiny_patch4_window7_224'}
Row = dict[str, object]


@dataclass(frozen=True)
class Run:
    """Where to run, and whether only to try the script."""

    device: str
    quick: bool
    cuda: bool

    def images(self) -> Tensor:
        """Smooth noise, of more tokens than the dense way takes."""
        size = (1, 3, 64, 64) if self.quick else (2, 3, 256, 320)
        return smooth_noise(*size).to(self.device)

    def model(self, **options: object) -> ClusTR:
        """ClusTR-tiny with drawn weights."""
        torch.manual_seed(0)
        return ClusTR('tiny', **options).to(self.device).eval()


def check_kernel(run: Run) -> Iterator[Row]:
    """Neighbours found in float32 against those of float64 distances."""
    ways = {'torch': search.candidates}
    if run.cuda:
        module = importlib.import_module('clustr_mm.ops.triton_search')
        ways['Triton'] = module.search
    length, width = (300 if run.quick else 3000), 8
    channels = (16, 64) if run.quick else (16, 64, 128, 256, 320)
    for count, limited in product(channels, (False, True)):
        tokens = torch.randn(1, length, count).to(run.device)
        drawn = torch.randint(length + 1, (1, length)).to(run.device)
        limits = drawn if limited else None
        # What plain TF32 would find: factors of 10 bits behind the point.
        rounded = tokens.view(torch.int32).add(0x1000).bitwise_and(~0x1FFF)
        rounded, wide = rounded.view(torch.float32).double(), tokens.double()
        norms = wide.square().sum(2).unsqueeze(1)
        distances = [torch.cdist(wide, wide).square(), norms - 2 * rounded @ rounded.mT]
        if limited:
            beyond = torch.arange(length, device=run.device) >= limits.unsqueeze(2)
            distances = [x.masked_fill(beyond, torch.inf) for x in distances]
        exact = distances[0]
        best = [x.topk(width, largest=False)[1] for x in distances]
        found = {way: find(tokens, tokens, width, limits) for way, find in ways.items()}
        # Positions in order; the number of keys for what is beyond the limit.
        wanted, coarse, *others = (
            x.masked_fill(exact.gather(2, x).isinf(), length).sort()[0]
            for x in (*best, *found.values())
        )
        padded = F.pad(exact, (0, 1), value=-1.0)
        nearest = padded.gather(2, wanted).sort()[0]
        for way, got in zip(('TF32', *ways), (coarse, *others)):
            differing = int((got != wanted).any(2).sum())
            # Float32 may swap keys that are equally far but for its rounding.
            slip = (padded.gather(2, got).sort()[0] - nearest).abs().max()
            error = float(slip) / (2 * count)
            row = dict(search=way, C=count, limits=limited, relative_error=error)
            # It must show what plain TF32 gets wrong.
            right = error < 2e-6 and differing <= 3
            ok = run.quick or not right if way == 'TF32' else right
            yield dict(row, rows_that_differ=differing, ok=ok)


def check_backends(run: Run) -> Iterator[Row]:
    """Labels of every way to search, and of k-means twice."""
    ways = {'dense': ('torch', 2**30), 'torch, in blocks': ('torch', 0)}
    if run.cuda:
        ways['Triton'] = ('triton', 0)
    side = 14 if run.quick else 48
    maps = smooth_noise(2, 64, side, side).flatten(2).transpose(1, 2)
    inputs = {'Gaussian': torch.randn(2, side**2, 64), 'smooth': maps}
    for kind, tokens in inputs.items():
        counts = (side**2 // 64, side**2 // 16)
        expected = dpc_knn(tokens, counts)
        for way, (name, most) in ways.items():
            asked = mock.patch.dict(os.environ, {VARIABLE: name})
            with asked, mock.patch.object(search, 'DENSE_TOKENS', most):
                labels = dpc_knn(tokens.to(run.device), counts)
            wrong = sum(int((a.cpu() != b).sum()) for a, b in zip(labels, expected))
            yield dict(tokens=kind, search=way, labels_off_CPU=wrong, ok=wrong == 0)
        tokens = tokens.to(run.device)
        first, second = (kmeans(tokens, (side, side), (9, 36)) for _ in range(2))
        parts = zip((*first[0], *first[2]), (*second[0], *second[2]))
        same = all(torch.equal(a, b) for a, b in parts)
        yield dict(tokens=kind, search='k-means twice', equal_bits=same, ok=same)


def check_no_waiting(run: Run) -> Iterator[Row]:
    """No forward pass waits for the GPU."""
    images = run.images()
    for (name, options), train in product(MODELS.items(), (False, True)):
        model, error = run.model(**options).train(train), ''
        with torch.set_grad_enabled(train):
            model(images)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode('error')
            try:
                model(images)
            except RuntimeError as caught:
                error = describe(caught)
            finally:
                torch.cuda.set_sync_debug_mode('default')
        yield dict(model=name, train=train, note=error, ok=not error)


def check_graphs(run: Run) -> Iterator[Row]:
    """A captured forward pass gives what an eager one gives."""
    for name, options in MODELS.items():
        model, static = run.model(**options), torch.zeros_like(run.images())
        with torch.no_grad():
            for _ in range(3):
                model(static)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outs = model(static)
            static.copy_(run.images())
            graph.replay()
            error = relative_error(outs, model(static.clone()))
        yield dict(model=name, relative_error=error, ok=error < 1e-3)


def relative_error(outs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest of the maps' errors over their norm; infinite for NaN."""
    errors = [(a.float() - b).norm() / b.norm() for a, b in zip(outs, expected)]
    return float(torch.stack(errors).nan_to_num(torch.inf).max())


def check_precisions(run: Run) -> Iterator[Row]:
    """Half precision and channels last against float32."""
    images = run.images()
    last = images.to(memory_format=torch.channels_last)
    for name, options in MODELS.items():
        model = run.model(**options)
        with torch.no_grad():
            expected = model(images)
            found = {'channels_last': (model(last), 1e-3)}
            for dtype in (torch.float16, torch.bfloat16):
                with torch.autocast(run.device, dtype):
                    found[str(dtype)] = (model(images), 0.2)
        for what, (outs, most) in found.items():
            error = relative_error(outs, expected)
            yield dict(model=name, what=what, relative_error=error, ok=error < most)


def find(name: str, size: tuple[int, int]) -> tuple[str, Backbone | None]:
    """A backbone and whose it is, of mmdet before timm, or why there is none."""
    if name not in TIMM:
        return 'clustr_mm', find_backbone(name)
    if all(map(importlib.util.find_spec, ('mmdet', 'mmcv'))):
        return 'mmdet', find_backbone(name)
    if not importlib.util.find_spec('timm'):
        return 'no mmdet or timm here: left out', None
    create = importlib.import_module('timm').create_model
    cfg = dict(type=create, model_name=TIMM[name], features_only=True)
    if name == 'swin-t':
        cfg.update(img_size=size, strict_img_size=False)
    return 'timm', Backbone(name, dict(cfg, drop_path_rate=0.1))


def measure_backbones(run: Run) -> Iterator[Row]:
    """Time and memory of ClusTR-small beside its peers, in bfloat16."""
    inputs = [(64, (224, 224)), (8, (512, 512)), (2, (800, 1344))]
    names = [*TIMM, 'clustr-s', 'clustr-s-linear']
    if run.quick:
        inputs, names = [(1, (64, 64))], ['clustr-t', 'clustr-t-linear']
    for (batch, size), mode in product(inputs, ('forward', 'train')):
        base: Row = {}
        for name in names:
            row = dict(backbone=name, batch=batch, size=f'{size[0]}x{size[1]}')
            row['of'], backbone = find(name, size)
            row['mode'] = mode
            if backbone is not None:
                make = partial(Pass, backbone, batch, size, mode, run.device, 'bf16')
                try:
                    call, found = probe_cuda(make, 'cuda') if run.cuda else (make(), {})
                    row.update(found, ms=median_ms(call, run))
                except Exception as error:
                    row.update(note=describe(error), ok=False)
                call = None
                base = row if name == BASELINE else base
            for key in {'ms', 'MiB'}.intersection(row, base):
                row[f'{key} / {BASELINE}'] = row[key] / base[key]
            yield row


def median_ms(call: Callable[[], object], run: Run) -> float:
    """Median duration after a warm-up, by CUDA events on a GPU."""

    def once() -> float:
        start = timer()
        call()
        return 1e3 * (timer() - start)

    for _ in range(1 if run.quick else 3):
        passed = once()
    rounds = 2 if run.quick else max(3, min(20, int(2000 / passed)))
    if not run.cuda:
        return median(once() for _ in range(rounds))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in zip(events, events[1:]))


def measure_operator(run: Run) -> Iterator[Row]:
    """The clustering beside the textbook's, and all of a detector's image."""
    for batch, length in [(1, 256)] if run.quick else [(1, 16384), (4, 3136)]:
        shape = (batch, length, 64)
        calls = {name: make_operator(name, *shape, run.device) for name in OPERATORS}
        times = {name: median_ms(call, run) for name, call in calls.items()}
        x = torch.randn(shape).to(run.device)
        brute_force = partial(lambda x: torch.cdist(x, x).topk(5, largest=False), x)
        times['cdist and topk alone'] = median_ms(brute_force, run)
        for name, ms in times.items():
            speed = times['textbook'] / ms
            yield dict(what=name, input=str(shape), ms=ms, speed_ratio=speed)
    total = 0.0
    size = (96, 64) if run.quick else (800, 1344)
    for depth, stride, channels in [(3, 4, 64), (5, 8, 128), (13, 16, 256)]:
        maps = smooth_noise(1, channels, *(side // stride for side in size))
        tokens = F.layer_norm(maps.flatten(2).transpose(1, 2), (channels,))
        coarse = tokens.shape[1] // (32 // stride) ** 2
        counts = [coarse, 4 * coarse][: 1 + (stride < 16)]
        ms = depth * median_ms(partial(dpc_knn, tokens.to(run.device), counts), run)
        total += ms
        shape = f'{depth} x {tuple(tokens.shape)}, {counts}'
        yield dict(what='clusterings of a stage', input=shape, ms=ms)
    yield dict(what='all clusterings of an image', ms=total)


def train(run: Run, device: str) -> list[float]:
    """Losses of a short training of a segmenter on drawn shapes."""
    side, classes = 32, 3
    torch.manual_seed(0)
    backbone = ClusTR('tiny', drop_path_rate=0.0).train()
    heads = [nn.Conv2d(c, classes, 1) for c in backbone.arch_settings['embed_dims']]
    model = nn.ModuleList([backbone, *heads]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(12 if run.quick else 200):
        blobs = torch.randn(2, classes, 4, 4, generator=generator)
        labels = F.interpolate(blobs, (side, side), mode='bilinear').argmax(1)
        noise = torch.randn(2, 3, side, side, generator=generator)
        images = F.one_hot(labels, classes).permute(0, 3, 1, 2) + 0.5 * noise
        # Some labels are wrong: the loss has a floor, where trainings meet.
        wrong = torch.rand(labels.shape, generator=generator) < 0.1
        drawn = torch.randint(classes, labels.shape, generator=generator)
        labels = torch.where(wrong, drawn, labels)
        outs = backbone(images.to(device))
        maps = [head(out) for head, out in zip(heads, outs)]
        logits = sum(F.interpolate(x, (side, side), mode='bilinear') for x in maps)
        loss = F.cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def check_training(run: Run) -> Iterator[Row]:
    """The loss of a training falls on a GPU as on a CPU."""
    last = []
    for device in ('cpu', 'cuda')[: 1 + run.cuda]:
        losses, tail = train(run, device), (4 if run.quick else 20)
        first = sum(losses[:tail]) / tail
        last.append(sum(losses[-tail:]) / tail)
        fell = last[-1] < first * (1 if run.quick else 0.8)
        yield dict(device=device, first=first, last=last[-1], ok=fell)
    difference = abs(last[-1] / last[0] - 1)
    yield dict(device='difference', last=difference, ok=difference < 0.15)


#: In the order of their numbers; their docstrings are the titles.
PARTS = [
    *(check_kernel, check_backends, check_no_waiting, check_graphs),
    *(check_precisions, measure_backbones, measure_operator, check_training),
]
NEED_GPU = (check_no_waiting, check_graphs)


def about(run: Run) -> Row:
    """What the results were taken on."""
    found = dict(date=datetime.now(timezone.utc).isoformat(timespec='seconds'))
    found.update(card=device_name(run.device), quick=run.quick, cuda=torch.version.cuda)
    folder = shlex.quote(str(Path(__file__).parent))
    commands = {'commit': f'git -C {folder} describe --always --dirty'}
    if run.cuda:
        found['capability'] = '.'.join(map(str, torch.cuda.get_device_capability()))
        commands['driver'] = 'nvidia-smi --query-gpu=driver_version --format=csv'
    for key, command in commands.items():
        found[key] = subprocess.getoutput(f'{command} 2>/dev/null') or None
    triton = importlib.util.find_spec('triton')
    found['triton'] = importlib.import_module('triton').__version__ if triton else None
    return {**found, 'versions': versions()}


def run_part(run: Run, number: int) -> Row:
    """Run a part; nothing it may raise gets out."""
    check = PARTS[number - 1]
    title = check.__doc__.rstrip('.')
    print(f'{number}. {title} ...', flush=True)
    rows, note, start = [], '', time.perf_counter()
    torch.manual_seed(0)
    skip = check in NEED_GPU and not run.cuda
    try:
        for row in () if skip else check(run):
            rows.append(row)
    except Exception as error:
        note = describe(error)
    ok = not note and all(row.get('ok', True) for row in rows)
    status = 'skipped: needs a GPU' if skip else 'passed' if ok else 'failed'
    seconds = round(time.perf_counter() - start, 1)
    print(f'   {status} in {seconds} s {note}'.rstrip(), flush=True)
    part = dict(part=number, title=title, status=status, seconds=seconds, note=note)
    return dict(part, rows=rows)


def to_markdown(report: Row) -> str:
    """All parts in a table, and one for the rows of each."""
    about = '\n'.join(f'- {key}: {value}' for key, value in report['about'].items())
    heads = [dict(part, rows=len(part['rows'])) for part in report['parts']]
    blocks = ['# Acceptance on a GPU', about, table(heads)]
    for part in report['parts']:
        if part['rows']:
            blocks += [f'## {part["part"]}. {part["title"]}', table(part['rows'])]
    return '\n\n'.join(blocks) + '\n'


def table(rows: Sequence[Row]) -> str:
    """Rows of any keys as a Markdown table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ['---'] * len(keys)]
    for row in rows:
        cells = (row.get(key, '') for key in keys)
        lines.append([f'{x:.4g}' if isinstance(x, float) else f'{x}' for x in cells])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, see the module; returns the exit status."""
    parser = command_line('gpu_acceptance.py', __doc__)
    numbers = range(1, len(PARTS) + 1)
    add = parser.add_argument
    add('--device', choices=('cuda', 'cpu'), default='cuda')
    add('--quick', action='store_true', help='tiny sizes, to try the script')
    add('--parts', type=int, nargs='+', choices=numbers, default=numbers, metavar='N')
    add('--out', type=Path, default=Path('work_dirs/gpu_acceptance'))
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU; --device cpu --quick tries the script')
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'cannot write to --out {args.out}: {error.strerror}')
    torch.set_num_threads(1)  # what runs on the CPU is small
    run = Run(args.device, args.quick, args.device == 'cuda')
    report = dict(about=about(run), parts=[])
    for number in args.parts:
        report['parts'].append(run_part(run, number))
        # Written each time: the next part may take the process down.
        report['complete'] = len(report['parts']) == len(args.parts)
        texts = {'json': json.dumps(report, indent=1), 'md': to_markdown(report)}
        for suffix, text in texts.items():
            write_whole(args.out / f'gpu_acceptance.{suffix}', text.encode())
    print(to_markdown(report))
    return int(any(part['status'] == 'failed' for part in report['parts']))


if __name__ == '__main__':
    sys.exit(main())
