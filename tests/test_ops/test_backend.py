"""The way to the kernel and back to plain torch, with no GPU and no Triton."""

import sys
import warnings
from types import ModuleType

import pytest
import torch

import clustr_mm.ops
from clustr_mm.ops import backend, dpc_knn, search

MODULE = 'clustr_mm.ops.triton_search'
TOKENS = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Tensors on the CPU look like those on a GPU, on which nothing was tried."""
    monkeypatch.setattr(backend, 'on_gpu', lambda tokens: True)
    monkeypatch.setattr(backend, '_failures', {})
    monkeypatch.setattr(backend, '_chosen', None)
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(search, 'DENSE_TOKENS', 0)


def fail_with(monkeypatch, error):
    """Let the kernel fail at its launch. Returns a list, an entry for every try."""
    tries = []

    def fail(*args):
        tries.append(args)
        raise error

    fake = ModuleType(MODULE)
    fake.search = fail
    monkeypatch.setitem(sys.modules, MODULE, fake)
    monkeypatch.setattr(clustr_mm.ops, 'triton_search', fake, raising=False)
    return tries


def no_triton(monkeypatch):
    # The kernel's module is imported anew.
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.delattr(clustr_mm.ops, 'triton_search', raising=False)
    monkeypatch.setitem(sys.modules, 'triton', None)


def old_triton(monkeypatch):
    no_triton(monkeypatch)
    old, language = ModuleType('triton'), ModuleType('triton.language')
    old.__path__, old.language = [], language
    monkeypatch.setitem(sys.modules, 'triton', old)
    monkeypatch.setitem(sys.modules, 'triton.language', language)


def launch(error):
    return lambda monkeypatch: fail_with(monkeypatch, error)


NO_COMPILER = RuntimeError('Failed to find C compiler. Please specify.\nMore lines.')
WAYS = [
    (no_triton, 'ModuleNotFoundError: import of triton halted'),
    (old_triton, "AttributeError: module 'triton' has no attribute 'jit'"),
    (launch(NO_COMPILER), 'RuntimeError: Failed to find C compiler.'),
    (launch(ValueError('capability 6.1')), 'ValueError: capability 6.1'),
    (launch(KeyError()), 'KeyError: no message'),
]


@pytest.mark.parametrize(('way', 'reason'), WAYS)
def test_auto_warns_once_and_takes_torch(monkeypatch, way, reason):
    backend.set_search_backend('torch')
    expected = dpc_knn(TOKENS, [5, 20], 5)
    backend.set_search_backend('auto')
    tries = way(monkeypatch)
    for known in (False, True):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            labels = dpc_knn(TOKENS, [5, 20], 5)
        texts = [str(w.message) for w in seen if 'kernel' in str(w.message)]
        assert len(texts) == (0 if known else 1)
        assert all(reason in text and 'plain torch' in text for text in texts)
        assert all(torch.equal(a, b) for a, b in zip(labels, expected))
    assert reason in backend.why_no_kernel(TOKENS.device)
    assert 'More lines' not in backend.why_no_kernel(TOKENS.device)
    assert tries is None or len(tries) == 1


@pytest.mark.parametrize(('way', 'reason'), WAYS)
def test_triton_is_an_error_every_time(monkeypatch, way, reason):
    monkeypatch.setenv(backend.VARIABLE, 'triton')
    tries = way(monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            dpc_knn(TOKENS, [5, 20], 5)
        assert reason in str(caught.value)
        assert 'plain torch' not in str(caught.value)
    assert tries is None or len(tries) == 1


def test_torch_never_tries(monkeypatch):
    tries = fail_with(monkeypatch, NO_COMPILER)
    backend.set_search_backend('torch')
    dpc_knn(TOKENS, [5, 20], 5)
    assert not tries and backend.why_no_kernel(TOKENS.device) is None


@pytest.mark.parametrize('name', ['auto', 'triton'])
def test_too_little_memory_is_passed_on(monkeypatch, name):
    """It says nothing about the kernel, which is tried again."""
    tries = fail_with(monkeypatch, torch.cuda.OutOfMemoryError('too little'))
    backend.set_search_backend(name)
    for _ in range(2):
        with pytest.raises(torch.cuda.OutOfMemoryError, match='too little'):
            dpc_knn(TOKENS, [5, 20], 5)
    assert len(tries) == 2 and backend.why_no_kernel(TOKENS.device) is None


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match="got 'cuda'"):
        backend.set_search_backend('cuda')
    monkeypatch.setenv(backend.VARIABLE, 'Triton')
    with pytest.raises(ValueError, match=f"{backend.VARIABLE} .*got 'Triton'"):
        dpc_knn(TOKENS, [5, 20], 5)
    # What was asked for in the process comes first.
    backend.set_search_backend('torch')
    assert backend.get_search_backend() == 'torch'
