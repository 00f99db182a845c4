"""What several tools of this folder need."""

import argparse
import importlib
import platform
import re
import sys
from collections.abc import Callable
from importlib import metadata
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from clustr_mm.files import shorten

PACKAGES = (
    *('torch', 'triton', 'numpy', 'mmengine', 'mmcv', 'mmcv-lite', 'clustr_mm'),
    *('mmdet', 'mmsegmentation', 'mmpose', 'mmpretrain', 'timm'),
)


def command_line(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for a tool; an error takes one line and exits with status 2."""
    parser = argparse.ArgumentParser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda text: parser.exit(2, f'{name}: {text}\n')
    return parser


def at_least(least: float, kind: type = int) -> Callable[[str], float]:
    """A type of numbers for the command line."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float('nan')
        if not value >= least:
            raise argparse.ArgumentTypeError(f'must be at least {least}, got {text!r}')
        return value

    return parse


def import_extra(name: str) -> ModuleType:
    """Import what only tools need, or end with a sentence on how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        tool = Path(sys.argv[0]).name
        raise SystemExit(
            f"{tool} needs {name} ({error}): pip install 'clustr_mm[tools]'"
        ) from error


def to_png(figure: Any) -> bytes:
    """A figure of matplotlib as a PNG file."""
    file = BytesIO()
    figure.savefig(file, dpi=120, format='png')
    return file.getvalue()


def describe(error: BaseException) -> str:
    """One short line about an exception."""
    hints = ('allocate memory', 'bad_alloc', 'out of memory')
    if isinstance(error, MemoryError) or any(hint in str(error) for hint in hints):
        return 'out of memory'
    return f'{type(error).__name__}: {shorten(error, 120)}'


def device_name(device: str) -> str:
    """What the device calls itself."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    path = Path('/proc/cpuinfo')
    found = path.exists() and re.search(r'model name\s*: (.*)', path.read_text())
    return found[1] if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of what is installed of ``PACKAGES``."""
    found = {each.metadata['Name']: each.version for each in metadata.distributions()}
    installed = {name: found[name] for name in PACKAGES if name in found}
    return dict(python=platform.python_version(), **installed)


def parse_shape(text: str, like: str) -> tuple[int, ...]:
    """Read as many numbers as ``like`` has; one is enough for height and width."""
    is_shape = re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', text)
    numbers = tuple(map(int, text.split('x'))) if is_shape else ()
    wanted = like.count('x') + 1
    if wanted == 2 and len(numbers) == 1:
        numbers *= 2
    if len(numbers) != wanted:
        raise argparse.ArgumentTypeError(f'must be like {like}, got {text!r}')
    return numbers
