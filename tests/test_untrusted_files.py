"""Whatever way a bad checkpoint comes in: one error, no code run, nothing changed."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
import visualize_clusters
from broken_files import BROKEN, HOSTILE, make_file
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint
from PIL import Image
from test_models.variants import ARCHS, CASES, make_model
from torch_versions import restricted

FILE = 'weights.pth'


class Model(BaseModel):
    def __init__(self, name='ClusTR'):
        super().__init__()
        self.backbone = make_model(name)

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


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def refusal(model, path):
    """What is said; the model is as it was."""
    before = state(model)
    with pytest.raises(Exception) as caught:  # of what kind depends on the file
        path(model)
    assert not Path('hacked').exists()
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return str(caught.value)


def test_the_attack_works_without_the_safe_loader():
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
def test_no_checkpoint(path, kind):
    model = Model()
    Path(FILE).write_bytes(make_file(kind, state(model)))
    said = refusal(model, path)
    if path is by_init_cfg:  # not torch's advice to switch safety off
        assert FILE in said and '\n' not in said and 'set to' not in said


@pytest.mark.parametrize('name', CASES)
def test_weights_of_another_model(name):
    others = {case['type']: key for key, case in CASES.items()}
    arch = ARCHS[CASES[name]['type']]
    del others[CASES[name]['type']]
    wider = {**arch, 'embed_dims': [2 * dims for dims in arch['embed_dims']]}
    model = Model(name)
    for other in [make_model(name, arch=wider), *map(make_model, others.values())]:
        torch.save(dict(state_dict=other.state_dict()), FILE)
        assert 'parameters match' in refusal(model, by_init_cfg)
    torch.save(dict(state_dict=model.state_dict()), FILE)
    by_init_cfg(model)


@pytest.mark.parametrize('content', [[1], 3, torch.ones(2), {}, dict(state_dict=3)])
def test_no_weights(content):
    torch.save(content, FILE)
    refusal(Model(), by_init_cfg)


@pytest.mark.parametrize('kind', HOSTILE + BROKEN)
def test_visualize_clusters(capsys, kind):
    Path(FILE).write_bytes(make_file(kind, {}))
    Image.new('RGB', (40, 30)).save('image.png')
    with pytest.raises(SystemExit) as end:
        visualize_clusters.main(['image.png', '--checkpoint', FILE, '--out', 'out'])
    assert end.value.code == 2
    assert FILE in capsys.readouterr().err.splitlines()[-1]
    assert sorted(os.listdir()) == ['image.png', FILE]
