"""Put or remove a start-up file in the site-packages of this Python.

``mim test mmdet`` imports mmcv.ops before it reads the config that names clustr_mm.
With mmcv-lite that fails, unless the stand-in is known from the start of Python. With
the file, configs can also inherit from 'clustr_mm::mmdet/...'.
"""

import argparse
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ..files import write_whole
from .finder import VARIABLE

#: Without the package, after an uninstallation say, it does nothing.
START_UP = (
    "import importlib.util as u; s = u.find_spec('clustr_mm'); "
    "s = s and u.spec_from_file_location('_clustr_mm_finder', "
    "s.submodule_search_locations[0] + '/compat/finder.py'); "
    'm = s and u.module_from_spec(s); s and (s.loader.exec_module(m), m.start())\n'
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exits with 1 if site-packages cannot be written."""
    parser = argparse.ArgumentParser(
        prog='python -m clustr_mm.compat', description=__doc__
    )
    parser.add_argument('action', choices=('on', 'off', 'status'))
    action = parser.parse_args(argv).action
    file = Path(sysconfig.get_path('purelib'), 'clustr_mm.pth')
    there = file.is_file()
    try:
        if action == 'on':
            write_whole(file, START_UP.encode())
        elif action == 'off':
            file.unlink(missing_ok=True)
    except OSError as error:
        sys.exit(f'cannot change {file}: {error.strerror}')
    if action == 'on':
        print(f'on: {"renewed" if there else "wrote"} {file}')
    elif action == 'off':
        print(f'off: removed {file}' if there else 'off: there was no start-up file')
    elif not there:
        print(f'off: there is no {file}')
    elif file.read_text() == START_UP:
        print(f'on: {file}')
    else:
        print(f'on, but of another version: {file}; put it once more by `on`')
    if os.environ.get(VARIABLE) == '0':
        print(f'{VARIABLE}=0 is set: the file does nothing')


if __name__ == '__main__':
    main()
