"""Metafiles: what they say of the configs is so."""

from pathlib import Path

import pytest
import yaml
from get_flops import count_flops, load_model

ROOT = Path(__file__).resolve().parents[1]
TOOLBOXES = ('mmdet', 'mmpose', 'mmpretrain', 'mmseg')
MODELS_OF = {
    toolbox: yaml.safe_load((ROOT / f'configs/{toolbox}/metafile.yml').read_text())[
        'Models'
    ]
    for toolbox in TOOLBOXES
}


@pytest.mark.parametrize('toolbox', TOOLBOXES)
def test_every_config_is_in_the_metafile(toolbox):
    configs = (ROOT / 'configs' / toolbox).glob('*.py')
    named = [model['Config'] for model in MODELS_OF[toolbox]]
    assert sorted(named) == sorted(
        str(config.relative_to(ROOT)) for config in configs if 'toy' not in config.stem
    )
    for model in MODELS_OF[toolbox]:
        assert model['Name'] == Path(model['Config']).stem
        assert 'Weights' not in model  # there are none


@pytest.mark.parametrize('model', MODELS_OF['mmpretrain'], ids=lambda m: m['Name'])
def test_flops(model):
    about = model['Metadata']
    size = map(int, about['Input Size'].split('x'))
    _, built = load_model(str(ROOT / model['Config']))
    assert count_flops(built, *size).total == about['FLOPs']


@pytest.mark.parametrize('toolbox', TOOLBOXES)
def test_the_readme_has_the_figures_of_the_metafile(toolbox):
    readme = (ROOT / f'configs/{toolbox}/README.md').read_text()
    rows = [line.split(' | ') for line in readme.splitlines() if line[:3] == '| [']
    expected = []
    for model in MODELS_OF[toolbox]:
        about = model['Metadata']
        figures = [next(iter(r['Metrics'].values())) for r in model.get('Results', ())]
        expected.append(
            [
                f'| [{model["Name"]}]({model["Name"]}.py)',
                about['Architecture'][0],
                about['Input Size'],
                f'{about["Parameters"] / 1e6:.1f}',
                f'{about["FLOPs"] / 1e9:.1f}',
                ' / '.join(map(str, figures)),
                '|',  # nothing reproduced
            ]
        )
    assert rows == expected
