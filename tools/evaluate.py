"""Test checkpoints and put the figures beside the published ones.

Give checkpoints, or folders such as the work_dirs/ of `mim train`, of which the best
checkpoint of each training is taken, or else the last. Each is tested by `mim test`
with the config that is named, that it or its folder is named after, or that lies
beside it; not again if it was tested before.

Examples:
    python tools/evaluate.py work_dirs
    python tools/evaluate.py work_dirs --launcher pytorch --gpus 8
    python tools/evaluate.py epoch_12.pth --configs mask-rcnn_clustr-s-w224_fpn_1x_coco
"""

import argparse
import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from clustr_mm.files import read_checkpoint, read_config, shorten, write_whole

try:
    from tabulate import tabulate
except ImportError:
    sys.exit('evaluate.py needs the package tabulate: pip install clustr_mm[tools]')

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
SHIPPED = {file.stem: file for file in CONFIGS.glob('mm*/*.py')}
PACKAGES = ('torch', 'mmengine', 'clustr_mm')

#: Figures of the runners: their names in metafiles, and what makes percent of them.
METRICS = {
    'coco/bbox_mAP': ('box AP', 100),
    'coco/segm_mAP': ('mask AP', 100),
    'coco-wholebody/AP': ('Whole AP', 100),
    'coco-wholebody/AR': ('Whole AR', 100),
    'mIoU': ('mIoU', 1),
    'accuracy/top1': ('Top 1 Accuracy', 1),
}
NOTE = (
    'Figures are in percent. "Measured" is what this run found, "paper" what the paper '
    'of the backbone has, "published" what the papers of others have.'
)
NO_CONFIG = 'no config is beside it, and none has its name; name it by --configs'

COLOR = re.compile(r'\x1b\[[\d;]*m')
#: What a runner logs as an error, or the end of a traceback.
ERROR = re.compile(
    r'.* - ERROR - (.+)|(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b.*)'
)
#: Launchers say these of every failure of what they launched.
LAUNCHERS = re.compile('CalledProcessError|ChildFailedError')
#: The runner only warns of this, and tests random weights.
MISFIT = re.compile(r'(?:missing keys in source state_dict|size mismatch for).*')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and refuse what cannot be."""
    parser = argparse.ArgumentParser(
        prog='evaluate.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('paths', nargs='+', type=Path, metavar='CHECKPOINT_OR_FOLDER')
    add(
        '--configs',
        nargs='+',
        default=[],
        metavar='CONFIG',
        help='test only with these: files, or names of configs of configs/. A single '
        'one is used for every checkpoint given as a file',
    )
    add('--work-dir', type=Path, default=Path('work_dirs/evaluate'), help='for logs')
    add('--out', type=Path, help='for the table, by default the work dir')
    add('--launcher', choices=('none', 'pytorch', 'slurm'), default='none')
    add('--gpus', type=int, help='GPUs in all')
    add('--gpus-per-node', type=int, help='GPUs per node, for slurm')
    add('--partition', help='for slurm')
    add('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    args = parser.parse_args(argv)

    for path in args.paths:
        if not path.exists():
            parser.error(f'there is no checkpoint or folder {str(path)!r}')
    files = [SHIPPED.get(name.removesuffix('.py'), Path(name)) for name in args.configs]
    for file in files:
        if not file.is_file():
            parser.error(f'there is no config {str(file)!r}, here or in {CONFIGS}')
    args.configs = {file.stem: file for file in files}
    args.mim_options = ['--launcher', args.launcher]
    for name in ('gpus', 'gpus_per_node', 'partition'):
        if getattr(args, name) is not None:
            option = f'--{name.replace("_", "-")}'
            args.mim_options += [option, str(getattr(args, name))]
    if args.cfg_options:
        args.mim_options += ['--cfg-options', *args.cfg_options]
    args.out = args.out or args.work_dir
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'--out: {error}')
    return args


def find_checkpoints(path: Path) -> list[Path]:
    """The best checkpoint of each training in a folder, or else the last."""
    if path.is_file():
        return [path]
    trainings: dict[Path, list[Path]] = {}
    for file in sorted(path.rglob('*.pth')):
        if file.is_file():  # not a link to what is gone
            training = file if file.stem in SHIPPED else file.parent
            trainings.setdefault(training, []).append(file)
    return sorted(map(pick_checkpoint, trainings.values()))


def pick_checkpoint(files: Sequence[Path]) -> Path:
    """The newest of those that the runner calls best, or else the last."""
    chosen = [file for file in files if file.name.startswith('best_')]
    last = files[0].with_name('last_checkpoint')
    if not chosen and last.is_file():
        # The path in it is that of the machine that trained.
        name = Path(last.read_text(errors='replace').strip()).name
        chosen = [file for file in files if file.name == name]
    return max(chosen or files, key=lambda file: (file.stat().st_mtime_ns, file.name))


def find_config(checkpoint: Path, named: Mapping[str, Path]) -> Path | None:
    """A checkpoint's config: of those named, or else beside it, or else shipped."""
    folder = checkpoint.absolute().parent
    beside = {file.stem: file for file in folder.glob('*.py')}
    names = [checkpoint.stem, folder.name, *(beside if len(beside) == 1 else ())]
    known = named or {**SHIPPED, **beside}
    return next((known[name] for name in names if name in known), None)


def run_mim(arguments: Sequence[str], log: Path) -> int:
    """Run ``mim``, keep what it prints, and leave no process behind."""
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
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise


def last_error(text: str, status: int) -> str:
    """The runner's own last word on why it failed or measured nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    killed = re.search(r'died with <Signals\.(\w+)', lines[-1]) if lines else None
    if killed or status < 0:
        return f'ended by {killed[1] if killed else signal.Signals(-status).name}'
    for line in reversed(lines):
        error = ERROR.match(line)
        if error and not LAUNCHERS.search(line):
            return error[1] or error[2]
    return lines[-1] if lines else f'ended with status {status} and no message'


def measure(arguments: Sequence[str], folder: Path) -> dict[str, float]:
    """Run ``mim test`` in an empty folder and read the figures that it writes there.

    Raises:
        ValueError: If there are none, with the runner's reason in one line.
    """
    log = folder / 'test.log'
    status = run_mim(['test', *arguments], log)
    text = COLOR.sub('', log.read_text(errors='replace'))
    misfit = MISFIT.search(text)
    if misfit and not status:
        raise ValueError(f'does not fit the config: {shorten(misfit[0])}; see {log}')
    figures = {}
    for file in folder.glob('*/*.json') if not status else ():
        for key, value in json.loads(file.read_text()).items():
            if isinstance(value, (int, float)) and key not in ('time', 'data_time'):
                figures[key] = value
    if not figures:
        raise ValueError(f'{shorten(last_error(text, status))}; see {log}')
    return figures


def find_figures(
    checkpoint: Path, config: Path, args: argparse.Namespace
) -> tuple[str, dict]:
    """A checkpoint's toolbox, and its figures, from an earlier test if there is one."""
    read_checkpoint(checkpoint)  # what is none is said so, before anything runs
    content = read_config(config)
    toolbox = content.get('default_scope')
    if not toolbox:
        raise ValueError(f'{config} has no default_scope, which names the toolbox')
    # Whatever may change a figure makes another folder.
    about = [str(checkpoint.resolve()), checkpoint.stat().st_mtime_ns]
    about += [args.cfg_options, content.to_dict()]
    key = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()
    folder = args.work_dir / config.stem / f'{checkpoint.stem}-{key[:8]}'
    done = folder / 'figures.json'
    if done.is_file():
        print(f'  was tested before; without {done} it is tested again')
        return toolbox, json.loads(done.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = ['--checkpoint', str(checkpoint), '--work-dir', str(folder)]
    figures = measure([toolbox, str(config), *paths, *args.mim_options], folder)
    write_whole(done, json.dumps(figures).encode())
    return toolbox, figures


def read_published(toolbox: str) -> list[dict[str, Any]]:
    """What papers say of models with and without a config, in one list."""
    models = []
    for file in sorted((CONFIGS / toolbox).glob('*.yml')):
        for model in yaml.safe_load(file.read_text())['Models']:
            about = model['Metadata']
            model['backbone'], model['method'] = about['Architecture']
            model['remark'] = about.get('Remark', '')
            model['figures'] = {}
            for result in model.get('Results', ()):
                model['figures'].update(result['Metrics'])
            models.append(model)
    return models


def compare(
    name: str, figures: Mapping[str, float], models: Sequence[Mapping]
) -> Iterator[dict[str, Any]]:
    """Put the figures of a config in percent beside its paper's.

    Those of a runner that are in no published table are shown as the runner has them,
    if there are no others.
    """
    paper = next((model for model in models if model['Name'] == name), {})
    if paper and not paper['figures']:
        # That of the whole family, where the paper does not say of which variant.
        family = paper['In Collection'], paper['method']
        paper = next((m for m in models if (m['backbone'], m['method']) == family), {})
    known = {key: METRICS[key] for key in METRICS if key in figures}
    for key, (metric, factor) in (known or {k: (k, 1) for k in figures}).items():
        value = figures[key]
        if not math.isfinite(value) or (known and value < 0):
            # COCO's -1, or NaN: nothing to find in this data.
            yield dict(metric=metric, error=f'{key} is not defined on this data')
            continue
        row = dict(metric=metric, measured=round(value * factor, 2))
        if metric in paper.get('figures', ()):
            row['paper'] = paper['figures'][metric]
            row['difference'] = round(row['measured'] - row['paper'], 2)
            row['remark'] = paper['remark']
        yield row


def list_peers(name: str, models: Sequence[Mapping]) -> dict[str, list[dict[str, Any]]]:
    """Published figures of all backbones with the method of a config."""
    methods = [model['method'] for model in models if model['Name'] == name]
    return {
        method: [
            dict(backbone=peer['backbone'], **peer['figures'], remark=peer['remark'])
            for peer in models
            if peer['method'] == method and peer['figures']
        ]
        for method in methods
    }


def save(out: Path, content: Mapping[str, Any]) -> str:
    """Write ``evaluation.md`` and ``evaluation.json``, each whole or not at all."""
    about = {k: v for k, v in content.items() if isinstance(v, str)}
    parts = ['# Evaluation', '\n'.join(f'- {k}: {v}' for k, v in about.items()), NOTE]
    parts.append(to_table(content['rows']) or 'Nothing was evaluated.')
    not_run = content['not_run'].items()
    parts.append(to_table([{'not run': k, 'reason': v} for k, v in not_run]))
    for method, peers in content['published'].items():
        parts += [f'## {method}: published figures', to_table(peers)]
    text = '\n\n'.join(filter(None, parts)) + '\n'
    write_whole(out / 'evaluation.md', text.encode())
    write_whole(out / 'evaluation.json', json.dumps(content, indent=2).encode())
    return text


def to_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown."""
    rows = [
        {k: v.replace('|', r'\|') if isinstance(v, str) else v for k, v in row.items()}
        for row in rows
    ]
    return tabulate(rows, 'keys', 'pipe', floatfmt='.2f', missingval='–')


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate checkpoints; the status is 0 if all that was asked for has a figure."""
    args = parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)  # for whoever follows a log of this
    jobs, rows, peers = {}, [], {}
    not_run = dict.fromkeys(args.configs, 'no checkpoint found')
    for path in args.paths:
        for checkpoint in find_checkpoints(path):
            config = find_config(checkpoint, args.configs)
            if path.is_file() and len(args.configs) == 1:
                (config,) = args.configs.values()
            if config:
                jobs[checkpoint.resolve()] = checkpoint, config
                not_run[str(checkpoint)] = 'not finished'
            elif path.is_file():
                rows.append(dict(config='', checkpoint=str(path), error=NO_CONFIG))
            elif not args.configs:
                not_run[str(checkpoint)] = NO_CONFIG
    settings = os.environ.items()
    content = dict(
        command=shlex.join(['evaluate.py', *(sys.argv[1:] if argv is None else argv)]),
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU',
        versions=', '.join(f'{name} {version(name)}' for name in PACKAGES),
        environment=', '.join(f'{k}={v}' for k, v in settings if k[:7] == 'CLUSTR_'),
        **dict(rows=rows, not_run=not_run, published=peers),
    )
    text, status = save(args.out, content), 0
    try:
        for number, (checkpoint, config) in enumerate(jobs.values(), 1):
            print(f'[{number}/{len(jobs)}] {config.stem}: testing {checkpoint}')
            row = dict(config=config.stem, checkpoint=str(checkpoint))
            try:
                toolbox, figures = find_figures(checkpoint, config, args)
                models = read_published(toolbox)
                peers.update(list_peers(config.stem, models))
                found = list(compare(config.stem, figures, models))
            except (ValueError, OSError) as error:
                found = [dict(error=str(error))]
            for line in found:
                rows.append({**row, **line})
                print('  ' + ' '.join(str(value) for value in line.values()))
            for name in (str(checkpoint), config.stem):
                not_run.pop(name, None)
            text = save(args.out, content)
    except KeyboardInterrupt:
        print('interrupted')
        status = 130
    print(f'{text}\nwrote {args.out / "evaluation.md"} and evaluation.json')
    failed = not rows or any('error' in row for row in rows)
    return status or int(failed or any(name in not_run for name in args.configs))


if __name__ == '__main__':
    # Slurm and kill end it as Ctrl-C does, with what is finished.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # MMEngine has a word on each variable that a config reads.
    logging.disable(logging.INFO)
    sys.exit(main())
