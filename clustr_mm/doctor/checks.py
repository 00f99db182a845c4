"""Checks of what is installed by using it. None of them downloads anything."""

from __future__ import annotations

import importlib
import inspect
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ..compat import mmcv_ops_are_stand_in
from ..compat.safe_load import HAS_ALLOW_LIST
from ..ops import dpc_knn
from ..ops.backend import find_kernel, why_no_kernel
from .records import FAIL, OK, WARN, Check, guarded
from .versions import check_python, check_versions, find_distributions, is_installed

NOT_INSTALLED = 'not installed'

#: A ClusTR that is built and run in no time.
ARCH = dict(
    embed_dims=[16, 16, 32, 32],
    num_heads=[1, 1, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
)

#: Per toolbox a config of its own, which is found as configs find theirs, and what
#: makes a model on ClusTR of it.
TOOLBOXES = dict(
    mmdet=('_base_/models/faster-rcnn_r50_fpn.py', dict(neck=ARCH['embed_dims'])),
    mmseg=('_base_/models/fpn_r50.py', dict(neck=ARCH['embed_dims'])),
    mmpose=(
        'wholebody_2d_keypoint/topdown_heatmap/coco-wholebody/'
        'td-hm_res50_8xb64-210e_coco-wholebody-256x192.py',
        dict(head=ARCH['embed_dims'][-1]),
    ),
    mmpretrain=('_base_/models/resnet50.py', dict(head=ARCH['embed_dims'][-1])),
)

#: The test image's height and width, multiples of nothing.
SIZE = (70, 90)


def run_checks() -> Iterator[Check]:
    """Run all checks, one after another.

    Yields:
        Check: Their results.
    """
    yield check_python()
    yield from check_versions(find_distributions())
    yield guarded('GPU', check_gpu)
    yield guarded('torchvision', check_torchvision)
    yield guarded('OpenCV', partial(check_import, 'OpenCV', 'cv2'))
    yield guarded('pkg_resources', check_pkg_resources)
    yield guarded('mim', partial(check_import, 'mim', 'mim'))
    # The compiled part is what was built for one numpy or another.
    compiled = 'xtcocotools.mask'
    yield guarded('xtcocotools', partial(check_import, 'xtcocotools', compiled))
    yield guarded('mmcv operators', check_mmcv_ops)
    yield guarded('stand-in at start', check_start_up)
    yield guarded('clustering', check_clustering)
    yield guarded('runner checkpoint', check_checkpoint)
    for toolbox in TOOLBOXES:
        yield guarded(f'ClusTR in {toolbox}', partial(check_toolbox, toolbox))


def check_import(name: str, module: str) -> Check:
    """Import a module.

    Args:
        name (str): What it is called.
        module (str): Its import name.

    Returns:
        Check: Always 'ok'; a missing package is no failure.

    Raises:
        Exception: Whatever the import raises.
    """
    if not is_installed(module.split('.')[0]):
        return Check(name, OK, NOT_INSTALLED)
    importlib.import_module(module)
    return Check(name, OK, 'imports')


def check_gpu() -> Check:
    """GPUs that torch sees, and those that are there."""
    cuda = torch.version.cuda
    built = f'torch {torch.__version__}, ' + (
        f'built for CUDA {cuda}' if cuda else 'built without CUDA'
    )
    driver = read_driver()
    text = f'{built}, driver {driver or "not found"}'
    if torch.cuda.is_available():
        names = [
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        ]
        return Check('GPU', OK, f'{text}, {len(names)} seen: {", ".join(names)}')
    if driver:
        return Check(
            *('GPU', WARN, f'{text}, none seen by torch'),
            'there is a driver: is torch built with CUDA, the driver new enough for '
            'it, and CUDA_VISIBLE_DEVICES not empty?',
        )
    return Check('GPU', OK, f'{text}, none; `--launcher pytorch` needs one')


def read_driver() -> str | None:
    """Version of NVIDIA's driver, None without one."""
    program = shutil.which('nvidia-smi')
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, '--query-gpu=driver_version', '--format=csv,noheader'],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split('\n')[0] or None


def check_torchvision() -> Check:
    """Whether torchvision has operators for this torch."""
    if not is_installed('torchvision'):
        if not mmcv_ops_are_stand_in():
            return Check('torchvision', OK, NOT_INSTALLED)
        return Check(
            *('torchvision', WARN, NOT_INSTALLED),
            'the stand-in for the operators of mmcv needs it: install the one that '
            f'matches torch {torch.__version__}',
        )
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0]])
    kept = nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist()
    return expect('torchvision', 'its operators run', kept, [1])


def check_pkg_resources() -> Check:
    """Whether there is what mmengine resolves ``mmseg::`` in configs with."""
    importlib.import_module('pkg_resources')
    return Check('pkg_resources', OK, 'imports')


def check_mmcv_ops() -> Check:
    """Where the operators of mmcv come from, and whether they run."""
    name = 'mmcv operators'
    if not is_installed('mmcv'):
        return Check(name, OK, 'mmcv is not installed')
    importlib.import_module('mmcv')  # if that fails, it is not for want of operators
    ops = importlib.import_module('mmcv.ops')
    extension = importlib.import_module('mmcv._ext')
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0]])
    kept = ops.nms(boxes, torch.tensor([0.5, 0.9]), 0.5)[1].tolist()
    text = 'compiled, all of them'
    if mmcv_ops_are_stand_in():
        text = (
            f"clustr_mm's stand-in: {', '.join(list_operators(extension))}; every "
            'other raises NotImplementedError when it is called'
        )
    return expect(name, text, kept, [1])


def list_operators(extension: ModuleType) -> list[str]:
    """Operators of a stand-in, forward and backward under one name."""
    names = [
        re.sub(r'_(forward|backward).*', '', name)
        for name, function in inspect.getmembers(extension, inspect.isfunction)
        if function.__module__ == extension.__name__ and name[0] != '_'
    ]
    return sorted({name for name in names if not name.startswith('get_')})


def check_start_up() -> Check:
    """Whether the stand-in was there before this package was imported."""
    name = 'stand-in at start'
    if not is_installed('mmcv') or not mmcv_ops_are_stand_in():
        return Check(name, OK, 'not needed')
    modules = {
        type(finder).__module__
        for finder in sys.meta_path
        if type(finder).__name__ == 'StandInFinder'
    }
    # The package's own, if it is here, came with this import.
    if modules - {'clustr_mm.compat.finder'}:
        return Check(name, OK, 'offered from the start of Python')
    return Check(
        *(name, WARN, 'offered only after `import clustr_mm`'),
        '`mim test mmdet` imports mmcv.ops before it reads a config: install with '
        'pip install . or, if editable, copy clustr_mm/compat/clustr_mm.pth to '
        'site-packages',
    )


def check_clustering() -> Check:
    """What the clustering runs on, and whether it gives the same there."""
    tokens = torch.randn(1, 1500, 16, generator=torch.Generator().manual_seed(0))
    labels = dpc_knn(tokens, [4, 16])
    if not torch.cuda.is_available():
        return Check('clustering', OK, 'plain PyTorch on the CPU')
    on_gpu = tokens.cuda()
    agree = all(
        torch.equal(a, b.cpu()) for a, b in zip(labels, dpc_knn(on_gpu, [4, 16]))
    )
    kernel = find_kernel(on_gpu)
    text = f'{"Triton" if kernel else "plain PyTorch"} on the GPU'
    check = expect('clustering', text, agree, True)
    if check.status == OK and not kernel:
        reason = why_no_kernel(on_gpu.device) or 'the search backend is torch'
        check.status, check.hint = WARN, f'faster by the Triton kernel, but {reason}'
    return check


def check_checkpoint() -> Check:
    """Whether torch's safe loader takes what MMEngine's runner saves."""
    if not HAS_ALLOW_LIST:
        text = f'torch {torch.__version__} cannot read it by weights_only=True'
        hint = 'torch 2.6 or later reads checkpoints of a training safely'
        return Check('runner checkpoint', WARN, text, hint)
    history = HistoryBuffer()
    history.update(0.5)
    saved = dict(
        state_dict=dict(weight=torch.ones(1)),
        message_hub=dict(
            log_scalars={'train/loss': history},
            runtime_info=dict(best_score=np.float64(0.25)),
        ),
    )
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)['message_hub']
    mean = loaded['log_scalars']['train/loss'].mean()
    seen = [mean, loaded['runtime_info']['best_score']]
    text = 'loads with weights_only=True'
    return expect('runner checkpoint', text, seen, [0.5, 0.25])


def check_toolbox(toolbox: str) -> Check:
    """Build a model of a toolbox on ClusTR and run it on a small image.

    Args:
        toolbox (str): Its import name.

    Returns:
        Check: The result.

    Raises:
        Exception: Whatever goes wrong in the toolbox.
    """
    name = f'ClusTR in {toolbox}'
    if not is_installed(toolbox):
        return Check(name, OK, NOT_INSTALLED)
    # The registry swallows an import error and then knows no model.
    importlib.import_module(f'{toolbox}.models')
    base, channels = TOOLBOXES[toolbox]
    backbone = dict(_delete_=True, type='ClusTR', arch=ARCH)
    if toolbox == 'mmpretrain':
        backbone['out_indices'] = (3,)
    model = {key: dict(in_channels=value) for key, value in channels.items()}
    model['backbone'] = backbone
    if toolbox == 'mmseg':
        model['pretrained'] = None
    config = Config.fromstring(f"_base_ = '{toolbox}::{base}'\nmodel = {model}", '.py')
    with DefaultScope.overwrite_default_scope(toolbox):
        net = MODELS.build(config.model)
        net.eval()  # which returns None in some toolboxes
        image = torch.rand(1, 3, *SIZE)
        with torch.no_grad():
            shape = forward(toolbox, net, image)
    return Check(name, OK, f'{type(net).__name__} runs, output {shape}')


def forward(toolbox: str, net: nn.Module, image: Tensor) -> str:
    """Run a model, and say what comes out; for detectors to the last box."""
    if toolbox == 'mmdet':
        from mmdet.structures import DetDataSample

        size = tuple(image.shape[2:])
        names = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
        metainfo = dict.fromkeys(names, size) | dict(scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=metainfo)
        return f'{len(net(image, [sample], mode="predict")[0].pred_instances)} boxes'
    maps = net(image) if toolbox == 'mmseg' else net.head(net.extract_feat(image))
    if not maps.isfinite().all():
        raise ValueError('the output is not finite')
    return ' x '.join(map(str, maps.shape))


def expect(name: str, text: str, seen: object, wanted: object) -> Check:
    """A check of a computation with a known result."""
    if seen == wanted:
        return Check(name, OK, text)
    return Check(name, FAIL, f'{text}, but wrongly: {seen} instead of {wanted}')
