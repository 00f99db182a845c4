"""Any input, any process, any number of calls: the same well-defined output."""

import copy
import hashlib
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustr_mm import ClusTR

ARCH = dict(
    embed_dims=[16, 32, 48, 64],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 2, 1],
    sr_ratios=[8, 4, 2, 1],
)


def make_model(**kwargs):
    torch.manual_seed(0)
    return ClusTR(ARCH, **kwargs).eval()


# Before 2.2 a CPU has no products of float16.
HALF = [torch.bfloat16]
if hasattr(torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu'):
    HALF.append(torch.float16)
MODEL = make_model()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(x, model=MODEL):
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


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_sizes_and_layouts(batch, height, width, layout):
    x = LAYOUTS[layout](randn(batch, 3, height, width))
    maps = run(x)
    for i, (y, channels) in enumerate(zip(maps, ARCH['embed_dims'])):
        stride = 4 * 2**i
        assert y.shape == (batch, channels, -(-height // stride), -(-width // stride))
        assert y.isfinite().all() and y.is_contiguous()
    assert equal(maps, run(x.clone(memory_format=torch.contiguous_format)))


def test_double_precision():
    model = make_model().double()
    maps = run(randn(1, 3, 40, 56).double(), model)
    assert all(y.dtype == torch.float64 and y.isfinite().all() for y in maps)


@pytest.mark.parametrize('dtype', HALF)
def test_half_precision_weights(dtype):
    model = make_model().to(dtype)
    maps = run(randn(2, 3, 40, 56).to(dtype), model)
    assert all(y.dtype == dtype and y.isfinite().all() for y in maps)


@pytest.mark.parametrize('value', [0.0, 255.0, 1e-30, 1e15, -1e15])
def test_plain_images(value):
    maps = run(torch.full((2, 3, 48, 40), value))
    assert all(y.isfinite().all() for y in maps)
    # Not bit by bit: the library's matrix products round by the place in the batch.
    for y in maps:
        torch.testing.assert_close(y[0], y[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 3e38])
def test_broken_pixels_stay_in_their_image(value):
    x = randn(3, 3, 48, 40)
    good = run(x)
    x[1, :, 5:9, 7] = value
    bad = run(x)
    for a, b in zip(good, bad):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert not torch.equal(a[1].nan_to_num(7.0), b[1].nan_to_num(7.0))


def test_meta_device():
    with torch.device('meta'):
        model = ClusTR(ARCH)
        maps = model(torch.empty(2, 3, 64, 96))
    assert [tuple(y.shape) for y in maps] == [
        (2, 16, 16, 24), (2, 32, 8, 12), (2, 48, 4, 6), (2, 64, 2, 3)
    ]  # fmt: skip
    assert all(y.is_meta for y in maps)


@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies(copied):
    x = randn(1, 3, 50, 60)
    other = copied(MODEL)
    assert equal(run(x), run(x, other))
    fresh = ClusTR(ARCH).eval()
    fresh.load_state_dict(other.state_dict())
    assert equal(run(x), run(x, fresh))
    # Hooks that translate checkpoints come along.
    with pytest.raises(RuntimeError, match='parameters match'):
        other.load_state_dict({})


def test_inference_mode():
    x = randn(1, 3, 50, 60)
    with torch.inference_mode():
        assert equal(MODEL(x), run(x))


def test_threads():
    images = [randn(1, 3, 40 + 8 * i, 64, seed=i) for i in range(6)]
    expected = [run(x) for x in images]
    failures = []

    def work(order):
        for i in order:
            if not equal(run(images[i]), expected[i]):
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


def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        model = make_model(drop_path_rate=0.0).train()
        gradients = []
        for _ in range(2):
            model.zero_grad()
            sum(y.square().mean() for y in model(randn(2, 3, 48, 64))).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert equal(*gradients)
    finally:
        torch.use_deterministic_algorithms(False)


def digest(maps):
    data = b''.join(y.numpy().tobytes() for y in maps)
    return hashlib.sha256(data).hexdigest()


def test_another_process_gives_the_same_bits():
    code = (
        'import sys; sys.path.insert(0, sys.argv[1]); import torch\n'
        'torch.set_num_threads(int(sys.argv[2]))\n'
        'from test_robustness import digest, randn, run\n'
        'print(digest(run(randn(2, 3, 72, 104))))'
    )
    folder = __file__.rpartition('/')[0]
    done = subprocess.run(
        [sys.executable, '-c', code, folder, str(torch.get_num_threads())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == digest(run(randn(2, 3, 72, 104))), done.stderr


MANY_CALLS = """
import resource, torch
from clustr_mm import ClusTR
torch.manual_seed(0)
arch = dict(embed_dims=[16, 16, 16, 16], num_heads=[1, 1, 1, 1],
            mlp_ratios=[1, 1, 1, 1], depths=[1, 1, 1, 1], sr_ratios=[8, 4, 2, 1])
model = ClusTR(arch, cluster_window=48).eval()
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
