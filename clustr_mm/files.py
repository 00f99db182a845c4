"""Reads files of any origin, and writes files all or nothing.

A checkpoint is read without running anything in it; a config is a program and runs.
"""

import os
import re
import uuid
import warnings
import zipfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from .compat.safe_load import HAS_ALLOW_LIST

#: What torch says about switching its safe loader off, around the reason of an error.
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running anything in it.

    Args:
        path (Path): A file of ``torch.save``, or one ending in '.safetensors'.

    Returns:
        dict: Its content, weights unwrapped by :func:`unwrap`.

    Raises:
        ValueError: If it cannot be read safely or is not a dict with names.
        OSError: If the file cannot be opened.
    """
    if not path.is_file():
        what = 'is no regular file' if path.exists() else 'there is no such file'
        raise ValueError(what)
    if not path.stat().st_size:
        raise ValueError('is empty')
    try:
        content = _load(path)
        if isinstance(content, Mapping):
            content = dict(content)
            unwrap(content)
    except (OSError, MemoryError):
        raise
    except ImportError as error:
        raise ValueError(f'{error}: pip install safetensors') from error
    # What a broken or hostile file raises depends on how it is made.
    except Exception as error:
        reason = ADVICE.sub('', str(error)).strip()
        if isinstance(error, KeyError) or not reason:
            reason = 'torch.save did not write it, or not all of it'
        message = f'cannot be read as a checkpoint: {shorten(reason, 200)}'
        if not HAS_ALLOW_LIST:
            message += ' (torch 2.6 or later reads safely what a training saves)'
        raise ValueError(message) from error
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise ValueError('holds no state dict')
    return content


def unwrap(content: MutableMapping[str, Any]) -> None:
    """Lift weights out of the entry ``state_dict`` or ``model``, in place."""
    for name in ('state_dict', 'model'):
        if isinstance(content.get(name), Mapping):
            content.update(content.pop(name))
            unwrap(content)


def _load(path: Path) -> Any:
    if path.suffix == '.safetensors':
        from safetensors.torch import load_file

        return load_file(path)
    # Optimizer states, twice as large as the weights, are never read.
    mmap = zipfile.is_zipfile(path)
    if mmap and not HAS_ALLOW_LIST:
        # An older torch runs an archive of TorchScript in spite of weights_only.
        with zipfile.ZipFile(path) as archive:
            if any(Path(n).name == 'constants.pkl' for n in archive.namelist()):
                raise ValueError('is an archive of TorchScript')
    with warnings.catch_warnings():
        # What is odd about a file is an error or of no interest.
        warnings.simplefilter('ignore')
        return torch.load(str(path), map_location='cpu', weights_only=True, mmap=mmap)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file such that an interruption leaves the old or the new one.

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
