"""Print one page about this environment, for a bug report.

Exits with 0 if nothing fails. What an error means stands in docs/faq.md, by its text.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import shutil
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils.dl_utils import collect_env

from .compat import mmcv_ops_are_stand_in
from .compat.finder import VARIABLE
from .compat.safe_load import HAS_ALLOW_LIST
from .files import shorten
from .models import ClusTR
from .ops import dpc_knn
from .ops.backend import find_kernel, why_no_kernel

#: What is left out of MMEngine's report: long, or of no use here.
LEFT_OUT = ('PyTorch compiling details', 'numpy_random_seed', 'MUSA available')

#: Distributions that MMEngine does not report; together those of one module.
DISTRIBUTIONS = (
    *('clustr_mm', 'numpy', 'setuptools', 'triton', 'mmcv mmcv-lite onedl-mmcv'),
    *('mmdet onedl-mmdetection', 'mmsegmentation onedl-mmsegmentation'),
    *('mmpose', 'mmpretrain', 'openmim'),
)

#: What fails to import where things do not fit together.
MODULES = ('pkg_resources', 'cv2', 'torchvision.ops', 'xtcocotools.mask')

DIMS = ClusTR.arch_zoo['tiny']['embed_dims']

#: Per toolbox a config of its own, and what makes a model on ClusTR of it.
TOOLBOXES = dict(
    mmdet=('_base_/models/faster-rcnn_r50_fpn.py', dict(neck=DIMS)),
    mmseg=('_base_/models/fpn_r50.py', dict(neck=DIMS)),
    mmpose=(
        'wholebody_2d_keypoint/topdown_heatmap/coco-wholebody/'
        'td-hm_res50_8xb64-210e_coco-wholebody-256x192.py',
        dict(head=DIMS[-1]),
    ),
    mmpretrain=('_base_/models/resnet50.py', dict(head=DIMS[-1])),
)


class Concern(Exception):
    """Something that works, but not as it could."""


def check_machine() -> str:
    """What MMEngine reports of it, and whether torch sees the GPUs that are there."""
    env = {key: value for key, value in collect_env().items() if key not in LEFT_OUT}
    text = ''.join(f'\n       {key}: {value}' for key, value in env.items())
    if shutil.which('nvidia-smi') and not torch.cuda.is_available():
        raise Concern(f'torch sees no GPU, but there is a driver{text}')
    return text


def check_versions() -> str:
    """Versions of all distributions; of those of one module there should be one."""
    texts, twice = [], False
    for names in map(str.split, DISTRIBUTIONS):
        found = []
        for name in names:
            with suppress(metadata.PackageNotFoundError):
                found.append(f'{name} {metadata.version(name)}')
        texts += found or [f'no {names[0]}']
        twice |= len(found) > 1
    text = ', '.join(texts)
    if twice:
        raise Concern(f'{text}; several of one module: uninstall all but one')
    if 'no clustr_mm' in texts:
        raise Concern(f'{text}; `mim train` does not find it, pip install .')
    return text


def check_import(module: str) -> str:
    """Import a module."""
    if find_spec(module.split('.')[0]) is None and module != 'pkg_resources':
        return 'not installed'
    import_module(module)
    return 'works'


def check_mmcv_ops() -> str:
    """Where the operators of mmcv come from, and whether they run."""
    if find_spec('mmcv') is None:
        return 'mmcv is not installed'
    ops = import_module('mmcv.ops')
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0]])
    expect(ops.nms(boxes, torch.tensor([0.5, 0.9]), 0.5)[1].tolist(), [1])
    if not mmcv_ops_are_stand_in():
        return 'compiled, all of them'
    return "clustr_mm's stand-in; docs/faq.md lists what it has"


def check_start_up() -> str:
    """Whether the stand-in is there before this package is imported."""
    if os.environ.get(VARIABLE) == '0':
        raise Concern(f'{VARIABLE}=0 switches it off, the stand-in and the allow-list')
    if Path(sysconfig.get_path('purelib'), 'clustr_mm.pth').is_file():
        return 'in place'
    if mmcv_ops_are_stand_in():
        raise Concern('`mim test mmdet` needs it: python -m clustr_mm.compat on')
    return 'none, none needed'


def check_checkpoint() -> str:
    """Whether torch's safe loader takes what MMEngine's runner saves."""
    if not HAS_ALLOW_LIST:
        raise Concern('read unprotected before torch 2.6: load no files of strangers')
    history = HistoryBuffer()
    history.update(0.5)
    file = io.BytesIO()
    torch.save(dict(loss=history, best=np.float64(0.25)), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    expect([loaded['loss'].mean(), loaded['best']], [0.5, 0.25])
    return 'loads with weights_only=True'


def check_clustering() -> str:
    """What the clustering runs on, and whether it gives the same there."""
    tokens = torch.randn(1, 1500, 16, generator=torch.Generator().manual_seed(0))
    labels = dpc_knn(tokens, [4, 16])
    if not torch.cuda.is_available():
        return 'plain PyTorch on the CPU'
    on_gpu = tokens.cuda()
    expect([x.tolist() for x in dpc_knn(on_gpu, [4, 16])], [x.tolist() for x in labels])
    if find_kernel(on_gpu):
        return 'Triton on the GPU'
    reason = why_no_kernel(on_gpu.device) or 'that is the search backend asked for'
    raise Concern(f'plain PyTorch on the GPU, slower than Triton: {reason}')


def check_training() -> str:
    """Run a ClusTR forward and backward."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = ClusTR('tiny').to(device)
    maps = model(torch.rand(2, 3, 70, 90, device=device))
    sum(x.square().mean() for x in maps).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    expect(all(x is not None and x.isfinite().all() for x in gradients), True)
    return f'forward and backward on {device}'


def check_toolbox(toolbox: str) -> str:
    """Build a model of a toolbox on ClusTR and run it on a small image."""
    if find_spec(toolbox) is None:
        return 'not installed'
    # The registry swallows an import error and then knows no model.
    import_module(f'{toolbox}.models')
    base, channels = TOOLBOXES[toolbox]
    model: dict = {key: dict(in_channels=value) for key, value in channels.items()}
    model['backbone'] = dict(_delete_=True, type='ClusTR', arch='tiny')
    if toolbox == 'mmpretrain':
        model['backbone']['out_indices'] = (3,)
    if toolbox == 'mmseg':
        model['pretrained'] = None
    config = Config.fromstring(f"_base_ = '{toolbox}::{base}'\nmodel = {model}", '.py')
    with DefaultScope.overwrite_default_scope(toolbox), torch.no_grad():
        net = MODELS.build(config.model)
        net.eval()  # which returns None in some toolboxes
        run = net if toolbox == 'mmseg' else net.extract_feat
        maps = run(torch.rand(1, 3, 70, 90))
        if toolbox in ('mmpose', 'mmpretrain'):
            maps = net.head(maps)
    last = maps if isinstance(maps, torch.Tensor) else maps[-1]
    expect(bool(last.isfinite().all()), True)
    return f'{type(net).__name__} runs, output {" x ".join(map(str, last.shape))}'


def expect(seen: object, wanted: object) -> None:
    """Raise ValueError unless the two are equal."""
    if seen != wanted:
        raise ValueError(f'wrong result: {seen} instead of {wanted}')


#: Each returns what it saw, raises Concern for a warning, or anything for a failure.
CHECKS: dict[str, Callable[[], str]] = {
    'environment': check_machine,
    'versions': check_versions,
    **{f'import {name}': partial(check_import, name) for name in MODULES},
    'mmcv operators': check_mmcv_ops,
    'start-up file': check_start_up,
    'runner checkpoint': check_checkpoint,
    'clustering': check_clustering,
    'ClusTR': check_training,
    **{f'ClusTR in {name}': partial(check_toolbox, name) for name in TOOLBOXES},
}


def hide_paths(text: str) -> str:
    """Put '<env>' and '~' for the folders of this Python and of the user."""
    places = {sys.prefix: '<env>', sys.base_prefix: '<python>', str(Path.home()): '~'}
    # The longest first, as one may be inside another; only whole folders, lest
    # /usr is found in all words.
    for place in sorted(places.keys() - {Path.home().anchor}, key=len, reverse=True):
        text = re.sub(rf'{re.escape(place)}(?=[/\\\s:\'")]|$)', places[place], text)
    return text


def describe(error: BaseException) -> str:
    """Put an error on one line, and what it came from on others."""
    text = f'{type(error).__name__}: {shorten(error)}'
    cause = error.__cause__ or error.__context__
    return f'{text}\n       from {describe(cause)}' if cause else text


def run_check(check: Callable[[], str]) -> tuple[str, str]:
    """Run a check; return 'ok', 'warn' or 'fail', and what it saw."""
    try:
        return 'ok', check()
    except Concern as concern:
        return 'warn', str(concern)
    # Packages that do not fit together raise whatever they like, or exit.
    except (Exception, SystemExit) as error:
        return 'fail', describe(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page; return 1 if a check failed, 0 otherwise."""
    parser = argparse.ArgumentParser('python -m clustr_mm.doctor', description=__doc__)
    parser.parse_args(argv)
    # What the packages print is no part of the page.
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        results = [(name, *run_check(check)) for name, check in CHECKS.items()]
    for name, status, text in results:
        print(hide_paths(f'[{status:^4}] {name}: {text}'))
    count = Counter(status for _, status, _ in results)
    print(f'{count["fail"]} failed, {count["warn"]} warnings; see docs/faq.md')
    return int(count['fail'] > 0)


if __name__ == '__main__':
    logging.disable(logging.WARNING)
    sys.exit(main())
