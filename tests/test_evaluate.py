"""Evaluation: from checkpoints to a table, with a stand-in for mim and with mim."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluate
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).resolve().parents[1]
FPN = 'fpn_clustr-t_4xb4-80k_ade20k-512x512'
FPN_LINEAR = 'fpn_clustr-t-linear_4xb4-80k_ade20k-512x512'
RCNN = 'mask-rcnn_clustr-s_fpn_1x_coco'
WINDOWS = 'mask-rcnn_clustr-s-w224_fpn_1x_coco'
DUAL_VIT = 'mask-rcnn_dualvit-s_fpn_1x_coco'
POSE = 'td-hm_clustr-s_8xb64-210e_coco-wholebody-256x192'
IMAGENET = 'clustr-s_8xb128_in1k'

#: In the place of mim: records its arguments, then does what its folder says.
MIM = """
import json, os, pathlib, sys, time
root = pathlib.Path(__file__).parents[1]
with (root / 'calls').open('a') as calls:
    calls.write(json.dumps(sys.argv[1:]) + '\\n')
outcome = root / f'{pathlib.Path(sys.argv[5]).stem}.txt'
if outcome.exists():
    text = outcome.read_text()
    if text == 'sleep':
        (root / 'pid').write_text(str(os.getpid()))
        time.sleep(100)
    print(text)
    sys.exit(0 if ' - ' in text or 'do not match' in text else 1)
folder = pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1], '20260101_000000')
folder.mkdir()
results = json.loads((root / 'results.json').read_text())
(folder / '20260101_000000.json').write_text(json.dumps(results[sys.argv[2]]))
"""
RESULTS = {
    'mmseg': {'aAcc': 80.0, 'mIoU': 41.25, 'data_time': 0.1, 'time': 0.2},
    'mmdet': {'coco/bbox_mAP': 0.456, 'coco/segm_mAP': 0.412, 'coco/bbox_mAP_s': 0.1},
    'mmpose': {'coco-wholebody/AP': 0.6, 'coco-wholebody/AR': 0.69},
    'mmpretrain': {'accuracy/top1': 82.5, 'accuracy/top5': 96.0},
}


def save(path, weights=None):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=weights or {}), path)
    return path


class Mim:
    """The stand-in, and what it was called with."""

    def __init__(self, folder):
        self.folder = folder
        (folder / 'mim').mkdir(parents=True)
        (folder / 'mim/__init__.py').touch()
        (folder / 'mim/__main__.py').write_text(MIM)
        (folder / 'calls').touch()
        self.give(**RESULTS)

    def give(self, **results):
        (self.folder / 'results.json').write_text(json.dumps(results))

    def fail(self, checkpoint, text):
        (self.folder / f'{checkpoint}.txt').write_text(text)

    @property
    def calls(self):
        return [*map(json.loads, (self.folder / 'calls').read_text().splitlines())]


@pytest.fixture
def mim(monkeypatch, tmp_path):
    stub = Mim(tmp_path / 'stub')
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    monkeypatch.setenv('PYTHONPATH', str(stub.folder))
    return stub


def results(folder='work_dirs/evaluate'):
    content = json.loads(Path(folder, 'evaluation.json').read_text())
    return content, Path(folder, 'evaluation.md').read_text()


def measured(content):
    return {
        (row['config'], row['metric']): (row['measured'], row.get('paper'))
        for row in content['rows']
    }


def test_measured_beside_published(mim, capsys):
    for config in (FPN, FPN_LINEAR, RCNN, DUAL_VIT, POSE, IMAGENET):
        save(f'work_dirs/{config}/epoch_12.pth')
    assert evaluate.main(['work_dirs']) == 0
    content, markdown = results()
    assert measured(content) == {
        (FPN, 'mIoU'): (41.25, 48.0),
        (FPN_LINEAR, 'mIoU'): (41.25, None),  # not the paper's clustering
        (RCNN, 'box AP'): (45.6, None),
        (RCNN, 'mask AP'): (41.2, None),
        (DUAL_VIT, 'box AP'): (45.6, 46.5),
        (DUAL_VIT, 'mask AP'): (41.2, 42.2),
        (POSE, 'Whole AP'): (60.0, 59.4),
        (POSE, 'Whole AR'): (69.0, 69.7),
        (IMAGENET, 'Top 1 Accuracy'): (82.5, 83.2),
    }
    line = next(line for line in markdown.splitlines() if f'| {FPN} ' in line)
    assert [cell.strip() for cell in line.split('|')[3:7]] == [
        *('mIoU', '41.25', '48.00', '-6.75')
    ]
    assert 'which variant' in line
    # Other backbones with these methods, and no word on configs nobody asked for.
    assert '## Semantic FPN: published' in markdown and 'PVTv2-B2' in markdown
    assert 'UPerNet' not in markdown and content['not_run'] == {}
    assert markdown in capsys.readouterr().out


def test_what_was_tested_is_not_tested_again(mim):
    checkpoint = save(f'w/{FPN}/iter_1.pth')
    for options, calls in (
        ([], 1),
        ([], 1),
        (['--cfg-options', 'a.b=[1,2]'], 2),
        (['--launcher', 'pytorch', '--gpus', '2'], 2),
    ):
        assert evaluate.main(['w', *options]) == 0
        assert len(mim.calls) == calls
        assert results()[0]['rows'][0]['measured'] == 41.25
    assert mim.calls[1][-4:] == ['--launcher', 'none', '--cfg-options', 'a.b=[1,2]']
    os.utime(checkpoint, (1, 1))
    assert evaluate.main(['w', '--launcher', 'slurm', '--partition', 'p']) == 0
    assert mim.calls[2][-4:] == ['--launcher', 'slurm', '--partition', 'p']


def test_the_config_of_a_checkpoint(mim, capsys):
    """By its name, its folder's name, beside it, or as the user says."""
    text = "default_scope = 'mmseg'\n"
    save('beside/iter_1.pth')
    Path('beside/mine.py').write_text(text)
    save(f'zoo/{FPN}.pth')
    save(f'zoo/{RCNN}.pth')
    save(f'w/{FPN}/iter_1.pth')
    Path(f'w/{FPN}/{FPN}.py').write_text(text)
    save('stray/epoch_1.pth')
    assert evaluate.main(['.']) == 0
    shipped = {name: str(evaluate.SHIPPED[name]) for name in (FPN, RCNN)}
    expected = {
        'beside/iter_1.pth': f'{Path.cwd()}/beside/mine.py',
        f'zoo/{FPN}.pth': shipped[FPN],
        f'zoo/{RCNN}.pth': shipped[RCNN],
        f'w/{FPN}/iter_1.pth': f'{Path.cwd()}/w/{FPN}/{FPN}.py',
    }
    assert {call[4]: call[2] for call in mim.calls} == expected
    assert list(results()[0]['not_run']) == ['stray/epoch_1.pth']
    # A config of any place, and one other than the folder's.
    for config in ('beside/mine.py', WINDOWS):
        assert evaluate.main([f'zoo/{RCNN}.pth', '--configs', config]) == 0
        assert Path(mim.calls[-1][2]).stem == Path(config).stem
    # A folder is searched for what belongs to the config.
    assert evaluate.main(['zoo', '--configs', FPN, WINDOWS]) == 1
    assert results()[0]['not_run'] == {WINDOWS: 'no checkpoint found'}
    assert evaluate.main(['stray/epoch_1.pth']) == 1
    assert 'name it by --configs' in results()[0]['rows'][0]['error']


def test_one_checkpoint_for_each_training(tmp_path):
    def touch(name, age):
        os.utime(save(tmp_path / name), (1e9 - age, 1e9 - age))

    touch('best/best_AP_epoch_1.pth', 9)
    touch('best/best_AP_epoch_2.pth', 5)
    touch('best/epoch_3.pth', 0)
    touch('last/deep/epoch_1.pth', 0)
    touch('last/deep/epoch_2.pth', 5)
    # A path of the machine that trained.
    (tmp_path / 'last/deep/last_checkpoint').write_text('/elsewhere/epoch_2.pth\n')
    touch('newest/iter_1.pth', 0)
    touch('newest/iter_2.pth', 5)
    (tmp_path / 'newest/latest.pth').symlink_to(tmp_path / 'newest/gone.pth')
    found = evaluate.find_checkpoints(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in found] == [
        'best/best_AP_epoch_2.pth',
        'last/deep/epoch_2.pth',
        'newest/iter_1.pth',
    ]


TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in y\n'
LAUNCHED = "subprocess.CalledProcessError: Command '[...]' returned non-zero exit 1."
EMPTY = '01/01 - mmengine - \x1b[31mERROR\x1b[0m - coco_metric.py - all is empty.\n'
HEADS = 'do not match exactly\nmissing keys in source state_dict: head.a, head.b\n'


LOGS = [
    (f'{TRACE}KeyError: 3|4\n{TRACE}{LAUNCHED}', 'KeyError: 3|4'),
    (f'{TRACE}[rank1]: torch.OutOfMemoryError: a\n', 'torch.OutOfMemoryError: a'),
    (f"{TRACE}FileNotFoundError: 'data/x'\n", "FileNotFoundError: 'data/x'"),
    ('x died with <Signals.SIGKILL: 9>.', 'ended by SIGKILL'),
    ('no such option\n', 'no such option'),
    (EMPTY, 'coco_metric.py - all is empty.'),
    (HEADS, 'does not fit the config: missing keys in source state_dict: head.a'),
]


def test_the_runners_own_reason(mim):
    checkpoints = [str(save(f'{number}.pth')) for number in range(len(LOGS) + 1)]
    Path('junk.pth').write_text('junk')
    for checkpoint, (log, _) in zip(checkpoints, LOGS):
        mim.fail(Path(checkpoint).stem, log)
    options = ['--configs', FPN, '--out', 'out', '--work-dir', 'runs']
    assert evaluate.main([*checkpoints, 'junk.pth', *options]) == 1
    content, markdown = results('out')
    *failed, fine, junk = content['rows']
    assert 'cannot be read as a checkpoint' in junk['error']
    assert fine['measured'] == 41.25
    for row, (_, reason) in zip(failed, LOGS, strict=True):
        assert row['error'].startswith(reason) and 'paper' not in row
        assert Path(row['error'].rpartition('see ')[2]).is_relative_to(f'runs/{FPN}')
        assert reason.replace('|', r'\|') in markdown
    # What failed is tried again.
    (mim.folder / '0.txt').unlink()
    assert evaluate.main([checkpoints[0], *options]) == 0


def test_figures_without_a_number_and_without_a_published_one(mim):
    save(f'w/{RCNN}/epoch_1.pth')
    save(f'w/{FPN}/epoch_1.pth')
    boxes = {'coco/bbox_mAP': -1, 'coco/segm_mAP': float('nan')}
    mim.give(mmdet=boxes, mmseg={'mDice': 51.5, 'time': 3.0})
    assert evaluate.main(['w']) == 1
    undefined = [row['error'] for row in results()[0]['rows'] if 'error' in row]
    assert undefined == [f'{key} is not defined on this data' for key in boxes]
    (row,) = [row for row in results()[0]['rows'] if 'measured' in row]
    assert (row['metric'], row['measured'], row.get('paper')) == ('mDice', 51.5, None)


def test_an_interruption_keeps_what_is_finished(mim):
    save(f'w/{FPN}/iter_1.pth')
    save(f'w/{RCNN}/epoch_1.pth')
    mim.fail('epoch_1', 'sleep')
    tool = [sys.executable, ROOT / 'tools/evaluate.py', 'w']
    process = subprocess.Popen(tool, stdout=subprocess.PIPE, text=True)
    while not (mim.folder / 'pid').exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 130 and 'interrupted' in output
    content, _ = results()
    assert measured(content) == {(FPN, 'mIoU'): (41.25, 48.0)}
    assert content['not_run'] == {f'w/{RCNN}/epoch_1.pth': 'not finished'}
    with pytest.raises(ProcessLookupError):
        os.kill(int((mim.folder / 'pid').read_text()), 0)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['gone.pth'], "there is no checkpoint or folder 'gone.pth'"),
        (['.', '--configs', 'nothing'], "no config 'nothing'"),
        (['.', '--launcher', 'mpi'], 'invalid choice'),
        (['.', '--out', 'file'], 'file'),
        ([], 'CHECKPOINT_OR_FOLDER'),
    ],
)
def test_wrong_usage(mim, capsys, arguments, message):
    Path('file').touch()
    with pytest.raises(SystemExit) as exit:
        evaluate.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not mim.calls


def test_nothing_to_do_is_no_success(mim):
    assert evaluate.main(['.']) == 1
    assert 'Nothing was evaluated.' in results()[1]


@pytest.mark.parametrize('backbone', ['', 'clustr-s', 'clustr-s-linear'])
@pytest.mark.parametrize('script', ['train_multi_gpu', 'train_slurm', 'test_all'])
def test_scripts(tmp_path, script, backbone):
    for program in ('mim', 'python'):
        (tmp_path / program).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/record\n')
        (tmp_path / program).chmod(0o755)
    path = f'{tmp_path}:{os.environ["PATH"]}'
    command = [ROOT / f'tools/benchmarks/{script}.sh', 'mmpose', 'w', '8', '8', '--amp']
    environment = {**os.environ, 'PATH': path, 'BACKBONE': backbone}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    configs = sorted((ROOT / 'configs/mmpose').glob(f'*{backbone}_*.py'))
    lines = (tmp_path / 'record').read_text()
    assert sorted(w for w in lines.split() if w.endswith('256x192.py')) == [
        str(config) for config in configs if config.stem.endswith('256x192')
    ]
    assert lines.splitlines()[0].endswith('--amp')
    usage = subprocess.run(command[:2], capture_output=True, text=True, check=False)
    assert usage.returncode == 2 and usage.stderr.startswith('usage: ')


def test_with_the_real_runner(tmp_path, monkeypatch):
    from make_toy_data import make_toy_data

    root, _ = make_toy_data('ade20k', tmp_path / 'toy', 1, 2, 64, 0)
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path)
    config = Config.fromfile(evaluate.SHIPPED[FPN])
    init_default_scope(config.default_scope)
    classes = importlib.import_module('mmseg.datasets').ADE20KDataset.METAINFO
    state = MODELS.build(config.model).state_dict()
    checkpoint = Path('work_dirs') / FPN / 'iter_80000.pth'
    checkpoint.parent.mkdir(parents=True)
    meta = dict(dataset_meta=dict(classes))
    torch.save(dict(state_dict=state, meta=meta), checkpoint)
    # Small images: what is to be seen is that the figure arrives.
    options = [
        *('--cfg-options', 'test_dataloader.num_workers=0'),
        'test_dataloader.persistent_workers=False',
        'test_dataloader.dataset.pipeline.1.scale=(64,64)',
    ]
    assert evaluate.main(['work_dirs', *options]) == 1
    assert 'data/ade/ADEChallengeData2016' in results()[0]['rows'][0]['error']
    (tmp_path / 'data/ade').symlink_to(root.parent)
    assert evaluate.main(['work_dirs', *options]) == 0
    (row,) = results()[0]['rows']
    (file,) = Path('work_dirs/evaluate', FPN).glob('*/*/*.json')
    # With numpy 2 the metric's file has the digits of a float32.
    assert row['measured'] == round(json.loads(file.read_text())['mIoU'], 2) < 48
    assert row['difference'] == round(row['measured'] - 48, 2)
