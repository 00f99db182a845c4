"""Files are written all or nothing."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from clustr_mm.files import write_whole


def test_several_writers_of_one_file(tmp_path):
    """One of them wins, and each has written all of its own."""
    contents = [bytes([number]) * 100_000 for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda content: write_whole(tmp_path / 'file', content), contents)
        )
    assert (tmp_path / 'file').read_bytes() in contents
    assert os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('function', ['fsync', 'replace'])
@pytest.mark.parametrize('error', [OSError(28, 'No space left'), KeyboardInterrupt()])
def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch, function, error):
    def fail(*_):
        raise error

    write_whole(tmp_path / 'file', b'before')
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        write_whole(tmp_path / 'file', b'after')
    assert os.listdir(tmp_path) == ['file']
    assert (tmp_path / 'file').read_bytes() == b'before'
