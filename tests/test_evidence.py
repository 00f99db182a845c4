"""The cue task, its configs, and the driver that runs lists of them."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import evidence
import mmseg.apis
import numpy as np
import pytest
import torch
from get_flops import count_flops
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from clustr_mm.evidence import ClassIoUMetric, CueTask, RandomGroups
from clustr_mm.evidence.cue_task import COLOURS, NOISE
from clustr_mm.ops import SortedTokens

ROOT = Path(__file__).resolve().parents[1]
LISTS = evidence.make_lists()
TINY = [
    *('train_cfg.max_iters=2', 'train_cfg.val_interval=1'),
    *(f'{part}_dataloader.dataset.num_pictures=2' for part in ('val', 'test')),
    'train_dataloader.batch_size=2',
    *('default_hooks.checkpoint.interval=1', 'default_hooks.logger.interval=1'),
]


def find_cue(image, size):
    """Row and column of the only square with a rim of pure white."""
    rim = max(1, size // 7)
    frame = np.ones((size, size), bool)
    frame[rim:-rim, rim:-rim] = False
    white = (image == 255).all(axis=2)
    windows = np.lib.stride_tricks.sliding_window_view(white, (size, size))
    ((y, x),) = np.argwhere((windows == frame).all(axis=(2, 3)))
    return int(y), int(x), rim


def is_colour(image, colour):
    return (np.abs(image.astype(int) - colour) <= NOISE).all(axis=-1)


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(size=64),
        dict(size=131, cue_size=3, num_colours=6, num_shapes=9, num_targets=1),
        dict(cue_size=5, num_colours=2, shape_sizes=(5, 9), num_targets=6),
    ],
)
def test_labels_are_what_the_pictures_say(split, settings):
    """The labels follow from the cue and the colours, found anew in the picture."""
    data = CueTask(split, 12, pipeline=[], **settings)
    for index in range(len(data)):
        image, labels = data.draw(index)
        y, x, rim = find_cue(image, data.cue_size)
        end = data.cue_size - rim
        cue = np.s_[y : y + data.cue_size, x : x + data.cue_size]
        patch = image[cue][rim:end, rim:end]
        (colour,) = (c for c in COLOURS if is_colour(patch, c).all())
        assert (labels[cue] == 0).all()

        strong = np.stack([is_colour(image, c) for c in COLOURS]).any(axis=0)
        strong[cue] = False
        expected = np.where(is_colour(image, colour), 1, 2) * strong
        assert (labels == expected).all()
        assert (labels == 1).any() == (data.num_targets > 0)
        assert (labels == 2).any() == (data.num_targets < data.num_shapes)


@pytest.mark.parametrize(
    ('num_targets', 'counts', 'limits'),
    [(2, False, (59, 59)), (1, False, (34, 38)), (1, True, (89, 95))],
)
def test_iou_of_telling_one_colour_from_the_others(num_targets, counts, limits):
    """With perfect outlines: what docs/evidence.md compares networks with."""
    data = CueTask('val', 128, num_targets=num_targets, pipeline=[])
    drawn = []
    for image, labels in map(data.draw, range(len(data))):
        masks = [is_colour(image, c) & (labels > 0) for c in COLOURS[:3]]
        drawn.append((masks, labels == 1))
    ious = []
    for told in range(3):
        common = either = 0
        for masks, target in drawn:
            others = [mask for i, mask in enumerate(masks) if i != told and mask.any()]
            if (masks[told] & target).any():
                found = masks[told]
            elif counts:
                found = min(others, key=np.sum)
            else:
                found = np.any(others, axis=0)
            common += (found & target).sum()
            either += (found | target).sum()
        ious.append(round(100 * common / either))
    assert (min(ious), max(ious)) == limits


def test_pictures_depend_on_split_seed_and_index_alone():
    sets = [
        CueTask(s, 40, seed, pipeline=[]) for s in ('train', 'val') for seed in (0, 1)
    ]
    pictures = [data.draw(index)[0].tobytes() for data in sets for index in range(40)]
    assert len(set(pictures)) == 160
    again = CueTask('train', 9, pipeline=[])
    assert [again.draw(index)[0].tobytes() for index in range(9)] == pictures[:9]
    # Blue comes first, as in a file that MMSegmentation loads.
    assert (again[3]['img'][..., ::-1] == again.draw(3)[0]).all()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(split='test'), "split must be one of .* got 'test'"),
        (dict(cue_size=2), 'cue_size must be from 3 to 96, got 2'),
        (dict(size=301), 'size must be from 1 to 300, got 301'),
        (dict(num_colours=7), 'num_colours must be from 2 to 6, got 7'),
        (dict(num_targets=7), 'num_targets must be from 0 to 6, got 7'),
        (dict(shape_sizes=(9, 8)), r'shape_sizes must rise up to 96, got \(9, 8\)'),
        (dict(num_shapes=60), 'no room for a cue of 14 pixels'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CueTask(**{'split': 'val', 'num_pictures': 1, **settings}, pipeline=[]).draw(0)


def test_metric_of_single_classes():
    metric = ClassIoUMetric()
    metric.dataset_meta = CueTask.METAINFO
    truth = torch.tensor([[0, 0, 1, 1]])
    found = torch.tensor([[0, 1, 1, 1]])
    sample = dict(pred_sem_seg=dict(data=found), gt_sem_seg=dict(data=truth))
    metric.process({}, [sample])
    ious = metric.evaluate(1)
    assert [ious[f'IoU.{name}'] for name in CueTask.METAINFO['classes']] == [
        50,
        66.67,
        0,
    ]


def load(variant, task='cue_task'):
    """Config and model of a variant."""
    config = Config.fromfile(evidence.Run(variant, 0, task=task).config)
    for name in config.custom_imports.imports:
        __import__(name)
    init_default_scope(config.default_scope)
    torch.manual_seed(0)
    return config, MODELS.build(config.model)


def size_of(model):
    return sum(parameter.numel() for parameter in model.backbone.parameters())


@pytest.mark.parametrize('variant', dict.fromkeys(evidence.MAIN + evidence.BACKBONES))
def test_variants_train(variant):
    """One step makes the loss of its batch smaller."""
    config, model = load(variant)
    if variant in evidence.MAIN:
        same = set(evidence.MAIN) - {'all', 'strided'}
        assert (size_of(model) == size_of(load('dpcknn')[1])) == (variant in same)
    else:
        assert 0.8 < size_of(model) / size_of(load('dpcknn')[1]) < 1.2
    data = CueTask('train', 4, pipeline=config.pipeline)
    batch = model.data_preprocessor(pseudo_collate([data[i] for i in range(4)]), True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        loss = model(**batch, mode='loss')['decode.loss_ce']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def reach(backbone, **arguments):
    """Whether a far corner of the picture has an effect on the first map's."""
    torch.manual_seed(0)
    model = MODELS.build({**backbone, 'out_indices': (0,), **arguments}).eval()
    image = torch.rand(1, 3, 96, 96, requires_grad=True)
    model(image)[0][0, 0, 0, 0].backward()
    return bool(image.grad[0, :, 64:, 64:].abs().max() > 0)


@pytest.mark.parametrize('variant', evidence.MAIN)
def test_only_without_attention_far_tokens_are_unseen(variant):
    # The pieces of a map that windows cut are merged for all the map.
    assert reach(load(variant)[0].model.backbone) == (variant != 'none')


def test_sorted_tokens_and_random_groups():
    tokens = torch.rand(2, 30, 8)
    likeness = torch.cosine_similarity(tokens, tokens.mean(1, keepdim=True), dim=2)
    for clusterer in (SortedTokens(), RandomGroups()):
        labels, counts, _ = clusterer(tokens, (5, 6), (4, 16))
        assert counts == (4, 16)
        for label, count in zip(labels, counts):
            sizes = torch.stack([row.bincount(minlength=count) for row in label])
            assert {30 // count, -(-30 // count)} == set(sizes.flatten().tolist())
        rising = labels[1].gather(1, likeness.argsort(dim=1)).diff() >= 0
        assert rising.all() == isinstance(clusterer, SortedTokens)


def test_control_arguments():
    backbone = load('none')[0].model.backbone
    for name, value in dict(keys='none', scale=2).items():
        with pytest.raises(ValueError, match=f'{name} must be .* got {value!r}'):
            MODELS.build({**backbone, name: value})
    whole, coarse, fine, plain = (
        MODELS.build({**backbone, 'keys': 'clusters', **settings})
        for settings in ({}, dict(scale=0), dict(scale=1), dict(learned_weights=False))
    )
    x = torch.rand(2, 36, 32)
    attentions = [m.stages[0].blocks[0].attn for m in (whole, coarse, fine)]
    assert [a.cluster_counts(576) for a in attentions] == [(9, 36), (9,), (36,)]
    trainable = [n for n, p in plain.named_parameters() if not p.requires_grad]
    assert len(trainable) == 8 and all('.importance.' in name for name in trainable)
    # All weigh the same: each token alone stays what it is.
    merge = plain.stages[0].blocks[0].attn.merge
    own = torch.arange(36).expand(2, -1) // 4
    (means,) = merge(
        x, type(plain.stages[0].blocks[0].attn.cluster(x, (6, 6)))((own,), (9,))
    )
    assert torch.allclose(means, x.unflatten(1, (9, 4)).mean(2), atol=1e-5)


def test_lists():
    """Every run has a config, a folder of its own, and options that take effect."""
    assert len(LISTS['main']) == 5 * len(LISTS['quick']) == 55
    runs = [r for runs in LISTS.values() for r in runs if r.seed == runs[0].seed]
    assert len({run.name for run in runs}) == len(set(map(str, runs)))
    base = evidence.count(evidence.Run('dpcknn', 0), {})
    configs = {file: Config.fromfile(file) for file in {run.config for run in runs}}
    # Or all that is tested on the way would be logged as of step 0.
    loggers = [config.default_hooks.logger for config in configs.values()]
    assert not any(logger.log_metric_by_epoch for logger in loggers)
    # Or a training that is killed while it writes its only checkpoint could not go on.
    savers = [config.default_hooks.checkpoint for config in configs.values()]
    assert all(saver.max_keep_ckpts > 1 for saver in savers)
    new = set()
    for run in runs:
        config = copy.deepcopy(configs[run.config])
        before = str(config._cfg_dict)
        for key in run.options:
            *path, last = key.split('.')
            place = config
            for part in path:
                place = place[int(part) if isinstance(place, list) else part]
            if last not in place:
                new.add(f'{path[-1]}.{last}')
        config.merge_from_dict(dict(run.options))
        assert (str(config._cfg_dict) == before) == (not run.options)
    # Arguments that no config gives; all else that a list changes is there.
    assert new == {
        *(f'dataset.{key}' for key in ('size', 'cue_size', 'num_targets', 'ann_file')),
        *(f'backbone.{key}' for key in ('scale', 'learned_weights', 'max_clusters')),
    }
    large = next(run for run in runs if run.name == 'cue_task/dpcknn_size-256_seed0')
    assert evidence.count(large, {})['multiply_adds'] > 7 * base['multiply_adds']
    # Of crops of 128 pixels, and of 240 x 320, as many as by get_flops.
    r18 = evidence.count(LISTS['camvid'][3], {})
    assert r18['multiply_adds'] == count_flops(load('r18', 'camvid')[1], 128, 128).total
    cells = evidence.count(LISTS['bccd'][1], {})
    model = load('pvtv2-b1', 'bccd')[1]
    assert cells['multiply_adds'] == count_flops(model, 240, 320).total


@pytest.fixture
def short(monkeypatch):
    """A training, one that cannot be, and a test and a tuning of the first one's."""
    runs = [
        evidence.Run('grid', 3),
        evidence.Run('grid', 3, 'wide', evidence.picture(cue_size=500)),
        evidence.Run('grid', 3, 'tested', {}, 'grid', is_test=True),
        evidence.Run('kmeans1', 3, 'tuned', {}, 'grid'),
        evidence.Run('kmeans1', 4, 'tuned', {}, 'grid'),  # of which there is none
    ]
    monkeypatch.setattr(evidence, 'make_lists', lambda: {'short': runs})


def test_runs_are_trained_tested_and_skipped(short, tmp_path, monkeypatch, capsys):
    """Two iterations by stock mim; what is finished is not done again."""
    work, out = tmp_path / 'work', tmp_path / 'evidence'
    arguments = ['short', '--work-dir', str(work), '--out', str(out), '--jobs', '1']
    options = [*TINY, 'train_dataloader.dataset.shape_sizes=(12,18)']
    arguments += ['--cfg-options', *options]
    # One that was interrupted after an iteration goes on there.
    first = dict(option.split('=') for option in options) | {'train_cfg.max_iters': 1}
    assert evidence.start(evidence.Run('grid', 3), work, first).wait() == 0
    with pytest.raises(SystemExit, match='1 runs failed'):
        evidence.main(arguments)
    log = (work / 'cue_task/grid_seed3/log.txt').read_text()
    assert re.search(r'resumed epoch: \d+, iter: 1\b', log)
    printed = capsys.readouterr().out
    assert 'short: 5 runs, 0 finished before' in printed
    assert 'kmeans1_tuned_seed4: left out, its weights are not trained yet' in printed
    good, bad, tested, tuned = json.loads((out / 'short.json').read_text())
    assert (good['status'], good['seed'], good['point']) == ('finished', 3, '')
    assert list(good['scores']) == list(tuned['scores']) == ['1', '2']
    assert good['options']['train_cfg.max_iters'] == 2
    assert good['seconds_per_iteration'] > 0
    assert good['commit'] and good['machine']
    assert good['versions']['torch'] == version('torch')
    assert bad['status'] == 'failed' and 'cue_size must be' in bad['error']
    assert tested['scores'] == {'0': good['scores']['2']}
    log = (work / 'cue_task/kmeans1_tuned_seed3/log.txt').read_text()
    assert 'Load checkpoint from' in log and 'grid_seed3/iter_2.pth' in log

    # Only the failed one is tried again: the options are the same.
    started = []

    def start(run, *_):
        started.append(run.point)
        return subprocess.Popen([sys.executable, '-c', 'exit(1)'])

    monkeypatch.setattr(evidence, 'start', start)
    with pytest.raises(SystemExit, match='1 runs failed'):
        evidence.main(arguments)
    assert '5 runs, 3 finished before' in capsys.readouterr().out
    assert started == ['wide']

    with pytest.raises(SystemExit, match='grid_seed3 is of the options .*: remove'):
        evidence.main([*arguments, 'randomness.deterministic=True'])

    # Pictures, labels, and what the two networks that left a checkpoint make of them.
    init_model, sizes = mmseg.apis.init_model, []

    def init(config, *args):
        sizes.append([*config.train_dataloader.dataset.shape_sizes])
        return init_model(config, *args)

    monkeypatch.setattr(mmseg.apis, 'init_model', init)
    evidence.main([*arguments[:5], '--predictions', '3'])
    assert sizes == [[12, 18]] * 2  # the options that they were trained with
    assert Image.open(out / 'short-predictions.png').height == round(4 * 1.1 * 120)
    with pytest.raises(SystemExit, match='no checkpoint of these runs in .*work'):
        evidence.main([*arguments[:5], '--predictions', '4'])


def test_nothing_begins_without_data(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, 'start', None)
    folders = ['--work-dir', str(tmp_path), '--out', str(tmp_path)]
    option = 'train_dataloader.dataset.data_root=nowhere'
    with pytest.raises(SystemExit, match='no folder nowhere .*camvid.*: docs/evid'):
        evidence.main(['camvid', *folders, '--cfg-options', option])
    assert not list(tmp_path.iterdir())


def test_trainings_end_with_the_driver(short, tmp_path, monkeypatch):
    children, handlers = [], {}

    def start(*_):
        command = [sys.executable, '-c', 'import time; time.sleep(99)']
        children.append(subprocess.Popen(command, start_new_session=True))
        return children[-1]

    monkeypatch.setattr(evidence, 'start', start)
    monkeypatch.setattr(evidence.signal, 'signal', handlers.__setitem__)
    hangup = evidence.signal.SIGHUP

    def sleep(_):
        children[0].kill()  # one that has ended, and been waited for, by then
        children[0].wait()
        handlers[hangup]()

    monkeypatch.setattr(evidence.time, 'sleep', sleep)
    folders = ['--work-dir', str(tmp_path), '--out', str(tmp_path)]
    with pytest.raises(SystemExit, match='stopped'):
        evidence.main(['short', *folders, '--jobs', '2'])
    assert set(handlers) == {hangup, evidence.signal.SIGTERM}
    ways = [evidence.signal.SIGKILL, evidence.signal.SIGTERM]
    assert [-child.returncode for child in children] == ways
    # Nor is one left where the driver fails at a start.
    monkeypatch.setattr(evidence, 'circumstances', {}.pop)
    with pytest.raises(TypeError):
        evidence.main(['short', *folders])
    assert len(children) == 2


def test_nohup(short, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, 'train', lambda *_: 0)
    hangup = evidence.signal.SIGHUP
    before = evidence.signal.signal(hangup, evidence.signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):
            evidence.main(['short', '--work-dir', str(tmp_path)])
        assert evidence.signal.getsignal(hangup) == evidence.signal.SIG_IGN
    finally:
        evidence.signal.signal(hangup, before)


def test_one_driver_in_a_folder(short, tmp_path, monkeypatch):
    arguments = ['short', '--work-dir', str(tmp_path)]
    program = tmp_path / 'program'
    program.write_text('#!/bin/sh\nexec sleep 99\n')
    program.chmod(0o700)
    with evidence.claim(tmp_path):
        with pytest.raises(SystemExit, match=f'{tmp_path} is held by another driver'):
            evidence.main(arguments)
        monkeypatch.setattr(evidence.sys, 'executable', str(program))
        child = evidence.start(evidence.Run('grid', 0), tmp_path, {})
    # A training that outlives its driver still holds it.
    try:
        with pytest.raises(SystemExit, match='or by a training that outlived one'):
            evidence.main(arguments)
    finally:
        child.kill()
        child.wait()
    with evidence.claim(tmp_path):
        pass
    with pytest.raises(SystemExit, match=f'evidence.py: .*exists: {str(program)!r}'):
        evidence.main([*arguments[:2], str(program)])


def record(variant, seed, ious, **more):
    return (
        dict(
            variant=variant,
            point='',
            seed=seed,
            status='finished',
            figure='IoU',
            scores=dict(zip(('250', '500', '1500'), ious)),
            parameters=2_000_000,
            multiply_adds=120_000_000,
        )
        | more
    )


def test_weights_are_found_where_the_clone_has_a_space_in_its_path(
    tmp_path, monkeypatch
):
    root = tmp_path / 'my clone'
    monkeypatch.setattr(evidence, 'ROOT', root)
    monkeypatch.setattr(evidence.Run, 'config', property(lambda _: Path('a/b/c/d.py')))
    monkeypatch.setattr(evidence.subprocess, 'Popen', lambda command, **_: command)
    tuned = evidence.Run('kmeans1', 0, 'tuned', {}, 'grid')
    command = evidence.start(tuned, root / 'work', {})
    assert 'load_from=work/cue_task/grid_seed0/iter.pth' in command


def test_tables_are_what_the_json_says(tmp_path, capsys, monkeypatch):
    out, page = tmp_path / 'evidence', tmp_path / 'evidence.md'
    records = [
        record('grid', 0, [10, 20, 85]),
        record('grid', 1, [30, 80, 95]),
        record('grid', 2, [99, 99], status='diverged'),
        record('none', 0, [0, 40, 1]),
        record('all', 0, [], status='failed', error='no room'),
    ]
    evidence.write_json(out / 'main.json', records)
    page.write_text('# A\n<!-- main -->\nold\n<!-- end of main -->\nB\n')
    arguments = ['main', '--out', str(out), '--table', '--figure']
    evidence.main(arguments)
    assert (out / 'main.png').read_bytes().startswith(b'\x89PNG')
    drawn = []
    monkeypatch.setattr(evidence, 'to_png', lambda figure: drawn.append(figure) or b'')
    evidence.main(arguments)
    # A panel for each network, in it a line for each seed and then their mean.
    panels = [axis for axis in drawn[0].axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ['grid', 'none', 'all']
    assert [len(axis.lines) for axis in panels] == [4, 2, 2]
    mean = panels[0].lines[3]
    assert [*mean.get_xdata()] == [250, 500, 1500]
    assert [*mean.get_ydata()] == pytest.approx([139 / 3, 199 / 3, 90])
    text = page.read_text()
    assert text.startswith('# A\n<!-- main -->\n') and text.endswith('main -->\nB\n')
    assert 'old' not in text and text.count('multiply-adds') == 1
    header, _, *rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in text.splitlines()
        if line.startswith('|')
    ]
    grid, none, every = (dict(zip(header, row)) for row in rows)
    assert grid == {
        'network': 'grid',
        'IoU at 250': '20.0 ± 14.1',
        'IoU at 500': '50.0 ± 42.4',
        'final IoU': '90.0 ± 7.1',
        'iterations to 80': '1000 ± 707',
        'left the plateau': '2 of 3',
        'learnt': '2 of 3',
        'diverged or failed': '1',
        'parameters, M': '2.00',
        'multiply-adds, M': '120',
    }
    assert (none['final IoU'], none['iterations to 80']) == ('1.0', '–')
    # Before it had learnt more, and forgot it.
    assert (none['left the plateau'], none['learnt']) == ('1 of 1', '0 of 1')
    assert (every['final IoU'], every['diverged or failed']) == ('–', '1')
    assert re.search(r'\| grid +\|', capsys.readouterr().out)
    # Of a test there is one figure, after no iterations.
    tested = record('grid', 0, [], scores={'0': 91})
    titles = evidence.make_table([tested]).splitlines()[0]
    photographs = [
        record(
            *('r18', seed, [9, 20, 30 + seed]),
            figure='mIoU',
            classes=dict(pole=seed, sky=90),
        )
        for seed in (0, 2)
    ]
    table = evidence.make_table(photographs).splitlines()
    cells = [[cell.strip() for cell in line.split('|')] for line in table]
    found = dict(zip(cells[0], cells[2]))
    assert (found['final mIoU'], found['pole']) == ('31.0 ± 1.4', '1.0 ± 1.4')
    assert found['sky'] == '90.0 ± 0.0' and 'learnt' not in found
    assert 'final IoU' in titles and 'iterations' not in titles and ' at ' not in titles
    # Nothing is written before the first run has ended.
    evidence.gather('quick', tmp_path, out)
    with pytest.raises(SystemExit):
        evidence.main(['quick', *arguments[1:]])
    assert 'quick.json: train the list quick first' in capsys.readouterr().err


def test_the_last_panel_of_a_column_has_numbers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evidence, 'to_png', lambda figure: drawn.append(figure) or b'')
    evidence.draw([record(name, 0, [1]) for name in 'abcde'], tmp_path / 'new.png')
    panels = [axis for axis in drawn[0].axes if axis.get_title()]
    shown = [axis.xaxis.get_tick_params()['labelbottom'] for axis in panels]
    assert shown == [False, True, True, True, True]


def test_records_stand_in_the_order_of_their_list(tmp_path):
    runs = LISTS['backbones']
    records = [record('else', 0, []), *(record(r.variant, r.seed, []) for r in runs)]
    evidence.write_json(tmp_path / 'backbones.json', records[::-1])
    evidence.gather('backbones', tmp_path, tmp_path)
    found = json.loads((tmp_path / 'backbones.json').read_text())
    assert found == [*records[1:], records[0]]
    # Of a run that is finished there, a failure here is not kept, and a finish is.
    for status, kept in dict(failed='finished', diverged='diverged').items():
        fresh = record('dpcknn', 0, [], status=status)
        evidence.write_json(tmp_path / runs[0].name / 'record.json', fresh)
        evidence.gather('backbones', tmp_path, tmp_path)
        found = json.loads((tmp_path / 'backbones.json').read_text())
        assert found[0]['status'] == kept


def test_tables_of_the_page():
    """What stands in the documentation is what the records beside it say."""
    text = (ROOT / 'docs/evidence.md').read_text()
    names = re.findall('<!-- ([a-z-]+) -->', text)
    assert 'main' in names
    for name in names:
        path = ROOT / f'docs/evidence/{name}.json'
        table = evidence.make_table(json.loads(path.read_text()))
        assert f'<!-- {name} -->\n\n{table}\n\n<!-- end of {name} -->' in text


def test_whose_networks_are_taken(tmp_path):
    plain = evidence.Run('grid', 0)
    other = evidence.Run('grid', 0, 'cue-4', evidence.picture(cue_size=4))
    for run in (plain, other):
        for status, taken in dict(failed=False, diverged=True, finished=True).items():
            evidence.write_json(
                tmp_path / run.name / 'record.json', dict(status=status)
            )
            assert not evidence.has_network(run, tmp_path)
            (tmp_path / run.name / 'iter_9.pth').touch()
            assert evidence.has_network(run, tmp_path) == taken
            (tmp_path / run.name / 'iter_9.pth').unlink()
        (tmp_path / run.name / 'iter_9.pth').touch()
    torch.save(dict(meta={}, optimizer={}), tmp_path / plain.name / 'iter_10.pth')
    evidence.slim(plain.find_network(tmp_path))
    assert [
        path.name for path in plain.find_network(tmp_path).parent.glob('*.pth')
    ] == ['iter_10.pth']
    with pytest.raises(SystemExit, match='have other pictures'):
        evidence.draw_predictions([plain, other], tmp_path, tmp_path / 'new.png')


def test_tests_of_a_network_that_is_trained_anew_are_made_anew(tmp_path):
    tested = evidence.Run('kmeans1', 0, 'weights-grid', {}, 'grid', is_test=True)
    path = tmp_path / tested.name / 'record.json'
    assert not evidence.is_finished(tested, tmp_path)
    evidence.write_json(path, dict(status='finished'))
    assert evidence.is_finished(tested, tmp_path)  # the network may be gone
    network = tmp_path / tested.source.name / 'iter_9.pth'
    network.parent.mkdir()
    network.touch()
    for later, finished in ((-9, True), (9, False)):
        os.utime(network, (path.stat().st_mtime + later,) * 2)
        assert evidence.is_finished(tested, tmp_path) == finished


def test_what_is_measured_of_a_divergence(tmp_path, monkeypatch):
    folder = tmp_path / 'time/vis_data'
    folder.mkdir(parents=True)
    lines = [
        dict(step=1, loss=math.nan, time=0.1),
        dict(step=1, mIoU=1, **{'IoU.target': 0.0}),
    ]
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    found = evidence.measure(evidence.Run('grid', 0), tmp_path, 0, {})
    assert (found['status'], found['scores']) == ('diverged', {'1': 0.0})
    assert 'classes' not in found
    found = evidence.measure(evidence.Run('r18', 0, task='camvid'), tmp_path, 0, {})
    assert (found['scores'], found['classes']) == ({'1': 1}, {'target': 0.0})
    # It was killed within a line, and went on before the divergence.
    text = (folder / 'scalars.json').read_text()
    (folder / 'scalars.json').write_text(f'{text}\n{{"step": 1')
    later = tmp_path / 'time2/vis_data'
    later.mkdir(parents=True)
    (later / 'scalars.json').write_text('{"step": 1, "loss": 0.5, "time": 0.2}')
    found = evidence.measure(evidence.Run('grid', 0), tmp_path, 0, {})
    assert (found['status'], found['seconds_per_iteration']) == ('finished', 0.2)
    (folder / 'scalars.json').write_text('{"step": 9, "pascal_voc/AP50": 0.123}')
    found = evidence.measure(evidence.Run('pvtv2-b1', 0, task='bccd'), tmp_path, 0, {})
    assert (found['figure'], found['scores']) == ('AP50', {'9': 12.3})
