"""The public API: what `import precimap as pm` offers, one line for each name.

Invariant: `precimap` and its `__all__` hold exactly what is imported here, so that another name is another line. Each is
imported `as` itself, which tells type checkers that it is public. `precimap/__init__.py` imports this file when a name is
first asked for: it takes seconds, because it imports torch.
"""

from precimap import metrics as metrics
from precimap.certificate import Certificate as Certificate
from precimap.end_to_end import EndToEnd as EndToEnd
from precimap.exporting.export import export as export
from precimap.exporting.exported import Exported as Exported
from precimap.exporting.linting.findings import Finding as Finding
from precimap.exporting.linting.findings import Linted as Linted
from precimap.exporting.linting.lint import lint as lint
from precimap.exporting.loaded import load_exported as load_exported
from precimap.hardware_profile import HardwareProfile as HardwareProfile
from precimap.layers.discover import discover as discover
from precimap.layers.target import EMULATED as EMULATED
from precimap.metrics.guard import Guard as Guard
from precimap.numerics.schemes import Scheme as Scheme
from precimap.precision_map import PrecisionMap as PrecisionMap
from precimap.runtime.checkpoint import load_deployed as load_deployed
from precimap.runtime.checkpoint import save_deployed as save_deployed
from precimap.runtime.compiling.compiled import compile as compile
from precimap.runtime.compiling.compiled import compiled as compiled
from precimap.runtime.compiling.target import CPU_INT8_COMPILED as CPU_INT8_COMPILED
from precimap.runtime.compiling.target import CUDA_FP8_COMPILED as CUDA_FP8_COMPILED
from precimap.runtime.compiling.target import CUDA_FP8_GRAPHS as CUDA_FP8_GRAPHS
from precimap.runtime.deploy import deploy as deploy
from precimap.runtime.nvidia.graphs import graphed as graphed
from precimap.runtime.nvidia.target import CUDA_FP8 as CUDA_FP8
from precimap.runtime.torchrec_tables import TORCHREC as TORCHREC
from precimap.runtime.x86.target import CPU_INT8 as CPU_INT8
from precimap.searching.allocation.knapsack import Constraints as Constraints
from precimap.searching.allocation.rules import Knapsack as Knapsack
from precimap.searching.allocation.rules import Threshold as Threshold
from precimap.searching.certificate.one_map import certify as certify
from precimap.searching.certificate.second_model import compare as compare
from precimap.searching.pipeline import search as search
from precimap.searching.planning import Plan as Plan
from precimap.searching.planning import plan as plan
from precimap.searching.question import Effort as Effort
from precimap.searching.question import Serving as Serving
from precimap.searching.result import SearchResult as SearchResult
from precimap.searching.timing.timed import bench_device as bench_device
from precimap.task import Splits as Splits
from precimap.task import Task as Task
