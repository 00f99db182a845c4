"""The tool that shows how much of the tokens clusters lose."""

import re
from pathlib import Path

import cluster_curve as tool
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_visualization import ARCH

from clustr_mm.ops import DPCKNN, KMeans
from clustr_mm.visualization import evaluating, load_backbone, read_image

CONFIG = f"model = dict(type='ClusTR', arch={ARCH})"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a config and two pictures of shapes in noise."""
    monkeypatch.chdir(tmp_path)
    Path('config.py').write_text(CONFIG)
    for name, (width, height) in {'wide': (96, 64), 'small': (40, 40)}.items():
        noise = np.random.default_rng(0).integers(90, 120, (height, width, 3))
        picture = Image.fromarray(noise.astype(np.uint8))
        pen = ImageDraw.Draw(picture)
        pen.ellipse((5, 9, 30, 34), 'red')
        pen.polygon([(20, 5), (90, 20), (35, 60)], 'yellow')
        picture.save(f'{name}.png')
    return tmp_path


def naive_unexplained(tokens, labels):
    """By loops over tokens and clusters."""
    lost = total = 0
    for token, label in zip(tokens, labels, strict=True):
        mine = [x for x, m in zip(tokens, labels, strict=True) if m == label]
        lost += ((token - sum(mine) / len(mine)) ** 2).sum()
        total += ((token - sum(tokens) / len(tokens)) ** 2).sum()
    return float(lost / total)


def test_unexplained_variance():
    # Far from the origin, as tokens may be; and no token has label 1 or 3.
    tokens = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) + 50
    labels = torch.tensor([0, 2, 4, 5, 2]).repeat(6)
    found = tool.unexplained_variance(tokens, labels)
    expected = naive_unexplained(tokens.double(), labels)
    assert 0.5 < expected < 1 and found == pytest.approx(expected, rel=1e-9)
    assert tool.unexplained_variance(tokens, labels * 0) == pytest.approx(1)
    assert tool.unexplained_variance(tokens, torch.arange(30)) == 0
    assert tool.unexplained_variance(tokens[:1].repeat(3, 1), labels[:3]) == 0


def test_curves_of_a_drawn_picture(folder):
    backbone, pixels = load_backbone('config.py')
    last = []
    backbone.stages[1].blocks[1].attn.register_forward_pre_hook(
        lambda _, x: last.append(x)
    )
    seen = tool.watch(backbone, [2, 1])
    with evaluating(backbone):
        backbone(pixels.normalise(read_image('wide.png')))
    assert torch.equal(seen[2][0], last[0][0])
    for stage, sides in {1: (16, 24), 2: (8, 12)}.items():
        tokens, hw = seen[stage]
        number = hw[0] * hw[1]
        assert hw == sides and tokens.shape == (1, number, 8 * stage)
        curves = tool.measure(tokens, hw, [number + 1, 14, number, 4])
        assert list(curves) == [
            'DPC-kNN',
            'k-means, 1 step',
            'k-means, 3 steps',
            'grid',
            'sorted',
        ]
        for curve in curves.values():
            assert list(curve) == [4, 14, number]
            assert curve[number] == (number, 0)
        # Of a grid of 2 : 3 there are 3 x 4 cells.
        assert [curve[14][0] for curve in curves.values()] == [14, 12, 12, 12, 14]
        for count in (4, 14):
            dpc_knn, one, three, grid, cut = (
                curve[count][1] for curve in curves.values()
            )
            # k-means starts from the grid, and no step makes it worse.
            assert three < one < grid and three < 0.8 * grid
            # One number a token tells less than all.
            assert three < cut < 1
            # As if each count were the only scale.
            for clusterer, found in [(DPCKNN(), dpc_knn), (KMeans(3), three)]:
                (labels,), *_ = clusterer(tokens, hw, [count])
                assert found == tool.unexplained_variance(tokens[0], labels[0])


def test_tool(folder, capsys):
    common = ['wide.png', 'small.png', '--config', 'config.py', '--counts', '200', '16']
    common += ['--stages', '2', '1', '--size', '80']
    tool.main([*common, '--out', 'new/curve'])
    output = capsys.readouterr().out
    assert re.match(
        r'\[1/2\] wide.png: 280 and 70 tokens, took [\d.]+ s\n\[2/2\]', output
    )
    assert sorted(path.name for path in Path('new').iterdir()) == [
        'curve.md',
        'curve.png',
    ]
    table = Path('new/curve.md').read_text()
    assert output.endswith(f'\n\n{table}\nwrote new/curve.png and new/curve.md\n')
    assert 'config, UNTRAINED: random weights; longer side at most 80' in table
    assert 'wide.png, small.png' in table
    rows = [line.split(' | ') for line in table.splitlines()[-3:]]
    # 200 is too many for stage 2, and in stage 1 for the small picture.
    places = [[cell.strip('| ') for cell in row[:3]] for row in rows]
    assert places == [['2', '16', '2'], ['1', '16', '2'], ['1', '200', '1']]
    values = [float(cell.split()[0]) for row in rows for cell in row[3:]]
    assert len(values) == 15 and all(0 < value < 1 for value in values)
    red = (255, 0, 0)
    assert (np.array(Image.open('new/curve.png').convert('RGB')) == red).all(-1).any()

    # The weights are those of the checkpoint, and the title says so.
    torch.manual_seed(0)
    backbone, _ = load_backbone('config.py')
    for parameter in backbone.parameters():
        parameter.data.mul_(1 + torch.rand_like(parameter))
    torch.save(backbone.state_dict(), 'weights.pth')
    tool.main([*common, '--checkpoint', 'weights.pth', '--out', 'new'])
    trained = Path('new/cluster_curve.md').read_text()
    assert 'config, weights of weights.pth;' in trained and 'UNTRAINED' not in trained
    pairs = zip(table.splitlines()[-3:], trained.splitlines()[-3:], strict=True)
    assert all(random != row and random[:12] == row[:12] for random, row in pairs)
    image = Image.open('new/cluster_curve.png').convert('RGB')
    assert not (np.array(image) == red).all(-1).any()


def test_average():
    curves = [{4: (4, 0.5), 16: (15, 0.25)}, {4: (3, 0.25)}]
    assert tool.average(curves) == {4: (3.5, 0.375), 16: (15, 0.25)}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['gone.png'], "there is no picture 'gone.png'"),
        (['--stages', '1', '4'], '--stages with clusters are [1, 2, 3], got 4'),
        (['--counts', '9', '0'], '--counts must be at least 1, got 0'),
        (
            ['--counts', '101'],
            '--counts must have one up to 100, the tokens of small.png',
        ),
        (['--size', '-1'], '--size must be at least 1, got -1'),
        (['--arch', 'tiny'], 'argument --arch: not allowed with argument --config'),
        (['--out', 'small.png'], '--out would replace the picture small.png'),
        (['--checkpoint', 'gone.pth'], "there is no checkpoint 'gone.pth'"),
    ],
)
def test_errors_take_one_line(folder, capsys, arguments, message):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    common = ['small.png', '--config', 'config.py', '--out', 'curve']
    with pytest.raises(SystemExit) as caught:
        tool.main([*common, *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and not captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith(f'cluster_curve.py: {message}')
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
