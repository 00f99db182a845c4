"""Peak memory, and a limit that keeps the machine out of its swap."""

import gc
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .cases import Case, Prepared

MIB, GIB = 2**20, 2**30

OUT_OF_MEMORY = ('allocate memory', 'bad_alloc', 'out of memory')


class CaseError(Exception):
    """Why a case gives no numbers, in one short line."""


class Usage(NamedTuple):
    """Peak memory of a case.

    Attributes:
        peak (float): In MiB. On a CPU resident memory of a process that runs
            nothing else, on a GPU what tensors take.
        imports (float, optional): MiB of the peak that the process held
            before the case was built. None on a GPU.
    """

    peak: float
    imports: float | None = None


@dataclass(frozen=True)
class Limits:
    """Beyond these a case is given up; they apply on the CPU.

    Attributes:
        memory (int): Bytes that a process may hold.
        seconds (float): Duration of one call in a process of its own, its
            start included.
        threads (int, optional): Threads of PyTorch; None leaves them.
    """

    memory: int
    seconds: float = 600
    threads: int | None = None


def available_memory() -> int:
    """Bytes that can be taken without swapping, by the system or a container."""
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        fields = dict(line.split(':') for line in lines)
        available = int(fields['MemAvailable'].split()[0]) * 1024
    except (OSError, KeyError):
        available = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    try:
        cgroup = Path('/sys/fs/cgroup')
        most = int((cgroup / 'memory.max').read_text())
        available = min(available, most - int((cgroup / 'memory.current').read_text()))
    except (OSError, ValueError):
        pass
    return available


def describe(error: BaseException) -> str:
    """One short line about an exception."""
    text = str(error).strip()
    if isinstance(error, CaseError):
        return text
    if isinstance(error, MemoryError) or any(hint in text for hint in OUT_OF_MEMORY):
        return 'out of memory'
    line = f'{type(error).__name__}: {text.splitlines()[0] if text else "no message"}'
    return line if len(line) <= 120 else f'{line[:117]}...'


def probe_cpu(case: Case, limits: Limits) -> Usage:
    """Run a case once in a process of its own.

    Args:
        case (Case): What to run.
        limits (Limits): The process is refused more memory than this.

    Returns:
        Usage: Peak memory of the process.

    Raises:
        CaseError: If the case fails, runs out of memory or takes too long.
    """
    try:
        child = subprocess.run(
            [sys.executable, '-m', 'clustr_mm.benchmark.child'],
            input=pickle.dumps((case, limits)),
            capture_output=True,
            timeout=limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CaseError(f'takes longer than {limits.seconds:g} s') from None
    try:
        result = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        result = dict(error=_last_words(child))
    if result.get('error') == 'out of memory':
        raise CaseError(f'needs more than {limits.memory / GIB:.3g} GiB of memory')
    if 'error' in result:
        raise CaseError(result['error'])
    return Usage(result['peak'] / MIB, result['imports'] / MIB)


def _last_words(child: subprocess.CompletedProcess) -> str:
    """Why a process ended without a result."""
    lines = child.stderr.decode(errors='replace').strip().splitlines()
    # C++ code ends the process when it gets no memory.
    if any(hint in line for line in lines for hint in OUT_OF_MEMORY):
        return 'out of memory'
    if child.returncode < 0:
        return f'its process was ended by signal {-child.returncode}'
    return lines[-1][:120] if lines else f'its process ended with {child.returncode}'


def probe_cuda(case: Case) -> tuple[Prepared, Usage]:
    """Prepare a case on a GPU and run it once.

    Args:
        case (Case): What to run.

    Returns:
        tuple[Prepared, Usage]: The case, ready to be timed, and the memory of
        its tensors; other tensors on the device do not count.
    """
    torch.cuda.reset_peak_memory_stats(case.device)
    before = torch.cuda.memory_allocated(case.device)
    prepared = case.prepare()
    prepared.run()
    torch.cuda.synchronize(case.device)
    peak = torch.cuda.max_memory_allocated(case.device) - before
    return prepared, Usage(peak / MIB)


def free_memory() -> None:
    """Give back what finished cases held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
