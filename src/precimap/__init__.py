"""precimap: the fastest per-layer precision map that your own task metric cannot tell from the original."""

from precimap import metrics
from precimap.certificate import Certificate
from precimap.end_to_end import EndToEnd
from precimap.hardware_profile import HardwareProfile
from precimap.layers.discover import discover
from precimap.layers.target import EMULATED
from precimap.metrics.guard import Guard
from precimap.precision_map import PrecisionMap
from precimap.runtime.checkpoint import load_deployed, save_deployed
from precimap.runtime.compiled import compiled
from precimap.runtime.compiled_target import CPU_INT8_COMPILED, CUDA_FP8_COMPILED
from precimap.runtime.cpu_int8 import CPU_INT8
from precimap.runtime.cuda_fp8 import CUDA_FP8
from precimap.runtime.cuda_graphs import graphed
from precimap.runtime.deploy import deploy
from precimap.runtime.torchrec_tables import TORCHREC
from precimap.searching.allocation.knapsack import Constraints
from precimap.searching.allocation.rules import Knapsack, Threshold
from precimap.searching.latency.serving import Serving
from precimap.searching.latency.timed import bench_device
from precimap.searching.limits import Effort
from precimap.searching.pipeline import search
from precimap.searching.planning import Plan, plan
from precimap.searching.result import SearchResult
from precimap.task import Splits, Task

__all__ = [
    "CPU_INT8",
    "CPU_INT8_COMPILED",
    "CUDA_FP8",
    "CUDA_FP8_COMPILED",
    "EMULATED",
    "TORCHREC",
    "Certificate",
    "Constraints",
    "Effort",
    "EndToEnd",
    "Guard",
    "HardwareProfile",
    "Knapsack",
    "Plan",
    "PrecisionMap",
    "SearchResult",
    "Serving",
    "Splits",
    "Task",
    "Threshold",
    "bench_device",
    "compiled",
    "deploy",
    "discover",
    "graphed",
    "load_deployed",
    "metrics",
    "plan",
    "save_deployed",
    "search",
]
