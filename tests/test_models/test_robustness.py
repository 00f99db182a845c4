"""Any input, any process, any thread: the same well-defined output."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_models import variants
from test_models.variants import (
    CASES,
    equal,
    fixed_model,
    for_all,
    for_maps,
    loss_of,
    randn,
    run,
)


@pytest.mark.parametrize('value', [0.0, 255.0, 1e-30, -1e15])
@for_all
def test_plain_images(name, value):
    for y in run(fixed_model(name), torch.full((2, 3, 48, 40), value)):
        assert y.isfinite().all()
        # Not bit by bit: matrix products of a library round by the place in the batch.
        torch.testing.assert_close(y[0], y[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize('value', [float('nan'), -float('inf'), 3e38])
@for_all
def test_broken_pixels_stay_in_their_image(name, value):
    x = randn(3, 3, 48, 40)
    good = run(fixed_model(name), x)
    x[1, :, 5:9, 7] = value
    for a, b in zip(good, run(fixed_model(name), x)):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert not torch.equal(a[1].nan_to_num(7.0), b[1].nan_to_num(7.0))


@for_maps
def test_meta_device(name):
    with torch.device('meta'):
        model = variants.make_model(name)
        outs = model(torch.empty(2, 3, 64, 96))
    dims = model.arch_settings['embed_dims']
    assert [tuple(y.shape) for y in outs] == [
        (2, dims[i], 16 // 2**i, 24 // 2**i) for i in range(4)
    ]
    assert all(y.is_meta for y in outs)


@for_all
def test_threads(name):
    images = [randn(1, 3, 40 + 8 * i, 64, seed=i) for i in range(6)]
    expected = [run(fixed_model(name), x) for x in images]
    with ThreadPoolExecutor(4) as threads:
        results = threads.map(lambda x: run(fixed_model(name), x), 4 * images)
        assert all(map(equal, results, 4 * expected))


@for_all
def test_deterministic_algorithms(name):
    model = variants.random_model(name).train()
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model.zero_grad()
            loss_of(model(randn(2, 3, 48, 64))).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(*gradients)


def digest(name):
    outs = run(fixed_model(name), randn(2, 3, 72, 104))
    return hashlib.sha256(b''.join(y.numpy().tobytes() for y in outs)).hexdigest()


def test_another_process_gives_the_same_bits():
    code = (
        f'import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n'
        f'import torch; torch.set_num_threads({torch.get_num_threads()})\n'
        'from test_models.test_robustness import CASES, digest\n'
        'print(*map(digest, CASES))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == list(map(digest, CASES)), done.stderr
