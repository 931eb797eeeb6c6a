"""What goes into and comes out of the forward."""

from dataclasses import replace

import torch

from mmtrain.model.stepio import RouterStats, first_inputs, sparse_layers, summarise
from tests.model.small import DENSE, SPARSE, sparse


def test_sparse_layers_follow_every_and_the_cut_of_the_tower() -> None:
    model = sparse(DENSE, "vision", "connector", "decoder", moe=replace(SPARSE, every=2))
    assert sparse_layers(model) == {"vision": 1, "connector": 1, "decoder": 1}
    cut = replace(model, vision=replace(model.vision, select_layer=-3))  # one layer is left, and it is dense
    assert sparse_layers(cut) == {"connector": 1, "decoder": 1}
    assert sparse_layers(DENSE) == {}


def test_a_first_step_knows_no_loads_yet() -> None:
    inputs = first_inputs(sparse(DENSE, "vision", "decoder"), 5.0, {"vision": 7.0})
    assert inputs.label_weight.item() == 5.0 and set(inputs.routers) == {"vision", "decoder"}
    vision = inputs.routers["vision"]
    assert torch.equal(vision.load_share, torch.full((3, 4), 0.25)) and not vision.bias.any()
    assert vision.valid_total.item() == 7.0 and inputs.routers["decoder"].valid_total.item() == 1.0
    vision.bias[1] = 3.0
    assert vision.layer(1).bias.tolist() == [3.0] * 4 and vision.layer(0).bias.tolist() == [0.0] * 4


def test_a_part_reports_means_of_its_losses_and_all_its_counts() -> None:
    layers = [
        RouterStats(torch.tensor(x), torch.tensor(10 * x), torch.tensor([x, x + 1]), torch.tensor([x, -x]))
        for x in (1.0, 3.0)
    ]
    balance, z, counts, probability = summarise(layers)
    assert (balance.item(), z.item(), counts.tolist()) == (2.0, 20.0, [[1.0, 2.0], [3.0, 4.0]])
    assert probability.tolist() == [[1.0, -1.0], [3.0, -3.0]]
    assert summarise([]) is None
