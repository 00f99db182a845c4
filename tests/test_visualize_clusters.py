"""The tool that draws clusters, and the hook of trainings."""

import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import visualize_clusters as tool
from mmengine.model import BaseModel, ImgDataPreprocessor, MMDistributedDataParallel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from PIL import Image
from test_visualization import (
    ARCH,
    count_pixels,
    find_picture,
    make_backbone,
    make_images,
    make_picture,
    save,
)
from torch import nn

from clustr_mm.visualization import Pixels
from clustr_mm.visualization import hook as hook_module
from clustr_mm.visualization.hook import ClusterVisualizationHook

RED = (200, 30, 20)


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """The working directory, with a picture and a config."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(make_picture()).save('photo.png')
    config = tmp_path / 'small.py'
    config.write_text(f'model = dict(backbone=dict(type="ClusTR", arch={ARCH}))')
    return tmp_path


def run(*arguments):
    options = ('--config', 'small.py', '--device', 'cpu', '--panel', 90, '--out', 'out')
    return tool.main([str(argument) for argument in (*options, *arguments)])


def read(path):
    return np.array(Image.open(path))


def test_one_picture(photo, capsys):
    assert run('photo.png') == 0
    line, *more = capsys.readouterr().out.splitlines()
    assert not more
    assert re.fullmatch(r'\[1/1\] wrote out/photo_clusters.png, took [\d.]+ s', line)
    figure = read('out/photo_clusters.png')
    assert len(find_picture(figure, make_picture())) == 3  # one for each stage
    assert count_pixels(figure, RED)  # the weights are random

    save(photo / 'weights.pth', make_backbone())
    assert run('photo.png', '--checkpoint', 'weights.pth', '--out', 'trained.png') == 0
    assert not count_pixels(read('trained.png'), RED)
    # One stage has two blocks.
    assert run('photo.png', '--block', 1) == 0
    assert len(find_picture(read('out/photo_clusters.png'), make_picture())) == 1


@pytest.mark.parametrize(
    ('options', 'built'),
    [
        (['--clusterer', 'kmeans'], 'KMeans(steps=2)'),
        (['--clusterer', 'grid', '--max-clusters', '3'], 'GridCells()'),
        (['--cluster-window', '24'], 'DPCKNN(k=5, window=24)'),
    ],
)
def test_other_clusters(photo, monkeypatch, options, built):
    seen = []
    draw = tool.draw_figure

    def spy(image, maps, title, about, *args):
        seen.append((maps, about[0]))
        return draw(image, maps, title, about, *args)

    compute = tool.compute_maps

    def watch(backbone, *args):
        assert str(backbone.stages[0].blocks[0].attn.clusterer) == built
        return compute(backbone, *args)

    monkeypatch.setattr(tool, 'draw_figure', spy)
    monkeypatch.setattr(tool, 'compute_maps', watch)
    assert run('photo.png', *options) == 0
    ((maps, about),) = seen
    assert options[1] in about
    if '--max-clusters' in options:
        assert about == 'small, grid, at most 3 coarse clusters'
        assert maps[0].num_clusters <= 3


def test_point_of_a_shrunk_picture(photo, monkeypatch):
    """The middle of the pixel, to scale."""
    calls, compute = [], tool.compute_maps

    def spy(backbone, inputs, stages, block, point):
        calls.append((tuple(inputs.shape), point))
        return compute(backbone, inputs, stages, block, point)

    monkeypatch.setattr(tool, 'compute_maps', spy)
    assert run('photo.png', '--point', 89, 0, '--size', 45) == 0
    ((shape, point),) = calls
    assert shape == (1, 3, 38, 45)
    assert point == pytest.approx((89.5 / 2, 0.5 * 38 / 75))
    assert count_pixels(read('out/photo_attention.png'), (90, 255, 90)) > 100


def test_many_pictures(photo, capsys):
    (photo / 'broken.jpg').write_text('no')
    (photo / 'other').mkdir()
    Image.fromarray(make_picture(20)).save('other/photo.jpg')
    names = ['gone.jpg', 'photo.png', 'broken.jpg', 'other/photo.jpg']
    assert run(*names) == 1
    captured = capsys.readouterr()
    lines, errors = captured.out.splitlines(), captured.err.splitlines()
    assert [line[:11] for line in lines] == ['[2/4] wrote', '[4/4] wrote']
    assert errors[0] == "[1/4] there is no picture 'gone.jpg'"
    assert errors[1].startswith('[3/4] cannot read the picture broken.jpg: ')
    assert errors[2:] == ['2 of 4 failed']
    found = sorted(path.name for path in (photo / 'out').iterdir())
    assert found == ['photo_clusters.png', 'photo_clusters_2.png']

    # The point is in one of the two.
    assert run('photo.png', 'other/photo.jpg', '--point', 5, 50) == 1
    message = 'other/photo.jpg: the point 5, 50 is outside the image of 90 x 20 pixels'
    assert capsys.readouterr().err.splitlines()[0] == f'[2/2] {message}'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--block', '2'], '--block must be first, last or up to 1, got 2'),
        (
            ['--block', 'x'],
            'argument --block: must be first, last or a number from 0, ',
        ),
        (['--size', '0'], "argument --size: must be at least 1, got '0'"),
        (['--panel', '9'], "argument --panel: must be at least 32, got '9'"),
        (['--arch', 'tiny'], '--arch goes without --config, which says it'),
        (['--device', 'x'], '--device x cannot be used here: '),
        (['--checkpoint', 'gone.pth'], "there is no checkpoint 'gone.pth'"),
        (['--out', 'photo.png'], '--out would replace the picture photo.png'),
        (['b.png', '--out', 'c.png'], '--out must be a folder for many pictures, got'),
        (
            ['--cluster-window', '9', '--clusterer', 'grid'],
            '--cluster-window goes without --clusterer grid',
        ),
        ([], 'drawing needs matplotlib and scikit-image'),
    ],
)
def test_bad_arguments(photo, monkeypatch, capsys, arguments, message):
    if not arguments:
        monkeypatch.setitem(sys.modules, 'skimage', None)
        monkeypatch.delitem(sys.modules, 'skimage.color', raising=False)
    before = (photo / 'photo.png').read_bytes()
    with pytest.raises(SystemExit) as caught:
        run('photo.png', *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert line.startswith(f'visualize_clusters.py: {message}')
    assert (photo / 'photo.png').read_bytes() == before


# The hook.


class Model(BaseModel):
    """A loss on everything the backbone returns."""

    def __init__(self):
        cfg = dict(mean=[120.0, 115.0, 100.0], std=[58.0, 57.0, 50.0], bgr_to_rgb=True)
        super().__init__(data_preprocessor=ImgDataPreprocessor(**cfg))
        self.backbone = make_backbone(
            drop_rate=0.3, drop_path_rate=0.3, frozen_stages=0
        )

    def forward(self, inputs, data_samples=None, mode='tensor'):
        outs = self.backbone(inputs)
        return dict(loss=sum(out.square().mean() for out in outs))


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        picture = np.random.default_rng(index).integers(0, 256, (3, 40, 56))
        return dict(inputs=torch.from_numpy(picture.astype(np.uint8)))


def train(folder, hooks):
    model = Model()
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=2,
            dataset=Data(),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        custom_hooks=hooks,
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        randomness=dict(seed=0),
        experiment_name=f'{folder.parent.name}_{folder.name}',
        log_level='WARNING',
    )
    runner.train()
    modes = [module.training for module in model.modules()]
    states = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    return model, modes, states


def test_training_is_the_same_with_the_hook(tmp_path):
    cfg = dict(type='ClusterVisualizationHook', interval=2, size=56, stages=(0, 1))
    model, modes, states = train(tmp_path / 'without', [])
    other, other_modes, other_states = train(tmp_path / 'with', [cfg])
    files = sorted((tmp_path / 'with').rglob('train_clusters*'))
    assert [f.name for f in files] == ['train_clusters_2.png', 'train_clusters_4.png']
    assert not list((tmp_path / 'without').rglob('train_clusters*'))
    # The first image of the second and of the fourth batch of two, one row a stage.
    for file, index in zip(files, (2, 6), strict=True):
        picture = Data()[index]['inputs'].flip(0).permute(1, 2, 0).numpy()
        assert len(find_picture(read(file), picture)) == 2

    weights, start = model.state_dict(), Model().state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in other.state_dict().items())
    assert not all(torch.equal(v, weights[k]) for k, v in start.items())
    assert modes == other_modes and len(set(modes)) == 2
    assert torch.equal(states[0], other_states[0])
    assert np.array_equal(states[1], other_states[1]) and states[2] == other_states[2]
    assert not other.backbone._forward_pre_hooks


class Stub:
    """As much of a runner as the hook sees; calls the model itself."""

    def __init__(self, model=None):
        self.model = model or Model()
        self.iter = 0
        self.added = []
        self.warnings = []
        self.visualizer = SimpleNamespace(add_image=lambda *a: self.added.append(a))
        self.logger = SimpleNamespace(warning=self.warnings.append)

    def train(self, hook, iterations, inputs=None):
        hook.before_train(self)
        for self.iter in range(iterations):
            hook.before_train_iter(self, self.iter)
            if inputs is not None:
                self.model(inputs, mode='loss')
            hook.after_train_iter(self, self.iter)
        hook.after_train(self)
        return self.added


def test_hook_in_a_wrapped_model_with_autocast(tmp_path, monkeypatch):
    half, compute = [], hook_module.compute_maps

    def spy(*args):
        half.append(torch.is_autocast_cpu_enabled())
        return compute(*args)

    monkeypatch.setattr(hook_module, 'compute_maps', spy)
    inputs = make_images(2)[..., :40, :40]
    hook = ClusterVisualizationHook(interval=1, stages=[1], block=0, size=40, name='n')
    store = dist.FileStore(str(tmp_path / 'store'), 1)
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        model = MMDistributedDataParallel(Model(), find_unused_parameters=True)
        with torch.autocast('cpu', torch.bfloat16):
            added = Stub(model).train(hook, 2, inputs)
    finally:
        dist.destroy_process_group()
    assert [(name, step) for name, _, step in added] == [('n', 1), ('n', 2)]
    picture = Pixels((120, 115, 100), (58, 57, 50)).restore(inputs[0])
    assert len(find_picture(added[0][1], picture)) == 1
    assert half == [False, False]  # unlike the training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hook_draws_only_where_it_should(monkeypatch):
    inputs = make_images(2)
    hook = ClusterVisualizationHook(draw=False, interval=1)
    assert Stub().train(hook, 2, inputs) == []
    hook = ClusterVisualizationHook(interval=3, size=32, stages=[2])
    assert [step for *_, step in Stub().train(hook, 7, inputs)] == [3, 6]
    stub = Stub()
    assert stub.train(ClusterVisualizationHook(interval=2), 3) == []
    name = 'ClusterVisualizationHook'
    assert stub.warnings == [f'{name}: the backbone got no image in iteration 2']
    # Other processes neither draw nor warn.
    monkeypatch.setattr(hook_module, 'is_main_process', lambda: False)
    stub = Stub()
    assert stub.train(ClusterVisualizationHook(interval=1), 2, inputs) == []
    assert not stub.warnings


@pytest.mark.parametrize(
    ('model', 'arguments', 'message'),
    [
        (nn.Linear(1, 1), {}, 'there is no ClusTR in this Linear'),
        (None, dict(stages=[3]), 'stage must be one of [0, 1, 2], the stages with'),
        (None, dict(block=1), 'block must be from -1 to 0 in stage 0, got 1'),
        (None, dict(interval=0), 'interval must be at least 1, got 0'),
        (
            type('FullyShardedDataParallel', (Model,), {})(),
            {},
            'ClusterVisualizationHook does not work with FSDP: no process has all',
        ),
    ],
)
def test_hook_of_what_is_not_there(model, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hook = HOOKS.build(dict(type='ClusterVisualizationHook', **arguments))
        hook.before_train(Stub(model))
