"""Train ClusTR-tiny with Semantic FPN on a toy data set and draw what it sees.

What an earlier run has finished is kept: results of a step count as finished
while they are newer than what they were made from.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from PIL import Image

from clustr_mm.files import write_whole
from clustr_mm.visualization import Pixels, compute_clusters, draw_clusters

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools/dataset_converters'))
from make_toy_data import ADE_CLASSES, make_toy_data  # noqa: E402

# From the project's folder, where the demo runs.
CONFIG = Path('configs/mmseg/fpn_clustr-t_toy-ade20k.py')
WORK = Path('work_dirs/demo')
EXAMPLES = (2, 5, 6)  # validation images in the picture
PROGRESS = re.compile(r'Iter\(train\) \[ *(\d+)/(\d+)\].* eta: (.+?)  .* loss: (\S+)')


def is_fresh(target: Path, *sources: Path) -> bool:
    """Whether ``target`` exists and is as new as all that it is made from."""
    newest = max(source.stat().st_mtime_ns for source in sources)
    return target.is_file() and target.stat().st_mtime_ns >= newest


def show_progress(line: str) -> None:
    """Print what a line of a training's log says, over the one before on a terminal."""
    found = PROGRESS.search(line)
    if found is None:
        return
    iteration, last, eta, loss = found.groups()
    text = f'iteration {iteration:>3} of {last}  loss {float(loss):.3f}  {eta} left'
    if sys.stdout.isatty():
        print(f'\r{text}', end='\n' if iteration == last else '', flush=True)
    elif int(iteration) % 100 == 0:
        print(text, flush=True)


def mim(command: str, folder: Path, *arguments: object) -> None:
    """Run ``mim train`` or ``mim test`` with this work dir and a log beside it."""
    line = ['mim', command, 'mmseg', CONFIG, '--work-dir', folder, *arguments]
    line, log, last = [*map(str, line)], folder.with_suffix('.log'), ''
    print(f'$ {" ".join(line)} > {log}', flush=True)
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with (
        log.open('w') as file,
        subprocess.Popen([sys.executable, '-m', *line], **output) as process,
    ):
        for printed in process.stdout:
            print(printed, end='', file=file, flush=True)
            show_progress(printed)
            last = printed.strip() or last
    if process.returncode:
        raise SystemExit(f'demo.py: mim {command} failed, see {log}: {last}')


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
    # The folders between have the time as their name.
    return max(folder.glob('*/*.json'), default=folder / 'metrics.json')


def evaluate(checkpoint: Path, folder: Path, *sources: Path) -> float:
    """Test on the held-out images; ``folder`` gets label maps too. Returns the mIoU."""
    if not is_fresh(find_metrics(folder), checkpoint, *sources):
        predictions = folder / 'predictions'
        mim('test', folder, '--checkpoint', checkpoint, '--out', predictions)
    return json.loads(find_metrics(folder).read_text())['mIoU'] / 100


def build_model(config: Config) -> torch.nn.Module:
    """Build the segmentor as the runner does, with untrained weights."""
    set_random_seed(config.randomness.seed)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.init_weights()
    return model.eval()


def draw_stage(model: torch.nn.Module, image: np.ndarray, stage: int) -> np.ndarray:
    """The coarse clusters of a stage in an (H, W, 3) uint8 image, enlarged."""
    inputs = Pixels.of_model(model).normalise(image)
    large = image.repeat(3, axis=0).repeat(3, axis=1)
    return draw_clusters(large, compute_clusters(model.backbone, inputs, stage)[0])


def draw(model: torch.nn.Module, data: Path, predictions: Path) -> bytes:
    """Compose the picture, a PNG file: toy scenes, legend, and one photograph."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from skimage.data import coffee

    figure = Figure(figsize=(12, 12.1), layout='constrained')
    scenes, photograph = figure.subfigures(2, 1, height_ratios=(9.7, 2.4))
    palette = np.full((256, 3), 60, np.uint8)
    for label, colour in ADE_CLASSES.values():
        palette[label] = colour
    for row, index in zip(scenes.subplots(len(EXAMPLES), 4), EXAMPLES):
        name = f'ADE_val_{index:08d}'
        image = np.array(Image.open(data / f'images/validation/{name}.jpg'))
        truth = Image.open(data / f'annotations/validation/{name}.png')
        found = Image.open(predictions / f'{name}.png')
        row[0].imshow(image)
        row[1].imshow(palette[np.array(truth)])
        row[2].imshow(palette[np.array(found)])
        row[3].imshow(draw_stage(model, image, 0))
    patches = [
        Patch(color=np.array(colour) / 255, label=name)
        for name, (_, colour) in ADE_CLASSES.items()
    ]
    scenes.legend(handles=patches, loc='outside lower center', ncols=10, frameon=False)

    photo = np.array(Image.fromarray(coffee()).resize((384, 256)))
    axes = photograph.subplots(1, 4)
    axes[0].imshow(photo)
    for stage in range(3):
        axes[stage + 1].imshow(draw_stage(model, photo, stage))
    titles = ('image', 'ground truth', 'prediction', 'clusters of stage 1')
    titles += ('photograph', *(f'clusters of stage {stage}' for stage in (1, 2, 3)))
    for axis, title in zip([*scenes.axes[:4], *axes], titles):
        axis.set_title(title)
    for axis in figure.axes:
        axis.set_axis_off()
    file = BytesIO()
    figure.savefig(file, dpi=100, format='png')
    return file.getvalue()


def main() -> None:
    """Run the demo."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    start = time.time()
    os.chdir(ROOT)
    # How each layer is initialised, and what mmseg will rename, is no news here.
    logging.disable(logging.INFO)
    warnings.filterwarnings('ignore', module='mmseg')
    config = Config.fromfile(CONFIG)
    # A folder above: the data set's own name is ADE20K's.
    data, drawn = make_toy_data(out=Path(config.data_root).parent, size=config.size[0])
    print(f'{"drew" if drawn else "found"} {data}', flush=True)
    sources = (data / 'toy_data.json', CONFIG)

    WORK.mkdir(parents=True, exist_ok=True)
    model = build_model(config)
    untrained = WORK / 'untrained.pth'
    if not is_fresh(untrained, *sources):
        file = BytesIO()
        torch.save(dict(state_dict=model.state_dict(), meta=dict()), file)
        write_whole(untrained, file.getbuffer())
    before = evaluate(untrained, WORK / 'before', *sources)

    train = WORK / 'train'
    trained = train / f'iter_{config.train_cfg.max_iters}.pth'
    last = find_last(train, *sources)
    if last != trained:
        mim('train', train, *([] if last is None else ['--resume']))
    after = evaluate(trained, WORK / 'after', *sources)

    picture = WORK / 'demo.png'
    if not is_fresh(picture, trained, find_metrics(WORK / 'after'), Path(__file__)):
        weights = torch.load(trained, map_location='cpu', weights_only=True)
        model.load_state_dict(weights['state_dict'])
        write_whole(picture, draw(model, data, WORK / 'after/predictions'))

    print(f'picture: {picture}')
    print(f'mIoU on the held-out images: {after:.3f}')
    print(f'mIoU before training: {before:.3f}')
    print(f'took {time.time() - start:.0f} s')


if __name__ == '__main__':
    main()
