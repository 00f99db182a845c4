import pytest
import torch
from test_models.variants import randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch_versions import compiles

from clustr_mm import ClusTR


@pytest.fixture
def model():
    torch.manual_seed(0)
    torch._dynamo.reset()
    return ClusTR('tiny', drop_path_rate=0.0).eval()


def assert_same_features(outs, expected):
    assert len(outs) == len(expected)
    for out, want in zip(outs, expected):
        torch.testing.assert_close(torch.as_tensor(out), want, rtol=0, atol=1e-4)


@compiles
@pytest.mark.parametrize(
    'cfg',
    [
        dict(clusterer=dict(type='DPCKNN')),
        dict(clusterer=dict(type='DPCKNN', window=32)),
        dict(clusterer=dict(type='KMeans'), max_clusters=4),
    ],
)
def test_compile_without_graph_break(model, cfg):
    other = ClusTR('tiny', drop_path_rate=0.0, **cfg)
    other.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(other, backend=counter, fullgraph=True)
    x = randn(1, 3, 64, 96)
    assert_same_features(compiled(x), other(x))
    assert counter.frame_count == 1
    nodes = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    clusterings = sum('clustr_mm.dpc_knn' in node for node in nodes)
    if cfg['clusterer'] == dict(type='DPCKNN'):
        assert clusterings == 9  # blocks that cluster
    elif cfg['clusterer']['type'] == 'DPCKNN':
        assert clusterings >= 9  # windows of one size are one node
    else:
        assert clusterings == 0


@compiles
def test_compiled_gradients(model):
    compiled = torch.compile(model, backend='aot_eager')
    x = randn(1, 3, 64, 64)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        sum(out.square().mean() for out in run(x)).backward()
        grads.append([param.grad.clone() for param in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@compiles
def test_operator_is_registered_correctly():
    torch.library.opcheck(torch.ops.clustr_mm.dpc_knn, (randn(2, 40, 16), [3, 10], 5))


@pytest.mark.parametrize('linear', [False, True])
def test_onnx(tmp_path, linear):
    onnxruntime = pytest.importorskip('onnxruntime')
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    # Fewer blocks, the same operations: a large graph takes minutes to convert.
    arch = {**ClusTR.arch_zoo['tiny'], 'depths': [1, 1, 1, 1]}
    cfg = dict(clusterer=dict(type='KMeans'), max_clusters=4) if linear else {}
    model = ClusTR(arch, **cfg).eval()
    x = randn(1, 3, 72, 104)
    path = str(tmp_path / 'clustr.onnx')
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for seed in (1, 2):  # not only the input that was traced
        x = randn(1, 3, 72, 104, seed=seed)
        outs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert_same_features(outs, model(x))

    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {
        tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in graph.value_info
    }
    # The distances of all pairs of the 18 x 26 tokens of stage 1.
    assert any(shape[-2:] == (468, 468) for shape in shapes) != linear
