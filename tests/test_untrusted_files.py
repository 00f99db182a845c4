"""Whatever way a bad checkpoint comes in: one error, no code run, nothing changed."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
import visualize_clusters
from broken_files import BROKEN, HOSTILE, Attack, make_file
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint
from PIL import Image
from test_models.variants import ARCHS, CASES, make_model
from torch_versions import restricted

from clustr_mm.evaluation.checkpoints import load
from clustr_mm.models.pyramid import PyramidBackbone

FILE = 'weights.pth'


class Model(BaseModel):
    def __init__(self, name='ClusTR', init_cfg=None):
        super().__init__()
        self.backbone = make_model(name, init_cfg=init_cfg)

    def forward(self, inputs, mode='tensor'):
        return self.backbone(inputs)


def by_init_cfg(model):
    model.backbone.init_cfg = dict(type='Pretrained', checkpoint=FILE)
    model.init_weights()


def by_load_checkpoint(model):
    load_checkpoint(model, FILE, map_location='cpu')


def runner(model, **kwargs):
    return Runner(model, 'work', log_level='CRITICAL', experiment_name='x', **kwargs)


def by_load_from(model):
    runner(model, load_from=FILE).load_or_resume()


def by_resume(model):
    runner(model, load_from=FILE, resume=True).load_or_resume()


PATHS = [by_init_cfg, by_load_checkpoint, by_load_from, by_resume]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_refused(model, path):
    before = state(model)
    with pytest.raises(Exception):  # noqa: B017  which one depends on the file
        path(model)
    assert not Path('hacked').exists()
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_attack_works_without_the_safe_loader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in HOSTILE:
        Path(FILE).write_bytes(make_file(kind, {}))
        # The old format is found to be none after it ran.
        with contextlib.suppress(RuntimeError):
            torch.load(FILE, weights_only=False)
        assert Path('hacked').exists(), kind
        Path('hacked').unlink()


@restricted
@pytest.mark.parametrize('kind', HOSTILE + BROKEN)
@pytest.mark.parametrize('path', PATHS)
def test_no_checkpoint(tmp_path, monkeypatch, path, kind):
    monkeypatch.chdir(tmp_path)
    model = Model()
    Path(FILE).write_bytes(make_file(kind, state(model)))
    assert_refused(model, path)


def other_variant(name):
    """Of the same names and other shapes."""
    arch = ARCHS[CASES[name]['type']]
    wider = {**arch, 'embed_dims': [2 * dims for dims in arch['embed_dims']]}
    return make_model(name, arch=wider)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('path', PATHS[:1])
def test_weights_of_another_model(tmp_path, monkeypatch, path, name):
    monkeypatch.chdir(tmp_path)
    others = {case['type']: key for key, case in CASES.items()}
    del others[CASES[name]['type']]
    model = Model(name)
    assert isinstance(model.backbone, PyramidBackbone)
    for other in [other_variant(name), *map(make_model, others.values())]:
        torch.save(dict(state_dict=other.state_dict()), FILE)
        assert_refused(model, path)
    torch.save(dict(state_dict=model.state_dict()), FILE)
    path(model)


@pytest.mark.parametrize('content', [[1], 3, torch.ones(2), {}, dict(state_dict=3)])
@pytest.mark.parametrize('path', PATHS[:1])
def test_no_weights(tmp_path, monkeypatch, path, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, FILE)
    assert_refused(Model(), path)


@restricted
def test_resume_refuses_what_comes_beside_the_weights(tmp_path, monkeypatch):
    """Optimizer, schedule and message hub are read from the same file."""
    monkeypatch.chdir(tmp_path)
    model = Model()
    for key in ('optimizer', 'param_schedulers', 'message_hub', 'meta', 'ema'):
        torch.save({'state_dict': model.state_dict(), key: Attack()}, FILE)
        assert_refused(model, by_resume)


@pytest.mark.parametrize('kind', HOSTILE + BROKEN)
def test_visualize_clusters(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    Path(FILE).write_bytes(make_file(kind, {}))
    Image.new('RGB', (40, 30)).save('image.png')
    with pytest.raises(SystemExit) as end:
        visualize_clusters.main(['image.png', '--checkpoint', FILE, '--out', 'out'])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert FILE in said and said.count('\n') == 1
    assert sorted(os.listdir()) == ['image.png', FILE]


@pytest.mark.parametrize('kind', HOSTILE + BROKEN)
def test_evaluation(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Path(FILE).write_bytes(make_file(kind, {}))
    with pytest.raises(
        ValueError, match='^cannot be read as a checkpoint: |^is empty|^holds no'
    ):
        load(Path(FILE))
    assert os.listdir() == [FILE]
