"""Searches on models that nobody here wrote, from discovery to a file: the map that is found is the map that is deployed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import zoo, zoo_language, zoo_senses
from helpers.small_tasks import COUNTED_INT8
from helpers.specimen import Builder, Specimen, run
from helpers.zoo_deployed import by_half, rms
from helpers.zoo_outside import untouched
from precimap import Knapsack, Splits, Task, deploy, load_deployed, save_deployed, search
from precimap.layers.emulation import quantized
from precimap.layers.quantized import quantize_map
from precimap.metrics import Loss
from precimap.runtime.weights.placing import low_weights
from precimap.runtime.x86.target import int8_scheme
from precimap.searching.question import Effort

pytestmark = pytest.mark.filterwarnings("ignore")
_BY_NAME = {
    build.__name__: build
    for build in (*zoo.ZOO, *zoo_language.DECODERS, *zoo_language.STATES, *zoo_language.PAIRS, *zoo_senses.PICTURES)
}
SEARCHED = [_BY_NAME[name] for name in "gpt2 mixtral_lm mamba2 t5 vit sasrec".split()]
UNITS = 128


def like(value: Any, generator: torch.Generator) -> Any:
    """Other values of the kind that the specimen's batch has."""
    if isinstance(value, dict):
        return {name: like(each, generator) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(like(each, generator) for each in value)
    if value.is_floating_point():
        return torch.randn(UNITS, *value.shape[1:], generator=generator)
    return torch.randint(int(value.min()), int(value.max()) + 1, (UNITS, *value.shape[1:]), generator=generator)


def task_of(specimen: Specimen) -> Task:
    """Classes that the model mostly gets right."""

    def forward(model: Any, batch: Any) -> Tensor:
        scores = specimen.forward(model, batch["inputs"])
        return scores.reshape(len(scores), -1)[:, -16:]

    def split(seed: int, batches: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for _ in range(batches):
            inputs = like(specimen.batch, generator)
            with torch.no_grad():
                scores = forward(specimen.model, {"inputs": inputs})
            noise = torch.rand(scores.shape, generator=generator).log().neg().log().neg()
            made.append({"inputs": inputs, "labels": (2 * scores + noise).argmax(1)})
        return made

    return Task(
        specimen.model,
        splits=Splits(split(1, 1), split(2, 3), split(3, 6)),
        forward=forward,
        loss=lambda scores, batch: F.cross_entropy(2 * scores, batch["labels"], reduction="none"),
        metric=Loss(),
    )


@pytest.mark.parametrize("build", SEARCHED, ids=lambda build: build.__name__)
def test_a_model_of_the_zoo_is_searched_and_deployed(build: Builder, tmp_path: Path) -> None:
    specimen = build()
    specimen()
    task = task_of(specimen)
    with untouched(specimen.model):
        found = search(
            task,
            schemes=[int8_scheme(), "int8-row"],
            margin=0.1,
            target=COUNTED_INT8,
            rule=Knapsack(bytes_worth=30),
            effort=Effort(rounding_draws=0, timing_seconds=0),
        ).map
        assert found.not_certified is None
        fast, emulated = deploy(specimen.model, found, task=task), deploy(specimen.model, found, target="emulated")
    layers = quantize_map(specimen.model, found)
    assert set(low_weights(fast)) == set(low_weights(emulated)) == set(layers)
    assert len(layers) > len(found.layers) / 2
    base = specimen()
    with quantized(specimen.model, layers):
        emulation = specimen()
    assert torch.equal(run(specimen, emulated), emulation)
    assert by_half(run(specimen, fast), emulation) < 1e-3 * rms(emulation, base)
    save_deployed(fast, specimen.model, tmp_path / "fast.safetensors")
    loaded = load_deployed(build().model, tmp_path / "fast.safetensors")
    assert torch.equal(run(specimen, loaded), run(specimen, fast))
