"""Evaluation: from checkpoints to a table, with and without the real runner."""

import contextlib
import copy
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from clustr_mm.evaluation import TASKS, Job, Report, Row, find_configs, find_task
from clustr_mm.evaluation import plan as plan_module
from clustr_mm.evaluation import runs as runs_module
from clustr_mm.evaluation.checkpoints import (
    check_fit,
    find,
    load,
    match_meta,
    match_path,
)
from clustr_mm.evaluation.datasets import missing_data
from clustr_mm.evaluation.runs import evaluate, last_error, run_mim
from clustr_mm.toy_data import make_toy_data

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = find_configs(ROOT / 'configs')
CONFIG = {config.stem: config for config in BENCHMARKS}
FPN = 'fpn_clustr-t_4xb4-80k_ade20k-512x512'
FPN_S = 'fpn_clustr-s_4xb4-80k_ade20k-512x512'
RCNN = 'mask-rcnn_clustr-s_fpn_1x_coco'
WINDOWS = 'mask-rcnn_clustr-s-w224_fpn_1x_coco'
LINEAR = 'fpn_clustr-s-linear_4xb4-80k_ade20k-512x512'
POSE = 'td-hm_clustr-s_8xb64-210e_coco-wholebody-256x192'
IMAGENET = 'clustr-s_8xb128_in1k'
RESULTS = {
    'mmseg': {'aAcc': 80.0, 'mIoU': 41.25, 'mAcc': 50.0},
    'mmdet': {'coco/bbox_mAP': 0.456, 'coco/segm_mAP': 0.412, 'coco/bbox_mAP_s': 0.1},
    'mmpose': {'coco-wholebody/AP': 0.6, 'coco-wholebody/AR': 0.69},
    'mmpretrain': {'accuracy/top1': 82.5, 'accuracy/top5': 96.0},
}


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location(
        'evaluate', ROOT / 'tools/evaluate.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(path, weights=None, **meta):
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {'w': torch.zeros(1)} if weights is None else weights
    torch.save(dict(state_dict=weights, meta=meta), path)
    return path


@functools.cache
def read(name):
    return Config.fromfile(CONFIG[name])


def read_copy(name):
    """MMEngine takes most of a second to read a config."""
    return copy.deepcopy(read(name))


def make_data(root):
    """Something in the place of every data set."""
    files = [
        *('coco/val2017/1.jpg', 'coco/annotations/instances_val2017.json'),
        'coco/annotations/coco_wholebody_val_v1.0.json',
        'coco/person_detection_results/COCO_val2017_detections_AP_H_56_person.json',
        'ade/ADEChallengeData2016/images/validation/1.jpg',
        'ade/ADEChallengeData2016/annotations/validation/1.png',
        'imagenet/val/n01440764/1.JPEG',
    ]
    for file in files:
        (root / 'data' / file).parent.mkdir(parents=True, exist_ok=True)
        (root / 'data' / file).write_text('x')


class Mim:
    """Stands for ``mim test``: records its calls and writes metrics or fails."""

    def __init__(self):
        self.calls = []
        self.fail = {}

    def __call__(self, arguments, log):
        self.calls.append(list(arguments))
        toolbox, config = arguments[1], Path(arguments[2]).stem
        log.parent.mkdir(parents=True, exist_ok=True)
        outcome = self.fail.get(config, 0)
        if isinstance(outcome, BaseException):
            raise outcome
        log.write_text(outcome or 'fine')
        if outcome:
            return 1
        time.sleep(0.01)  # the files of two runs must differ in time
        folder = Path(arguments[arguments.index('--work-dir') + 1]) / '20260101_000000'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / '20260101_000000.json').write_text(json.dumps(RESULTS[toolbox]))
        return 0


@pytest.fixture
def mim(monkeypatch, tmp_path):
    """A working directory with data, and neither models nor runs."""
    stub = Mim()
    monkeypatch.setattr(runs_module, 'run_mim', stub)
    monkeypatch.setattr(plan_module, 'check_fit', lambda config, weights: None)
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path)
    return stub


def results(folder='work_dirs/evaluate'):
    content = json.loads(Path(folder, 'evaluation.json').read_text())
    return content, Path(folder, 'evaluation.md').read_text()


# Published figures


def test_every_benchmark_has_a_task_and_only_known_paper_figures():
    paper = {}
    for name, config in CONFIG.items():
        key = f'{config.parent.name}/{name}'
        task = find_task(key)
        assert task in TASKS, name
        for metric in task.metrics:
            if metric.paper and Path(key).match(metric.paper_configs):
                paper.setdefault(name, []).append(metric.paper)
    expected = {IMAGENET: [83.2]}
    for name in CONFIG:
        if '-linear' in name:  # not the paper's attention
            continue
        if name.startswith('fpn_clustr'):
            expected[name] = [48.0]
        elif name.startswith('upernet_clustr'):
            expected[name] = [49.6]
        elif name.startswith('td-hm'):
            expected[name] = [59.4, 69.7]
    assert paper == expected


@pytest.mark.parametrize('task', TASKS, ids=lambda task: task.title)
def test_published_figures_are_in_percent_and_complete(task):
    for peer in task.peers:
        assert len(peer.figures) == len(task.metrics)
        assert all(30 < figure < 90 for figure in peer.figures)
    known = any(metric.paper for metric in task.metrics)
    assert not known or 'the source' in task.remark


def test_an_unknown_config_is_held_against_nothing():
    task = find_task('mmseg/fpn_clustr-t_toy-ade20k')
    assert not task.peers and all(metric.paper is None for metric in task.metrics)
    assert 'mIoU' in [metric.key for metric in task.metrics]


# Which config a checkpoint belongs to


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        (f'work_dirs/{RCNN}/epoch_12.pth', RCNN),
        (f'work_dirs/{WINDOWS}/epoch_12.pth', WINDOWS),
        (f'work_dirs/{LINEAR}/iter_80000.pth', LINEAR),
        (f'work_dirs/{POSE}/best_coco-wholebody_AP_epoch_210.pth', POSE),
        (f'work_dirs/{IMAGENET}_run2/epoch_300.pth', IMAGENET),
        (f'work_dirs/{IMAGENET}/run/epoch_300.pth', IMAGENET),
        (f'{IMAGENET}-20260101-abcdef.pth', IMAGENET),
        (f'{RCNN}/{FPN}.pth', FPN),
        (f'{IMAGENET}2/epoch_1.pth', None),
        ('work_dirs/demo/epoch_1.pth', None),
        ('mask-rcnn_clustr-s/epoch_1.pth', None),
    ],
)
def test_names(path, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert match_path(Path(path), BENCHMARKS) == CONFIG.get(name)


def test_the_longest_name_wins():
    configs = [Path('a/x.py'), Path('a/x_y.py'), Path('a/x_z.py')]
    assert match_path(Path('w/x_y-2/1.pth'), configs) == Path('a/x_y.py')


def test_the_folder_is_found_from_inside(tmp_path, monkeypatch):
    folder = tmp_path / RCNN
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert match_path(Path('epoch_12.pth'), BENCHMARKS) == CONFIG[RCNN]


def test_stored_names_and_texts():
    assert (
        match_meta({'experiment_name': f'{FPN}_20260101_1'}, BENCHMARKS)
        == (CONFIG[FPN])
    )
    names = (FPN, FPN_S, LINEAR, WINDOWS, RCNN)
    candidates = [CONFIG[name] for name in names]
    for name in names:
        config = read_copy(name)
        # What a training may change and what it stores of its own.
        config.model.backbone.update(with_cp=True, drop_path_rate=0.2)
        config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='a.pth')
        config.work_dir = 'work_dirs/mine'
        meta = {'experiment_name': '20260101_1', 'cfg': config.pretty_text}
        assert match_meta(meta, candidates) == CONFIG[name]
        assert match_meta(meta, [*candidates, CONFIG[name]]) is None
    config.model.rpn_head.in_channels = 128
    assert match_meta({'cfg': config.pretty_text}, candidates) is None


@pytest.mark.parametrize(
    'text',
    [
        None,
        3,
        'model = (',
        'model = ' + '[' * 5000,
        'model = open("ran", "w")',
        'model = dict(a=open("ran", "w"))',
        'default_scope = "mmdet"; model = dict(type=open("ran", "w"))',
        'import os; os.mkdir("ran")',
        '',
    ],
)
def test_stored_text_is_never_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert match_meta({'cfg': text}, BENCHMARKS[:1]) is None
    assert not Path('ran').exists()


# Which checkpoints are taken


def test_one_checkpoint_for_each_training(tmp_path):
    def touch(name, age):
        file = save(tmp_path / name)
        os.utime(file, (1e9 - age, 1e9 - age))

    touch('best/best_AP_epoch_1.pth', 9)
    touch('best/best_AP_epoch_2.pth', 5)
    touch('best/epoch_3.pth', 0)
    touch('last/deep/epoch_1.pth', 0)
    touch('last/deep/epoch_2.pth', 5)
    # A path of the machine that trained.
    (tmp_path / 'last/deep/last_checkpoint').write_text('/elsewhere/epoch_2.pth\n')
    touch('newest/iter_1.pth', 0)
    touch('newest/iter_2.pth', 5)
    (tmp_path / 'newest/last_checkpoint').write_text('/elsewhere/gone.pth')
    touch(f'zoo/{FPN}.pth', 0)
    touch(f'zoo/{FPN}_2.pth', 0)
    touch(f'zoo/{RCNN}.pth', 0)
    (tmp_path / 'empty').mkdir()
    # What a training links and then deletes, and a damaged record.
    (tmp_path / 'newest/latest.pth').symlink_to(tmp_path / 'newest/gone.pth')
    (tmp_path / 'alone').mkdir()
    (tmp_path / 'alone/latest.pth').symlink_to(tmp_path / 'alone/gone.pth')
    touch('record/epoch_1.pth', 0)
    (tmp_path / 'record/last_checkpoint').write_bytes(b'\xff\xfe')
    assert [str(file.relative_to(tmp_path)) for file in find(tmp_path, BENCHMARKS)] == [
        'best/best_AP_epoch_2.pth',
        'last/deep/epoch_2.pth',
        'newest/iter_1.pth',
        'record/epoch_1.pth',
        *(f'zoo/{FPN}.pth', f'zoo/{FPN}_2.pth', f'zoo/{RCNN}.pth'),
    ]


# Loading and fit


class Harmful:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def test_loading(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta, weights = load(save(Path('a.pth'), {'module.a.b': torch.ones(2)}, epoch=3))
    assert meta == {'epoch': 3} and list(weights) == ['a.b']
    torch.save({'x': torch.ones(1)}, 'bare.pth')
    assert list(load(Path('bare.pth'))[1]) == ['x']

    torch.save({'state_dict': {}, 'x': Harmful()}, 'harmful.pth')
    Path('cut.pth').write_bytes(Path('a.pth').read_bytes()[:500])
    Path('junk.pth').write_bytes(b'junk')
    Path('empty.pth').write_bytes(b'')
    torch.save([1, 2], 'list.pth')
    torch.save({'state_dict': 3}, 'number.pth')
    for name in ('harmful', 'cut', 'junk', 'empty', 'list', 'number'):
        with pytest.raises(
            ValueError,
            match='^(cannot be read as|is empty|holds no state)',
        ) as e:
            load(Path(f'{name}.pth'))
        assert '\n' not in str(e.value)
    assert not Path('ran').exists()


def test_fit():
    def model(name):
        config = read_copy(name)
        init_default_scope(config.default_scope)
        with torch.device('meta'):
            return config, MODELS.build(config.model).state_dict()

    config, weights = model(FPN)
    check_fit(config, weights)
    check_fit(config, {k: v for k, v in weights.items() if 'num_batches' not in k})
    with pytest.raises(ValueError, match=r'\d+ of \d+ parameters match'):
        check_fit(model(FPN_S)[0], weights)
    # The runner would test with random heads.
    backbone = {k: v for k, v in weights.items() if k.startswith('backbone.')}
    with pytest.raises(ValueError, match='missing: neck.*, and .* more$'):
        check_fit(config, backbone)
    config.model.decode_head.num_classes = 3
    with pytest.raises(ValueError, match='size mismatch for decode_head.conv_seg'):
        check_fit(config, weights)
    config.model.decode_head.type = 'NoSuchHead'
    with pytest.raises(ValueError, match='NoSuchHead'):
        check_fit(config, weights)


# Data


def test_data_of_every_toolbox(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = {
        'mmdet': ['instances_val2017.json', 'val2017/', 'cocodataset.org'],
        'mmseg': ['images/validation', 'annotations/validation', 'csail.mit.edu'],
        'mmpose': ['coco_wholebody_val_v1.0', 'AP_H_56', 'jin-s13', 'cocodataset.org'],
        'mmpretrain': ['data/imagenet/val', 'image-net.org'],
    }
    names = (FPN, RCNN, POSE, IMAGENET)
    loaded = {CONFIG[name]: read(name) for name in names}
    for config in loaded:
        message = missing_data(loaded[config])
        assert '\n' not in message
        for word in sources[config.parent.name]:
            assert word in message, message
    make_data(tmp_path)
    assert [missing_data(config) for config in loaded.values()] == [None] * len(loaded)
    shutil.rmtree('data/coco/val2017')
    Path('data/coco/val2017').mkdir()
    message = missing_data(loaded[CONFIG[RCNN]])
    assert message.startswith('data missing: data/coco/val2017/ (COCO')
    assert missing_data(loaded[CONFIG[FPN]]) is None


def test_wrapped_data_sets():
    inner = dict(type='A', data_root='s3://there', ann_file='a')
    config = Config(
        dict(
            test_dataloader=dict(
                dataset=dict(
                    type='Concat',
                    datasets=[
                        inner,
                        dict(type='R', dataset=dict(ann_file='gone.json')),
                    ],
                )
            ),
            test_evaluator=[dict(type='M'), dict(type='N', ann_file='lost.json')],
        )
    )
    message = missing_data(config)
    assert 'gone.json' in message and 'lost.json' in message and 's3' not in message


# Runs


def job(folder, name=FPN):
    return Job(CONFIG[name], Path('a.pth'), folder)


def test_figures_in_percent(mim, tmp_path):
    def figures(name):
        rows = evaluate(job(tmp_path / 'w', name))
        return [(r.metric, r.measured, r.paper, r.difference) for r in rows]

    assert figures(FPN) == [('mIoU', 41.25, 48.0, -6.75)]
    assert figures(RCNN) == [
        ('box AP', 45.6, None, None),
        ('mask AP', 41.2, None, None),
    ]
    assert figures(POSE) == [('whole AP', 60, 59.4, 0.6), ('whole AR', 69, 69.7, -0.7)]
    assert figures(IMAGENET) == [('top-1', 82.5, 83.2, -0.7)]
    assert figures('clustr-b_8xb128_in1k') == [('top-1', 82.5, None, None)]
    assert figures(LINEAR) == [('mIoU', 41.25, None, None)]
    # A remark on a figure that is not shown would be taken for one on the other.
    (row,) = evaluate(job(tmp_path / 'w', LINEAR))
    assert row.remark == 'the paper figure is not of this config'


def test_only_figures_of_this_run_count(mim, tmp_path, monkeypatch):
    assert evaluate(job(tmp_path / 'w'))[0].measured == 41.25
    monkeypatch.setattr(runs_module, 'run_mim', lambda arguments, log: 0)
    (row,) = evaluate(job(tmp_path / 'w'))
    assert (row.measured, row.error) == (None, 'mim test wrote no metrics')


@pytest.mark.parametrize('value', [-1, float('nan'), float('inf')])
def test_undefined_figures_are_not_numbers(mim, tmp_path, monkeypatch, value):
    monkeypatch.setitem(
        RESULTS, 'mmdet', {'coco/bbox_mAP': value, 'coco/segm_mAP': 0.4}
    )
    box, mask = evaluate(job(tmp_path / 'w', RCNN))
    assert (box.measured, mask.measured) == (None, 40)
    assert box.error == 'coco/bbox_mAP is not defined on this data'


def test_other_metrics_are_an_error(mim, tmp_path, monkeypatch):
    monkeypatch.setitem(RESULTS, 'mmseg', {'aAcc': 3.0})
    (row,) = evaluate(job(tmp_path / 'w'))
    assert row.measured is None and row.error.endswith('has none of mIoU')


TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in y\n'
LAUNCHED = "subprocess.CalledProcessError: Command '[...]' returned non-zero exit 1.\n"


@pytest.mark.parametrize(
    ('log', 'status', 'error'),
    [
        (f'{TRACE}KeyError: 3\n{TRACE}{LAUNCHED}', 1, 'KeyError: 3'),
        (f'{TRACE}[rank1]: RuntimeError: a\n{LAUNCHED}', 1, 'RuntimeError: a'),
        (f'{TRACE}torch.OutOfMemoryError: a\nE0 x\n', 1, 'torch.OutOfMemoryError: a'),
        (f'{TRACE}AssertionError\n{LAUNCHED}', 1, 'AssertionError'),
        ('KeyError: 3\nx died with <Signals.SIGKILL: 9>.', 1, 'ended by SIGKILL'),
        ('step 1\n', -signal.SIGTERM, 'ended by SIGTERM'),
        ('no such option\n\n', 2, 'no such option'),
        ('', 3, 'ended with status 3 and no message'),
    ],
)  # fmt: skip
def test_last_error(tmp_path, log, status, error):
    (tmp_path / 'log').write_text(log)
    assert last_error(tmp_path / 'log', status).startswith(error)


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_run_keeps_the_output(tmp_path, monkeypatch):
    stub = executable(
        tmp_path / 'python', '#!/bin/sh\necho "$@"\ncat\necho e >&2\nexit 3'
    )
    monkeypatch.setattr(sys, 'executable', str(stub))
    assert run_mim(['test', 'a b'], tmp_path / 'w/log') == 3
    assert (tmp_path / 'w/log').read_text() == '-m mim test a b\ne\n'


def test_interrupted_run_leaves_no_process(tmp_path, monkeypatch):
    pid = tmp_path / 'pid'
    stub = executable(
        tmp_path / 'python', f'#!/bin/sh\nsleep 60 &\necho $! > {pid}.new\n'
        f'mv {pid}.new {pid}\nwait\n',
    )  # fmt: skip
    monkeypatch.setattr(sys, 'executable', str(stub))

    def ring(*_):
        if not pid.exists():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            run_mim([], tmp_path / 'log')
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    process = Path('/proc', pid.read_text().strip(), 'stat')
    for _ in range(50):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if process.read_text().rsplit(')', 1)[1].split()[0] != 'Z':
                time.sleep(0.1)
                continue
        return
    raise AssertionError('the child is still there')


# The tool


def test_table_and_status(tool, mim, capsys):
    save(Path('work_dirs') / FPN / 'iter_80000.pth')
    save(Path('work_dirs') / RCNN / 'epoch_12.pth')
    save(Path('work_dirs/demo/untrained.pth'))
    assert tool.main(['work_dirs']) == 0
    assert mim.calls == [
        [
            *('test', config.parent.name, str(config)),
            *('--checkpoint', f'work_dirs/{config.stem}/{checkpoint}.pth'),
            *('--work-dir', f'work_dirs/evaluate/{config.stem}/{checkpoint}'),
            *('--launcher', 'none'),
        ]
        for config, checkpoint in (
            (CONFIG[FPN], 'iter_80000'),
            (CONFIG[RCNN], 'epoch_12'),
        )
    ]
    content, markdown = results()
    assert [row['measured'] for row in content['rows']] == [41.25, 45.6, 41.2]
    assert set(content['not_run']) == set(CONFIG) - {FPN, RCNN}
    assert set(content['not_run'].values()) == {'no checkpoint found'}
    assert content['checkpoints_of_no_config'] == ['work_dirs/demo/untrained.pth']
    (remark,) = {r['remark'] for r in content['rows'] if r['config'] == FPN}
    assert 'which variant' in remark
    assert (
        f'| {FPN} | work_dirs/{FPN}/iter_80000.pth | mIoU | 41.25 | 48.0 | -6.75 | '
        f'{remark} |'
    ) in markdown
    assert f'| {RCNN} | work_dirs/{RCNN}/epoch_12.pth | box AP | 45.60 | – | – |' in (
        markdown
    )
    # Peers of these tasks, and of no other.
    assert '| Swin-T | 42.7 | 39.3 |' in markdown and '| PVTv2-B2 | 45.2 |' in markdown
    assert 'TCFormer' not in markdown
    output = capsys.readouterr().out
    assert f'[1/2] {FPN}: testing' in output
    assert f'[2/2] {RCNN}: box AP 45.60, mask AP 41.20, took 0 s' in output
    assert markdown in output


def test_failures_are_rows(tool, mim, capsys):
    save(Path('w') / FPN / 'iter_1.pth')
    save(Path('w') / FPN_S / 'iter_1.pth')
    broken = Path('w') / RCNN / 'epoch_12.pth'
    broken.parent.mkdir()
    broken.write_bytes(b'junk')
    mim.fail[FPN] = f'{TRACE}ValueError: a|b\n{LAUNCHED}'
    assert tool.main(['w', '--out', 'out', '--work-dir', 'runs']) == 1
    content, markdown = results('out')
    errors = {row['config']: row['error'] for row in content['rows']}
    assert errors[FPN] == 'ValueError: a|b' and errors[FPN_S] is None
    assert errors[RCNN].startswith('cannot be read as a checkpoint: ')
    assert f'failed: ValueError: a\\|b; log: runs/{FPN}/iter_1/test.log |' in markdown
    assert Path('runs', FPN, 'iter_1/test.log').read_text().startswith('Traceback')
    assert content['not_run'][FPN] == content['not_run'][RCNN] == 'failed, see above'
    assert FPN_S not in content['not_run']
    # A published figure stands nowhere near a figure that was not measured.
    assert all(row['paper'] is None for row in content['rows'] if row['error'])


def test_missing_data_is_found_before_anything_runs(tool, mim, capsys):
    save(Path('w') / FPN / 'iter_1.pth')
    save(Path('w') / RCNN / 'epoch_1.pth')
    shutil.rmtree('data/ade')
    assert tool.main(['w']) == 1
    content, _ = results()
    assert [row['config'] for row in content['rows']] == [RCNN, RCNN]
    assert content['not_run'][FPN].startswith('data missing: data/ade/')
    output = capsys.readouterr().out
    assert output.index(f'{FPN}: data missing: ') < output.index('[1/1]')


def test_overrides_reach_the_check_and_the_run(tool, mim):
    save(Path(f'{FPN}.pth'))
    Path('data/ade').rename('data/mine')
    root = 'test_dataloader.dataset.data_root=data/mine/ADEChallengeData2016'
    options = ['--launcher', 'slurm', '--gpus', '8', '--gpus-per-node', '4']
    options += ['--partition', 'p', '--cfg-options', root, 'a.b=[1,2]']
    assert tool.main([f'{FPN}.pth', *options]) == 0
    assert mim.calls[0][7:] == options


def test_a_named_config_is_used_for_files(tool, mim):
    """Weights of the one, tested as the other."""
    save(Path(RCNN) / 'epoch_12.pth')
    assert tool.main([f'{RCNN}/epoch_12.pth', '--configs', WINDOWS]) == 0
    assert mim.calls[0][2] == str(CONFIG[WINDOWS])
    # A folder is searched for what belongs to the config.
    mim.calls.clear()
    assert tool.main([RCNN, '--configs', WINDOWS]) == 1
    content, _ = results()
    assert not mim.calls and content['rows'] == []
    assert content['not_run'] == {WINDOWS: 'no checkpoint found'}
    # Some of what was asked for has no figure.
    assert tool.main([RCNN, '--configs', WINDOWS, str(CONFIG[RCNN])]) == 1
    assert results()[0]['not_run'] == {WINDOWS: 'no checkpoint found'}
    assert len(mim.calls) == 1


def test_a_file_of_no_config(tool, mim):
    save(Path('mine.pth'))
    configs = ['--configs', FPN, FPN_S]
    assert tool.main(['mine.pth', *configs]) == 1
    content, _ = results()
    (row,) = content['rows']
    assert row['error'].startswith('belongs to no config')
    save(Path('mine.pth'), cfg=read(FPN).pretty_text)
    assert tool.main(['mine.pth', *configs]) == 1
    assert results()[0]['not_run'] == {FPN_S: 'no checkpoint found'}
    assert mim.calls[0][2] == str(CONFIG[FPN])


def test_same_checkpoint_once_and_same_names_apart(tool, mim):
    for run in 'ab':
        save(Path('w') / run / FPN / 'iter_1.pth')
    assert tool.main(['w', f'w/a/{FPN}/iter_1.pth']) == 0
    folders = [call[call.index('--work-dir') + 1] for call in mim.calls]
    assert folders == [
        f'work_dirs/evaluate/{FPN}/iter_1',
        f'work_dirs/evaluate/{FPN}/iter_1-2',
    ]


def test_interrupt_keeps_what_is_finished(tool, mim):
    save(Path('w') / FPN / 'iter_1.pth')
    save(Path('w') / RCNN / 'epoch_1.pth')
    mim.fail[RCNN] = KeyboardInterrupt()
    assert tool.main(['w']) == 130
    content, markdown = results()
    assert [row['measured'] for row in content['rows']] == [41.25]
    assert content['not_run'][RCNN] == 'not finished'
    assert content['not_run'][FPN_S] == 'no checkpoint found'


def test_an_end_without_notice_keeps_what_is_finished(tool, mim):
    save(Path('w') / FPN / 'iter_1.pth')
    save(Path('w') / RCNN / 'epoch_1.pth')
    mim.fail[RCNN] = SystemExit()
    with pytest.raises(SystemExit):
        tool.main(['w'])
    content, _ = results()
    assert [row['measured'] for row in content['rows']] == [41.25]
    assert content['not_run'][RCNN] == 'not finished'


def test_interrupt_while_checking(tool, mim, monkeypatch):
    save(Path('w') / FPN / 'iter_1.pth')

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_module, 'load', interrupt)
    assert tool.main(['w']) == 130
    assert set(results()[0]['not_run'].values()) == {'not finished'}


def test_nothing_to_do_is_no_success(tool, mim):
    Path('w').mkdir()
    assert tool.main(['w']) == 1
    assert 'Nothing was evaluated.' in results()[1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['gone.pth'], "there is no checkpoint or folder 'gone.pth'"),
        (['.', '--configs', 'nothing'], "got 'nothing'"),
        (
            ['.', '--configs', 'stray.py'],
            'folder named mmdet, mmpose, mmpretrain, mmseg',
        ),
        (['.', '--gpus', '0'], '--gpus must be at least 1, got 0'),
        (['.', '--launcher', 'pytorch'], '--launcher pytorch needs --gpus'),
        (['.', '--launcher', 'slurm', '--gpus', '8'], 'needs --gpus-per-node'),
        (['.', '--launcher', 'mpi'], 'invalid choice'),
        (['.', '--cfg-options', 'a'], "--cfg-options must be like key=value, got 'a'"),
        (['.', '--cfg-options', 'a=[1,2'], 'Imbalanced brackets exist in [1,2'),
        (['.', '--out', 'stray.py'], 'stray.py'),
        ([], 'CHECKPOINT_OR_FOLDER'),
    ],
)
def test_wrong_usage_takes_one_line(tool, mim, capsys, arguments, message):
    Path('stray.py').write_text('')
    with pytest.raises(SystemExit) as exit:
        tool.main(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_files_are_written_whole(tmp_path, monkeypatch):
    report = Report('first', BENCHMARKS)
    report.save(tmp_path)
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(before) == {'evaluation.md', 'evaluation.json'}
    report.rows.append(Row(FPN, 'Semantic FPN, ADE20K', 'a.pth', 'mIoU', 40.0))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'fsync', interrupt)
    with pytest.raises(KeyboardInterrupt):
        report.save(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


# The scripts

SCRIPTS = sorted((ROOT / 'tools/benchmarks').glob('*.sh'))


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda script: script.name)
def test_scripts_say_how_to_use_them(script):
    assert len(script.read_text().splitlines()) <= 15
    subprocess.run(['bash', '-n', script], check=True)
    done = subprocess.run(
        [script, 'mmseg'], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith('usage: ') and done.stderr.count('\n') == 1


def run_script(tmp_path, name, *arguments, fail='nothing', **environment):
    record = tmp_path / 'record'
    stub = (
        f'#!/bin/sh\necho "$0" "$@" >> {record}\ncase "$*" in *{fail}*) exit 3;; esac\n'
    )
    for program in ('mim', 'python'):
        executable(tmp_path / program, stub)
    done = subprocess.run(
        [ROOT / 'tools/benchmarks' / name, *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', **environment},
    )  # fmt: skip
    lines = record.read_text().splitlines() if record.exists() else []
    return done, [line.removeprefix(f'{tmp_path}/') for line in lines]


def of_toolbox(toolbox):
    return [config for config in BENCHMARKS if config.parent.name == toolbox]


def test_train_multi_gpu(tmp_path):
    done, lines = run_script(tmp_path, 'train_multi_gpu.sh', 'mmseg', '8', '--amp')
    assert done.returncode == 0
    assert lines == [
        f'mim train mmseg {config} --launcher pytorch --gpus 8 --amp'
        for config in of_toolbox('mmseg')
    ]


@pytest.mark.parametrize('name', ['clustr-s', 'clustr-s-linear'])
def test_train_one_variant(tmp_path, name):
    """Without a suffix it means every clustering: one checkpoint starts them all."""
    _, lines = run_script(tmp_path, 'train_multi_gpu.sh', 'mmpose', '8', BACKBONE=name)
    configs = [config for config in of_toolbox('mmpose') if name in config.stem]
    assert [line.split()[3] for line in lines] == list(map(str, configs)) != []


def test_train_slurm(tmp_path):
    arguments = ('mmpretrain', 'p', '16', '8', '--resume')
    done, lines = run_script(tmp_path, 'train_slurm.sh', *arguments, fail='clustr-t')
    assert done.returncode == 1
    assert sorted(lines) == [
        f'mim train mmpretrain {config} --launcher slurm --partition p --gpus 16 '
        '--gpus-per-node 8 --resume'
        for config in of_toolbox('mmpretrain')
    ]
    assert {log.stem for log in (tmp_path / 'work_dirs').glob('*.log')} == {
        config.stem for config in of_toolbox('mmpretrain')
    }


def test_test_all(tmp_path):
    done, lines = run_script(
        tmp_path, 'test_all.sh', 'mmdet', 'work_dirs', '--gpus', '2'
    )
    assert done.returncode == 0
    configs = ' '.join(map(str, of_toolbox('mmdet')))
    assert lines == [
        f'python {ROOT}/tools/evaluate.py work_dirs --configs {configs} --gpus 2'
    ]


@pytest.mark.parametrize(
    'name', ['train_multi_gpu.sh', 'train_slurm.sh', 'test_all.sh']
)
def test_scripts_stop_at_a_toolbox_that_is_not_there(tmp_path, name):
    done, lines = run_script(tmp_path, name, 'mmnothing', '8', '8', '8')
    assert done.returncode != 0 and lines == []


# With the real runner


def test_end_to_end(tool, tmp_path, monkeypatch):
    root, _ = make_toy_data('ade20k', tmp_path / 'toy', 1, 2, 64, 0)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/ade').symlink_to(root.parent)
    monkeypatch.chdir(tmp_path)
    config = read_copy(FPN)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    classes = importlib.import_module('mmseg.datasets').ADE20KDataset.METAINFO
    save(
        Path('work_dirs') / FPN / 'iter_80000.pth',
        model.state_dict(),
        dataset_meta=dict(classes),
        cfg=config.pretty_text,
    )
    workers = 'test_dataloader.num_workers=0'
    persistent = 'test_dataloader.persistent_workers=False'
    # Small images: what is to be seen is that the figure arrives.
    scale = 'test_dataloader.dataset.pipeline.1.scale=(64,64)'
    options = ['--cfg-options', workers, persistent, scale]
    assert tool.main(['work_dirs', '--configs', FPN, *options]) == 0
    content, markdown = results()
    (row,) = content['rows']
    (file,) = Path('work_dirs/evaluate', FPN, 'iter_80000').glob('*/*.json')
    measured = json.loads(file.read_text())['mIoU']
    # With numpy 2 the metric's file has the digits of a float32.
    assert row['measured'] == round(measured, 2) and 0 <= measured < 48
    assert row['difference'] == round(measured - 48, 2)
    assert content['not_run'] == {}
    assert f'| {measured:.2f} | 48.0 | {measured - 48:+.2f} |' in markdown
