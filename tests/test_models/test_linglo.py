import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from get_flops import count_flops
from test_models import variants
from test_models.variants import ARCHS, randn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_versions import HALF

from clustr_mm.models import layers, linglo
from clustr_mm.models.linglo import KeyOnlyAttention, LinGlo

ARCH = ARCHS['LinGlo']
random_model = partial(variants.random_model, 'LinGlo')


def make_attention(*args, **kwargs):
    torch.manual_seed(0)
    return KeyOnlyAttention(*args, **kwargs).double().eval()


# ---- sizes


@pytest.mark.parametrize(
    ('name', 'published', 'count'),
    [
        ('b0', 3.4e6, 3_438_024),
        ('b1', 13.1e6, 13_051_816),
        ('b2', 25.4e6, 25_746_664),
    ],
)
def test_parameter_count_of_a_classifier(name, published, count):
    with torch.device('meta'):
        model = LinGlo(name)
    width = model.arch_settings['embed_dims'][-1]
    parameters = sum(param.numel() for param in model.parameters())
    assert parameters + 1000 * (width + 1) == count
    assert count == pytest.approx(published, rel=0.03)


def test_blocks_alternate_in_all_stages():
    with torch.device('meta'):
        models = [LinGlo('b0'), LinGlo('b2'), LinGlo(ARCH)]
    for model in models:
        for stage, depth in zip(model.stages, model.arch_settings['depths']):
            kinds = [type(block.attn) for block in stage.blocks]
            both = [KeyOnlyAttention, layers.ConvFFN]
            assert kinds == [both[i % 2] for i in reversed(range(depth))]


# ---- attention by its definition


def by_definition(attn, x, hw, window):
    """Token by token and head by head."""
    height, width = hw
    batch, length, channels = x.shape
    dims = channels // attn.num_heads
    gate, kv = torch.sigmoid(attn.gate(x)), attn.kv(x)
    key, value = kv[..., :channels], kv[..., channels:]
    out = torch.zeros_like(x)
    for b in range(batch):
        for head in range(attn.num_heads):
            part = slice(head * dims, (head + 1) * dims)
            score = torch.zeros(length, dtype=x.dtype)
            for n in range(length):
                active = 0.5 * key[b, n, part]
                active = active * (1 + torch.erf(key[b, n, part] / math.sqrt(2)))
                score[n] = min(30, max(-30, float(active @ attn.saliency[head])))
            total = score.softmax(0) @ value[b, :, part]
            for n in range(length):
                row, column = divmod(n, width)
                near = [
                    r * width + c
                    for r in range(row - window // 2, row + window // 2 + 1)
                    for c in range(column - window // 2, column + window // 2 + 1)
                    if 0 <= r < height and 0 <= c < width
                ]
                local = score[near].softmax(0) @ value[b, near, part]
                out[b, n, part] = gate[b, n, part] * (total + local)
    return attn.proj(out)


@pytest.mark.parametrize('factor', [1, 40, 1000])
@pytest.mark.parametrize(
    ('hw', 'window'), [((5, 4), 3), ((1, 1), 3), ((1, 6), 3), ((4, 4), 5), ((2, 3), 1)]
)
def test_attention_by_definition(hw, window, factor):
    """Sharp saliencies as well: one token may outweigh all, and some be cut off."""
    attn = make_attention(16, 2, window, 0.0, 0.0)
    attn.saliency.data *= factor
    x = randn(2, hw[0] * hw[1], 16).double() * (3 if factor > 1 else 1)
    with torch.no_grad():
        expected = by_definition(attn, x, hw, window)
        torch.testing.assert_close(attn(x, hw), expected, rtol=1e-5, atol=1e-5)


def test_neighbourhood_far_below_the_maximum():
    """Softmax is as good there as next to it."""
    attn = make_attention(4, 1, 3, 0.0, 0.0).float()
    attn.saliency.data.fill_(1.0)
    values = randn(1, 36, 1, 4)
    keys = torch.zeros(1, 36, 1, 4)
    keys[0, 0] = 1e4
    keys[0, 20:] = -0.2 * torch.rand(16, 1, 4)
    weights = attn.weigh(keys)
    near = attn.pool(weights * values, (6, 6)) / attn.pool(weights, (6, 6))
    seen = [28, 29, 34, 35]
    expected = weights[0, seen] / weights[0, seen].sum(0) * values[0, seen]
    torch.testing.assert_close(near[0, 35], expected.sum(0))


@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
def test_huge_saliency_stays_finite(dtype):
    attn = make_attention(16, 2, 3, 0.0, 0.0).float()
    attn.saliency.data.fill_(3e4)
    x = (100 * randn(1, 36, 16)).requires_grad_()
    half = nullcontext() if dtype == torch.float32 else torch.autocast('cpu', dtype)
    with half:
        out = attn(x, (6, 6))
    out.float().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(param.grad.isfinite().all() for param in attn.parameters())


def test_half_precision_without_autocast():
    attn = make_attention(16, 2, 3, 0.0, 0.0)
    x = randn(1, 36, 16)
    with torch.no_grad():
        expected = attn(x.double(), (6, 6)).float()
        attn, x = attn.bfloat16(), x.bfloat16()
        out = attn(x, (6, 6))
        assert attn.weigh(x.unflatten(2, (2, 8))).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)


def test_one_corner_changes_the_other():
    model = random_model(out_indices=(0,)).eval()
    x = randn(1, 3, 160, 192)
    changed = x.clone()
    changed[:, :, :4, :4] += 1
    with torch.no_grad():
        difference = model(x)[0] - model(changed)[0]
    assert difference[..., -1, -1].abs().max() > 0


# ---- cost


@pytest.mark.parametrize('name', ['b0', 'b2'])
def test_multiply_adds_are_linear(name):
    with torch.device('meta'):
        model = LinGlo(name)
    small, large = count_flops(model, 224, 224), count_flops(model, 448, 224)
    assert large.total == pytest.approx(2 * small.total, rel=0.02)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that anything returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_memory_is_linear():
    with torch.device('meta'):
        attn = KeyOnlyAttention(16, 2, 3, 0.0, 0.0)
        for side in (10, 100):
            with Largest() as largest:
                attn(torch.empty(1, side**2, 16), (side, side))
            # Keys and values.
            assert largest.size == 32 * side**2


# ---- wrong arguments


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch={**ARCH, 'sr_ratios': [1] * 4}), 'keys.*got .*sr_ratios'),
        (dict(window=0), 'window.*got 0'),
        (dict(window=4), 'window.*odd.*got 4'),
        (dict(window=3.0), r'window.*got 3\.0'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LinGlo(**{'arch': ARCH, **kwargs})


def test_window_reaches_the_attention():
    attn = LinGlo(ARCH, window=5).stages[3].blocks[1].attn
    assert attn.window == 5
    default = linglo.MODELS.build(dict(type='LinGlo', arch=ARCH))
    assert default.stages[3].blocks[1].attn.window == 3
