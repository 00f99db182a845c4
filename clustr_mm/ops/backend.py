"""Which way the search takes: plain torch, or a kernel on GPUs.

What is chosen here changes time and memory, not what is computed.
"""

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

#: What can be asked for.
BACKENDS = ('auto', 'torch', 'triton')

#: Environment variable that asks for one of them.
VARIABLE = 'CLUSTR_MM_SEARCH_BACKEND'

Kernel = Callable[..., Tensor | None]

_chosen: str | None = None
#: Why the kernel does not run on a device, by device.
_failures: dict[torch.device, str] = {}


def set_search_backend(name: str | None) -> None:
    """Choose how nearest neighbours are searched on a GPU, for this process.

    Args:
        name (str, optional): 'auto' takes the Triton kernel where it can be built,
            and plain torch with one warning where it cannot; 'torch' never takes
            it; 'triton' makes it an error if it cannot be built. None goes by the
            environment variable ``CLUSTR_MM_SEARCH_BACKEND``, 'auto' if that is
            not set.

    Raises:
        ValueError: If there is no such backend.
    """
    global _chosen
    if name is not None and name not in BACKENDS:
        raise ValueError(f'search backend must be one of {BACKENDS}, got {name!r}')
    _chosen = name


def get_search_backend() -> str:
    """The backend that was asked for, see :func:`set_search_backend`.

    Raises:
        ValueError: If the environment variable names no backend.
    """
    name = _chosen or os.environ.get(VARIABLE) or 'auto'
    if name not in BACKENDS:
        raise ValueError(f'{VARIABLE} must be one of {BACKENDS}, got {name!r}')
    return name


def find_kernel(tokens: Tensor) -> Kernel | None:
    """The search kernel for tokens on a GPU, None where plain torch takes its place.

    Returns:
        Callable, optional: Does what :func:`.search.candidates` does; returns None,
        after a warning, if it turns out that it cannot be built.
    """
    backend = get_search_backend()
    if not on_gpu(tokens) or backend == 'torch':
        return None
    if tokens.device in _failures:
        if backend == 'triton':
            raise RuntimeError(_explain(tokens.device))
        return None
    return _guarded_kernel


def on_gpu(tokens: Tensor) -> bool:
    """Whether the tokens are where the kernel runs."""
    return tokens.is_cuda


def why_no_kernel(device: torch.device) -> str | None:
    """Why plain torch searches on a device on which the kernel was tried."""
    return _failures.get(device)


def _guarded_kernel(queries: Tensor, *args: Tensor | int | None) -> Tensor | None:
    try:
        # Triton takes long to import and not everybody has it.
        from .triton_search import search

        return search(queries, *args)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler comes up with
        reason = str(error).strip() or 'no message'
        _failures[queries.device] = f'{type(error).__name__}: {reason.splitlines()[0]}'
        if get_search_backend() == 'triton':
            raise RuntimeError(_explain(queries.device)) from error
        warnings.warn(
            f'{_explain(queries.device)}; plain torch takes its place, with the same '
            'result',
            stacklevel=2,
        )
        return None


def _explain(device: torch.device) -> str:
    return (
        f'the Triton kernel of the clustering cannot be built for {device} '
        f'({_failures[device]})'
    )


def may_read(tokens: Tensor) -> bool:
    """Whether a look at numbers may save work: a GPU would have to wait for it."""
    return tokens.device.type == 'cpu' and not exporting()


def exporting() -> bool:
    """Whether the model is being traced into a graph to be run elsewhere."""
    # torch.compiler.is_exporting came with torch 2.7; inside torch.compile it
    # says yes as well.
    is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)
    return (
        is_exporting() and not torch.compiler.is_dynamo_compiling()
    ) or torch.onnx.is_in_onnx_export()
