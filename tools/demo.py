"""Train ClusTR-tiny with Semantic FPN on a toy data set and draw what it sees.

What an earlier run has finished is kept: results of a step count as finished
while they are newer than what they were made from.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from PIL import Image

from clustr_mm.files import write_whole
from clustr_mm.toy_data import ADE_CLASSES, make_toy_data
from clustr_mm.visualization import Pixels, compute_clusters, draw_clusters

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/mmseg/fpn_clustr-t_toy-ade20k.py'
WORK = ROOT / 'work_dirs/demo'
EXAMPLES = (2, 5, 6)  # validation images in the picture


def is_fresh(target: Path, *sources: Path) -> bool:
    """Whether ``target`` exists and is as new as all that it is made from."""
    if not target.is_file():
        return False
    newest = max(source.stat().st_mtime_ns for source in sources)
    return target.stat().st_mtime_ns >= newest


def mim(command: str, *arguments: object) -> None:
    """Run ``mim train`` or ``mim test`` for MMSegmentation, or stop."""
    line = ['mim', command, 'mmseg', *map(str, arguments)]
    print(f'$ {" ".join(line)}', flush=True)
    done = subprocess.run([sys.executable, '-m', *line], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f'demo.py: mim {command} failed, see its message above')


def find_last(folder: Path, *sources: Path) -> Path | None:
    """The last whole checkpoint of a training, if newer than what it depends on."""
    record = folder / 'last_checkpoint'
    if not is_fresh(record, *sources):
        return None
    # The runner deletes the file before, writes the new one, then its record: an
    # interruption leaves a part of a file, or a record of one that is gone.
    path = folder / Path(record.read_text().strip()).name
    return path if path.is_file() else None


def find_metrics(folder: Path) -> Path:
    """The newest file of metrics that ``mim test`` wrote into its work dir."""
    files = sorted(folder.glob('*/*.json'), key=lambda file: file.stat().st_mtime_ns)
    return files[-1] if files else folder / 'metrics.json'


def evaluate(checkpoint: Path, folder: Path, *sources: Path) -> float:
    """Test a checkpoint on the held-out images.

    Args:
        checkpoint (Path): What to test.
        folder (Path): Gets the metrics and, in ``predictions``, the
            predicted label maps.
        *sources (Path): What else the result depends on.

    Returns:
        float: mIoU in [0, 1].
    """
    if not is_fresh(find_metrics(folder), checkpoint, *sources):
        mim(
            'test',
            *(CONFIG, '--checkpoint', checkpoint, '--work-dir', folder),
            *('--out', folder / 'predictions'),
        )
    return json.loads(find_metrics(folder).read_text())['mIoU'] / 100


def build_model(config: Config) -> torch.nn.Module:
    """Build the segmentor as the runner does, with untrained weights."""
    set_random_seed(config.randomness.seed)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.init_weights()
    return model.eval()


def save_untrained(model: torch.nn.Module, path: Path) -> None:
    """Save the weights so that an interruption leaves no broken file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    torch.save(dict(state_dict=model.state_dict(), meta=dict()), file)
    write_whole(path, file.getbuffer())


def cluster_pictures(
    model: torch.nn.Module, image: np.ndarray, stages: tuple[int, ...], zoom: int = 1
) -> list[np.ndarray]:
    """Draw the coarse clusters of several stages.

    Args:
        model (nn.Module): The segmentor.
        image (np.ndarray): (H, W, 3) uint8 RGB.
        stages (tuple[int]): Stages from 0.
        zoom (int): Enlarges the pictures. Defaults to 1.

    Returns:
        list[np.ndarray]: (zoom * H, zoom * W, 3) uint8 RGB for each stage.
    """
    inputs = Pixels.of_model(model).normalise(image)
    large = Image.fromarray(image)
    large = np.array(large.resize((zoom * large.width, zoom * large.height)))
    return [
        draw_clusters(large, compute_clusters(model.backbone, inputs, stage)[0])
        for stage in stages
    ]


def colour_labels(path: Path) -> np.ndarray:
    """Read a label map and give it ADE20K's colours, (H, W, 3) uint8."""
    palette = np.full((256, 3), 60, np.uint8)
    for label, colour in ADE_CLASSES.values():
        palette[label] = colour
    return palette[np.array(Image.open(path))]


def draw(model: torch.nn.Module, data: Path, predictions: Path, path: Path) -> None:
    """Compose the picture: toy scenes, legend, and one photograph."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    from skimage.data import coffee

    figure = plt.figure(figsize=(12, 12.1), layout='constrained')
    scenes, photograph = figure.subfigures(2, 1, height_ratios=(9.7, 2.4))

    axes = scenes.subplots(len(EXAMPLES), 4)
    titles = ('image', 'ground truth', 'prediction', 'clusters of stage 1')
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for row, index in zip(axes, EXAMPLES, strict=True):
        name = f'ADE_val_{index:08d}'
        image = np.array(Image.open(data / f'images/validation/{name}.jpg'))
        cells = (
            image,
            colour_labels(data / f'annotations/validation/{name}.png'),
            colour_labels(predictions / f'{name}.png'),
            *cluster_pictures(model, image, (0,), zoom=4),
        )
        for axis, cell in zip(row, cells, strict=True):
            axis.imshow(cell)
    patches = [
        Patch(color=np.array(colour) / 255, label=name)
        for name, (_, colour) in ADE_CLASSES.items()
    ]
    scenes.legend(handles=patches, loc='outside lower center', ncols=10, frameon=False)

    photo = np.array(Image.fromarray(coffee()).resize((384, 256)))
    cells = (photo, *cluster_pictures(model, photo, (0, 1, 2), zoom=2))
    titles = ('photograph', *(f'clusters of stage {stage}' for stage in (1, 2, 3)))
    row = photograph.subplots(1, 4)
    for axis, cell, title in zip(row, cells, titles, strict=True):
        axis.imshow(cell)
        axis.set_title(title)
    for axis in figure.axes:
        axis.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, dpi=100, format='png')
    write_whole(path, file.getbuffer())


def main() -> None:
    """Run the demo."""
    start = time.time()
    os.chdir(ROOT)
    config = Config.fromfile(CONFIG)
    # A folder above: the data set's own name is ADE20K's.
    data, drawn = make_toy_data(out=Path(config.data_root).parent, size=config.size[0])
    print(f'{"drew" if drawn else "found"} {data}', flush=True)
    sources = (data / 'toy_data.json', CONFIG)

    model = build_model(config)
    untrained = WORK / 'untrained.pth'
    if not is_fresh(untrained, *sources):
        save_untrained(model, untrained)
    before = evaluate(untrained, WORK / 'before', *sources)

    train = WORK / 'train'
    trained = train / f'iter_{config.train_cfg.max_iters}.pth'
    last = find_last(train, *sources)
    if last is None or last.name != trained.name:
        resume = [] if last is None else ['--resume']
        mim('train', CONFIG, '--work-dir', train, *resume)
    after = evaluate(trained, WORK / 'after', *sources)

    picture = WORK / 'demo.png'
    if not is_fresh(picture, trained, find_metrics(WORK / 'after'), Path(__file__)):
        weights = torch.load(trained, map_location='cpu', weights_only=True)
        model.load_state_dict(weights['state_dict'])
        draw(model, data, WORK / 'after/predictions', picture)

    print(f'picture: {picture}')
    print(f'mIoU on the held-out images: {after:.3f}')
    print(f'mIoU before training: {before:.3f}')
    print(f'took {time.time() - start:.0f} s')


if __name__ == '__main__':
    main()
