"""What holds for every backbone: shapes, arguments, training."""

import pytest
import torch
from test_models.variants import (
    ARCHS,
    CASES,
    for_all,
    for_maps,
    loss_of,
    make_model,
    randn,
    random_model,
)
from torch_versions import HALF, compiles

from clustr_mm.models import pyramid


def run(model, x):
    with torch.no_grad():
        return model(x)


def blocks_of(model):
    return [m for m in model.modules() if isinstance(m, pyramid.Block)]


# ---- shapes


@pytest.mark.parametrize('batch', [1, 2, 3, 5])
@pytest.mark.parametrize(
    'size', [(1, 1), (2, 9), (7, 50), (31, 31), (64, 64), (97, 160)]
)
@for_maps
def test_output_shapes(name, size, batch):
    model = random_model(name).eval()
    outs = run(model, randn(batch, 3, *size))
    assert isinstance(outs, tuple)
    assert len(outs) == 4
    for i, (out, dims) in enumerate(zip(outs, model.arch_settings['embed_dims'])):
        stride = 4 * 2**i
        assert out.shape == (batch, dims, *(-(-side // stride) for side in size))
        assert out.is_contiguous()
        assert out.isfinite().all()


@for_all
def test_image_alone_and_in_a_batch(name):
    model = random_model(name).eval()
    images = randn(3, 3, 50, 70)
    for a, b in zip(run(model, images), run(model, images[1:2])):
        torch.testing.assert_close(a[1:2], b, rtol=0, atol=1e-5)


@pytest.mark.parametrize('out_indices', [(0,), (3,), (0, 2), (1, 2, 3), (0, 1)])
@for_maps
def test_out_indices(name, out_indices):
    x = randn(2, 3, 40, 40)
    full = random_model(name).eval()
    part = make_model(name, out_indices=out_indices).eval()
    assert len(part.stages) == out_indices[-1] + 1
    part.load_state_dict(full.state_dict(), strict=False)
    expected, outs = run(full, x), run(part, x)
    assert len(outs) == len(out_indices)
    for index, out in zip(out_indices, outs):
        assert torch.equal(out, expected[index])


@for_all
def test_in_channels(name):
    outs = run(random_model(name, in_channels=6).eval(), randn(1, 6, 32, 32))
    assert outs[0].shape[:2] == (1, 16)


# ---- training


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (0,), (1,), (2,), (0, 2)])
@for_all
def test_every_parameter_gets_a_gradient(name, out_indices):
    model = random_model(name, out_indices=out_indices).train()
    loss_of(model(randn(2, 3, 64, 64))).backward()
    for key, param in model.named_parameters():
        assert param.grad is not None, key
        # A factor common to all merge weights cancels, but for rounding.
        assert param.grad.any() or key.endswith('importance.bias'), key


@pytest.mark.parametrize('rate', ['drop_rate', 'attn_drop_rate', 'drop_path_rate'])
@for_all
def test_drop_rates_act_in_training_only(name, rate):
    x = randn(4, 3, 64, 64)
    model = random_model(name, **{rate: 0.5})
    assert not torch.equal(model.train()(x)[-1], model(x)[-1])
    assert torch.equal(model.eval()(x)[-1], model(x)[-1])


@for_all
def test_drop_path_grows_linearly(name):
    model = make_model(name, drop_path_rate=0.5)
    rates = [b.drop_path.prob for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx(
        [0.5 * i / (len(rates) - 1) for i in range(len(rates))]
    )


@for_all
def test_same_input_same_output_in_training(name):
    model = random_model(name).train()
    x = randn(2, 3, 60, 44)
    for a, b in zip(model(x), model(x)):
        assert torch.equal(a, b)


@pytest.mark.parametrize('frozen', [-1, 0, 2, 3])
@for_all
def test_frozen_stages(name, frozen):
    model = random_model(name, frozen_stages=frozen, drop_rate=0.3, drop_path_rate=0.3)
    # From the constructor on; there, MMEngine wraps the model for several GPUs.
    for i, stage in enumerate(model.stages):
        assert all(param.requires_grad == (i > frozen) for param in stage.parameters())
    assert model.train() is model
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    for i, stage in enumerate(model.stages):
        assert all(module.training == (i > frozen) for module in stage.modules())
    before = [[b.clone() for b in stage.buffers()] for stage in model.stages]
    outs = model(randn(2, 3, 32, 32))
    if any(out.requires_grad for out in outs):
        loss_of(outs).backward()
    for i, stage in enumerate(model.stages):
        assert all((p.grad is not None) == (i > frozen) for p in stage.parameters())
        for a, b in zip(before[i], stage.buffers()):
            assert torch.equal(a, b) == (i <= frozen)


@for_all
def test_with_cp_equals_plain(name, monkeypatch):
    calls = []
    real = pyramid.checkpoint
    monkeypatch.setattr(
        pyramid, 'checkpoint', lambda *a, **k: calls.append(k) or real(*a, **k)
    )
    rates = dict(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.3)
    results = []
    for with_cp in (False, True):
        model = random_model(name, with_cp=with_cp, **rates).train()
        run(model, randn(1, 3, 32, 32))
        assert not calls, 'nothing to recompute without gradients'
        model = random_model(name, with_cp=with_cp, **rates).train()
        x = randn(2, 3, 64, 96).requires_grad_()
        torch.manual_seed(3)
        outs = model(x)
        loss_of(outs).backward()
        grads = [param.grad for param in model.parameters()]
        results.append([x.grad, *outs, *grads, *model.buffers()])
    assert calls == [dict(use_reentrant=False)] * len(blocks_of(model))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', HALF)
@for_all
def test_autocast(name, dtype):
    model = random_model(name).train()
    x = randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast('cpu', dtype=dtype):
        outs = model(x)
        loss = loss_of(outs)
    loss.backward()
    assert all(param.grad.isfinite().all() for param in model.parameters())
    for a, b in zip(outs, expected):
        assert (a.float() - b).abs().mean() < 0.05 * b.abs().mean()


@for_all
@compiles
def test_compile_and_export(name):
    torch._dynamo.reset()
    case = CASES[name]
    # One block of a kind suffices.
    arch = {**ARCHS[case['type']], 'depths': [1, 1, 1, 1]}
    if 'local_depths' in arch:
        arch['depths'][0], arch['local_depths'] = 2, [1, 1, 1, 1]
    model = random_model(name, arch=arch).eval()
    x = randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,))
        compiled = torch.compile(model, backend='eager', fullgraph=True)
        for outs in (program.module()(x), compiled(x)):
            for a, b in zip(outs, expected):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@for_all
def test_layer_wise_decay_of_the_learning_rate(name):
    """By mmpretrain's constructor, with the backbone inside a classifier."""
    optimizers = pytest.importorskip('mmpretrain.engine.optimizers')
    from mmpretrain.models.classifiers import ImageClassifier

    classifier = ImageClassifier(dict(type='ResNet', depth=18))
    classifier.backbone = backbone = make_model(name)
    cfg = dict(
        type='OptimWrapper', optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05)
    )
    build = optimizers.LearningRateDecayOptimWrapperConstructor(
        cfg, dict(layer_decay_rate=0.5)
    )
    groups = build(classifier).optimizer.param_groups
    depth = sum(len(stage.blocks) for stage in backbone.stages)
    rates = {group['param_name']: group['lr'] for group in groups}
    assert len(rates) == sum(p.requires_grad for p in classifier.parameters())
    number = 0
    for i, stage in enumerate(backbone.stages):
        for j in range(len(stage.blocks)):
            number += 1
            mine = [
                rate
                for key, rate in rates.items()
                if key.startswith(f'backbone.stages.{i}.blocks.{j}.')
            ]
            assert mine and set(mine) == {0.5 ** (depth + 1 - number)}
    first = [
        v for k, v in rates.items() if k.startswith('backbone.stages.0.patch_embed')
    ]
    assert set(first) == {0.5 ** (depth + 1)}
    assert min(rates.values()) == 0.5 ** (depth + 1)
    key = next(key for key, _ in backbone.named_parameters() if 'norm' in key)
    assert backbone.get_layer_depth(key) == backbone.get_layer_depth(f'x.{key}', 'x.')
    assert backbone.get_layer_depth('head.weight', 'x.') == (depth + 1, depth + 2)


# ---- wrong arguments


def change(name, **entries):
    return dict(arch={**ARCHS[CASES[name]['type']], **entries})


@for_all
def test_wrong_arch(name):
    arch = ARCHS[CASES[name]['type']]
    lacking = {k: v for k, v in arch.items() if k != 'depths'}
    for kwargs, message in [
        (dict(arch='huge'), "arch must be one of .*got 'huge'"),
        (dict(arch=5), 'keys .*embed_dims.*got 5'),
        (dict(arch=lacking), 'keys.*depths.*got'),
        (change(name, width=[1]), 'keys.*got .*width'),
        (change(name, depths=[1, 1]), "equally long.*'depths': 2"),
        (change(name, depths=[1, 0, 1, 1]), r'depths must.*\[1, 0, 1, 1\]'),
        (change(name, depths=[1, 2.0, 2, 1]), r'depths must.*whole.*\[1, 2.0, 2, 1\]'),
        (change(name, embed_dims=64), 'embed_dims must be a sequence, got 64'),
        (change(name, num_heads='1234'), "num_heads must be a sequence, got '1234'"),
        (change(name, mlp_ratios=[2, 2, None, 2]), 'mlp_ratios must.*None'),
        (change(name, num_heads=[3, 2, 2, 4]), 'divisible.*16 and 3'),
    ]:
        with pytest.raises(ValueError, match=message):
            make_model(name, **kwargs)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(in_channels=0), 'in_channels.*got 0'),
        (dict(in_channels='3'), "in_channels.*got '3'"),
        (dict(drop_path_rate='0.1'), "drop_path_rate.*got '0.1'"),
        (dict(out_indices=3), r'out_indices.*\[0, 1, 2, 3\], got 3'),
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
@for_all
def test_wrong_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, **kwargs)


@pytest.mark.parametrize(
    'shape', [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (0, 3, 32, 32), (1, 3, 9)]
)
@for_all
def test_wrong_input(name, shape):
    model = make_model(name)
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\)') as error:
        model(torch.zeros(shape))
    assert str(shape) in str(error.value)
