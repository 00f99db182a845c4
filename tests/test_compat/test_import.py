"""What importing the package changes outside of it, in fresh interpreters."""

import os
import subprocess
import sys

import pytest

from clustr_mm.compat.safe_load import HAS_ALLOW_LIST

#: Prints what differs after the import; the start-up file's finders go before it.
CODE = """
import sys
import torch
import mmengine.model, mmengine.runner  # which add to torch's list themselves
from mmengine.config import utils
from torch.nn.modules import module
if 'old torch' in sys.argv and hasattr(torch.serialization, 'get_safe_globals'):
    del torch.serialization.get_unsafe_globals_in_checkpoint
ours = ('StandInFinder', 'ConfigsFinder')
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ not in ours]
utils.MODULE2PACKAGE.pop('clustr_mm', None)

def look():
    allowed = getattr(torch.serialization, 'get_safe_globals', list)()
    hooks = {k: v for k, v in vars(module).items() if k.startswith('_global_')}
    return dict(
        finders=[type(finder).__name__ for finder in sys.meta_path],
        allowed=set(map(str, allowed)),
        hooks=str(hooks),
        configs=dict(utils.MODULE2PACKAGE),
    )

before = look()
import clustr_mm
after = look()
print(*(key for key in before if before[key] != after[key]))
print(*after['finders'][len(before['finders']):])
"""


@pytest.mark.parametrize('switch', ['0', '1'])
@pytest.mark.parametrize('torch', ['this torch', 'old torch'])
@pytest.mark.parametrize('mmcv', ['lite', 'compiled'])
def test_only_what_is_needed_changes(tmp_path, mmcv, torch, switch):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').touch()
    if mmcv == 'compiled':
        (package / '_ext.py').touch()
    done = subprocess.run(
        [sys.executable, '-c', CODE, torch],
        env={**os.environ, 'CLUSTR_MM_COMPAT': switch, 'PYTHONPATH': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    needed = {
        'finders': mmcv == 'lite',
        'allowed': HAS_ALLOW_LIST and torch == 'this torch',
    }
    changed, finders = done.stdout.splitlines()
    assert changed.split() == [k for k in needed if needed[k] and switch == '1']
    assert finders == ('StandInFinder' if 'finders' in changed else '')
