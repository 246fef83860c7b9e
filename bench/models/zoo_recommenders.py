"""Ranking models of libraries that the tests do not install: RecBole and DeepCTR.

Both begin with embeddings of a thousandth, whose scores are all one number; here weights are as large as after training.
"""

import importlib
import random
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from helpers.specimen import ROWS, Builder, Specimen, call, seeded

CLICKS = "DCN DCNMix xDeepFM AutoInt DeepFM NFM WDL FiBiNET ONN IFM DIFM AFN PNN".split()
SEVERAL_TASKS = "MMOE PLE SharedBottom ESMM".split()
SEQUENTIAL = "SASRec GRU4Rec BERT4Rec NARM Caser STAMP NextItNet SINE LightSANs CORE GCSAN SRGNN HGN NPE FOSSIL".split()
BY_CONTEXT = "DCN DCNV2 AutoInt xDeepFM DeepFM NFM AFM FwFM FiGNN PNN WideDeep DSSM FNN KD_DAGFM EulerNet".split()
USERS, ITEMS, FIELDS = 30, 40, 4


def spread(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return model


def _deepctr(name: str) -> Builder:
    def build() -> Specimen:
        inputs, models = (importlib.import_module(f"deepctr_torch.{part}") for part in ("inputs", "models"))
        fields = [inputs.SparseFeat(f"field_{k}", 50, embedding_dim=16) for k in range(FIELDS)]
        columns, kind = [*fields, inputs.DenseFeat("dense", 3)], getattr(models, name)
        if name in SEVERAL_TASKS:
            model = kind(columns, task_types=["binary"] * 2, task_names=["a", "b"], device="cpu")
        else:
            towers = (columns,) if name == "PNN" else (columns, columns)
            model = kind(*towers, task="binary", device="cpu")
        ids = torch.randint(50, (ROWS, FIELDS)).float()
        return Specimen(name, spread(model), call, torch.cat([ids, torch.randn(ROWS, 3)], 1))

    build.__name__ = f"deepctr {name}"
    return seeded(build)


def _recbole(name: str, sequential: bool) -> Builder:
    def build() -> Specimen:
        sys.argv = sys.argv[:1]  # RecBole reads options there
        sys.modules.setdefault("torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=object))
        for old, new in (("float_", "float64"), ("complex_", "complex128"), ("unicode_", "str_"), ("bool8", "bool_")):
            if not hasattr(np, old):
                setattr(np, old, getattr(np, new))
        config, data, utils = (importlib.import_module(f"recbole.{part}") for part in ("config", "data", "utils"))
        with tempfile.TemporaryDirectory() as folder:
            _write_log(Path(folder))
            settings = config.Config(name, "toy", config_dict=_settings(folder, sequential))
            batches, _, _ = data.data_preparation(settings, data.create_dataset(settings))
        model = utils.get_model(name)(settings, batches._dataset)
        method = "full_sort_predict" if sequential else "predict"
        return Specimen(name, spread(model), lambda model, batch: getattr(model, method)(batch), _first(batches))

    build.__name__ = f"recbole {name}"
    return seeded(build)


def _first(batches: Any) -> Any:
    return next(iter(batches))[:ROWS]


def _write_log(folder: Path) -> None:
    """600 events, and a class for each item."""
    (folder / "toy").mkdir()
    draw = random.Random(0).randrange
    events = "".join(f"{draw(USERS)}\t{draw(ITEMS)}\t{t}\t{draw(2)}\n" for t in range(600))
    (folder / "toy" / "toy.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\tlabel:float\n" + events)
    classes = "".join(f"{item}\t{item % 5}\n" for item in range(ITEMS))
    (folder / "toy" / "toy.item").write_text("item_id:token\tclass:token\n" + classes)


def _settings(folder: str, sequential: bool) -> dict[str, Any]:
    columns = {"inter": ["user_id", "item_id", "timestamp", "label"], "item": ["item_id", "class"]}
    settings = {
        "data_path": folder, "embedding_size": 32, "hidden_size": 32, "inner_size": 64, "n_layers": 1, "n_heads": 2,
        "MAX_ITEM_LIST_LENGTH": 8, "use_gpu": False, "show_progress": False, "mlp_hidden_size": [32, 16],
        "load_col": columns, "train_neg_sample_args": None, "state": "ERROR",
    }  # fmt: skip
    if sequential:
        return settings | {"loss_type": "CE"}
    split = {"split": {"RS": [8, 1, 1]}, "group_by": "None", "order": "RO", "mode": "labeled"}
    return settings | {"LABEL_FIELD": "label", "eval_args": split}


BUILDERS: tuple[Builder, ...] = (
    *(_deepctr(name) for name in (*CLICKS, *SEVERAL_TASKS)),
    *(_recbole(name, sequential=True) for name in SEQUENTIAL),
    *(_recbole(name, sequential=False) for name in BY_CONTEXT),
)
