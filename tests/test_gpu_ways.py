"""What a GPU would run, shown without one.

In FakeTensorMode tensors have a device, a shape and no numbers: what asks for a number
fails there, and it can be seen where every tensor is, and how large.
"""

import importlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from count_kernels import count_kernels
from get_flops import load_model
from test_models.variants import for_all, make_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch_versions import compiles

from clustr_mm.ops import kmeans, merge_tokens, set_search_backend

CONFIGS = Path(__file__).parents[1] / 'configs'

# The package exports a function under the name of this module.
dpc_module = importlib.import_module('clustr_mm.ops.dpc_knn')

pytestmark = compiles

#: Operators whose result depends on numbers, so that the CPU waits for them.
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

#: Their index may be a mask, which is no better; otherwise it is not read.
INDEXED = ('aten::index', 'aten::index_put', 'aten::index_put_')

#: Bytes of the largest tensor there may be.
LARGEST = 2**29


class Watch(TorchDispatchMode):
    """Fails at the first operator that a GPU would have to wait for.

    Nothing is read back, and nothing comes from or goes to the memory of the CPU.
    """

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.dtypes = set()
        self.operators = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if func.namespace == 'prim':  # what asks for the device, and such
            return func(*args, **(kwargs or {}))
        if name in INDEXED:
            masks = [i for i in args[1] if i is not None and i.dtype != torch.int64]
            assert not masks, f'{func} by a mask'
        else:
            assert not TAGS & set(func.tags), f'{func} is read back'
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten((args, kwargs, out))[0]:
            if isinstance(value, torch.Tensor):
                assert value.is_cuda, f'{func} has a tensor on the {value.device}'
                self.largest = max(self.largest, value.untyped_storage().nbytes())
                self.dtypes.add(value.dtype)
        self.operators.add(name)
        return out


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU that autocast believes in, for tensors without numbers."""
    no_amp = 'torch.cuda.amp.common.amp_definitely_not_available'
    monkeypatch.setattr(no_amp, lambda: False)
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda: True)
    # The kernel cannot run without numbers; count_kernels() has a stand-in.
    set_search_backend('torch')
    with FakeTensorMode():
        yield
    set_search_backend(None)


@pytest.fixture
def opened(monkeypatch):
    """The clustering runs as the operators that it is made of."""
    monkeypatch.setattr(torch.ops.clustr_mm, 'dpc_knn', dpc_module._dpc_knn)


def rand(*shape):
    return torch.empty(*shape, device='cuda')


def run(model, size, train=False, dtype=None):
    """Outputs of a model, or what else takes an image, and the watch over it."""
    autocast = torch.autocast('cuda', dtype) if dtype else nullcontext()
    with torch.set_grad_enabled(train), autocast, Watch() as watch:
        outs = model(rand(*size))
    outs = [out for out in tree_flatten(outs)[0] if isinstance(out, torch.Tensor)]
    assert {(out.is_cuda, out.requires_grad) for out in outs} == {(True, train)}
    assert dtype is None or dtype in watch.dtypes
    return outs, watch


@pytest.mark.parametrize('dtype', [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('train', [False, True])
@for_all
def test_backbones(name, train, dtype):
    with torch.device('cuda'):
        model = make_model(name, drop_path_rate=0.3, drop_rate=0.1).train(train)
    run(model, (2, 3, 224, 256), train, dtype)


@pytest.mark.parametrize('dtype', [None, torch.float16])
@pytest.mark.parametrize('name', ['ClusTR', 'ClusTR, windows'])
def test_backbones_with_the_clustering_opened(name, dtype, opened):
    with torch.device('cuda'):
        model = make_model(name)
    _, watch = run(model, (2, 3, 224, 256), True, dtype)
    assert 'aten::topk' in watch.operators


@pytest.mark.parametrize(
    'config',
    [
        'mmdet/retinanet_clustr-s-linear_fpn_1x_coco.py',
        'mmpose/td-hm_clustr-t_8xb64-210e_coco-wholebody-256x192.py',
        'mmpretrain/clustr-t-linear_8xb128_in1k.py',
        'mmseg/fpn_clustr-t_4xb4-80k_ade20k-512x512.py',
        'mmseg/upernet_clustr-t-linear_8xb2-160k_ade20k-512x512.py',
    ],
)
def test_whole_models(config):
    model = whole_model(config)
    image = (2, 3, 256, 192)
    run(lambda x: model(x, None, mode='tensor'), image, True, torch.float16)


def test_features_of_mask_rcnn(opened):
    """What is after them depends on numbers: how many boxes there are."""
    model = whole_model('mmdet/mask-rcnn_clustr-t_fpn_1x_coco.py')
    outs, watch = run(model.extract_feat, (1, 3, 800, 1344), True)
    assert len(outs) == 5
    assert 'aten::topk' in watch.operators


def whole_model(config):
    with torch.device('cuda'):
        return load_model(str(CONFIGS / config))[1].train()


def cluster(tokens):
    return dpc_module._dpc_knn(tokens, (49, 196), 5)


@pytest.mark.parametrize('length', [784, 3136, 67200])
def test_dpc_knn(length):
    """With all distances in one matrix, and in blocks."""
    found, watch = run(cluster, (2, length, 64))
    assert [f.shape for f in found] == [(2, length)] * 2
    assert watch.largest <= LARGEST


def test_kmeans_and_merge():
    def merged(tokens):
        found = kmeans(tokens, (200, 336), (49, 196))
        return merge_tokens(tokens, found, tokens[..., 0].exp())

    outs, watch = run(merged, (2, 67200, 64))
    assert [out.shape for out in outs] == [(2, 48, 64), (2, 192, 64)]  # 6 x 8 cells
    assert watch.largest <= LARGEST


def kernels(function, *args):
    with count_kernels() as counts:
        function(*args)
    return counts.total()


@pytest.mark.parametrize(
    ('number', 'what'),
    [
        (0, lambda x: x.transpose(1, 2).split(2, 1)[0].detach().unsqueeze(0)),
        (0, lambda x: (torch.empty_like(x), x.new_empty(3), x.device, x.shape)),
        (1, lambda x: torch.arange(3, device='cuda')),
        (1, lambda x: nn.functional.scaled_dot_product_attention(*[x[None]] * 3)),
        (3, lambda x: torch.bmm(x.add_(1), x.mT.contiguous())),
    ],
)
def test_what_is_a_kernel(number, what):
    """Not views, allocations nor metadata; attention is one."""
    assert kernels(what, rand(2, 2, 8, 4)[0]) == number


@pytest.mark.parametrize(('length', 'most'), [(784, 60), (3136, 120)])
def test_kernels_of_dpc_knn(length, most):
    """In one matrix, and with the search of the GPU."""
    if length > 1024:
        pytest.importorskip('triton.backends', reason='no Triton 3')
    assert kernels(cluster, rand(2, length, 128)) <= most


def kernels_of_kmeans(steps):
    return kernels(kmeans, rand(2, 3136, 128), (56, 56), (49, 196), steps)


def test_kernels_of_kmeans():
    assert kernels_of_kmeans(3) <= 60


def test_kernels_of_a_step():
    """There is one at each of the two scales."""
    assert 0 < (kernels_of_kmeans(3) - kernels_of_kmeans(2)) / 2 <= 15
