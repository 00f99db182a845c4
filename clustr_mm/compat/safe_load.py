"""Lets ``torch.load(weights_only=True)`` read checkpoints of MMEngine's runner.

Since torch 2.6 a checkpoint may name only allow-listed globals. Those of MMEngine's
runner hold log scalars in ``HistoryBuffer`` objects, and with these numpy arrays and
scalars. The names below are the ones such a file contains and torch does not allow by
itself, and no others.
"""

import argparse
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

#: Whether torch.load restricts what a file may name, and takes names for the list of
#: what it may; both came with torch 2.6.
HAS_ALLOW_LIST = hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint')

_STATISTICS = ('min', 'max', 'current', 'mean')


def _history_buffer_getattr(*args: Any) -> Callable[..., Any]:
    """Stand for ``getattr`` while a checkpoint is read.

    Pickle writes a reference to the method ``HistoryBuffer.min`` as a call of
    ``getattr``. The real one would let a file reach from any allowed object into
    its module and on to everything else.

    Args:
        *args: What the file passes: the owner and the name of an attribute.

    Returns:
        Callable: One of the four statistics methods of ``HistoryBuffer``.

    Raises:
        pickle.UnpicklingError: If anything else is asked for.
    """
    if len(args) == 2 and args[0] is HistoryBuffer and args[1] in _STATISTICS:
        return getattr(HistoryBuffer, args[1])
    raise UnpicklingError(
        f'The checkpoint calls getattr{args!r}; only HistoryBuffer and its '
        f'{", ".join(_STATISTICS)} are allowed.'
    )


def _runner_globals() -> list[Any]:
    """List what ``torch.serialization.add_safe_globals`` takes for these files.

    Returns:
        list: Classes, or pairs of a function and the name under which a file has it.
    """
    # An array and a scalar say themselves which function rebuilds them, wherever the
    # installed numpy keeps it.
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    # numpy 2 renamed the module; the name in the file is that of the numpy that
    # wrote it, which need not be the one that reads it.
    numpy_functions = [
        (function, f'numpy.{core}.multiarray.{name}')
        for core in ('core', '_core')
        for name, function in (('_reconstruct', reconstruct), ('scalar', scalar))
    ]
    # A dtype object is an instance of one class per number type, and torch wants
    # that class on the list. Object and structured dtypes stay off it.
    codes = '?' + np.typecodes['AllInteger'] + np.typecodes['AllFloat']
    dtype_classes = {type(np.dtype(code)) for code in codes}
    return [
        HistoryBuffer,
        # Scripts of the DeiT family keep their arguments in a checkpoint.
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        *dtype_classes,
        *numpy_functions,
        (_history_buffer_getattr, 'builtins.getattr'),
    ]


def allow_runner_checkpoints() -> None:
    """Put what a runner checkpoint holds on torch's allow-list, from 2.6 on."""
    if HAS_ALLOW_LIST:
        allowed = _runner_globals()
        if getattr in torch.serialization.get_safe_globals():
            # Of two under one name torch takes any. The user has chosen.
            allowed.pop()
        torch.serialization.add_safe_globals(allowed)
