"""Print what is installed, whether it works together, and what to do if not.

Exits with 0 if nothing fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict

from .checks import run_checks
from .records import FAIL, WARN, Check


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what others print off stdout, be they written in Python or not."""
    sys.stdout.flush()
    saved = os.dup(1)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        logging.disable(disabled)


def format_check(check: Check) -> str:
    """One check for people to read, the hint on a line of its own."""
    line = f'[{check.status:^4}] {check.name}: {check.text}'
    return line + (f'\n       -> {check.hint}' if check.hint else '')


def summarise(checks: Sequence[Check]) -> str:
    """Count what is not as it should be."""
    counts = {
        status: sum(check.status == status for check in checks)
        for status in (FAIL, WARN)
    }
    return f'{counts[FAIL]} failed, {counts[WARN]} warnings'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks.

    Args:
        argv (Sequence[str], optional): Arguments, by default the command line's.

    Returns:
        int: Exit status, 1 if a check failed.
    """
    parser = argparse.ArgumentParser(
        prog='python -m clustr_mm.doctor', description=__doc__
    )
    parser.add_argument('--json', action='store_true', help='print the same as JSON')
    args = parser.parse_args(argv)
    with quiet():
        checks = list(run_checks())
    failed = any(check.status == FAIL for check in checks)
    if args.json:
        result = dict(ok=not failed, checks=[asdict(check) for check in checks])
        print(json.dumps(result, indent=1))
    else:
        print(*map(format_check, checks), summarise(checks), sep='\n')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
