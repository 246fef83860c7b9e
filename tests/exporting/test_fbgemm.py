"""Tables for FBGEMM and torchrec: its own operators look up what was certified, and every table is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import precimap as pm
from helpers.small_maps import map_of
from precimap.errors import DeployError
from precimap.layers.quantized import quantize_map


class Tables(nn.Module):
    """Three bags and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.users, self.items, self.hours = (nn.EmbeddingBag(n, 16, mode="sum") for n in (50, 70, 24))
        self.head = nn.Linear(48, 1)

    def forward(self, ids: Tensor) -> Tensor:
        bags = [self.users(ids[:, :2] % 50), self.items(ids[:, 2:5] % 70), self.hours(ids[:, 5:] % 24)]
        return self.head(torch.cat(bags, 1)).squeeze(1)


@pytest.fixture(scope="module")
def task() -> pm.Task:
    batches = [{"ids": torch.randint(1000, (20, 6)), "labels": torch.zeros(20)} for _ in range(3)]
    return pm.Task(
        Tables().eval(),
        splits=pm.Splits(*([batch] for batch in batches)),
        metric="log-loss",
        forward=lambda model, batch: model(batch["ids"]),
    )


def test_fbgemm_looks_up_what_the_map_ships(task: pm.Task, tmp_path: Path) -> None:
    pytest.importorskip("fbgemm_gpu", reason="needs fbgemm-gpu-cpu")
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    chosen = map_of(task, {"users.weight": "int8-row-half", "items.weight": "int4-row"}, target="emulated")
    found = pm.export(task, chosen, to="fbgemm", output=tmp_path / "out", uncertified=True)
    assert found.layers == {
        "users.weight": "INT8 rows",
        "items.weight": "INT4 rows",
        "hours.weight": "FP32 rows",
        "head.weight": "not in these files",
    }
    listed = json.loads((tmp_path / "out" / "tables.json").read_text())
    tensors = load_file(tmp_path / "out" / "tables.safetensors")
    assert [table["torchrec"] for table in listed.values()] == ["torch.qint8", "torch.quint4x2", "torch.float32"]
    specs = [
        (name, table["rows"], table["width"], SparseType[table["fbgemm"]], EmbeddingLocation.HOST)
        for name, table in listed.items()
        if "scale_bias_size_in_bytes" in table
    ]
    bags = IntNBitTableBatchedEmbeddingBagsCodegen(
        specs, device=torch.device("cpu"), output_dtype=SparseType.FP32, scale_bias_size_in_bytes=4, row_alignment=1
    )
    bags.initialize_weights()
    bags.assign_embedding_weights([(tensors[f"{name}.codes"], tensors[f"{name}.scale_shift"]) for name, *_ in specs])
    ids, ends = torch.tensor([4, 9, 33, 2, 65], dtype=torch.int32), torch.tensor([0, 2, 3, 5], dtype=torch.int32)
    sums = bags(ids[:5], ends[[0, 1, 3]])  # a bag of two users, a bag of three items
    layers = quantize_map(task.model, chosen)
    users, items = (layers[f"{name}.weight"].weight() for name in ("users", "items"))
    torch.testing.assert_close(sums, torch.cat([users[ids[:2]].sum(0), items[ids[2:]].sum(0)])[None], rtol=0, atol=1e-6)
    assert tensors["hours.weight"].equal(task.model.hours.weight)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"users.weight": "int8-row"}, "reads a row's scale and offset as float16, and int8-row has them in float32"),
        (
            {"users.weight": "int4-row", "head.weight": "fp8-weight"},
            r"tables alone, .* in other schemes \(head",
        ),
    ],
)
def test_what_fbgemm_would_misread_is_refused(choice: dict[str, str], said: str, task: pm.Task, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=said):
        pm.export(task, map_of(task, choice, target="emulated"), to="fbgemm", output=tmp_path / "out", uncertified=True)
    assert not list(tmp_path.iterdir())
