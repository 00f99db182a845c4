"""Checkpoints of MMEngine's runner under ``torch.load(weights_only=True)``."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from torch_versions import restricted

from clustr_mm.compat import activate, safe_load

NUMBER_CODES = sorted('?' + np.typecodes['AllInteger'] + np.typecodes['AllFloat'])


def save_pickle(path: Path, payload: bytes) -> Path:
    """Write a checkpoint file whose pickled part is ``payload``."""
    frame = io.BytesIO()
    torch.save(None, frame)
    with zipfile.ZipFile(frame) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            is_pickle = name.endswith('data.pkl')
            target.writestr(name, payload if is_pickle else source.read(name))
    return path


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def message_hub() -> MessageHub:
    hub = MessageHub('test_safe_load')
    for value in (3.0, 1.0, 2.0):
        hub.update_scalar('train/loss', value)
    hub.update_info('best_score', np.float64(0.25))
    return hub


@restricted
def test_message_hub(tmp_path):
    file = tmp_path / 'epoch_1.pth'
    torch.save(dict(message_hub=message_hub().state_dict()), file)
    hub = MessageHub('test_safe_load_copy')
    hub.load_state_dict(torch.load(file, weights_only=True)['message_hub'])

    history = hub.get_scalar('train/loss')
    assert isinstance(history, HistoryBuffer)
    assert history.data[0].tolist() == [3.0, 1.0, 2.0]
    results = [history.statistics(name) for name in ('min', 'max', 'current', 'mean')]
    assert results == [1.0, 3.0, 2.0, 2.0]
    assert hub.get_info('best_score') == 0.25


@restricted
@pytest.mark.parametrize('code', NUMBER_CODES)
def test_numpy_numbers(tmp_path, code):
    array = np.array([[1, 0, 1]], dtype=code)
    content = dict(array=array, column=array.T, scalar=array[0, 0])
    torch.save(content, tmp_path / 'file.pth')
    loaded = torch.load(tmp_path / 'file.pth', weights_only=True)
    for name, value in content.items():
        assert isinstance(loaded[name], np.ndarray) == isinstance(value, np.ndarray)
        assert loaded[name].dtype == value.dtype
        assert np.array_equal(loaded[name], value)


@restricted
@pytest.mark.parametrize('core', [b'numpy.core', b'numpy._core'])
def test_files_of_either_numpy(tmp_path, core):
    payload = pickle.dumps([np.arange(3.0), np.float64(2.5)], protocol=2)
    payload = payload.replace(b'numpy._core', b'numpy.core')
    assert payload.count(b'numpy.core.multiarray') == 2
    payload = payload.replace(b'numpy.core', core)
    file = save_pickle(tmp_path / 'file.pth', payload)
    array, scalar = torch.load(file, weights_only=True)
    assert array.tolist() == [0.0, 1.0, 2.0] and scalar == 2.5


@restricted
@pytest.mark.parametrize(
    'function, template',
    [
        (os.system, 'echo > {}'),
        (eval, "open({!r}, 'w')"),
        (exec, "open({!r}, 'w')"),
        (os.mkdir, '{}'),
    ],
)
def test_hostile_file_does_not_run(tmp_path, function, template):
    marker = tmp_path / 'marker'
    payload = pickle.dumps(Call(function, template.format(str(marker))), protocol=2)
    file = save_pickle(tmp_path / 'file.pth', payload)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    assert not marker.exists()


@restricted
@pytest.mark.parametrize(
    'args',
    [
        (os, 'system'),
        (torch, 'load'),
        (HistoryBuffer, '__init__'),
        (HistoryBuffer, 'register_statistics'),
        (HistoryBuffer.min, '__globals__'),
        (np.ndarray, 'min'),
        (HistoryBuffer(), 'min'),
        (HistoryBuffer, ['min']),
        (HistoryBuffer, 'min', None),
        (HistoryBuffer,),
        (),
    ],
)
def test_getattr_answers_for_the_statistics_only(args):
    allowed = {
        entry[1]: entry[0]
        for entry in torch.serialization.get_safe_globals()
        if isinstance(entry, tuple)
    }
    with pytest.raises(pickle.UnpicklingError, match='only HistoryBuffer'):
        allowed['builtins.getattr'](*args)
    minimum = allowed['builtins.getattr'](HistoryBuffer, 'min')
    assert minimum is HistoryBuffer.min


@restricted
@pytest.mark.parametrize(
    'args',
    [
        (HistoryBuffer, '__init__'),
        (HistoryBuffer, 'register_statistics'),
        (Call(getattr, HistoryBuffer, 'min'), '__globals__'),
        (np.ndarray, 'tofile'),
    ],
)
def test_file_cannot_reach_other_attributes(tmp_path, args):
    payload = pickle.dumps(Call(getattr, *args), protocol=2)
    file = save_pickle(tmp_path / 'file.pth', payload)
    with pytest.raises(pickle.UnpicklingError, match='only HistoryBuffer'):
        torch.load(file, weights_only=True)


@restricted
def test_everything_else_is_still_refused(tmp_path):
    for content in (
        np.array(['text', None], dtype=object),
        np.zeros(2, dtype=[('field', 'f4')]),
        np.random.RandomState(0),
        Path('file'),
        Call(HistoryBuffer.min, 1),
    ):
        torch.save(content, tmp_path / 'file.pth')
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / 'file.pth', weights_only=True)


@restricted
def test_real_getattr_is_not_on_the_list():
    entries = torch.serialization.get_safe_globals()
    functions = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
    assert all(function is not getattr for function in functions)
    assert torch.load.__module__ == 'torch.serialization'


@restricted
def test_activate_twice_changes_nothing():
    before = set(torch.serialization.get_safe_globals())
    activate()
    assert set(torch.serialization.get_safe_globals()) == before


@restricted
def test_a_getattr_that_the_user_allowed_stays(tmp_path):
    """Of two entries under one name torch takes any."""
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([getattr])
        safe_load.allow_runner_checkpoints()
        after = torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert getattr in after and HistoryBuffer in after
    names = [entry[1] for entry in after if isinstance(entry, tuple)]
    assert names and 'builtins.getattr' not in names


def test_older_torch_is_left_alone(monkeypatch):
    monkeypatch.setattr(safe_load, 'HAS_ALLOW_LIST', False)
    monkeypatch.delattr(torch.serialization, 'add_safe_globals', raising=False)
    safe_load.allow_runner_checkpoints()
