import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clustr_mm import ClusTR
from clustr_mm.models import layers, pyramid
from clustr_mm.models.clustr import ClusteredAttention
from clustr_mm.ops import dpc_knn, windows

# Before 2.2 autocast on a CPU knows no float16.
HALF = [torch.bfloat16]
if hasattr(torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu'):
    HALF.append(torch.float16)
GOLDEN = Path(__file__).parents[1] / 'data' / 'clustr_tiny.npz'
ARCH = dict(
    embed_dims=[16, 32, 48, 64],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 2, 2, 1],
    sr_ratios=[8, 4, 2, 1],
)


@pytest.fixture(scope='module')
def golden():
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture
def golden_model(golden):
    model = ClusTR(ARCH).eval()
    model.load_state_dict(
        {
            name.removeprefix('param/'): value
            for name, value in golden.items()
            if name.startswith('param/') and not name.startswith('param/head.')
        }
    )
    return model


def random_model(**kwargs):
    """A model whose biases and norms do something, too."""
    torch.manual_seed(0)
    model = ClusTR(**{'arch': ARCH, 'drop_path_rate': 0.0, **kwargs})
    for param in model.parameters():
        param.data += 0.05 * torch.randn_like(param)
    return model


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the numbers of the public code


@pytest.mark.parametrize('size', ['64x64', '72x104', '96x160'])
def test_golden_features_and_logits(golden, golden_model, size):
    with torch.no_grad():
        outs = golden_model(golden[f'input/{size}'])
    for i, out in enumerate(outs, start=1):
        torch.testing.assert_close(out, golden[f'stage{i}/{size}'], rtol=0, atol=1e-4)
        # Far below the agreement asked for: an eps of 1e-6 in the norms of
        # the patch embeddings would be 2e-4 off.
        assert (out - golden[f'stage{i}/{size}']).abs().max() < 1e-5
    logits = nn.functional.linear(
        outs[-1].mean(dim=(2, 3)),
        golden['param/head.weight'],
        golden['param/head.bias'],
    )
    torch.testing.assert_close(logits, golden[f'logits/{size}'], rtol=0, atol=1e-4)


@pytest.mark.parametrize('size', ['64x64', '72x104', '96x160'])
def test_golden_labels(golden, golden_model, size):
    seen = []

    def compare(name, attn, tokens):
        counts = attn.cluster_counts(tokens.shape[1])
        labels = torch.stack(dpc_knn(tokens, counts), dim=1)
        assert torch.equal(labels, golden[f'labels/{name}/{size}'].long()), name
        seen.append(name)

    for i, stage in enumerate(golden_model.stages[:3], start=1):
        for j, block in enumerate(stage.blocks):
            block.attn.register_forward_pre_hook(
                lambda attn, args, name=f'block{i}.{j}': compare(name, attn, args[0])
            )
    golden_model(golden[f'input/{size}'])
    assert len(seen) == 5


@pytest.mark.parametrize(
    ('names', 'count'),
    [
        (['tiny', 't', 'b1'], 11_169_417),
        (['small', 's', 'b2'], 22_177_941),
        (['base', 'b', 'b3'], 39_733_210),
    ],
)
def test_parameter_count(names, count):
    for name in names:
        with torch.device('meta'):
            model = ClusTR(name)
        assert sum(param.numel() for param in model.parameters()) == count


# ---- shapes


@pytest.mark.parametrize('batch', [1, 2, 3, 5])
@pytest.mark.parametrize(
    'size',
    [(32, 32), (31, 31), (33, 33), (7, 50), (112, 137), (256, 309), (1, 1), (2, 9)],
)
def test_output_shapes(size, batch):
    model = random_model().eval()
    with torch.no_grad():
        outs = model(randn(batch, 3, *size))
    assert isinstance(outs, tuple)
    for i, out in enumerate(outs):
        stride = 4 * 2**i
        expected = (batch, ARCH['embed_dims'][i], *(-(-s // stride) for s in size))
        assert out.shape == expected
        assert out.is_contiguous()
        assert out.isfinite().all()


def test_image_alone_and_in_a_batch():
    model = random_model().eval()
    images = randn(3, 3, 50, 70)
    with torch.no_grad():
        together = model(images)
        alone = model(images[1:2])
    for a, b in zip(together, alone):
        torch.testing.assert_close(a[1:2], b, rtol=0, atol=1e-5)


@pytest.mark.parametrize('out_indices', [(0,), (3,), (0, 2), (1, 2, 3), (0, 1)])
def test_out_indices(out_indices):
    x = randn(2, 3, 40, 40)
    full = random_model().eval()
    part = ClusTR(ARCH, out_indices=out_indices).eval()
    assert len(part.stages) == out_indices[-1] + 1
    part.load_state_dict(full.state_dict(), strict=False)
    with torch.no_grad():
        expected, outs = full(x), part(x)
    assert len(outs) == len(out_indices)
    for index, out in zip(out_indices, outs):
        assert torch.equal(out, expected[index])


def test_in_channels():
    out = ClusTR(ARCH, in_channels=6)(randn(1, 6, 32, 32))
    assert out[0].shape == (1, 16, 8, 8)


def test_full_attention_where_nothing_is_merged():
    arch = {**ARCH, 'sr_ratios': [8, 4, 1, 1]}
    model = ClusTR(arch)
    kinds = [type(stage.blocks[0].attn) for stage in model.stages]
    assert kinds == [ClusteredAttention] * 2 + [layers.FullAttention] * 2


# ---- clustered attention against its definition


@pytest.mark.parametrize('num_tokens', [1, 3, 16, 36, 35])
def test_attention_by_definition(num_tokens):
    torch.manual_seed(0)
    attn = ClusteredAttention(16, 2, 2, 5, None, 0.0, 0.0).double()
    x = torch.randn(2, num_tokens, 16, dtype=torch.float64)
    expected = 0
    weight = torch.exp(attn.importance(x))
    m1 = max(1, num_tokens // 4)
    for kv, count in [(attn.kv1, m1), (attn.kv2, min(4 * m1, num_tokens))]:
        (labels,) = dpc_knn(x, [count])
        member = nn.functional.one_hot(labels, count).double().transpose(1, 2)
        merged = member @ (x * weight) / (member @ weight + 1e-6)
        key, value = kv(merged).chunk(2, dim=-1)
        heads = []
        for h in (slice(0, 8), slice(8, 16)):
            score = attn.q(x)[..., h] @ key[..., h].transpose(1, 2) / 8**0.5
            heads.append(score.softmax(-1) @ value[..., h])
        expected = expected + torch.cat(heads, dim=-1)
    # The merge weights are float32 by design.
    torch.testing.assert_close(
        attn(x, (1, num_tokens)), attn.proj(expected), rtol=1e-6, atol=1e-6
    )


def test_no_clustering_where_clusters_are_tokens(monkeypatch):
    counts = []

    def spy(tokens, num_clusters, k):
        counts.append((tokens.shape[1], tuple(num_clusters)))
        return dpc_knn(tokens, num_clusters, k)

    monkeypatch.setattr(windows, 'dpc_knn', spy)
    random_model()(randn(1, 3, 64, 64))
    # Stage 3 has 16 tokens, M1 = 4 and M2 = 16; stage 4 is not clustered.
    assert counts == [(256, (4, 16))] + [(64, (4, 16))] * 2 + [(16, (4,))] * 2


def test_num_neighbors_reaches_the_clustering(monkeypatch):
    seen = set()

    def spy(tokens, num_clusters, k):
        seen.add(k)
        return dpc_knn(tokens, num_clusters, k)

    monkeypatch.setattr(windows, 'dpc_knn', spy)
    ClusTR(ARCH, num_neighbors=7)(randn(1, 3, 32, 32))
    assert seen == {7}


# ---- training


def test_every_parameter_gets_a_gradient():
    model = random_model().train()
    sum(out.square().mean() for out in model(randn(2, 3, 64, 64))).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and param.grad.abs().sum() > 0, name


@pytest.mark.parametrize('last', [0, 1, 2])
def test_no_unused_parameter_before_the_last_output(last):
    model = random_model(out_indices=(last,)).train()
    model(randn(1, 3, 64, 64))[0].square().mean().backward()
    assert all(param.grad is not None for param in model.parameters())


def test_same_input_same_output_in_training():
    model = random_model().train()
    x = randn(2, 3, 60, 44)
    for a, b in zip(model(x), model(x)):
        assert torch.equal(a, b)


def test_drop_rates_act_in_training_only():
    x = randn(4, 3, 32, 32)
    for name in ['drop_rate', 'attn_drop_rate', 'drop_path_rate']:
        model = random_model(**{name: 0.5})
        assert not torch.equal(model.train()(x)[-1], model(x)[-1]), name
        assert torch.equal(model.eval()(x)[-1], model(x)[-1]), name


def test_drop_path_grows_linearly():
    model = ClusTR(ARCH, drop_path_rate=0.5)
    rates = [b.drop_path.prob for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = layers.DropPath(0.25).train()
    out = drop(torch.ones(4000, 3, 2))
    values = out[:, 0, 0]
    assert torch.equal(out, values[:, None, None].expand_as(out))
    assert sorted(set(values.tolist())) == pytest.approx([0, 4 / 3])
    assert values.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize('frozen', [-1, 0, 1, 3])
def test_frozen_stages(frozen):
    model = random_model(frozen_stages=frozen, drop_rate=0.3, drop_path_rate=0.3)

    def check():
        for i, stage in enumerate(model.stages):
            for param in stage.parameters():
                assert param.requires_grad == (i > frozen)
            for module in stage.modules():
                assert module.training == (i > frozen)

    # From the constructor on; there, MMEngine wraps the model for several GPUs.
    for param in model.stages[: frozen + 1].parameters():
        assert not param.requires_grad
    assert model.train() is model
    check()
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    check()


def test_with_cp_equals_plain():
    plain = random_model(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.3)
    saving = random_model(
        drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.3, with_cp=True
    )
    results = []
    for model in (plain, saving):
        x = randn(2, 3, 48, 64).requires_grad_()
        torch.manual_seed(3)
        outs = model.train()(x)
        sum(out.square().mean() for out in outs).backward()
        results.append([x.grad, *outs, *[p.grad for p in model.parameters()]])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_with_cp_recomputes_without_reentrance(monkeypatch):
    calls = []
    real = pyramid.checkpoint

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(pyramid, 'checkpoint', spy)
    model = random_model(with_cp=True)
    with torch.no_grad():
        model(randn(1, 3, 32, 32))
    assert not calls
    model(randn(1, 3, 32, 32))
    assert calls == [dict(use_reentrant=False)] * 6


@pytest.mark.parametrize('dtype', HALF)
def test_autocast_clusters_in_float32(monkeypatch, dtype):
    seen = []

    def spy(tokens, num_clusters, k):
        labels = dpc_knn(tokens, num_clusters, k)
        with torch.autocast('cpu', enabled=False):
            again = dpc_knn(tokens.float(), num_clusters, k)
        seen.extend(torch.equal(a, b) for a, b in zip(labels, again))
        return labels

    monkeypatch.setattr(windows, 'dpc_knn', spy)
    model = random_model().train()
    with torch.autocast('cpu', dtype=dtype):
        loss = sum(out.float().square().mean() for out in model(randn(2, 3, 64, 64)))
    loss.backward()
    assert seen and all(seen)
    assert loss.isfinite()
    assert all(param.grad.isfinite().all() for param in model.parameters())


def test_large_importance_does_not_overflow():
    attn = ClusteredAttention(16, 2, 2, 5, None, 0.0, 0.0)
    nn.init.constant_(attn.importance.bias, 200.0)
    assert attn(randn(1, 36, 16), (6, 6)).isfinite().all()


# ---- initialisation


def test_initialisation():
    torch.manual_seed(0)
    model = ClusTR('tiny')
    block = model.stages[1].blocks[0]
    assert block.attn.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.ffn.dwconv.weight.std().item() == pytest.approx(
        (2 / 9) ** 0.5, rel=0.05
    )
    assert model.stages[1].patch_embed.proj.weight.std().item() == pytest.approx(
        (2 / (9 * 128)) ** 0.5, rel=0.05
    )
    for name, param in model.named_parameters():
        if name.endswith('bias'):
            assert not param.any(), name
        elif 'norm' in name:
            assert (param == 1).all(), name


def test_norm_cfg():
    model = ClusTR(ARCH, norm_cfg=dict(type='LN', eps=1e-3, requires_grad=False))
    stage = model.stages[0]
    assert stage.norm.eps == stage.blocks[0].norm1.eps == 1e-3
    assert stage.patch_embed.norm.eps == 1e-5
    assert not stage.norm.weight.requires_grad
    assert ClusTR(ARCH).stages[0].norm.eps == 1e-6


def test_deepcopy():
    model = random_model().eval()
    x = randn(1, 3, 32, 32)
    assert torch.equal(copy.deepcopy(model)(x)[-1], model(x)[-1])


# ---- wrong arguments


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='huge'), "'tiny', 't', 'b1'.*got 'huge'"),
        (dict(arch=5), 'keys .*embed_dims.*got 5'),
        (dict(arch={k: v for k, v in ARCH.items() if k != 'depths'}), 'keys.*depths'),
        (dict(arch={**ARCH, 'width': [1]}), 'got .*width'),
        (dict(arch={**ARCH, 'depths': [1, 1]}), "equally long.*'depths': 2"),
        (dict(arch={**ARCH, 'depths': [1, 0, 1, 1]}), r'depths must.*\[1, 0, 1, 1\]'),
        (dict(arch={**ARCH, 'num_heads': [3, 2, 3, 4]}), 'divisible.*16 and 3'),
        (dict(in_channels=0), 'in_channels.*got 0'),
        (dict(num_neighbors=0), 'num_neighbors.*got 0'),
        (dict(cluster_window=0), 'cluster_window.*got 0'),
        (dict(cluster_window=-224), 'cluster_window.*got -224'),
        (dict(cluster_window=1.5), 'cluster_window.*got 1.5'),
        (dict(drop_rate=1.0), r'drop_rate.*\[0, 1\).*1.0'),
        (dict(attn_drop_rate=-0.1), 'attn_drop_rate.*-0.1'),
        (dict(drop_path_rate=1.5), 'drop_path_rate.*1.5'),
        (dict(out_indices=(4,)), r'out_indices.*\[0, 1, 2, 3\].*\(4,\)'),
        (dict(out_indices=(-1,)), r'out_indices.*\(-1,\)'),
        (dict(out_indices=(2, 1)), r'out_indices.*\(2, 1\)'),
        (dict(out_indices=()), r'out_indices.*\(\)'),
        (dict(frozen_stages=4), 'frozen_stages.*-1, 0, 1, 2, 3.*got 4'),
        (dict(frozen_stages=-2), 'frozen_stages.*got -2'),
        (dict(norm_cfg=dict(eps=1e-6)), 'norm_cfg.*None'),
        (dict(norm_cfg=dict(type='NoSuchNorm')), 'norm_cfg.*NoSuchNorm'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ClusTR(**{'arch': ARCH, **kwargs})


@pytest.mark.parametrize(
    'shape', [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (0, 3, 32, 32), (1, 3, 9)]
)
def test_wrong_input(shape):
    model = ClusTR(ARCH)
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\)') as error:
        model(torch.zeros(shape))
    assert str(shape) in str(error.value)
