"""``share_clusters=True``: the blocks of a stage attend to the same clusters."""

import pytest
import torch
from test_models.variants import ARCHS, make_model


def run(share, with_cp=False, clusterer='DPCKNN'):
    """Maps, gradients, and the labels that every clustering found."""
    arch = {**ARCHS['ClusTR'], 'depths': [3, 2, 2, 1]}
    options = dict(share_clusters=share, with_cp=with_cp)
    model = make_model('ClusTR', arch=arch, clusterer=dict(type=clusterer), **options)
    found = []
    for stage in model.stages[:3]:
        stage.blocks[0].attn.clusterer.register_forward_hook(
            lambda module, args, clusters: found.append(clusters[0][0])
        )
    maps = model.train()(torch.rand(2, 3, 64, 96))
    sum(x.square().mean() for x in maps).backward()
    return maps, [param.grad for param in model.parameters()], found


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('clusterer', ['DPCKNN', 'KMeans', 'GridCells'])
def test_one_clustering_for_a_stage(clusterer, with_cp):
    maps, gradients, found = run(True, with_cp, clusterer)
    assert [labels.shape[1] for labels in found] == [384, 96, 24]
    # Recomputed in the backward pass or not.
    each, _, found = run(False, with_cp, clusterer)
    assert [labels.shape[1] for labels in found] == [384] * 3 + [96] * 2 + [24] * 2
    # A grid is the same in every block; tokens are not, nor are clusters of them.
    same = all(torch.equal(a, b) for a, b in zip(maps, each))
    assert same == (clusterer == 'GridCells')
    again, plain, _ = run(True, not with_cp, clusterer)
    for a, b in zip((*maps, *gradients), (*again, *plain)):
        torch.testing.assert_close(a, b)
