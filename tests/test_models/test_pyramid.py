"""What holds for every backbone: sizes, arguments, training, messages."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models.variants import (
    ARCHS,
    CASES,
    equal,
    fixed_model,
    for_all,
    for_maps,
    loss_of,
    make_model,
    randn,
    random_model,
    run,
)
from torch_versions import HALF, compiles

from clustr_mm.models import pyramid

# ---- what goes in and comes out

LAYOUTS = {
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'strided': lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'expanded': lambda x: x[:1].expand(len(x), -1, -1, -1),
}


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    name=st.sampled_from(list(CASES)),
    batch=st.integers(1, 3),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_sizes_and_layouts(name, batch, height, width, layout):
    model = fixed_model(name)
    x = LAYOUTS[layout](randn(batch, 3, height, width))
    outs = run(model, x)
    assert isinstance(outs, tuple) and len(outs) == (1 if 'class' in name else 4)
    for i, (y, channels) in enumerate(zip(outs, model.arch_settings['embed_dims'])):
        stride = 4 * 2**i
        size = () if y.ndim == 2 else (-(-height // stride), -(-width // stride))
        assert y.shape == (batch, channels, *size)
        assert y.isfinite().all() and y.is_contiguous()
    assert equal(outs, run(model, x.clone(memory_format=torch.contiguous_format)))


@for_all
def test_image_alone_and_in_a_batch(name):
    model = random_model(name).eval()
    images = randn(5, 3, 97, 160)
    for a, b in zip(run(model, images), run(model, images[1:2])):
        torch.testing.assert_close(a[1:2], b, rtol=0, atol=1e-5)


@pytest.mark.parametrize('out_indices', [(0,), (3,), (0, 2), (1, 2, 3)])
@for_maps
def test_out_indices(name, out_indices):
    full = random_model(name).eval()
    part = make_model(name, out_indices=list(out_indices)).eval()
    assert len(part.stages) == out_indices[-1] + 1
    assert not part.load_state_dict(full.state_dict(), strict=False).missing_keys
    x = randn(2, 3, 40, 40)
    expected = run(full, x)
    assert equal(run(part, x), [expected[index] for index in out_indices])


@pytest.mark.parametrize('dtype', [torch.float64, *HALF])
@for_all
def test_dtype_of_the_weights(name, dtype):
    model = random_model(name).eval()
    x = randn(2, 3, 40, 56)
    single = run(model, x)
    for y, expected in zip(run(model.to(dtype), x.to(dtype)), single):
        assert y.dtype == dtype and y.isfinite().all()
        if dtype == torch.float64:
            torch.testing.assert_close(y.float(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
@for_all
def test_copies_and_state_dicts(name, copied):
    model = random_model(name, in_channels=4).eval()
    fresh = make_model(name, in_channels=4).eval()
    x = randn(1, 4, 50, 60)
    expected = run(model, x)
    other = copied(model)
    assert equal(run(other, x), expected)
    assert not equal(run(fresh, x), expected)
    fresh.load_state_dict(other.state_dict())
    assert equal(run(fresh, x), expected)
    # Hooks that translate checkpoints come along.
    wrapped = {f'module.backbone.{k}': v for k, v in other.state_dict().items()}
    assert not other.load_state_dict(wrapped).missing_keys


# ---- training


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (0,), (1,), (2,)])
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
    model, plain = random_model(name, **{rate: 0.5}), random_model(name)
    assert not torch.equal(model.train()(x)[-1], model(x)[-1])
    assert equal(plain.train()(x), plain(x))
    assert torch.equal(model.eval()(x)[-1], model(x)[-1])


@for_all
def test_drop_path_grows_linearly(name):
    model = make_model(name, drop_path_rate=0.5)
    rates = [b.drop_path.prob for stage in model.stages for b in stage.blocks]
    last = len(rates) - 1
    assert rates == pytest.approx([0.5 * i / last for i in range(last + 1)])


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
        model = random_model(name, with_cp=with_cp, **rates)
        run(model.eval(), randn(1, 3, 32, 32))
        assert not calls, 'nothing to recompute without gradients'
        x = randn(2, 3, 64, 96).requires_grad_()
        torch.manual_seed(3)
        outs = model.train()(x)
        loss_of(outs).backward()
        grads = [param.grad for param in model.parameters()]
        results.append([x.grad, *outs, *grads, *model.buffers()])
    blocks = [m for m in model.modules() if isinstance(m, pyramid.Block)]
    assert calls == [dict(use_reentrant=False)] * len(blocks)
    assert equal(*results)


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
    # One block of a kind suffices.
    arch = {**ARCHS[CASES[name]['type']], 'depths': [1, 1, 1, 1]}
    if 'local_depths' in arch:
        arch.update(depths=[2, 1, 1, 1], local_depths=[1, 1, 1, 1])
    model = random_model(name, arch=arch).eval()
    x = randn(1, 3, 64, 96)
    expected = run(model, x)
    program = torch.export.export(model, (x,)).module()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    for runs in (program, compiled):
        for a, b in zip(run(runs, x), expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@for_all
def test_depth_of_parameters(name):
    """As mmpretrain asks for it, whose learning rates decay from layer to layer."""
    model = make_model(name)
    blocks = [
        f'stages.{i}.blocks.{j}.'
        for i, stage in enumerate(model.stages)
        for j in range(len(stage.blocks))
    ]
    number = len(blocks) + 2
    keys = [key for key, _ in model.named_parameters()]
    for depth, prefix in [(0, 'stages.0.patch_embed.'), *enumerate(blocks, start=1)]:
        mine = [key for key in keys if key.startswith(prefix)]
        assert mine
        for key in mine:
            assert model.get_layer_depth(f'x.{key}', 'x.') == (depth, number)
    assert model.get_layer_depth('stages.1.patch_embed.norm.bias')[0] == len(
        model.stages[0].blocks
    )
    assert model.get_layer_depth('head.weight', 'x.') == (number - 1, number)


# ---- messages

WRONG = [
    (dict(arch='huge'), "arch must be one of .*got 'huge'"),
    (dict(arch=None), r'arch must be one of \[.*\] or a dict .*embed_dims.*got None'),
    (dict(arch=dict(depths=[1])), r'keys .*embed_dims.*got \{.depths.: \[1\]\}'),
    (dict(in_channels='3'), "in_channels.*got '3'"),
    (dict(drop_rate=1.0), r'drop_rate.*\[0, 1\).*1.0'),
    (dict(drop_path_rate='0.1'), "drop_path_rate.*got '0.1'"),
    (dict(out_indices=3), r'out_indices.*\[0, 1, 2, 3\], got 3'),
    (dict(out_indices='12'), "out_indices.*got '12'"),
    (dict(out_indices=(4,)), r'out_indices.*\(4,\)'),
    (dict(out_indices=(2, 1)), r'out_indices.*\(2, 1\)'),
    (dict(out_indices=()), r'out_indices.*\(\)'),
    (dict(frozen_stages=4), 'frozen_stages.*-1, 0, 1, 2, 3.*got 4'),
    (dict(frozen_stages='2'), "frozen_stages.*got '2'"),
    (dict(norm_cfg='LN'), "norm_cfg must be a dict.*got 'LN'"),
    (dict(norm_cfg=dict(eps=1e-6)), 'norm_cfg.*None'),
    (dict(norm_cfg=dict(type='NoSuchNorm')), 'norm_cfg.*NoSuchNorm'),
]


@pytest.mark.parametrize(('kwargs', 'message'), WRONG)
@for_all
def test_wrong_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, **kwargs)


SHARED_ENTRIES = [
    (dict(width=[1]), 'keys.*got .*width'),
    (dict(depths=[1, 1]), "equally long.*'depths': 2"),
    (dict(depths=[1, 0, 1, 1]), r'depths must.*\[1, 0, 1, 1\]'),
    (dict(depths=[1, 2.0, 2, 1]), r'depths must.*whole.*\[1, 2.0, 2, 1\]'),
    (dict(embed_dims=64), 'embed_dims must be a list of positive.*got 64'),
    (dict(num_heads='1234'), "num_heads must.*got '1234'"),
    (dict(mlp_ratios=[2, 2, None, 2]), 'mlp_ratios must.*None'),
    (dict(num_heads=[3, 2, 2, 4]), 'divisible.*16 and 3'),
]
OWN_ENTRIES = [
    ('DualViT', dict(stem_width=0), 'stem_width .*positive.*got 0'),
    ('DualViT', dict(stem_width=[8]), r'stem_width .*got \[8\]'),
    ('DualViT', dict(mlp_ratios=[2, 2, 1, 2]), r'above 1.*\[2, 2, 1, 2\]'),
    ('STT', dict(window_size=0), 'window_size.*got 0'),
    ('STT', dict(embed_dims=[16, 16, 16, 32]), 'embed_dims.*same.*32'),
    ('STT', dict(local_depths=[2, 0, 1, 2]), 'local_depths.*positive'),
    (
        'STT',
        dict(local_depths=[2, 1, 2, 2]),
        r'local_depths.*at most.*\[2, 1, 2, 2\] and \[4, 2, 1, 2\]',
    ),
]


@pytest.mark.parametrize(
    ('name', 'entries', 'message'),
    [(name, *entry) for name in ARCHS for entry in SHARED_ENTRIES] + OWN_ENTRIES,
)
def test_wrong_entries_of_arch(name, entries, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, arch={**ARCHS[name], **entries})


@pytest.mark.parametrize('window', [0, 4, '3'])
def test_wrong_window(window):
    with pytest.raises(ValueError, match=f'window.*odd.*got {window!r}'):
        make_model('LinGlo', window=window)


@pytest.mark.parametrize('name', ARCHS)
def test_unknown_arguments(name):
    """A slip, or what a config has inherited from another backbone."""
    message = f"{name}: .*'depth', 'drop_path'; .* arch, .*drop_path_rate, .*_delete_="
    with pytest.raises(TypeError, match=message):
        make_model(name, drop_path=0.1, depth=50)


@pytest.mark.parametrize(
    ('x', 'message'),
    [
        (torch.zeros(3, 32, 32), r'\(B, 3, H, W\).*\(3, 32, 32\)'),
        (torch.zeros(1, 4, 32, 32), r'\(B, 3, H, W\).*\(1, 4, 32, 32\)'),
        (torch.zeros(1, 3, 0, 32), r'\(B, 3, H, W\).*\(1, 3, 0, 32\)'),
        (torch.zeros(0, 3, 32, 32), r'\(B, 3, H, W\).*\(0, 3, 32, 32\)'),
        (
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
            'float.*preprocessor.*torch.uint8',
        ),
    ],
)
@for_all
def test_wrong_input(name, x, message):
    model = make_model(name)
    with pytest.raises(ValueError, match=message):
        model(x)
