"""What the demo keeps of an interrupted training."""

import importlib.util
import os
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / 'tools/demo.py'


@pytest.fixture(scope='module')
def demo():
    spec = importlib.util.spec_from_file_location('demo', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_last_checkpoint_of_an_interrupted_training(demo, tmp_path):
    source = tmp_path / 'config.py'
    source.touch()
    train = tmp_path / 'train'
    assert demo.find_last(train, source) is None
    train.mkdir()
    first, second = train / 'iter_100.pth', train / 'iter_200.pth'
    first.touch()
    # Before there is a record of it, a file may be a part of one.
    assert demo.find_last(train, source) is None
    record = train / 'last_checkpoint'
    record.write_text(f'/elsewhere/{first.name}')
    assert demo.find_last(train, source) == first
    # The runner deletes the one before it writes the next.
    second.touch()
    assert demo.find_last(train, source) == first
    first.unlink()
    assert demo.find_last(train, source) is None
    record.write_text(str(second))
    assert demo.find_last(train, source) == second
    source.write_text('changed')
    stat = record.stat()
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert demo.find_last(train, source) is None
