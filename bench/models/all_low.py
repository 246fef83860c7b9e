"""A model with every layer low that a target takes, for benches that ask what there is to gain at most."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from precimap import Splits, Task, discover
from precimap.layers.inventory import Inventory
from precimap.layers.refusals import refusal
from precimap.layers.target import Target
from precimap.metrics import Loss
from precimap.numerics.schemes import Scheme
from precimap.searching.calibrate import calibrate, codes
from precimap.searching.progress import silent


def task_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Task:
    """One batch, which is every split; its loss is read by nobody."""
    return Task(
        model,
        splits=Splits([inputs], [inputs], [inputs]),
        forward=lambda m, batch: m(*batch),
        loss=lambda scores, batch: scores.float().square().reshape(len(scores), -1).mean(1),
        metric=Loss(),
    )


def takes(inventory: Inventory, scheme: Scheme, target: Target) -> list[str]:
    """The layers that can be in the scheme there."""
    return [
        layer.name
        for layer in inventory.layers
        if refusal(layer, scheme) is None and target.refusal(layer, scheme) is None
    ]


def all_low(
    model: nn.Module, inputs: tuple[Tensor, ...], scheme: Scheme, target: Target, only: Sequence[str] = ()
) -> nn.Module:
    """The model deployed with every layer that takes the scheme there, or those of `only`, ranges from the inputs."""
    task = task_of(model, inputs)
    inventory = discover(model, task.forward, inputs)
    names = [name for name in takes(inventory, scheme, target) if not only or name in only]
    calibration = calibrate(task, tuple(names), silent)
    layers = codes(task, inventory, calibration, [(name, scheme) for name in names])
    with target.running(model, {layer.name: layer for layer in layers}) as deployed, torch.no_grad():
        deployed(*inputs)  # compiled ones compile
        return deployed
