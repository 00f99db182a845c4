"""The export that docs/deployment.md shows, in onnxruntime."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmseg')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

ROOT = Path(__file__).parents[1]
LINEAR = dict(clusterer=dict(type='KMeans'), max_clusters=4)


@pytest.mark.parametrize('clusterer', [{}, LINEAR])
def test_segmentor(tmp_path, monkeypatch, clusterer):
    from mmengine.config import Config

    from clustr_mm import ClusTR

    config = Config.fromfile(ROOT / 'configs/mmseg/fpn_clustr-t_toy-ade20k.py')
    # Fewer blocks, the same operations: a large graph takes minutes to convert.
    arch = {**ClusTR.arch_zoo['tiny'], 'depths': [1, 1, 1, 1]}
    config.model.backbone.update(arch=arch, **clusterer)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = dict(CONFIG=config, CHECKPOINT=None, SIZE=(96, 128))
    page = (ROOT / 'docs/deployment.md').read_text()
    for block in re.findall(r'```python\n(.*?)```', page, re.DOTALL):
        exec(block, scope)

    # Not only the image that was traced.
    session, name = scope['session'], scope['name']
    for image in (scope['image'], torch.rand(1, 3, 96, 128)):
        (logits,) = session.run(None, {name: image.numpy()})
        with torch.no_grad():
            expected = scope['model'](image)
        torch.testing.assert_close(torch.as_tensor(logits), expected, rtol=0, atol=1e-3)
        assert (logits.argmax(1) == expected.argmax(1).numpy()).all()
    assert scope['labels'].shape == (1, 24, 32)
