"""Any input, any process, any number of calls: the same well-defined output."""

import copy
import hashlib
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models.variants import (
    CASES,
    for_all,
    for_maps,
    loss_of,
    make_model,
    randn,
    random_model,
)
from torch_versions import HALF

MODELS = {name: random_model(name).eval() for name in CASES}


def run(model, x):
    with torch.no_grad():
        return model(x)


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b)
    )


LAYOUTS = {
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'strided': lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'expanded': lambda x: x[:1].expand(len(x), -1, -1, -1),
}


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    name=st.sampled_from(list(CASES)),
    batch=st.integers(1, 3),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_sizes_and_layouts(name, batch, height, width, layout):
    model = MODELS[name]
    x = LAYOUTS[layout](randn(batch, 3, height, width))
    outs = run(model, x)
    for i, (y, channels) in enumerate(zip(outs, model.arch_settings['embed_dims'])):
        stride = 4 * 2**i
        size = () if y.ndim == 2 else (-(-height // stride), -(-width // stride))
        assert y.shape == (batch, channels, *size)
        assert y.isfinite().all() and y.is_contiguous()
    assert equal(outs, run(model, x.clone(memory_format=torch.contiguous_format)))


@for_all
def test_double_precision(name):
    outs = run(random_model(name).double().eval(), randn(1, 3, 40, 56).double())
    for y, single in zip(outs, run(MODELS[name], randn(1, 3, 40, 56))):
        assert y.dtype == torch.float64
        torch.testing.assert_close(y.float(), single, rtol=0, atol=1e-4)


@pytest.mark.parametrize('dtype', HALF)
@for_all
def test_half_precision_weights(name, dtype):
    model = random_model(name).to(dtype).eval()
    outs = run(model, randn(2, 3, 40, 56).to(dtype))
    assert all(y.dtype == dtype and y.isfinite().all() for y in outs)


@pytest.mark.parametrize('value', [0.0, 255.0, 1e-30, 1e15, -1e15])
@for_all
def test_plain_images(name, value):
    outs = run(MODELS[name], torch.full((2, 3, 48, 40), value))
    assert all(y.isfinite().all() for y in outs)
    # Not bit by bit: the library's matrix products round by the place in the batch.
    for y in outs:
        torch.testing.assert_close(y[0], y[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 3e38])
@for_all
def test_broken_pixels_stay_in_their_image(name, value):
    x = randn(3, 3, 48, 40)
    good = run(MODELS[name], x)
    x[1, :, 5:9, 7] = value
    bad = run(MODELS[name], x)
    for a, b in zip(good, bad):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert not torch.equal(a[1].nan_to_num(7.0), b[1].nan_to_num(7.0))


@for_maps
def test_meta_device(name):
    with torch.device('meta'):
        model = make_model(name)
        outs = model(torch.empty(2, 3, 64, 96))
    assert [tuple(y.shape) for y in outs] == [
        (2, dims, 16 // 2**i, 24 // 2**i)
        for i, dims in enumerate(model.arch_settings['embed_dims'])
    ]
    assert all(y.is_meta for y in outs)


@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
@for_all
def test_copies(name, copied):
    x = randn(1, 3, 50, 60)
    expected = run(MODELS[name], x)
    other = copied(MODELS[name])
    assert equal(run(other, x), expected)
    fresh = make_model(name).eval()
    assert not equal(run(fresh, x), expected)
    fresh.load_state_dict(other.state_dict())
    assert equal(run(fresh, x), expected)
    # Hooks that translate checkpoints come along.
    wrapped = {f'module.backbone.{k}': v for k, v in other.state_dict().items()}
    assert not other.load_state_dict(wrapped).missing_keys


@for_all
def test_inference_mode(name):
    x = randn(1, 3, 50, 60)
    with torch.inference_mode():
        assert equal(MODELS[name](x), run(MODELS[name], x))


@for_all
def test_threads(name):
    images = [randn(1, 3, 40 + 8 * i, 64, seed=i) for i in range(6)]
    expected = [run(MODELS[name], x) for x in images]
    failures = []

    def work(order):
        for i in order:
            if not equal(run(MODELS[name], images[i]), expected[i]):
                failures.append(i)

    threads = [
        threading.Thread(target=work, args=([(i + t) % 6 for i in range(6)],))
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@for_all
def test_deterministic_algorithms(name):
    torch.use_deterministic_algorithms(True)
    try:
        model = random_model(name).train()
        gradients = []
        for _ in range(2):
            model.zero_grad()
            loss_of(model(randn(2, 3, 48, 64))).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert equal(*gradients)
    finally:
        torch.use_deterministic_algorithms(False)


def digest(name):
    outs = run(MODELS[name], randn(2, 3, 72, 104))
    return hashlib.sha256(b''.join(y.numpy().tobytes() for y in outs)).hexdigest()


def test_another_process_gives_the_same_bits():
    code = (
        'import sys; sys.path.insert(0, sys.argv[1]); import torch\n'
        'torch.set_num_threads(int(sys.argv[2]))\n'
        'from test_models.test_robustness import CASES, digest\n'
        'print(*map(digest, CASES))'
    )
    folder = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, '-c', code, folder, str(torch.get_num_threads())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [digest(name) for name in CASES], done.stderr


MANY_CALLS = """
import resource, torch
from clustr_mm import ClusTR
torch.manual_seed(0)
arch = dict(embed_dims=[16, 16, 16, 16], num_heads=[1, 1, 1, 1],
            mlp_ratios=[1, 1, 1, 1], depths=[1, 1, 1, 1], sr_ratios=[8, 4, 2, 1])
model = ClusTR(arch, clusterer=dict(type='DPCKNN', window=48)).eval()
peaks = []
with torch.no_grad():
    for i in range(500):
        model(torch.randn(1 + i % 2, 3, 32 + 8 * (i * 7 % 11), 32 + 8 * (i * 5 % 13)))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[-1] - peaks[199])
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss is in KiB on Linux')
def test_many_calls_at_changing_sizes_do_not_grow():
    """All combinations of sizes have come by after 143 calls."""
    done = subprocess.run(
        [sys.executable, '-c', MANY_CALLS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 1024
