"""The Triton kernel: on the CPU by its interpreter, compiled for GPUs."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from naive import naive_dpc_knn

from clustr_mm.ops import dpc_knn

pytest.importorskip('triton')

# The package exports functions under the names of these modules.
dpc_module = importlib.import_module('clustr_mm.ops.dpc_knn')
nearest = importlib.import_module('clustr_mm.ops.nearest')
MODULE = 'clustr_mm.ops.triton_nearest'


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


pytestmark = pytest.mark.skipif(
    not nearest._triton_is_installed(), reason='no Triton 3'
)
interpreted = pytest.mark.skipif(
    'TRITON_INTERPRET' not in os.environ, reason='Triton compiles for the GPU here'
)


@pytest.fixture
def kernel(monkeypatch):
    """Send searches to the kernel; on CPU tensors it is interpreted.

    Returns the shapes of the queries that reached it.
    """
    module = importlib.import_module(MODULE)
    seen = []

    def search(queries, *args):
        seen.append(tuple(queries.shape))
        return module.search(queries, *args)

    monkeypatch.setattr(nearest, '_search_by_kernel', search)
    for user in (nearest, dpc_module):
        monkeypatch.setattr(user, 'has_kernel', lambda tokens: True)
        monkeypatch.setattr(user, 'is_readable', lambda tokens: False)
    return seen


def check(tokens, counts, k=5):
    for label, expected in zip(
        dpc_knn(tokens, counts, k), naive_dpc_knn(tokens, counts, k)
    ):
        assert torch.equal(label, expected)


@interpreted
@pytest.mark.parametrize('channels', [16, 32, 64, 128, 320, 512])
def test_widths(kernel, channels):
    check(randn(2, 130, channels), [8, 32])
    # Neighbours, peaks and the centres of both scales all come this way.
    assert len(kernel) == 4


@interpreted
@pytest.mark.parametrize('length', [1, 2, 4, 63, 64, 65, 200])
def test_lengths(kernel, length):
    check(randn(1, length, 16), sorted({1, max(1, length // 4)}))


@interpreted
@pytest.mark.parametrize('seed', range(3))
def test_integers_are_identical(kernel, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-2, 3, (2, 150, 5), generator=generator).float()
    check(tokens, [9, 37, 100])


@interpreted
def test_duplicates_and_constant(kernel):
    check(randn(2, 20, 24).repeat(1, 7, 1), [10, 35])
    check(randn(1, 1, 16).expand(2, 100, 16), [6, 25])


@interpreted
@pytest.mark.parametrize('k', [1, 9])
def test_other_k(kernel, k):
    check(randn(1, 90, 8), [5, 22], k)


@interpreted
@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_scale(kernel, scale):
    check(randn(1, 80, 8) * scale, [5, 20])


@interpreted
def test_candidates_equal_the_torch_path(kernel):
    """The kernel alone, without the float64 settling behind it."""
    module = importlib.import_module(MODULE)
    queries, keys = randn(2, 70, 32), randn(2, 150, 32, seed=1)
    norms = keys.square().sum(-1)
    limits = torch.arange(70).expand(2, -1) * 2 + 8
    for limit in (None, limits):
        a = module.search(queries, keys, norms, 8, limit).sort(-1)[0]
        b = nearest._search(queries, keys, norms, 8, limit).sort(-1)[0]
        assert torch.equal(a, b)


@interpreted
def test_fewer_keys_than_neighbours(kernel, monkeypatch):
    """What is missing is infinitely far, and no key is its own double."""
    points = nearest.prepare(randn(1, 70, 16))
    limits = torch.arange(70).view(1, -1)
    ours, by_kernel = nearest.nearest(points, 5, limits=limits)
    assert kernel
    monkeypatch.undo()
    expected, positions = nearest.nearest(points, 5, limits=limits)
    assert torch.equal(ours, expected)
    assert torch.equal(by_kernel[ours.isfinite()], positions[ours.isfinite()])


@interpreted
@pytest.mark.parametrize('with_kernel', [True, False])
def test_no_peak_is_counted_on_the_host(kernel, monkeypatch, with_kernel):
    """On a GPU that would wait for the device, with Triton and without."""
    tokens = randn(2, 100, 16)

    def fail(*args):
        raise AssertionError('read a number back from the device')

    for name in ('item', '__int__', '__bool__', 'tolist', 'nonzero'):
        monkeypatch.setattr(torch.Tensor, name, fail)
    for user in (nearest, dpc_module):
        monkeypatch.setattr(user, 'has_kernel', lambda tokens: with_kernel)
    monkeypatch.setattr(
        nearest, '_search_by_kernel', lambda q, k, n, w, limits: torch.zeros(
            (*q.shape[:2], w), dtype=torch.int64
        ),
    )  # fmt: skip
    dpc_knn(tokens, [6, 25])


@pytest.mark.parametrize(
    ('device', 'hip', 'capability', 'precision'),
    [
        ('cuda', None, (7, 5), 'ieee'),
        ('cuda', None, (8, 0), 'tf32x3'),
        ('cuda', None, (9, 0), 'tf32x3'),
        ('cuda', '6.2', (9, 4), 'ieee'),
        ('cpu', None, (9, 0), 'ieee'),
    ],
)
def test_precision_that_the_device_offers(
    monkeypatch, device, hip, capability, precision
):
    """Three TF32 products need NVIDIA's tensor cores from Ampere on."""
    monkeypatch.setattr(torch.version, 'hip', hip)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    module = importlib.import_module(MODULE)
    assert module._precision(torch.device(device)) == precision


def test_cpu_tensors_take_plain_torch():
    assert not nearest.has_kernel(torch.zeros(1))


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from clustr_mm.ops import triton_nearest as module

capability, channels, width, has_limits = map(int, sys.argv[1:])
constants = dict(
    WIDTH=width, SLOTS=triton.next_power_of_2(width), CHANNELS=channels,
    CHUNK=32 if channels % 32 == 0 else 16, HAS_LIMITS=bool(has_limits),
    PRECISION='tf32x3' if capability >= 80 else 'ieee',
    BLOCK_Q=module.BLOCK_QUERIES, BLOCK_K=module.BLOCK_KEYS,
)
types = ['*fp32'] * 3 + ['*i64' if has_limits else '*fp32', '*i32', 'i32', 'i32']
signature = dict(zip(module._search_kernel.arg_names, types))
signature.update(dict.fromkeys(constants, 'constexpr'))
source = ASTSource(fn=module._search_kernel, signature=signature, constexprs=constants)
binary = triton.compile(source, target=GPUTarget('cuda', capability, 32))
print(binary.metadata.shared)
"""


@pytest.mark.parametrize(
    ('capability', 'channels', 'width', 'has_limits'),
    [(75, 64, 8, 0), (80, 64, 4, 1), (86, 512, 8, 0), (90, 320, 8, 0), (90, 48, 4, 1)],
)
def test_compiles_for_gpus(capability, channels, width, has_limits):
    env = {name: v for name, v in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run(
        [sys.executable, '-c', COMPILE]
        + [str(n) for n in (capability, channels, width, has_limits)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if 'ptxas' in done.stderr and 'not found' in done.stderr.lower():
        pytest.skip('this Triton ships no assembler')
    assert done.returncode == 0, done.stderr[-2000:]
    # What a block may have on the smallest of these GPUs, in bytes.
    assert int(done.stdout) <= 64 * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('channels', [16, 64, 128, 320, 512])
def test_on_a_gpu(channels):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(-3, 4, (2, 3000, channels), generator=generator).float()
    for a, b in zip(dpc_knn(tokens, [46, 187]), dpc_knn(tokens.cuda(), [46, 187])):
        assert torch.equal(a, b.cpu())
