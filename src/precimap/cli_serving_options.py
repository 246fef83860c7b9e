"""What may follow the verbs that put a map to work, as `cli_options` has it for the others.

Invariant: as there: nothing imports torch, and words that stand in modules with torch are repeated, and held equal by tests.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from precimap.cli_options import CHOICE, EXPERIMENTAL, OUTPUT, TargetName, option


class ToName(StrEnum):
    """What a map can be exported to: the writers of `precimap.exporting.export`."""

    AOTI = "aoti"
    ONNX = "onnx"
    FBGEMM = "fbgemm"
    VLLM = "vllm"
    SGLANG = "sglang"
    TRANSFORMERS = "transformers"


class EngineName(StrEnum):
    """Who reads a checkpoint: the engines of `precimap.exporting.linting.engine_rules`."""

    VLLM = "vllm"
    VLLM_CPU = "vllm-cpu"
    SGLANG = "sglang"
    TRANSFORMERS = "transformers"


DeployTargetOption = Annotated[
    TargetName | None,
    option(CHOICE, f"Deploy for this target instead of the one that the map names; cuda-fp8 is {EXPERIMENTAL}."),
]
DeployedOption = Annotated[Path, option(OUTPUT, "Write the deployed weights to this safetensors file.")]
TimesOption = Annotated[Path, option(OUTPUT, "Write the measured times to this JSON file.")]

FirstArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="Give the task, file.py:function or package.module:function, and the map, in either order.",
    ),
]
SecondArgument = Annotated[str, typer.Argument(metavar="MAP", help="Give the file map.json that a search wrote.")]
ToOption = Annotated[
    ToName,
    option(
        CHOICE,
        "Write the files that this engine loads: aoti is a package of AOTInductor for this CPU, which a server "
        "loads from Python or C++ without precimap; onnx is a file of standard Q/DQ operators, for ONNX Runtime, "
        "OpenVINO and others; fbgemm is the rows of all embedding tables, for FBGEMM and torchrec; vllm, sglang and "
        "transformers are compressed-tensors checkpoints.",
    ),
]
CheckpointOption = Annotated[
    Path | None,
    option(
        CHOICE,
        "Rewrite this Hugging Face folder, which the model came from; by default the one that the model's config names.",
    ),
]
CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Give the folder of a compressed-tensors checkpoint.")
]
EngineOption = Annotated[
    EngineName,
    option(CHOICE, "Look at it as this engine reads it; vllm-cpu is vLLM on a CPU.", "--for"),
]
UncertifiedOption = Annotated[bool, option(CHOICE, "Export the map although nothing is proved of it.", "--uncertified")]
FolderOption = Annotated[
    Path,
    option(OUTPUT, "Write the files into this folder, which must be new or empty.", "--output", "-o"),
]


def task_and_map(first: str, second: str) -> tuple[str, Path]:
    """Which of two arguments is the task and which the map: the map is a file that ends in .json."""
    return (second, Path(first)) if first.endswith(".json") else (first, Path(second))
