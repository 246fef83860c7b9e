"""torchrec's quantised collections hold and read the rows of a map; a DLRM of torchrec's runs packed on the CPU."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.zoo import torchrec_dlrm
from precimap import CPU_INT8, TORCHREC, Knapsack, Splits, Task, deploy, load_deployed, save_deployed, search
from precimap.errors import DeployError
from precimap.layers.discover import discover
from precimap.layers.emulation import quantized
from precimap.layers.quantized import QuantizedLayer, quantize_layer
from precimap.layers.refusals import refusal
from precimap.metrics import LogLoss
from precimap.numerics.schemes import scheme
from precimap.runtime.deploy import deployment_of
from precimap.runtime.torchrec_tables import held_rows, quantized_collection
from precimap.runtime.weights.placing import low_weights
from precimap.searching.question import Effort

NAMES = ("int4-row", "int8-row-half")


@pytest.fixture(scope="module")
def torchrec() -> Any:
    return pytest.importorskip("torchrec", reason="needs requirements-models.txt")


def collection_of(torchrec: Any, widths: tuple[int, ...] = (16, 16), **changes: Any) -> Any:
    """Tables of 50, 60, ... rows; the first table is read by two features."""
    tables = [
        torchrec.EmbeddingBagConfig(
            name=f"table_{k}",
            embedding_dim=width,
            num_embeddings=50 + 10 * k,
            feature_names=["ids_0", "more_0"] if k == 0 else [f"ids_{k}"],
            pooling=torchrec.PoolingType.MEAN if k == 1 else torchrec.PoolingType.SUM,
        )
        for k, width in enumerate(widths)
    ]
    return torchrec.EmbeddingBagCollection(tables=tables, device=torch.device("cpu"), **changes)


def layers_of(collection: Any, choice: dict[str, str]) -> dict[str, QuantizedLayer]:
    names = {table: f"embedding_bags.{table}.weight" for table in choice}
    weights = dict(collection.named_parameters())
    return {t: quantize_layer(names[t], weights[names[t]], (1,), scheme(s), None) for t, s in choice.items()}


def features(torchrec: Any, collection: Any, weights: bool = False) -> Any:
    keys = [feature for config in collection.embedding_bag_configs() for feature in config.feature_names]
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(0, 5, (len(keys) * 8,), generator=generator)
    values = torch.randint(50, (int(lengths.sum()),), generator=generator)
    given = torch.rand(len(values), generator=generator) if weights else None
    return torchrec.KeyedJaggedTensor.from_lengths_sync(keys=keys, values=values, lengths=lengths, weights=given)


@pytest.mark.parametrize("widths", [(16, 16), (4, 20), (64, 8)], ids=str)
def test_it_holds_what_torchrec_would_have_quantised(widths: tuple[int, ...], torchrec: Any) -> None:
    """Byte for byte: our rows against those of its own `from_float`, by its own quantiser."""
    from torchrec.modules.embedding_configs import QuantConfig
    from torchrec.quant import EmbeddingBagCollection

    collection = collection_of(torchrec, widths)
    layers = layers_of(collection, dict(zip(("table_0", "table_1"), NAMES, strict=True)))
    ours = held_rows(quantized_collection(collection, layers))
    observer = torch.quantization.PlaceholderObserver
    collection.qconfig = QuantConfig(
        activation=observer.with_args(dtype=torch.float32),
        weight=observer.with_args(dtype=torch.qint8),
        per_table_weight_dtype={"table_0": torch.quint4x2, "table_1": torch.qint8},
    )
    theirs = held_rows(EmbeddingBagCollection.from_float(collection))
    for table in ("table_0", "table_1"):
        for ours_of, theirs_of in zip(ours[table], theirs[table], strict=True):
            assert ours_of is not None
            assert theirs_of is not None
            assert torch.equal(ours_of, theirs_of)


@pytest.mark.parametrize("weighted", [False, True])
def test_it_computes_what_the_emulation_does(weighted: bool, torchrec: Any) -> None:
    """Mixed bits, a table that is kept, sums and means, empty bags, weights of samples."""
    collection = collection_of(torchrec, (16, 8, 12), is_weighted=weighted)
    if weighted:
        collection.embedding_bags.table_1.mode = "sum"  # torch's bags weigh samples in sums only
        collection._embedding_bag_configs[1].pooling = torchrec.PoolingType.SUM
    layers = layers_of(collection, {"table_0": "int4-row", "table_1": "int8-row-half"})
    given = features(torchrec, collection, weighted)
    with torch.no_grad(), quantized(collection, {layer.name: layer for layer in layers.values()}):
        expected = collection(given).to_dict()
    with torch.no_grad():
        found = quantized_collection(collection, layers)(given).to_dict()
        plain = collection(given).to_dict()
    assert set(found) == set(expected) == {"ids_0", "more_0", "ids_1", "ids_2"}
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)
        assert torch.equal(values, plain[name]) == (name == "ids_2")


def dlrm_task(torchrec: Any) -> Task:
    """torchrec's DLRM with its own tables of ids, as a Task: labels that its scores explain."""
    specimen = torchrec_dlrm()

    def batch(seed: int, n: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 4, (2 * n,), generator=generator)
        sparse = torchrec.KeyedJaggedTensor.from_lengths_sync(
            keys=["ids_0", "ids_1"],
            values=torch.randint(50, (int(lengths.sum()),), generator=generator),
            lengths=lengths,
        )
        dense = torch.randn(n, 16, generator=generator)
        with torch.no_grad():
            labels = torch.bernoulli(torch.sigmoid(specimen.model(dense, sparse).squeeze(1)), generator=generator)
        return {"dense": dense, "sparse": sparse, "labels": labels}

    def loss(scores: Tensor, given: dict[str, Any]) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(scores, given["labels"], reduction="none")

    return Task(
        specimen.model,
        splits=Splits([batch(1, 50)], [batch(k, 100) for k in (2, 3)], [batch(k, 100) for k in (4, 5, 6)]),
        forward=lambda model, given: model(given["dense"], given["sparse"]).squeeze(1),
        loss=loss,
        metric=LogLoss(),
        name="torchrec DLRM",
    )


@pytest.mark.parametrize(("target", "name"), [(CPU_INT8, "int8-row"), (CPU_INT8, "int4-row"), (TORCHREC, "int4-row")])
def test_a_dlrm_is_searched_and_deployed(target: Any, name: str, torchrec: Any, tmp_path: Path) -> None:
    """From its inventory to a checkpoint: the tables are layers of their own, and the model that runs is certified."""
    task = dlrm_task(torchrec)
    rule, effort = Knapsack(bytes_worth=30.0), Effort(rounding_draws=0, timing_seconds=0)
    found = search(task, schemes=[name], target=target, margin=0.1, rule=rule, effort=effort, ledger=tmp_path)
    tables = {f"sparse_arch.embedding_bag_collection.embedding_bags.table_{k}.weight" for k in range(2)}
    assert found.certified
    assert set(found.map.low) == tables
    fast = deploy(task.model, found.map, task=task)
    agreement = deployment_of(fast).agreement
    assert agreement is not None
    assert agreement.relative < 1e-5
    assert len(low_weights(fast)) == (2 if target is CPU_INT8 else 0)
    assert type(task.model.sparse_arch.embedding_bag_collection) is torchrec.EmbeddingBagCollection
    save_deployed(fast, task.model, tmp_path / "model.safetensors")
    skeleton = torchrec_dlrm().model
    with torch.no_grad():
        for parameter in skeleton.parameters():
            parameter.zero_()
    loaded = load_deployed(skeleton, tmp_path / "model.safetensors")
    given = next(iter(task.splits.certify))
    with torch.no_grad():
        assert torch.equal(task.forward(loaded, given), task.forward(fast, given))


def test_what_torchrec_does_not_hold_is_refused(torchrec: Any) -> None:
    specimen = torchrec_dlrm()
    inventory = discover(specimen.model, specimen.forward, specimen.batch)
    table = next(layer for layer in inventory.layers if layer.lookup)
    linear = next(layer for layer in inventory.layers if not layer.lookup)
    assert all(refusal(table, scheme(name)) is TORCHREC.refusal(table, scheme(name)) is None for name in NAMES)
    assert "int4-row and int8-row-half" in str(TORCHREC.refusal(table, scheme("int8-row")))
    assert "int4-row and int8-row-half" in str(TORCHREC.refusal(linear, scheme("fp8")))
    assert "a multiple of 4" in str(TORCHREC.refusal(replace(table, shape=(50, 18)), scheme("int4-row")))
    assert TORCHREC.refusal(replace(table, shape=(50, 18)), scheme("int8-row-half")) is None
    assert "EmbeddingBagCollection" in str(TORCHREC.refusal(replace(table, name="user.weight"), scheme("int4-row")))
    assert "tied" in str(TORCHREC.refusal(replace(table, tied=("other",)), scheme("int4-row")))
    collection = collection_of(torchrec)
    with pytest.raises(DeployError, match="int4-row and int8-row-half, got int8-row"):
        quantized_collection(collection, layers_of(collection, {"table_0": "int8-row"}))
    embedding = nn.Embedding(50, 16)
    layer = quantize_layer("weight", embedding.weight, (1,), scheme("int4-row"), None)
    with pytest.raises(DeployError, match="weight: in no torchrec EmbeddingBagCollection"):
        TORCHREC.deployed(embedding, {"weight": layer})


def test_other_rows_than_the_map_s_are_found(torchrec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault in what is handed over, and one in what is read."""
    from torchrec.quant import EmbeddingBagCollection

    from precimap.runtime import torchrec_tables

    collection = collection_of(torchrec)
    layers = layers_of(collection, {"table_0": "int4-row"})
    wrong = {"table_0": replace(layers["table_0"], codes=layers["table_0"].codes ^ 1)}
    given = {"table_0": torchrec_tables.held_rows(quantized_collection(collection, layers))["table_0"]}
    with pytest.raises(DeployError, match=r"table_0\.weight: FBGEMM reads rows that differ"):
        torchrec_tables._check_reading(
            quantized_collection(collection, layers), collection.embedding_bag_configs(), wrong
        )
    with pytest.raises(DeployError, match=r"table_0\.weight: torchrec holds other codes"):
        torchrec_tables._check_bytes(quantized_collection(collection, wrong), given, layers)
    plain = EmbeddingBagCollection.forward
    monkeypatch.setattr(EmbeddingBagCollection, "forward", lambda self, f: _doubled(plain(self, f)))
    with pytest.raises(DeployError, match="FBGEMM reads rows"):
        quantized_collection(collection, layers)


def _doubled(read: Any) -> Any:
    read._values = 2 * read.values()
    return read


def test_without_torchrec_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchrec", None)
    layer = discover(nn.Embedding(50, 16), lambda m, b: m(b), torch.arange(4)).layer("weight")
    with pytest.raises(DeployError, match=r"requirements-models\.txt"):
        TORCHREC.refusal(layer, scheme("int4-row"))
