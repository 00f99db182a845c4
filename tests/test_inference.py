"""The examples of docs/inference.md, run: stock inferencers on our configs."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from convert_checkpoint import convert_checkpoint
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.utils import digit_version
from skimage import data
from test_configs import TINY
from torch_versions import restricted

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
DOCS = (ROOT / 'docs/inference.md').read_text()
#: Section and number -> code.
EXAMPLES = {
    (section.split('\n')[0], number): code
    for section in DOCS.split('\n## ')
    for number, code in enumerate(
        re.findall(r'```python\n(.*?)```', section, re.DOTALL)
    )
}
HEIGHT, WIDTH = 96, 128


def dataset_meta(toolbox, config):
    """What the runner stores of the data set."""
    if toolbox == 'mmpose':
        from mmpose.apis.inference import dataset_meta_from_config

        return dataset_meta_from_config(config)
    if toolbox == 'mmseg':
        from mmseg.datasets import ADE20KDataset

        return dict(ADE20KDataset.METAINFO, reduce_zero_label=True)
    if toolbox == 'mmpretrain':
        return dict(classes=[f'kind {i}' for i in range(1000)])
    from mmdet.datasets import CocoDataset

    return CocoDataset.METAINFO


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A config and a checkpoint, as of a runner, of every toolbox; an image."""
    folder = tmp_path_factory.mktemp('inference')
    files = types.SimpleNamespace(folder=folder, config=dict(TINY), checkpoint={})
    history = HistoryBuffer()
    history.update(0.5)
    for toolbox, path in TINY.items():
        config = Config.fromfile(path)
        with DefaultScope.overwrite_default_scope(toolbox):
            model = MODELS.build(config.model)
            meta = dict(cfg=config.pretty_text)
            meta['dataset_meta'] = dataset_meta(toolbox, config)
        if toolbox == 'mmdet':
            # Random scores are all near 1 / 81; some box must pass a threshold.
            model.roi_head.bbox_head.fc_cls.bias.data[0] = 6
        files.checkpoint[toolbox] = folder / f'{toolbox}.pth'
        content = dict(
            meta=meta,
            message_hub=dict(log_scalars={'train/loss': history}),
            state_dict=model.state_dict(),
        )
        torch.save(content, files.checkpoint[toolbox])
    # Images as large and persons as many as the configs have take too long.
    smaller = dict(
        mmseg='pipeline = _base_.test_pipeline\n'
        "pipeline[1]['scale'] = (256, 128)\n"
        'test_dataloader = dict(dataset=dict(pipeline=pipeline))\n',
        mmdet='model = dict(test_cfg=dict(rcnn=dict(max_per_img=3)))\n',
    )
    for toolbox, text in smaller.items():
        files.config[toolbox] = folder / TINY[toolbox].name
        files.config[toolbox].write_text(f'_base_ = {str(TINY[toolbox])!r}\n{text}')
    files.image = folder / 'astronaut.png'
    image = data.astronaut()[:HEIGHT, 160 : 160 + WIDTH, ::-1]
    cv2.imwrite(str(files.image), np.ascontiguousarray(image))
    return files


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """The folder that examples write to, and small images for the detector."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CLUSTR_IMG_SCALE', '160,96')
    # Nobody is to fetch anything.
    monkeypatch.setattr('mmengine.runner.checkpoint.load_url', None)
    return tmp_path / 'outputs'


def placeholders(files, toolbox):
    return dict(
        CONFIG=str(files.config[toolbox]),
        CHECKPOINT=str(files.checkpoint[toolbox]),
        IMAGE=str(files.image),
        DETECTOR_CONFIG=str(files.config['mmdet']),
        DETECTOR_CHECKPOINT=str(files.checkpoint['mmdet']),
    )


def run(example, files, toolbox):
    """Run an example, and see that its model has the weights of the checkpoint."""
    variables = placeholders(files, toolbox)
    if toolbox == 'mmpretrain':
        init_default_scope('mmpretrain')  # as the page says
    exec(compile(EXAMPLES[example], 'docs/inference.md', 'exec'), variables)
    model = variables.get('model') or variables['inferencer']
    model = getattr(model, 'inferencer', model)  # MMPose wraps its own
    model = getattr(model, 'model', model)
    assert not model.training
    saved = torch.load(files.checkpoint[toolbox])['state_dict']
    for name, value in model.state_dict().items():
        assert torch.equal(value.cpu(), saved[name]), name
    return types.SimpleNamespace(**variables)


def pictures(folder):
    """Shapes of the pictures in a folder."""
    return [cv2.imread(str(file)).shape for file in folder.iterdir()]


def check_detection(names, files, outputs, printed):
    found = names.found
    assert 0 < len(found['bboxes']) == len(found['scores']) == len(found['masks'])
    assert max(found['scores']) > 0.5
    assert 'person' in printed
    assert pictures(outputs / 'vis') == [(HEIGHT, WIDTH, 3)]
    (file,) = (outputs / 'preds').iterdir()
    assert len(json.loads(file.read_text())['bboxes']) == len(found['bboxes'])


def check_segmentation(names, files, outputs, printed):
    assert names.labels.shape == (HEIGHT, WIDTH)
    assert len(names.classes) == 150 and names.classes[0] == 'wall'
    counts = re.search(r'\{.*: \d+\}', printed)[0]
    assert sum(map(int, re.findall(r': (\d+)', counts))) == HEIGHT * WIDTH
    assert pictures(outputs / 'vis') == [(HEIGHT, WIDTH, 3)]
    (shape,) = pictures(outputs / 'pred')
    assert shape[:2] == (HEIGHT, WIDTH)


def check_pose(names, files, outputs, printed):
    assert len(names.person['keypoints']) == 133
    assert names.person['bbox'][0] == [0, 0, WIDTH, HEIGHT]
    assert re.search(r'^133 -?\d\S*$', printed, re.MULTILINE)
    assert pictures(outputs / 'visualizations') == [(HEIGHT, WIDTH, 3)]
    (file,) = (outputs / 'predictions').iterdir()
    assert len(json.loads(file.read_text())[0]['keypoints']) == 133


def check_pose_of_detections(names, files, outputs, printed):
    people = names.result['predictions'][0]
    detector = names.inferencer.inferencer.detector
    found = detector(names.IMAGE)['predictions'][0]
    persons = [
        box
        for box, label, score in zip(
            *(found[k] for k in ('bboxes', 'labels', 'scores'))
        )
        if label == 0 and score > 0.3
    ]
    assert people and all(len(person['keypoints']) == 133 for person in people)
    for person in people:
        gaps = np.abs(np.array(persons) - person['bbox'][0]).max(axis=1)
        assert gaps.min() < 1e-2


def check_pose_of_boxes(names, files, outputs, printed):
    assert printed.count('(1, 133, 2)\n') == 2
    for sample, box in zip(names.samples, ([8, 4, 60, 90], [40, 10, 120, 95])):
        assert sample.pred_instances.bboxes.tolist() == [box]


def check_classification(names, files, outputs, printed):
    scores = names.result['pred_scores']
    assert scores.shape == (1000,) and abs(scores.sum() - 1) < 1e-4
    assert names.result['pred_label'] == scores.argmax()
    assert f'kind {scores.argmax()} {names.result["pred_score"]}' in printed
    assert len(pictures(outputs)) == 1


def check_detector(names, files, outputs, printed):
    assert len(names.found.bboxes) > 0
    assert names.found.masks.shape[1:] == (HEIGHT, WIDTH)
    assert names.model.dataset_meta['classes'][0] == 'person'


def check_segmentor(names, files, outputs, printed):
    assert names.labels.shape == (1, HEIGHT, WIDTH)
    assert len(names.model.dataset_meta['classes']) == 150


def check_classifier(names, files, outputs, printed):
    assert names.result['pred_class'] == f'kind {names.result["pred_label"]}'


#: Section and number of an example -> its toolbox and what must come of it.
CHECKS = {
    ('Detection', 0): ('mmdet', check_detection),
    ('Semantic segmentation', 0): ('mmseg', check_segmentation),
    ('Whole-body pose', 0): ('mmpose', check_pose),
    ('Whole-body pose', 1): ('mmpose', check_pose_of_detections),
    ('Whole-body pose', 2): ('mmpose', check_pose_of_boxes),
    ('Classification', 0): ('mmpretrain', check_classification),
    ('Without inferencers', 0): ('mmdet', check_detector),
    ('Without inferencers', 1): ('mmseg', check_segmentor),
    ('Without inferencers', 2): ('mmpretrain', check_classifier),
}
BACKBONE = ('The backbone alone', 0)


def test_every_example_is_run():
    assert {*CHECKS, BACKBONE} == EXAMPLES.keys()
    assert all(len(code.splitlines()) <= 10 for code in EXAMPLES.values())


@pytest.mark.parametrize('example', CHECKS, ids=lambda e: f'{e[0]} {e[1]}')
def test_example(example, files, outputs, capsys):
    toolbox, check = CHECKS[example]
    if toolbox == 'mmpose' and digit_version(np.__version__) >= digit_version('2.5'):
        pytest.skip('mmpose 1.3.2 draws radii that numpy 2.5 takes for no numbers')
    capsys.readouterr()
    names = run(example, files, toolbox)
    # With the reports and progress bars of the toolboxes.
    check(names, files, outputs, capsys.readouterr().out)


@restricted
def test_backbone_alone(files, outputs, tmp_path):
    file = tmp_path / 'backbone.safetensors'
    convert_checkpoint(files.checkpoint['mmdet'], file)
    variables = dict(BACKBONE=str(file))
    exec(EXAMPLES[BACKBONE], variables)
    model, saved = variables['model'], torch.load(files.checkpoint['mmdet'])
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved['state_dict'][f'backbone.{name}'])


def test_fresh_process(files, outputs, tmp_path):
    """Where nobody has imported this package before the toolbox and the config."""
    variables = placeholders(files, 'mmdet')
    code = f"""
import sys
globals().update({variables!r})
from mmdet.apis import DetInferencer
assert 'clustr_mm' not in sys.modules
{EXAMPLES['Detection', 0]}
"""
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r'^person 0\.\d+ \[', done.stdout, re.MULTILINE)
    assert pictures(outputs / 'vis') == [(HEIGHT, WIDTH, 3)]
