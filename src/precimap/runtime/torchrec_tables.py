"""torchrec's own quantised collections, filled with the rows of a map: the target `torchrec`.

    int4-row       DataType.INT4: fused 4-bit row-wise, float16 scale and offset
    int8-row-half  DataType.INT8: torchrec keeps float16 parameters for 8 bits as well, so `int8-row` is not what it holds

Each `EmbeddingBagCollection` becomes a `torchrec.quant.EmbeddingBagCollection` of the same tables; those that the map keeps
stay in their own precision inside it.

Invariant: the collection holds the codes that were measured, byte for byte, and reads rows as the emulation does; both are
checked before it is handed out. Its constructor is given our packed rows where `from_float` would quantise the weights
again: a checkpoint has no weights to quantise. `from_float` gives the same bytes, which the tests hold.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.layers.copying import shared_copy
from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.views import plain_name
from precimap.numerics.rows import pack_rows
from precimap.numerics.schemes import Scheme

# torchrec pads rows to 16 bytes for GPUs; floats in the rows need 4, and a padded byte is a byte that is not saved.
ROW_ALIGNMENT = 4
CHECKED_ROWS = 256  # of each table
_TABLE = re.compile(r"(^|\.)embedding_bags\.[^.]+\.weight$")
TOLERANCE = 1e-5  # of the largest value: float16 parameters, float32 arithmetic


class TorchrecTables:
    """The target `torchrec`: tables of EmbeddingBagCollections, on the CPU."""

    name = "torchrec"
    claim = "Measured on torchrec's quantised collections, run by FBGEMM on this CPU."
    timer = None  # a table of a collection runs with its neighbours; alone it would not be what is served
    whole_timer = None  # collections are sharded and fed by a pipeline of their own, which is not here

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        """Why torchrec cannot hold the layer in the scheme, or None. Raises DeployError without torchrec."""
        _torchrec()
        if _data_type(scheme) is None:
            return "torchrec's collections hold tables in int4-row and int8-row-half"
        if _TABLE.search(layer.name) is None:
            return "not a table of a torchrec EmbeddingBagCollection"
        if layer.tied:
            return f"tied to {', '.join(layer.tied)}; packed rows would untie them"
        words = 16 // scheme.weight_bits
        if layer.shape[-1] % words:
            return f"FBGEMM reads {scheme.weight_bits}-bit rows of whole 16-bit words: a width that is a multiple of {words}"
        return layer.not_packed

    @contextmanager
    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
        yield self.deployed(model, layers) if layers else model

    def deployed(self, model: nn.Module, layers: Mapping[str, QuantizedLayer], *, owned: bool = False) -> nn.Module:
        """A copy of the model's tree, over the same tensors, with quantised collections in place of its own.

        Raises DeployError for a layer that is in no collection, a scheme that torchrec does not hold, and without torchrec.
        """
        torchrec = _torchrec()
        copied = shared_copy(model)
        waiting = dict(layers)
        for path, module in list(copied.named_modules()):
            if type(module) is not torchrec.EmbeddingBagCollection:
                continue
            names = {
                table: plain_name(f"{path}.embedding_bags.{table}.weight".lstrip("."))
                for table in module.embedding_bags
            }
            inside = {table: waiting.pop(name) for table, name in names.items() if name in waiting}
            if not inside:
                continue
            made = quantized_collection(module, inside)
            if not path:
                copied = made
                break
            parent, _, attribute = path.rpartition(".")
            setattr(copied.get_submodule(parent), attribute, made)
        if waiting:
            raise DeployError(f"{', '.join(waiting)}: in no torchrec EmbeddingBagCollection; keep them in the map")
        return copied


TORCHREC = TorchrecTables()


def quantized_collection(collection: Any, tables: Mapping[str, QuantizedLayer]) -> nn.Module:
    """A torchrec.quant.EmbeddingBagCollection of an EmbeddingBagCollection, `tables` (by table name) in low precision.

    Raises DeployError without torchrec, for a scheme that it does not hold, and where it holds or reads other rows.
    """
    _torchrec()
    from torchrec.modules.embedding_configs import DataType
    from torchrec.quant import EmbeddingBagCollection

    configs = copy.deepcopy(collection.embedding_bag_configs())
    weights: dict[str, tuple[Tensor, Tensor | None]] = {}
    for config in configs:
        layer = tables.get(config.name)
        if layer is None:
            weight = collection.embedding_bags[config.name].weight.detach()
            config.data_type = DataType.FP32 if weight.dtype == torch.float32 else DataType.FP16
            weights[config.name] = (weight.contiguous().view(torch.uint8), None)
            continue
        data_type = _data_type(layer.scheme)
        if data_type is None or layer.scheme.rows is None:
            raise DeployError(f"{layer.name}: torchrec holds int4-row and int8-row-half, got {layer.scheme.name}")
        config.data_type = getattr(DataType, data_type)
        rows = pack_rows(layer.codes, layer.weight_affine, layer.scheme.weight.format, layer.scheme.rows)
        weights[config.name] = (rows[:, : -layer.scheme.rows.bytes], rows[:, -layer.scheme.rows.bytes :])
    made: nn.Module = EmbeddingBagCollection(
        configs,
        collection.is_weighted(),
        device=torch.device("cpu"),
        table_name_to_quantized_weights=weights,
        row_alignment=ROW_ALIGNMENT,
    )
    _check_bytes(made, weights, tables)
    _check_reading(made, configs, tables)
    return made


def held_rows(collection: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Table name -> codes uint8 [rows, bytes] and parameters uint8 [rows, 4] that a quantised collection holds."""
    found = {}
    for module, tables in zip(collection._emb_modules, collection._key_to_tables.values(), strict=True):
        split = module.split_embedding_weights_with_scale_bias(split_scale_bias_mode=1)
        for table, (codes, parameters, _) in zip(tables, split, strict=True):
            found[table.name] = (codes, parameters)
    return found


def _check_bytes(
    made: nn.Module, given: Mapping[str, tuple[Tensor, Tensor | None]], tables: Mapping[str, QuantizedLayer]
) -> None:
    held = held_rows(made)
    for name, layer in tables.items():
        for what, ours, theirs in zip(("codes", "scales and offsets"), given[name], held[name], strict=True):
            if ours is None or theirs is None or not torch.equal(ours, theirs):
                raise DeployError(
                    f"{layer.name}: torchrec holds other {what} than the map's; report its version with this"
                )


def _check_reading(made: nn.Module, configs: list[Any], tables: Mapping[str, QuantizedLayer]) -> None:
    """Bags of one row each, spread over every table, against what the codes stand for."""
    from torchrec.modules.embedding_modules import get_embedding_names_by_table

    smallest: dict[str, int] = {}  # a feature may read several tables
    for config in configs:
        for feature in config.feature_names:
            smallest[feature] = min(smallest.get(feature, config.num_embeddings), config.num_embeddings)
    ids = {
        feature: torch.linspace(0, rows - 1, CHECKED_ROWS, dtype=torch.float32).long()
        for feature, rows in smallest.items()
    }
    ones = torch.ones(len(ids) * CHECKED_ROWS, dtype=torch.float32)
    features = _torchrec().KeyedJaggedTensor.from_lengths_sync(
        keys=list(ids), values=torch.cat(list(ids.values())), lengths=ones.long(), weights=ones
    )
    with torch.no_grad():
        read = made(features).to_dict()
    for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True):
        for name, feature in zip(names, config.feature_names, strict=True):
            layer = tables.get(config.name)
            if layer is None:
                continue
            expected = layer.weight()[ids[feature]]
            difference = float((read[name] - expected).abs().max())
            if not difference <= TOLERANCE * float(expected.abs().max()):
                raise DeployError(f"{layer.name}: FBGEMM reads rows that differ from their codes by {difference:.3g}")


def _data_type(scheme: Scheme) -> str | None:
    """torchrec's name of the data type; None for what its collections do not hold."""
    if scheme.rows is None or scheme.rows.parameters != "float16":
        return None
    return {4: "INT4", 8: "INT8"}[scheme.weight_bits]


def _torchrec() -> Any:
    try:
        import torchrec
        import torchrec.quant
    except ImportError as error:
        raise DeployError(
            f"the target torchrec needs torchrec and fbgemm-gpu, and importing them failed ({error}); install the "
            "versions that requirements-models.txt names, with pip install --no-deps"
        ) from error
    return torchrec
