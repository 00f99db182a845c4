import math
from contextlib import nullcontext

import pytest
import torch
from get_flops import count_flops
from test_models.variants import ARCHS, count_parameters, randn
from torch_versions import HALF

from clustr_mm.models import layers
from clustr_mm.models.linglo import KeyOnlyAttention, LinGlo

ARCH = ARCHS['LinGlo']


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
    assert count_parameters(model) + 1000 * (width + 1) == count
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


# ---- cost


@pytest.mark.parametrize('name', ['b0', 'b2'])
def test_multiply_adds_are_linear(name):
    with torch.device('meta'):
        model = LinGlo(name)
    small, large = count_flops(model, 224, 224), count_flops(model, 448, 224)
    assert large.total == pytest.approx(2 * small.total, rel=0.02)


def test_window_reaches_the_attention():
    attn = LinGlo(ARCH, window=5).stages[3].blocks[1].attn
    assert attn.window == 5
