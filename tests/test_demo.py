"""What the demo keeps of an interrupted training, and what it prints of one."""

import os

import demo
import pytest


def test_the_last_checkpoint_of_an_interrupted_training(tmp_path):
    source, train = tmp_path / 'config.py', tmp_path / 'train'
    source.touch()
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
    time = record.stat().st_mtime_ns + 1
    os.utime(source, ns=(time, time))
    assert demo.find_last(train, source) is None


@pytest.mark.parametrize('works', [True, False])
def test_progress_is_short_and_the_log_is_whole(tmp_path, monkeypatch, capsys, works):
    lines = [
        'loading',
        'Iter(train) [ 20/500]  lr: 1e-3  eta: 0:05:00  time: 0.4  loss: 2.5',
    ]
    lines += [
        f'Iter(train) [{n}/500]  eta: 1 day, 0:04:00  time: 0.4  loss: 0.75'
        for n in (100, 120)
    ]
    (tmp_path / 'mim').mkdir()
    script = f'print({chr(10).join(lines)!r})\n' + ('' if works else 'exit("no data")')
    (tmp_path / 'mim/__init__.py').touch()
    (tmp_path / 'mim/__main__.py').write_text(script)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    if works:
        demo.mim('train', tmp_path / 'train')
    else:
        with pytest.raises(SystemExit, match=r'mim train failed, see .*log: no data$'):
            demo.mim('train', tmp_path / 'train')
    command, *progress = capsys.readouterr().out.splitlines()
    assert command.startswith('$ mim train mmseg configs/mmseg/fpn_clustr-t_toy')
    assert command.endswith(f'> {tmp_path}/train.log')
    assert progress == ['iteration 100 of 500  loss 0.750  1 day, 0:04:00 left']
    printed = (tmp_path / 'train.log').read_text().splitlines()
    assert printed == lines + ([] if works else ['no data'])
