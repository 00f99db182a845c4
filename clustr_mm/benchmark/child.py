"""The process in which a case runs once: its peak memory is that of the case.

Reads a pickled (case, limits), prints a line of JSON with ``peak`` and
``imports`` in bytes, or with ``error``.
"""

import json
import pickle
import resource
import sys
from pathlib import Path

import torch

from .cases import Case
from .memory import CaseError, Limits, describe


def main() -> None:
    """Run the case."""
    case, limits = pickle.load(sys.stdin.buffer)
    try:
        result = measure(case, limits)
    except Exception as error:
        result = dict(error=describe(error))
    print(f'\n{json.dumps(result)}', flush=True)


def measure(case: Case, limits: Limits) -> dict[str, int]:
    """Run the case once under the limit and look at the peak."""
    if limits.threads:
        torch.set_num_threads(limits.threads)
    case.load()
    # Starts the threads: their stacks shall not count against the limit.
    torch.rand(512, 512).mm(torch.rand(512, 512))
    imports = _peak_memory()
    if imports >= limits.memory:
        raise MemoryError
    _limit_data(limits.memory - imports)
    case.prepare().run()
    peak = _peak_memory()
    if peak > limits.memory:
        raise MemoryError
    return dict(peak=peak, imports=imports)


def _status(field: str) -> int:
    """A size from the kernel's record of this process, in bytes."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{field}:'):
            return int(line.split()[1]) * 1024
    raise CaseError(f'/proc/self/status has no {field}')


def _peak_memory() -> int:
    """Largest resident size so far, in bytes."""
    if Path('/proc/self/status').exists():
        # Not ru_maxrss: on Linux that starts from the parent's size.
        return _status('VmHWM')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def _limit_data(more: int) -> None:
    """Allow so many more bytes of memory, where the system keeps count."""
    if Path('/proc/self/status').exists():
        limit = _status('VmData') + more
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == '__main__':
    main()
