import pytest
import torch
from test_models.variants import ARCHS, count_parameters, golden, randn, random_model
from torch import nn
from torch.nn import functional as F
from torch_versions import HALF, compiles

from clustr_mm import ClusTR
from clustr_mm.models import layers
from clustr_mm.models.clustr import ClusteredAttention
from clustr_mm.ops import DPCKNN, dpc_knn

ARCH = ARCHS['ClusTR']

# ---- the numbers of the public code


@pytest.mark.parametrize('size', ['64x64', '72x104', '96x160'])
def test_golden_features_and_labels(size):
    arrays, weights = golden('clustr')
    model = ClusTR(ARCH).eval()
    assert not model.load_state_dict(weights, strict=False).missing_keys
    seen = []

    def compare(name, attn, tokens):
        labels = dpc_knn(tokens, attn.cluster_counts(tokens.shape[1]))
        expected = arrays[f'labels/block{name}/{size}'].long()
        assert torch.equal(torch.stack(labels, dim=1), expected), name
        seen.append(name)

    for i, stage in enumerate(model.stages[:3], start=1):
        for j, block in enumerate(stage.blocks):
            block.attn.register_forward_pre_hook(
                lambda attn, args, name=f'{i}.{j}': compare(name, attn, args[0])
            )
    with torch.no_grad():
        outs = model(arrays[f'input/{size}'])
    assert seen == ['1.0', '2.0', '2.1', '3.0', '3.1']
    for i, out in enumerate(outs, start=1):
        # Far below the agreement asked for, 1e-4: an eps of 1e-6 in the norms of the
        # patch embeddings would be 2e-4 off.
        torch.testing.assert_close(out, arrays[f'stage{i}/{size}'], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('names', 'count'),
    [
        (['tiny', 't', 'b1'], 11_169_417),
        (['small', 's', 'b2'], 22_177_941),
        (['base', 'b', 'b3'], 39_733_210),
    ],
)
def test_parameter_count(names, count):
    with torch.device('meta'):
        assert {count_parameters(ClusTR(name)) for name in names} == {count}


# ---- clustered attention


@pytest.mark.parametrize('num_tokens', [1, 3, 16, 36, 35])
def test_attention_by_definition(num_tokens):
    torch.manual_seed(0)
    attn = ClusteredAttention(16, 2, 2, DPCKNN()).double()
    x = torch.randn(2, num_tokens, 16, dtype=torch.float64)
    expected = 0
    weight = torch.exp(attn.importance(x))
    m1 = max(1, num_tokens // 4)
    for kv, count in [(attn.kv1, m1), (attn.kv2, min(4 * m1, num_tokens))]:
        (labels,) = dpc_knn(x, [count])
        member = F.one_hot(labels, count).double().transpose(1, 2)
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


def test_large_importance_does_not_overflow():
    attn = ClusteredAttention(16, 2, 2, DPCKNN())
    nn.init.constant_(attn.importance.bias, 200.0)
    assert attn(randn(1, 36, 16), (6, 6)).isfinite().all()


class Spy(DPCKNN):
    """Tells what it is asked for."""

    seen: list

    def find(self, tokens, counts):
        labels = super().find(tokens, counts)
        self.seen.append((tokens, tuple(counts), self.k, labels))
        return labels


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setattr(Spy, 'seen', [], raising=False)
    return Spy


def test_no_clustering_where_clusters_are_tokens(spy):
    random_model('ClusTR', clusterer=dict(type=spy, k=7))(randn(1, 3, 64, 64))
    # Stage 3 has 16 tokens, M1 = 4 and M2 = 16; stage 4 is not clustered.
    assert [(len(tokens[0]), counts) for tokens, counts, _, _ in spy.seen] == (
        [(256, (4, 16))] + [(64, (4, 16))] * 2 + [(16, (4,))] * 2
    )
    assert {k for _, _, k, _ in spy.seen} == {7}


@pytest.mark.parametrize('dtype', HALF)
def test_autocast_clusters_in_float32(spy, dtype):
    model = random_model('ClusTR', clusterer=dict(type=spy)).train()
    with torch.autocast('cpu', dtype=dtype):
        model(randn(2, 3, 64, 64))
    assert len(spy.seen) == 5
    for tokens, counts, k, labels in spy.seen:
        for a, b in zip(labels, dpc_knn(tokens.float(), counts, k)):
            assert torch.equal(a, b)


@compiles
def test_operator_is_registered_correctly():
    torch.library.opcheck(torch.ops.clustr_mm.dpc_knn, (randn(2, 40, 16), [3, 10], 5))


@compiles
def test_compiled_gradients():
    torch._dynamo.reset()
    model = random_model('ClusTR', arch={**ARCH, 'depths': [1, 1, 1, 1]})
    x = randn(1, 3, 64, 64)
    grads = []
    for run in (model, torch.compile(model, backend='aot_eager')):
        model.zero_grad()
        sum(out.square().mean() for out in run(x)).backward()
        grads.append([param.grad.clone() for param in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('clusterer', [dict(type='DPCKN'), dict(k=5), 'DPCKNN'])
def test_wrong_clusterer(clusterer):
    with pytest.raises(ValueError, match="clusterer must .*'DPCKNN'.*got ") as error:
        ClusTR(ARCH, clusterer=clusterer)
    assert repr(clusterer) in str(error.value)


# ---- the feed-forward layer, stochastic depth and initialisation


@pytest.mark.parametrize('residual', [True, False])
@pytest.mark.parametrize('batch', [1, 3])
def test_feed_forward_by_definition(residual, batch):
    torch.manual_seed(0)
    ffn = layers.ConvFFN(16, 200, residual=residual).double()
    x = torch.randn(batch, 35, 16, dtype=torch.float64)
    hidden = ffn.fc1(x).transpose(1, 2).reshape(batch, 200, 5, 7).contiguous()
    local = ffn.dwconv(hidden)
    local = local + hidden if residual else local
    expected = ffn.fc2(F.gelu(local).flatten(2).transpose(1, 2))
    torch.testing.assert_close(ffn(x, (5, 7)), expected)


@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
def test_slices_of_channels_without_gradients(monkeypatch, dtype):
    torch.manual_seed(0)
    ffn = layers.ConvFFN(16, 300)
    x = randn(2, 40, 16)
    sizes = []
    ffn.act.register_forward_hook(lambda _, args, out: sizes.append(out.numel()))
    with torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
        whole = ffn(x, (5, 8))
        assert sizes == [2 * 40 * 300]
        monkeypatch.setitem(layers.SLICE_ELEMENTS, 'cpu', 2 * 40 * 100)
        sizes.clear()
        with torch.no_grad():
            sliced = ffn(x, (5, 8))
    assert len(sizes) > 2 and sum(sizes) == 2 * 40 * 300
    assert max(sizes) <= 2 * 40 * 112 and sliced.dtype == whole.dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(sliced, whole.detach(), rtol=0, atol=tolerance)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = layers.DropPath(0.25).train()(torch.ones(4000, 3, 2))
    values = out[:, 0, 0]
    assert torch.equal(out, values[:, None, None].expand_as(out))
    assert sorted(set(values.tolist())) == pytest.approx([0, 4 / 3])
    assert values.mean().item() == pytest.approx(1, abs=0.05)


def test_initialisation():
    torch.manual_seed(0)
    model = ClusTR('tiny')
    stage = model.stages[1]
    for param, std in [
        (stage.blocks[0].attn.q.weight, 0.02),
        (stage.blocks[0].ffn.dwconv.weight, (2 / 9) ** 0.5),
        (stage.patch_embed.proj.weight, (2 / (9 * 128)) ** 0.5),
    ]:
        assert param.std().item() == pytest.approx(std, rel=0.05)
    for name, param in model.named_parameters():
        if name.endswith('bias'):
            assert not param.any(), name
        elif 'norm' in name:
            assert (param == 1).all(), name
