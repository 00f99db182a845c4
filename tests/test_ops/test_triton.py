"""The Triton kernel: on the CPU by its interpreter, compiled for GPUs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from naive import naive_dpc_knn, randn

from clustr_mm.ops import backend, dpc_knn, search

pytest.importorskip('triton.backends', reason='no Triton 3')

# The package exports a function under the name of this module.
dpc_module = importlib.import_module('clustr_mm.ops.dpc_knn')
MODULE = 'clustr_mm.ops.triton_search'
TOOL = Path(__file__).parents[2] / 'tools/analysis_tools/kernel_resources.py'
NO_COMPILER = re.compile('ptxas.* not found|find ptxas|name .knobs.|attribute .ptxas')


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

    def spy(queries, *args):
        seen.append(tuple(queries.shape))
        return module.search(queries, *args)

    monkeypatch.setattr(search, 'DENSE_TOKENS', 0)
    monkeypatch.setattr(search, 'find_kernel', lambda tokens: spy)
    for user in (search, dpc_module):
        monkeypatch.setattr(user, 'may_read', lambda tokens: False)
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


def check_against_float64(device, channels, with_limits, length=150):
    module = importlib.import_module(MODULE)
    queries, keys = randn(2, 70, channels), randn(2, length, channels, seed=1)
    limits = torch.arange(70).expand(2, -1) * 2 + 8 if with_limits else None
    found = module.search(
        *(queries.to(device), keys.to(device), 8),
        None if limits is None else limits.to(device),
    ).cpu()
    distances = torch.cdist(queries.double(), keys.double())
    if limits is not None:
        beyond = torch.arange(length) >= limits[..., None]
        distances = distances.masked_fill(beyond, torch.inf)
    expected = distances.topk(8, largest=False)[1]
    assert torch.equal(found.sort(dim=2)[0], expected.sort(dim=2)[0])


@interpreted
def test_fewer_keys_than_wanted(kernel, monkeypatch):
    """What is missing is infinitely far, and no key is its own double."""
    tokens = search.to_integers(randn(1, 70, 16))[0]
    limits = torch.arange(70).view(1, -1)
    ours, by_kernel = search.search(tokens, tokens, 8, limits)
    assert kernel
    monkeypatch.setattr(search, 'find_kernel', lambda tokens: None)
    expected, positions = search.search(tokens, tokens, 8, limits)
    for (a, i), (b, j) in zip(
        zip(ours[0], by_kernel[0]), zip(expected[0], positions[0])
    ):
        assert torch.equal(a.sort()[0], b.sort()[0])
        assert set(i[a.isfinite()].tolist()) == set(j[b.isfinite()].tolist())


@interpreted
@pytest.mark.parametrize('with_kernel', [True, False])
def test_no_peak_is_counted_on_the_host(kernel, monkeypatch, with_kernel):
    """On a GPU that would wait for the device, with Triton and without."""
    tokens = randn(2, 100, 16)

    def fail(*args):
        raise AssertionError('read a number back from the device')

    for name in ('item', '__int__', '__bool__', 'tolist', 'nonzero'):
        monkeypatch.setattr(torch.Tensor, name, fail)

    def nothing(queries, keys, width, limits):
        return torch.zeros((*queries.shape[:2], width), dtype=torch.int64)

    instead = nothing if with_kernel else None
    monkeypatch.setattr(search, 'find_kernel', lambda tokens: instead)
    dpc_knn(tokens, [6, 25])


@pytest.mark.parametrize(
    ('device', 'hip', 'capability', 'precision'),
    [
        ('cuda', None, (7, 5), 'ieee'),
        ('cuda', None, (8, 0), 'tf32x3'),
        ('cuda', None, (9, 0), 'tf32x3'),
        ('cuda', None, (10, 0), 'tf32x3'),
        ('cuda', None, (12, 0), 'tf32x3'),
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
    number = module._capability(torch.device(device))
    assert module.configuration(number, 64, 8, False)['PRECISION'] == precision


@interpreted
@pytest.mark.parametrize('capability', [75, 80, 90, 100])
@pytest.mark.parametrize('with_limits', [False, True])
def test_blocks_of_every_generation(monkeypatch, capability, with_limits):
    module = importlib.import_module(MODULE)
    monkeypatch.setattr(module, '_capability', lambda device: capability)
    # What plain TF32, of ten bits, would get wrong; small integers it would not.
    check_against_float64(torch.device('cpu'), 40, with_limits)


def test_cpu_tensors_take_plain_torch():
    assert backend.find_kernel(torch.zeros(1)) is None


SHAPES = [(75, 64, 8, 0), (75, 320, 4, 1), (80, 64, 4, 1), (86, 512, 8, 0)]
SHAPES += [(89, 320, 8, 0), (90, 320, 8, 0), (90, 48, 4, 1)]
SHAPES += [(100, 256, 4, 1), (100, 16, 8, 0)]

COMPILE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from kernel_resources import fits, measure
rows = [measure(*shape) for shape in json.loads(sys.argv[2])]
print(json.dumps([(row, fits(row)) for row in rows]))
"""


def test_fits_gpus():
    """No registers are spilled, and from Ampere on tensor cores multiply."""
    env = {name: v for name, v in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run(
        [sys.executable, '-c', COMPILE, str(TOOL.parent), json.dumps(SHAPES)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode and NO_COMPILER.search(done.stderr):
        pytest.skip('this Triton ships no assembler, or is too old to be asked')
    assert done.returncode == 0, done.stderr[-2000:]
    for shape, (row, fits) in zip(SHAPES, json.loads(done.stdout), strict=True):
        assert row['spill bytes'] == 0, shape
        assert fits, (shape, row)
        assert row['tensor cores'] == ('yes' if shape[0] >= 80 else 'no'), shape
        # With fewer, nothing is done while memory is waited for.
        assert row['warps per SM'] >= 12, shape


@pytest.fixture
def tool(monkeypatch):
    """The script, which compiles nothing."""
    spec = importlib.util.spec_from_file_location('kernel_resources', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    row = {'sm': 75, 'spill bytes': 0, 'shared KiB': 64}
    monkeypatch.setattr(module, 'measure', lambda *shape: dict(row, sm=shape[0]))
    monkeypatch.setattr(sys, 'argv', [TOOL.name])
    # It takes the variable away, and the tests get it back.
    monkeypatch.setenv('TRITON_INTERPRET', os.environ.get('TRITON_INTERPRET', '0'))
    return module


def test_table_between_the_markers(tool, monkeypatch, tmp_path):
    page = tmp_path / 'page.md'
    first, last = tool.MARKERS
    page.write_text(f'Before.\n{first}\nold\n{last}\nAfter.\n')
    monkeypatch.setattr(sys, 'argv', [TOOL.name, '--out', str(page)])
    for _ in range(2):
        assert tool.main() == 0
        text = page.read_text()
        assert text.startswith(
            f'Before.\n{first}\n|   sm |   spill bytes |   shared KiB |\n|'
        )
        assert text.endswith(
            f'|  100 |             0 |           64 |\n{last}\nAfter.\n'
        )
    page.write_text('No markers.')
    with pytest.raises(SystemExit, match='2'):
        tool.main()
    assert page.read_text() == 'No markers.'


@pytest.mark.parametrize('row', [{'spill bytes': 8}, {'shared KiB': 100}])
def test_status_where_it_does_not_fit(tool, monkeypatch, row):
    measure = tool.measure
    monkeypatch.setattr(tool, 'measure', lambda *shape: {**measure(*shape), **row})
    assert tool.main() == 1


def test_no_triton(tool, monkeypatch, capsys):
    def fail(*shape):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(tool, 'measure', fail)
    with pytest.raises(SystemExit, match='2'):
        tool.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert "needs Triton, as new as 3.6: No module named 'triton'" in last


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('channels', [16, 64, 128, 320, 512])
@pytest.mark.parametrize('with_limits', [False, True])
def test_gaussian_tokens_on_a_gpu(channels, with_limits):
    check_against_float64(torch.device('cuda'), channels, with_limits, 3000)
    tokens = randn(2, 3000, channels)
    for a, b in zip(dpc_knn(tokens, [46, 187]), dpc_knn(tokens.cuda(), [46, 187])):
        assert torch.equal(a, b.cpu())
