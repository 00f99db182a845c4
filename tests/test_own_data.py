"""The configs of docs/own_data.md, on drawn data of three classes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
CLASSES = ('disc', 'square', 'triangle')
COLOURS = ((230, 60, 60), (60, 210, 60), (70, 90, 240))
SIDE = 96


def draw(root):
    """COCO annotations and label maps of two shapes an image."""
    rng = np.random.default_rng(0)
    for split, number in dict(train=32, val=8).items():
        images, annotations = [], []
        for folder in (root / split, root / 'masks' / split):
            folder.mkdir(parents=True)
        for index in range(number):
            name = f'{index:03}.png'
            noise = rng.integers(90, 120, (SIDE, SIDE, 3), dtype=np.uint8)
            image, labels = Image.fromarray(noise), Image.new('L', (SIDE, SIDE), 255)
            for half in (0, SIDE // 2):
                kind, size = (int(rng.integers(*range_)) for range_ in ((3,), (28, 40)))
                x, y = half + int(rng.integers(47 - size)), int(rng.integers(95 - size))
                box = (x, y, x + size, y + size)
                for picture, fill in ((image, COLOURS[kind]), (labels, kind)):
                    pen = ImageDraw.Draw(picture)
                    if kind == 0:
                        pen.ellipse(box, fill)
                    elif kind == 1:
                        pen.rectangle(box, fill)
                    else:
                        top = (x + size // 2, y)
                        pen.polygon((top, box[2:], (x, y + size)), fill)
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=index,
                        category_id=kind + 1,
                        bbox=[x, y, size, size],
                        area=size * size,
                        iscrowd=0,
                    )
                )
            image.save(root / split / name)
            labels.save(root / 'masks' / split / name)
            images.append(dict(id=index, file_name=name, width=SIDE, height=SIDE))
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / f'{split}.json').write_text(json.dumps(content))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with the data and the configs of the page, by the clone."""
    folder = tmp_path_factory.mktemp('own_data') / 'work'
    draw(folder / 'data' / 'shapes')
    (folder.parent / 'clustr_mm').symlink_to(ROOT)
    page = (ROOT / 'docs/own_data.md').read_text()
    for block in re.findall(r'```python\n(.*?)```', page, re.DOTALL):
        name = re.match(r'# (\w+\.py)\n', block)[1]
        (folder / name).write_text(block)
    return folder


@pytest.mark.parametrize(
    ('toolbox', 'config', 'metric', 'least'),
    [
        ('mmdet', 'shapes_det_trial', 'coco/bbox_mAP', 0.05),
        ('mmseg', 'shapes_seg_trial', 'mIoU', 20),
    ],
)
def test_trial(folder, toolbox, config, metric, least):
    pytest.importorskip(toolbox)
    mim = [sys.executable, '-m', 'mim', 'train', toolbox, f'{config}.py']
    run = subprocess.run(mim, cwd=folder, capture_output=True, text=True)
    assert not run.returncode, run.stdout[-3000:] + run.stderr[-3000:]
    (log,) = folder.glob(f'work_dirs/{config}/*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line['loss'] for line in lines if 'loss' in line]
    assert np.mean(losses[-2:]) < 0.7 * losses[0]
    assert next(line[metric] for line in lines if metric in line) > least
