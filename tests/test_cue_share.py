"""How much of a cluster the cue can fill."""

from pathlib import Path

import cue_share
import pytest
import torch

from clustr_mm.evidence import CueTask

CONFIGS = Path(__file__).resolve().parents[1] / 'configs/mmseg'


@pytest.mark.parametrize('size', [3, 7, 14])
def test_the_cue_is_found(size):
    data = CueTask('val', 9, cue_size=size, pipeline=[])
    for index in range(len(data)):
        image, labels = data.draw(index)
        mask = cue_share.cue_mask(image).numpy() == 1
        assert mask.sum() == size**2
        # Nothing else is there; its rim is white, and its patch is not.
        assert (labels[mask] == 0).all()
        rim = max(1, size // 7)
        assert (image[mask] == 255).all(1).sum() == size**2 - (size - 2 * rim) ** 2


def test_largest_share():
    labels = torch.tensor([[0, 0, 1, 1], [3, 1, 2, 2]])
    cue = torch.tensor([[1, 0, 1, 1], [0.2, 0, 0.5, 0.3]])
    assert cue_share.largest_share(labels, cue).tolist() == pytest.approx([1, 0.4])


def test_command_line(capsys):
    names = ('dpcknn', 'kmeans3', 'grid')
    configs = [str(CONFIGS / f'cue_task/fpn_{name}_cue-96x96.py') for name in names]
    cue_share.main(
        [*configs, '--cue-sizes', '6', '14', '--pictures', '4', '--seeds', '1']
    )
    header, _, *rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert header == ['network', '6 px', '14 px']
    assert [row[0] for row in rows] == [*names]
    for column in (1, 2):
        shares = [float(row[column]) for row in rows]
        assert 1 >= shares[0] > shares[1] > shares[2] > 0
    assert all(float(row[1]) < float(row[2]) for row in rows)
    options = ['--cfg-options', 'model.backbone.max_clusters=1']
    cue_share.main(
        [configs[2], '--cue-sizes', '14', '--pictures', '4', '--seeds', '1', *options]
    )
    fewer = capsys.readouterr().out.splitlines()[-1].split('|')[2]
    assert 0 < float(fewer) < shares[2]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            ['cue_task/fpn_all_cue-96x96.py'],
            'cue_share.py: FullAttention has no clusters',
        ),
        (['cue_task/fpn_resnet_cue-96x96.py'], 'cue_share.py: ResNet has no clusters'),
        (['fpn_clustr-t_toy-ade20k.py'], 'toy-ade20k.py is not of the cue task'),
        (['cue_task/fpn_grid_cue-96x96.py', '--cue-sizes', '2'], "least 3, got '2'"),
        (['cue_task/none.py'], 'none.py'),
        (
            [
                *('cue_task/fpn_grid_cue-96x96.py', '--pictures', '1', '--cfg-options'),
                'model.backbone.type=Foo',
            ],
            'Foo is not in the',
        ),
        (
            ['cue_task/fpn_grid_cue-96x96.py', '--cfg-options', 'val_dataloader=None'],
            "no attribute 'dataset'",
        ),
        (
            [
                *('cue_task/fpn_grid_cue-96x96.py', '--pictures', '1', '--cfg-options'),
                'model.backbone.max_cluster=3',
            ],
            "cue_share.py: ClusTR: unexpected keyword argument 'max_cluster'",
        ),
    ],
)
def test_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cue_share.main([str(CONFIGS / arguments[0]), *arguments[1:]])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
