"""Checkpoints of all origins, and what is none, into files of a backbone."""

import functools
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from broken_files import make_file
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch_versions import restricted

import clustr_mm.files
from clustr_mm import ClusTR
from clustr_mm.conversion import ARCHS, convert_checkpoint, extract_backbone

pytestmark = restricted
ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = dict(tiny=11_169_417, small=22_177_941, base=39_733_210)


@pytest.fixture(scope='module')
def tool():
    path = ROOT / 'tools/convert_checkpoint.py'
    spec = importlib.util.spec_from_file_location('convert_checkpoint', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def weights(arch='tiny', dtype=torch.float16):
    """Random numbers for every parameter; not to be changed."""
    with torch.device('meta'):
        names = ClusTR(arch).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator).to(dtype)
        for name, value in names.items()
    }


def with_prefix(prefix, state_dict):
    return {prefix + name: value for name, value in state_dict.items()}


def public(state_dict):
    """The names of the authors' code."""
    renamed = {}
    for name, value in state_dict.items():
        _, stage, part, rest = name.split('.', 3)
        number = int(stage) + 1
        start = {'blocks': f'block{number}.', 'norm': f'norm{number}.'}
        name = start.get(part, f'patch_embed{number}.') + rest
        name = name.replace('.attn.importance.', '.attn.weight_layer.')
        name = name.replace('.ffn.dwconv.', '.mlp.dwconv.dwconv.')
        renamed[name.replace('.ffn.', '.mlp.')] = value
    return renamed


def history():
    buffer = HistoryBuffer()
    buffer.update(0.5)
    return buffer


HEAD = {'head.weight': torch.zeros(2, 512), 'head.bias': torch.zeros(2)}
NECK = {f'neck.convs.{i}.weight': torch.zeros(1) for i in range(4)}
ORIGINS = {
    'own backbone': lambda w: w,
    'public classifier': lambda w: {**public(w), **HEAD},
    'public training': lambda w: dict(
        model={**public(w), **HEAD}, epoch=3, args=Namespace(lr=0.1), optimizer={}
    ),
    'public, parallel': lambda w: dict(model=with_prefix('module.', public(w))),
    'mmpretrain': lambda w: dict(
        meta=dict(epoch=300), state_dict={**with_prefix('backbone.', w), **HEAD}
    ),
    'runner': lambda w: dict(
        meta=dict(cfg='x = 1'),
        message_hub=dict(log_scalars=dict(loss=history()), best=np.float64(0.5)),
        optimizer=dict(state={0: dict(exp_avg=torch.zeros(3))}, param_groups=[]),
        state_dict={**with_prefix('module.backbone.', w), **NECK},
    ),
}


def equal(given, expected):
    return list(given) == list(expected) and all(
        value.dtype == expected[name].dtype and torch.equal(value, expected[name])
        for name, value in given.items()
    )


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('origin', ORIGINS)
def test_origins(tmp_path, origin, suffix):
    source, target = tmp_path / 'source.pt', tmp_path / f'target{suffix}'
    content = ORIGINS[origin](weights())
    torch.save(content, source)
    conversion = convert_checkpoint(source, target)
    if suffix == '.pth':
        saved = torch.load(target, weights_only=True)
        assert list(saved) == ['state_dict']
        saved = saved['state_dict']
    else:
        saved = safetensors.torch.load_file(target)
        saved = {name: saved[name] for name in weights()}
    assert equal(saved, weights())
    assert conversion.arch == 'tiny'
    assert conversion.num_parameters == PARAMETERS['tiny']
    assert len(conversion.renamed) == (0 if origin == 'own backbone' else 220)
    assert sorted(os.listdir(tmp_path)) == ['source.pt', target.name]
    # Nothing of the rest is in the file, nor the room it took.
    assert target.stat().st_size < PARAMETERS['tiny'] * 2 + 100_000


@pytest.mark.parametrize('arch', ARCHS)
def test_archs(arch):
    state_dict = weights(arch)
    for content in (state_dict, with_prefix('backbone.', public(state_dict))):
        for asked in ('auto', arch):
            conversion = extract_backbone(content, asked)
            assert conversion.arch == arch
            assert equal(conversion.weights, state_dict)
            assert conversion.num_parameters == PARAMETERS[arch]
    other = ARCHS[ARCHS.index(arch) - 1]
    # Every name of the tiny one is in the small one, in the same shape.
    with pytest.raises(ValueError, match=f'is ClusTR-{arch}, not ClusTR-{other}'):
        extract_backbone(state_dict, other)
    with pytest.raises(ValueError, match="arch must be one of .*, got 'huge'"):
        extract_backbone(state_dict, 'huge')


def test_result_loads_by_init_cfg(tmp_path):
    """MMEngine takes the .pth; the .safetensors by the line of the help."""
    source = tmp_path / 'source.pth'
    expected = weights(dtype=torch.float32)
    torch.save(ORIGINS['public training'](expected), source)
    for name in ('new.pth', 'new.safetensors'):
        convert_checkpoint(source, tmp_path / name)
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'new.pth'))
    model = ClusTR('tiny', init_cfg=pretrained)
    model.init_weights()
    assert equal(model.state_dict(), expected)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = ClusTR('tiny')

    model, file = Model(), tmp_path / 'new.safetensors'
    model.backbone.load_state_dict(safetensors.torch.load_file(file))
    assert equal(model.backbone.state_dict(), expected)
    pretrained = dict(type='Pretrained', checkpoint=str(file))
    model = ClusTR('tiny', init_cfg=pretrained)
    try:
        model.init_weights()
    except pickle.UnpicklingError:
        pass  # torch.load of this version does not know the format
    else:
        assert equal(model.state_dict(), expected)


def test_dtypes_and_memory(tmp_path):
    """As they were, each parameter by itself."""
    flat = torch.zeros(PARAMETERS['tiny'] * 2)
    content, start = {}, 0
    for number, (name, value) in enumerate(weights().items()):
        content[name] = flat[start : start + value.numel()].view_as(value)
        if number % 2:
            content[name] = nn.Parameter(value.bfloat16())
        start += value.numel()
    shared = torch.ones(64)
    content['stages.0.norm.weight'] = content['stages.0.norm.bias'] = shared
    square = weights()['stages.0.blocks.0.attn.q.weight']
    content['stages.0.blocks.0.attn.q.weight'] = square.T.contiguous().T
    for name in ('a.pth', 'a.safetensors'):
        torch.save(content, tmp_path / 'source.pth')
        conversion = convert_checkpoint(tmp_path / 'source.pth', tmp_path / name)
        assert equal(conversion.weights, content)
        assert (tmp_path / name).stat().st_size < PARAMETERS['tiny'] * 4
    # Back and forth.
    convert_checkpoint(tmp_path / 'a.safetensors', tmp_path / 'b.pth')
    saved = torch.load(tmp_path / 'b.pth', weights_only=True)['state_dict']
    assert equal(saved, content)
    assert all(type(value) is torch.Tensor for value in saved.values())


def without(name):
    return {k: v for k, v in weights().items() if k != name}


WRONG = {
    'missing': (
        lambda: without('stages.1.blocks.0.attn.kv2.bias'),
        r'is no ClusTR-tiny: .*219 of 220 .*missing: stages\.1\.blocks\.0\.attn\.kv2',
    ),
    'misshaped': (
        lambda: {
            **weights(),
            'stages.0.patch_embed.proj.weight': torch.ones(64, 4, 7, 7),
        },
        r'patch_embed\.proj\.weight \(64, 4, 7, 7\) instead of \(64, 3, 7, 7\)',
    ),
    'a block less': (
        lambda: {k: v for k, v in weights().items() if 'stages.2.blocks.5' not in k},
        'no ClusTR of a known arch: its stages 0, 1, 2, 3 have 1, 2, 5, 1 blocks; '
        'tiny has 1, 2, 6, 1; small has 3, 5, 13, 2; ',
    ),
    'a block more': (
        lambda: {**weights(), 'block4.1.norm1.weight': torch.ones(512)},
        'its stages 0, 1, 2, 3 have 1, 2, 6, 2 blocks',
    ),
    'a stage more': (
        lambda: {**weights(), 'stages.4.blocks.0.norm1.weight': torch.ones(512)},
        'its stages 0, 1, 2, 3, 4 have 1, 2, 6, 1, 1 blocks',
    ),
    'a stage less': (
        lambda: {k: v for k, v in weights().items() if 'stages.3' not in k},
        'its stages 0, 1, 2 have 1, 2, 6 blocks',
    ),
    'another norm': (
        lambda: {**weights(), 'stages.0.norm.running_mean': torch.ones(64)},
        r'parameters that this one has not: stages\.0\.norm\.running_mean',
    ),
    'twice': (
        lambda: {**weights(), 'norm1.weight': torch.ones(64)},
        r'stages\.0\.norm\.weight and norm1\.weight are both stages\.0\.norm\.weight',
    ),
    'integers': (
        lambda: {**weights(), 'stages.0.norm.bias': torch.ones(64, dtype=torch.int)},
        r'stages\.0\.norm\.bias holds no floating-point numbers .*int32',
    ),
    'meta': (
        lambda: {**weights(), 'stages.0.norm.bias': torch.ones(64, device='meta')},
        r'stages\.0\.norm\.bias holds no floating-point numbers .*meta',
    ),
    'sparse': (
        lambda: {**weights(), 'stages.0.norm.bias': torch.ones(64).to_sparse()},
        r'stages\.0\.norm\.bias holds no floating-point numbers .*sparse',
    ),
    'rows': (
        lambda: {
            k: v.to_sparse_csr() if v.ndim == 2 else v for k, v in weights().items()
        },
        r' holds no floating-point numbers .*sparse_csr',
    ),
    'a stage far away': (
        lambda: {**weights(), 'stages.10000000000.blocks.0.x': torch.ones(1)},
        r'its stages 0, 1, 2, 3, 10000000000 have 1, 2, 6, 1, 1 blocks',
    ),
    'no tensor': (
        lambda: {**weights(), 'stages.0.norm.bias': [0.0] * 64},
        r'219 of 220 .*missing: stages\.0\.norm\.bias',
    ),
    'ResNet': (
        lambda: dict(
            state_dict={'conv1.weight': torch.ones(1), 'bn1.bias': torch.ones(1)}
        ),
        r'holds no ClusTR backbone, but conv1\.weight, bn1\.bias$',
    ),
    'nothing': (dict, 'holds no ClusTR backbone, but nothing'),
    'a list': (lambda: [weights()], 'holds no state dict'),
    'numbers': (lambda: {1: torch.ones(1)}, 'holds no state dict'),
    'a number': (lambda: dict(model={2: 3}), 'holds no state dict'),
    'a module': (lambda: nn.Linear(1, 1), r'Unsupported global: GLOBAL torch\.nn\.mod'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_content(tmp_path, capsys, tool, case):
    content, message = WRONG[case]
    source, target = tmp_path / 'source.pth', tmp_path / 'target.pth'
    torch.save(content(), source)
    target.write_text('before')
    said = refused(tool, capsys, source, target, '--overwrite')
    assert said.startswith(f'convert_checkpoint.py: {source}: ')
    assert re.search(message, said), said
    assert target.read_text() == 'before'
    assert len(os.listdir(tmp_path)) == 2


def refused(tool, capsys, *arguments):
    """The one line that the tool ends with."""
    with pytest.raises(SystemExit) as end:
        tool.main(list(map(str, arguments)))
    message = end.value.code
    assert message.startswith('convert_checkpoint.py: ')
    assert '\n' not in message and len(message) < 600
    # No way round the safe loader is to be read here.
    assert 'weights_only` set to' not in message and 'Please use' not in message
    assert capsys.readouterr() == ('', '')
    return message


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('hostile', 'GLOBAL posix.system'),
        ('hostile, old format', 'GLOBAL posix.system'),
        ('namespace with a call', 'GLOBAL posix.system'),
        ('plain pickle', 'cannot be read as a checkpoint: '),
        ('truncated', 'cannot be read as a checkpoint: '),
        ('zip', 'cannot be read as a checkpoint: '),
        ('script', 'TorchScript'),
        ('objects', 'cannot be read as a checkpoint: '),
        ('text', 'cannot be read as a checkpoint: KeyError'),
        ('empty', 'is empty'),
    ],
)
def test_no_checkpoint(tmp_path, monkeypatch, capsys, tool, kind, message):
    monkeypatch.chdir(tmp_path)
    for name in ('source.pth', 'source.safetensors'):
        Path(name).write_bytes(make_file(kind, weights()))
        said = refused(tool, capsys, name, 'target.pth')
        assert name in said
        assert message in said if name == 'source.pth' else True
        Path(name).unlink()
    assert not os.listdir(tmp_path)


def test_truncated_safetensors(tmp_path, capsys, tool):
    source = tmp_path / 'source.safetensors'
    safetensors.torch.save_file(weights(), source)
    os.truncate(source, source.stat().st_size - 10)
    message = refused(tool, capsys, source, tmp_path / 'target.pth')
    assert 'cannot be read as a checkpoint' in message


def test_places(tmp_path, monkeypatch, capsys, tool):
    source = tmp_path / 'source.pth'
    torch.save(weights(), source)
    (tmp_path / 'folder.pth').mkdir()
    (tmp_path / 'link.pth').symlink_to(source)
    os.link(source, tmp_path / 'same.pth')
    (tmp_path / 'broken.pth').symlink_to(tmp_path / 'absent')
    (tmp_path / 'there.pth').write_text('before')
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    for target, message, overwrite in [
        ('target.onnx', 'must end in .pth or .safetensors', True),
        ('target', 'must end in', True),
        ('nowhere/target.pth', 'there is no folder nowhere', True),
        ('folder.pth', 'is a folder', True),
        ('source.pth', 'is the checkpoint to be read', True),
        ('./source.pth', 'is the checkpoint to be read', False),
        ('link.pth', 'is the checkpoint to be read', True),
        ('same.pth', 'is the checkpoint to be read', True),
        ('there.pth', 'there.pth: is there already; --overwrite', False),
        ('broken.pth', 'is there already', False),
    ]:
        options = ['--overwrite'] if overwrite else []
        assert message in refused(tool, capsys, source, target, *options)
    for absent, message in [
        ('absent.pth', 'absent.pth: there is no such file'),
        ('folder.pth', 'folder.pth: is no regular file'),
        ('/dev/null', 'is no regular file'),
        ('absent.safetensors', 'there is no such file'),
    ]:
        assert message in refused(tool, capsys, absent, 'target.pth')
    assert sorted(os.listdir(tmp_path)) == before
    assert Path('there.pth').read_text() == 'before'

    tool.main(['source.pth', 'there.pth', '--overwrite', '--arch', 'tiny'])
    assert equal(torch.load('there.pth', weights_only=True)['state_dict'], weights())
    assert 'is ClusTR-tiny, not' in refused(
        tool,
        capsys.__class__ and _Drained(capsys),
        source,
        'new.pth',
        '--arch',
        'small',
    )


class _Drained:
    """Output of earlier successes is of no interest."""

    def __init__(self, capsys):
        capsys.readouterr()
        self.readouterr = capsys.readouterr


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('error', [OSError(28, 'No space left'), KeyboardInterrupt()])
def test_never_a_part_of_a_file(tmp_path, monkeypatch, error, suffix):
    source, target = tmp_path / 'source.pth', tmp_path / f'target{suffix}'
    torch.save(weights(), source)
    target.write_text('before')

    def fail(*_):
        # It is in the same folder that the file is made.
        assert len(os.listdir(tmp_path)) == 3
        raise error

    for function in ('fsync', 'replace'):
        with monkeypatch.context() as patch:
            patch.setattr(clustr_mm.files.os, function, fail)
            with pytest.raises(type(error)):
                convert_checkpoint(source, target, overwrite=True)
        assert sorted(os.listdir(tmp_path)) == ['source.pth', target.name]
        assert target.read_text() == 'before'


def test_permissions_of_the_result(tmp_path):
    torch.save(weights(), tmp_path / 'source.pth')
    convert_checkpoint(tmp_path / 'source.pth', tmp_path / 'target.pth')
    mode = (tmp_path / 'source.pth').stat().st_mode
    assert (tmp_path / 'target.pth').stat().st_mode == mode


def test_without_safetensors(tmp_path, monkeypatch, capsys, tool):
    torch.save(weights(), tmp_path / 'source.pth')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
    message = refused(
        tool, capsys, tmp_path / 'source.pth', tmp_path / 'target.safetensors'
    )
    assert 'pip install safetensors' in message
    (tmp_path / 'other.safetensors').write_text('x')
    message = refused(
        tool, capsys, tmp_path / 'other.safetensors', tmp_path / 'target.pth'
    )
    assert 'pip install safetensors' in message
    convert_checkpoint(tmp_path / 'source.pth', tmp_path / 'target.pth')


def test_averaged_weights():
    """MMEngine's hook itself puts them where they are taken from."""
    model = nn.Linear(1, 1, bias=False)
    hook = EMAHook()
    hook.src_model, hook.ema_model = model, ExponentialMovingAverage(model)
    for value, network in [(1.0, model), (2.0, hook.ema_model.module)]:
        nn.init.constant_(network.weight, value)
    saved = dict(state_dict=dict(model.state_dict()))
    hook.before_save_checkpoint(None, saved)
    assert saved['state_dict']['weight'] == 2
    assert saved['ema_state_dict']['module.weight'] == 1

    for entry in ('ema_state_dict', 'model_ema'):
        other = with_prefix('module.', {k: v + 1 for k, v in weights().items()})
        conversion = extract_backbone({**weights(), entry: other})
        assert equal(conversion.weights, weights())
        (note,) = conversion.notes
        assert entry in note and 'ignored' in note
        assert note in conversion.report().splitlines()
        assert entry in conversion.left_out
    assert not extract_backbone(weights()).notes


def test_report(tmp_path, capsys, tool):
    torch.save(ORIGINS['runner'](weights()), tmp_path / 'epoch_12.pth')
    tool.main([str(tmp_path / 'epoch_12.pth'), str(tmp_path / 'new.pth')])
    assert capsys.readouterr().out.splitlines() == [
        'ClusTR-tiny: 11,169,417 parameters in 220 tensors of float16',
        '0 names as they are, 220 renamed, such as '
        'module.backbone.stages.0.patch_embed.proj.weight to '
        'stages.0.patch_embed.proj.weight',
        '7 left out: meta, message_hub, optimizer, neck (4)',
        f'wrote {tmp_path / "new.pth"}',
    ]
    torch.save({**weights(), **{f'x{i}': 0 for i in range(999)}}, tmp_path / 'x.pth')
    tool.main([str(tmp_path / 'x.pth'), str(tmp_path / 'y.pth')])
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith('999 left out: x0, x1') and len(line) < 250


def test_command_line(tmp_path):
    torch.save(public(weights()), tmp_path / 'public.pth')

    tool = ROOT / 'tools/convert_checkpoint.py'
    done = subprocess.run(
        [sys.executable, tool, 'public.pth', 'new.safetensors'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, '')
    saved = safetensors.torch.load_file(tmp_path / 'new.safetensors')
    assert saved.keys() == weights().keys()
