"""What may follow a command: the arguments and options, each written once, with the names that a user types.

Invariant: no option is defined that no command reads. A value that a user can mistype is a StrEnum or has a parser here.
Every help text is whole sentences, and options that belong together stand in one panel. Nothing here imports torch,
because `--help` would wait for it; so the few defaults and words that stand in modules with torch are repeated here, and
tests hold them equal. What makes values of what was typed is in `cli_values`.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from precimap.numerics.schemes import SCHEMES

# Repeated from metrics.click, runtime.nvidia.target, searching.allocation.table and searching.question.
NE_MARGINS = ("0.02%", "0.05%", "0.1%")
EXPERIMENTAL = "experimental: not yet measured on a GPU"
BYTES_WORTH, TIMING_SECONDS, ROUNDING_DRAWS, MEMORY = 1e-3, 10.0, 8, "4GiB"

PANELS = QUESTION, CHOICE, SERVING, EFFORT, OUTPUT = "Question", "Choice", "Serving", "Effort", "Output"


class TargetName(StrEnum):
    """What a map can be made for here: the names of `precimap.targets`."""

    EMULATED = "emulated"
    CPU = "cpu"
    CUDA = "cuda"
    CPU_INT8 = "cpu-int8"
    CPU_INT8_COMPILED = "cpu-int8-compiled"
    CUDA_FP8 = "cuda-fp8"
    CUDA_FP8_COMPILED = "cuda-fp8-compiled"
    CUDA_FP8_GRAPHS = "cuda-fp8-graphs"
    TORCHREC = "torchrec"


class FormName(StrEnum):
    """How a model is served on the targets cpu and cuda: the forms of `searching.question`."""

    AUTO = "auto"
    EAGER = "eager"
    COMPILED = "compiled"
    GRAPHS = "graphs"


class RuleName(StrEnum):
    """How a chain of maps is made."""

    KNAPSACK = "knapsack"
    THRESHOLD = "threshold"


def option(panel: str, said: str, *names: str, **how: Any) -> Any:
    """A typer option in a panel of the help."""
    return typer.Option(*names, help=said, rich_help_panel=panel, **how)


def margin_text(text: str) -> str:
    """The text, if it is a number or a percentage; of what, the task's metric says later."""
    try:
        float(text.strip().removesuffix("%"))
    except ValueError:
        raise typer.BadParameter(
            f"expected a number such as 0.002, or a percentage such as 0.05%, got {text!r}"
        ) from None
    return text


TaskArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="The task is what a Python function returns: give file.py:function or package.module:function, or file.py "
        "alone if its function is called task.",
    ),
]
MapArgument = Annotated[Path, typer.Argument(metavar="MAP", help="Give the file map.json that a search wrote.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Give the run directory of a search.")]

MarginOption = Annotated[
    str,
    option(
        QUESTION,
        "The metric may get worse by at most this much, in its own units. Where its drop is relative to the "
        f"original model, as of normalised entropy (NE), per cent will do: {', '.join(NE_MARGINS)} are usual.",
        parser=margin_text,
        metavar="NUMBER",
    ),
]
ConfidenceOption = Annotated[
    float,
    option(
        QUESTION,
        "The certificate has to be this sure: with 0.95, a map that drops by more than the margin is certified in "
        "at most 5% of cases.",
    ),
]
CutoffOption = Annotated[
    float | None,
    option(
        QUESTION,
        "With the rule threshold, a layer takes low precision when its own drop is surely below this number; with "
        "knapsack it only names layers in reports. The default is the margin divided by the number of layers that "
        "could.",
    ),
]
BudgetOption = Annotated[
    float | None,
    option(
        QUESTION,
        "All tests on one certify split together may be wrong with this probability. The default, 1 - confidence, "
        "is enough for one test; 0.1 allows two at 95%.",
    ),
]
RealignOption = Annotated[
    bool,
    option(
        QUESTION,
        "The map also corrects the scale and the bias of the layer that makes the scores, so that low precision "
        "does not shift them. They are fitted without labels on the calibration split, and cost no time when the "
        "model runs.",
        "--realign",
    ),
]

_SCHEMES = ("--schemes", "--scheme")  # given once for each, or all at once in Python
SchemeOption = Annotated[
    list[str],
    option(
        CHOICE,
        "Layers may take this low-precision scheme; give the option several times, and each layer takes one of "
        f"them. The schemes are {', '.join(SCHEMES)}.",
        *_SCHEMES,
    ),
]
PlannedSchemeOption = Annotated[
    list[str] | None,
    option(
        CHOICE, "Plan for this low-precision scheme; it can be given several times, and the default is fp8.", *_SCHEMES
    ),
]
TimedSchemeOption = Annotated[
    list[str] | None,
    option(
        CHOICE,
        "Time this scheme; it can be given several times, and the default is every scheme that runs here.",
        *_SCHEMES,
    ),
]
RuleOption = Annotated[
    RuleName,
    option(
        CHOICE,
        "The rule knapsack looks for the layers that save the most time within the margin; threshold takes or "
        "leaves each layer by its own drop.",
    ),
]
TargetOption = Annotated[
    TargetName,
    option(
        CHOICE,
        "The map is made for this hardware, or for an emulation of any. On cpu and cuda the model is served as it "
        "is or compiled by torch, on cuda also as CUDA graphs of that (--form); the names of two and more parts are "
        f"one form of one kind of hardware. All of CUDA is {EXPERIMENTAL}.",
    ),
]
PinOption = Annotated[
    list[str] | None,
    option(
        CHOICE,
        "Keep the layer of this name in its original precision, or all layers whose names match this shell pattern; "
        "the option can be given several times.",
        *("--pinned", "--pin"),
    ),
]
AllowOption = Annotated[
    list[str] | None,
    option(
        CHOICE,
        "With PATTERN=SCHEME,SCHEME the layer of that name, or all layers that match that shell pattern, may take "
        "these schemes only. The option can be given several times.",
        *("--allowed", "--allow"),
    ),
]
RangeOption = Annotated[
    str,
    option(
        CHOICE,
        "Schemes with a fixed range for a layer's input choose the range in this way: amax covers every value seen, "
        "percentile:99.9 leaves out the largest 0.1%, and mse makes the mean squared error smallest.",
    ),
]
GainOption = Annotated[
    float,
    option(
        CHOICE,
        "Only maps that gain at least this much are considered. The gain is the share of the layers' time that is "
        "saved (of their FLOPs, where nothing is timed), plus the share of saved bytes times --bytes-worth; 0.05 is "
        "5%.",
    ),
]
MaximumBytesOption = Annotated[
    int | None, option(CHOICE, "All layers, embedding tables included, may take at most this many bytes.")
]
BytesWorthOption = Annotated[
    float, option(CHOICE, "Saving all bytes is worth this share of the layers' time; the default only breaks ties.")
]
BitsOption = Annotated[
    float | None,
    option(CHOICE, "The weights may take at most this many bits each on average, their scales included."),
]
ModelOption = Annotated[
    str | None,
    option(CHOICE, "Use the model in this local folder, or of this Hugging Face id, instead of the packaged one."),
]

ProfileOption = Annotated[
    Path | None,
    option(SERVING, "Plan with the times in this file, which bench-device wrote, instead of timing layers here."),
]
BatchSizesOption = Annotated[
    str,
    option(
        SERVING,
        "The model is served in batches of these sizes, for instance 64,1024. The default is the sizes of the "
        "profile, or the batches of the task's data.",
        show_default=False,
    ),
]
FormOption = Annotated[
    FormName,
    option(
        SERVING,
        "On the targets cpu and cuda the model is served as it is (eager) or compiled by torch, on cuda also as "
        "CUDA graphs of that (graphs). With auto, whole models are timed in all forms, and the search goes on in "
        "the fastest one.",
    ),
]
TimingOption = Annotated[
    float,
    option(
        SERVING,
        "The whole model is timed with its map for about this many seconds at each batch size; with 0 it is not timed.",
    ),
]
PeakOption = Annotated[
    float | None,
    option(
        SERVING,
        "Reports give the used share of this peak of the hardware, in 10^12 floating-point operations a second; "
        "nothing is decided by it. The default is measured here.",
    ),
]

ProbeOption = Annotated[
    bool,
    option(
        EFFORT,
        "Measure every layer one at a time. Without this option a quick look at all layers decides, and only those "
        "that it leaves open are measured, with a random sample of the others as a check.",
        "--probe-all",
    ),
]
DrawsOption = Annotated[
    int,
    option(
        EFFORT,
        "The final map is measured again with this many shifted rounding grids, to tell how much of its drop is "
        "chance of rounding; with 0 it is not.",
    ),
]
ScreenMemoryOption = Annotated[
    str,
    option(EFFORT, "The quick look at all layers may hold this much memory for a batch, for instance 512MB or 4GiB."),
]
ReplayMemoryOption = Annotated[
    str,
    option(
        EFFORT,
        "Measurements of single layers may keep results in this much memory, so that they need not compute again "
        "what does not depend on the layer.",
    ),
]
MinutesOption = Annotated[
    float | None,
    option(
        EFFORT,
        "After this many minutes the search begins no new measurement, and certifies the best map so far.",
        *("--minutes", "--max-minutes"),
    ),
]

RunOption = Annotated[
    Path,
    option(
        OUTPUT,
        "The search writes its measurements and the map to this directory. If it was interrupted, the same command "
        "goes on from there.",
    ),
]
JsonOption = Annotated[bool, option(OUTPUT, "Print the result as JSON, for machines.", "--json")]
CertifiedOption = Annotated[Path | None, option(OUTPUT, "Write the map with its new certificate to this file.")]
OutOption = Annotated[
    Path | None,
    option(
        OUTPUT,
        "Write everything to this new directory. The default is precimap-runs/demo, or demo-2, demo-3 and so on "
        "where that exists.",
        show_default=False,
    ),
]
