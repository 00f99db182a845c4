"""Reads files of any origin, and writes files all or nothing.

A checkpoint is read without running anything in it; a config is a program and runs.
"""

import importlib.util
import os
import re
import uuid
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from .compat.safe_load import HAS_ALLOW_LIST
from .models.checkpoint import unwrap

#: How torch tells to switch its safe loader off, and what stands around the reason.
ADVICE = re.compile(
    r'.*WeightsUnpickler error:|Weights only load failed\.'
    r'|In PyTorch 2\.6, we .*?trusted source\.|Please use `torch\.serialization\..*'
    r'|Check the documentation of torch\.load.*',
    re.DOTALL,
)


def shorten(error: object, limit: int = 300) -> str:
    """Put a message on one line."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + '...'


def read_config(path: Path) -> Config:
    """Read a config file.

    Args:
        path (Path): The file.

    Returns:
        Config: Its content.

    Raises:
        ValueError: If that is not possible, in one line.
    """
    if not path.is_file():
        raise ValueError(f'there is no config {str(path)!r}')
    try:
        return Config.fromfile(path)
    # What a program raises may be anything.
    except Exception as error:
        raise ValueError(f'cannot read the config {path}: {shorten(error)}') from error


def check_safetensors() -> None:
    """Raise ValueError if the package for this format is missing."""
    if importlib.util.find_spec('safetensors') is None:
        raise ValueError(
            'files of the format safetensors need the package of this name: '
            'pip install safetensors'
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running anything in it.

    Args:
        path (Path): A file of ``torch.save``, or one ending in '.safetensors'.

    Returns:
        dict: Its content; weights in a container such as ``state_dict`` stand beside
        what was next to that.

    Raises:
        ValueError: If it cannot be read safely or is not a dict with names.
        OSError: If the file cannot be opened.
    """
    if not path.is_file():
        what = 'is no regular file' if path.exists() else 'there is no such file'
        raise ValueError(what)
    if not path.stat().st_size:
        raise ValueError('is empty')
    if path.suffix == '.safetensors':
        check_safetensors()
        from safetensors.torch import load_file as load
    else:
        load = _load_torch
    try:
        content = load(str(path))
        if isinstance(content, Mapping):
            content = dict(content)
            unwrap(content)
    except (OSError, MemoryError):
        raise
    # What a broken or hostile file raises depends on how it is made.
    except Exception as error:
        reason = ADVICE.sub('', str(error)).strip()
        if isinstance(error, KeyError) or not reason:
            reason = f'{type(error).__name__} {reason}'
        message = f'cannot be read as a checkpoint: {shorten(reason, 200)}'
        if not HAS_ALLOW_LIST:
            message += ' (torch 2.6 or later reads safely what a training saves)'
        raise ValueError(message) from error
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise ValueError('holds no state dict')
    return content


def _load_torch(path: str) -> Any:
    with warnings.catch_warnings():
        # What is odd about a file is an error or of no interest.
        warnings.simplefilter('ignore')
        # Optimizer states, twice as large as the weights, are never read.
        mmap = zipfile.is_zipfile(path)
        if mmap and not HAS_ALLOW_LIST:
            # An older torch runs an archive of TorchScript in spite of weights_only.
            with zipfile.ZipFile(path) as archive:
                if any(Path(n).name == 'constants.pkl' for n in archive.namelist()):
                    raise ValueError('is an archive of TorchScript')
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file such that an interruption leaves the old or the new one.

    Args:
        path (Path): The file, replaced if it is there.
        content (bytes or memoryview): What it gets.

    Raises:
        OSError: If it cannot be written. Then it is as it was.
    """
    # In the same folder, because only within one file system a file takes the place
    # of another at once. Of a name of its own, for others that write the same file.
    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp')
    try:
        with temporary.open('xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
