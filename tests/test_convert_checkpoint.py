"""Checkpoints of all origins, and what is none, into files of a backbone."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import convert_checkpoint as tool
import numpy as np
import pytest
import safetensors.torch
import torch
from broken_files import BROKEN, HOSTILE, make_file
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from torch import nn
from torch_versions import restricted

from clustr_mm import ClusTR
from clustr_mm.models import STT

pytestmark = restricted
NORM = 'stages.0.norm.bias'


@functools.cache
def weights(dtype=torch.float16):
    """Random numbers for every parameter of ClusTR-tiny; not to be changed."""
    generator = torch.Generator().manual_seed(0)
    with torch.device('meta'):
        names = ClusTR('tiny').state_dict()
    return {
        name: torch.randn(value.shape, generator=generator).to(dtype)
        for name, value in names.items()
    }


def with_prefix(prefix, state_dict):
    return {prefix + name: value for name, value in state_dict.items()}


def public(state_dict):
    """The names of the authors' code."""

    def rename(name):
        start = r'^stages\.(\d)\.(block|norm|patch_embed)s?'
        name = re.sub(start, lambda m: f'{m[2]}{int(m[1]) + 1}', name)
        name = name.replace('.importance.', '.weight_layer.')
        return name.replace('ffn.', 'mlp.').replace('mlp.dw', 'mlp.dwconv.dw')

    return {rename(name): value for name, value in state_dict.items()}


def runner_checkpoint(state_dict):
    history = HistoryBuffer()
    history.update(0.5)
    neck = {f'neck.convs.{i}.weight': torch.zeros(1) for i in range(4)}
    return dict(
        meta=dict(cfg='x = 1'),
        message_hub=dict(log_scalars=dict(loss=history), best=np.float64(0.5)),
        optimizer=dict(state={0: dict(exp_avg=torch.zeros(3))}, param_groups=[]),
        state_dict={**with_prefix('module.backbone.', state_dict), **neck},
    )


HEAD = {'head.weight': torch.zeros(2, 512), 'head.bias': torch.zeros(2)}

#: A checkpoint of some weights, how many names are not ours, and what is left out.
ORIGINS = {
    'backbone': (lambda w: w, 0, '0 left out'),
    'public classifier': (lambda w: public(w) | HEAD, 220, '2 left out: head (2)'),
    'public training': (
        lambda w: dict(model=with_prefix('module.', public(w)), args=Namespace(lr=1)),
        *(220, '1 left out: args'),
    ),
    'runner': (
        *(runner_checkpoint, 220),
        '7 left out: meta, message_hub, optimizer, neck (4)',
    ),
    'averaged too': (
        lambda w: dict(state_dict=w, ema_state_dict={k: v + 1 for k, v in w.items()}),
        *(0, '1 left out: ema_state_dict\nthe entry ema_state_dict, a second set '),
    ),
}


def equal(given, expected):
    return given.keys() == expected.keys() and all(
        value.dtype == expected[name].dtype and torch.equal(value, expected[name])
        for name, value in given.items()
    )


def load(path):
    """The weights of a result."""
    if path.suffix == '.safetensors':
        return safetensors.torch.load_file(path)
    content = torch.load(path, weights_only=True)
    assert list(content) == ['state_dict']
    return content['state_dict']


def convert(source, *arguments):
    tool.main([str(source), *map(str, arguments)])


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('origin', ORIGINS)
def test_origins(tmp_path, capsys, origin, suffix):
    make, renamed, left_out = ORIGINS[origin]
    source, target = tmp_path / 'source.pt', tmp_path / f'target{suffix}'
    torch.save(make(weights()), source)
    convert(source, target)
    assert equal(load(target), weights())
    # Nothing of the rest is in the file, nor the room it took.
    assert target.stat().st_size < 11_169_417 * 2 + 100_000
    assert target.stat().st_mode == source.stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ['source.pt', target.name]
    report = capsys.readouterr().out
    assert report.startswith(
        'ClusTR-tiny: 11,169,417 parameters in 220 tensors of float16\n'
        f'{220 - renamed} names as they are, {renamed} renamed'
    )
    assert f'\n{left_out}' in report and report.endswith(f'\nwrote {target}\n')


@pytest.mark.parametrize(
    ('cls', 'arch'),
    [(cls, arch) for cls, archs in tool.KNOWN.items() for arch in archs],
)
def test_every_backbone_is_known(cls, arch):
    with torch.device('meta'):
        content = with_prefix('backbone.', cls(arch).state_dict())
    model, found, sources = tool.find_backbone(content)
    assert (type(model), found) == (cls, arch)
    assert sources == {name: f'backbone.{name}' for name in model.state_dict()}


@pytest.mark.parametrize(
    'cfg', [dict(type='DualViT'), dict(type='LinGlo'), dict(type='STT', with_cls=True)]
)
def test_siblings(tmp_path, cfg):
    """With counters of batch norms; without what a classifier has no use for."""
    model = MODELS.build(cfg)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    convert(tmp_path / 'a.pth', tmp_path / 'b.pth')
    saved, own = load(tmp_path / 'b.pth'), model.state_dict()
    assert equal(saved, {k: v for k, v in own.items() if not k.startswith('cls.')})
    assert isinstance(model, STT) == (len(saved) < len(own))


def test_commands_of_the_page(tmp_path, monkeypatch):
    """As they are in docs/inference.md; MMEngine takes the .pth that they make."""
    root = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(tmp_path)
    expected = weights(torch.float32)
    torch.save(runner_checkpoint(expected), 'epoch_12.pth')
    page = (root / 'docs/inference.md').read_text()
    commands = re.findall(r'^python (tools/\S+) (\S+) (\S+)$', page, re.MULTILINE)
    for script, source, target in commands:
        subprocess.run([sys.executable, root / script, source, target], check=True)
    assert equal(load(Path('backbone.safetensors')), expected)
    model = ClusTR(init_cfg=dict(type='Pretrained', checkpoint='backbone.pth'))
    model.init_weights()
    assert equal(model.state_dict(), expected)


def test_dtypes_and_memory(tmp_path):
    """As they were, each parameter by itself, and back from safetensors."""
    content = {
        name: nn.Parameter(value.bfloat16()) if number % 2 else value
        for number, (name, value) in enumerate(weights().items())
    }
    large = torch.ones(20_000_000)
    content['stages.0.norm.weight'] = content[NORM] = large[:64]
    square = 'stages.0.blocks.0.attn.q.weight'
    content[square] = content[square].T.contiguous().T
    torch.save(content, tmp_path / 'a.pth')
    for source, target in [('a.pth', 'b.safetensors'), ('b.safetensors', 'c.pth')]:
        convert(tmp_path / source, tmp_path / target)
        assert equal(load(tmp_path / target), content)
        assert (tmp_path / target).stat().st_size < 11_169_417 * 2 + 100_000


def changed(**new):
    return lambda: {**weights(), **new}


#: Content -> what must be said of it.
WRONG = {
    'missing': (
        lambda: {k: v for k, v in weights().items() if k != NORM},
        r'is no ClusTR-tiny: .*219 of 220 .*missing: stages\.0\.norm\.bias',
    ),
    'no tensor': (
        changed(**{NORM: [0.0] * 64}),
        r'is no ClusTR-tiny: .*219 of 220 .*missing: stages\.0\.norm\.bias',
    ),
    'misshaped': (
        changed(**{NORM: torch.ones(3)}),
        r'is no ClusTR-tiny: .*stages\.0\.norm\.bias \(3,\) instead of \(64,\)',
    ),
    'a block more': (
        changed(**{'block4.1.norm1.weight': torch.ones(512)}),
        r'is no ClusTR-tiny: .*of more blocks: stages\.3\.blocks\.1\.norm1\.weight',
    ),
    'a stage more': (
        changed(**{'stages.4.x': torch.ones(1)}),
        r'is no ClusTR-tiny, which has no stages\.4\.x$',
    ),
    'twice': (
        changed(**{'norm1.bias': torch.ones(64)}),
        r'stages\.0\.norm\.bias and norm1\.bias are both stages\.0\.norm\.bias',
    ),
    'int32': (changed(**{NORM: torch.ones(64).int()}), 'bias holds no .*int32'),
    'meta': (changed(**{NORM: torch.ones(64, device='meta')}), 'bias holds no .*meta'),
    'sparse': (changed(**{NORM: torch.ones(64).to_sparse()}), 'bias holds no .*sparse'),
    'another arch': (weights, "is ClusTR-tiny, not 'small'"),
    'ResNet': (
        lambda: dict(state_dict={'conv1.weight': torch.ones(1), 'bn1.bias': 3}),
        r'holds no backbone of this package, but conv1\.weight, bn1\.bias$',
    ),
    'nothing': (dict, 'holds no backbone of this package, but nothing'),
    'a list': (lambda: [weights()], 'holds no state dict'),
    'a number': (lambda: dict(model={2: 3}), 'holds no state dict'),
    'a module': (lambda: nn.Linear(1, 1), r'cannot be read as .*torch\.nn\.modules'),
}


def refusal(capsys, *arguments):
    """The one line that the tool ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        convert(*arguments)
    message = end.value.code
    assert message.startswith('convert_checkpoint.py: ')
    assert '\n' not in message and len(message) < 600
    # No way round the safe loader is to be read here.
    assert 'weights_only` set to' not in message and 'Please use' not in message
    assert capsys.readouterr() == ('', '')
    return message


@pytest.mark.parametrize('case', WRONG)
def test_wrong_content(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    content, message = WRONG[case]
    torch.save(content(), 'source.pth')
    Path('target.pth').write_text('before')
    arch = ('--arch', 'small') if case == 'another arch' else ()
    said = refusal(capsys, 'source.pth', 'target.pth', '--overwrite', *arch)
    assert re.search('source.pth: .*' + message, said), said
    assert Path('target.pth').read_text() == 'before' and len(os.listdir()) == 2


@pytest.mark.parametrize('kind', HOSTILE + BROKEN)
@pytest.mark.parametrize('name', ['source.pth', 'source.safetensors'])
def test_no_checkpoint(tmp_path, monkeypatch, capsys, name, kind):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(make_file(kind, weights()))
    said = refusal(capsys, name, 'target.pth')
    reason = 'is empty' if kind == 'empty' else 'cannot be read as a checkpoint: '
    assert f'{name}: {reason}' in said
    assert os.listdir() == [name]


def test_places(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(weights(), 'source.pth')
    Path('folder.pth').mkdir()
    Path('link.pth').symlink_to('source.pth')
    Path('broken.pth').symlink_to('absent')
    Path('there.pth').write_text('before')
    before = sorted(os.listdir())
    for source, target, message in [
        ('source.pth', 'target.onnx', 'must end in .pth or .safetensors'),
        ('source.pth', 'nowhere/target.pth', 'there is no folder nowhere'),
        ('source.pth', 'folder.pth', 'folder.pth: is a folder'),
        ('source.pth', './source.pth', 'is the checkpoint to be read'),
        ('source.pth', 'link.pth', 'is the checkpoint to be read'),
        ('source.pth', 'there.pth', 'there.pth: is there already; --overwrite'),
        ('source.pth', 'broken.pth', 'is there already'),
        ('absent.pth', 'target.pth', 'absent.pth: there is no such file'),
        ('folder.pth', 'target.pth', 'folder.pth: is no regular file'),
    ]:
        assert message in refusal(capsys, source, target)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, 'find_spec', lambda _: None)
        said = refusal(capsys, 'source.pth', 'target.safetensors')
        assert 'pip install safetensors' in said
    Path('other.safetensors').write_text('x')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'safetensors.torch', None)
        assert 'pip install' in refusal(capsys, 'other.safetensors', 'target.pth')
    os.remove('other.safetensors')
    assert sorted(os.listdir()) == before and Path('there.pth').read_text() == 'before'
    convert('source.pth', 'there.pth', '--overwrite', '--arch', 'tiny')
    assert equal(load(Path('there.pth')), weights())
