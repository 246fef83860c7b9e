"""How much faster is the fast twin than encoding and decoding? Times both in turns, with a plain copy as the ceiling.

    python bench/quantiser.py [--quick] [--json FILE]

A figure is the CPU time of one thread, median over turns with its quartiles; the ratio is taken inside each turn. One
thread, because with more the figures on a machine that does other work too are those of the waiting for each other.
Exits with 1 when a claim fails.
"""

import sys
import time
from dataclasses import dataclass

import torch

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from precimap.numerics.fast import fake_quantize
from precimap.numerics.formats import E4M3, E5M2, INT8, Format
from precimap.numerics.quantize import Affine, dequantize, quantize
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import Granularity, Rounding
from precimap.runtime.timing import Spread, interleaved, ratio, spread

FORMATS = (E4M3, E5M2, INT8)
HEIGHTS = {"1M": 1 << 10, "16M": 1 << 14}  # rows of 1024 values


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; times in milliseconds, `ratio` = codes / twin, `different` = values with other bits."""

    format: str
    granularity: str
    size: str
    codes: Spread
    twin: Spread
    copy: Spread
    ratio: Spread
    different: int


def by_codes(x: torch.Tensor, format: Format, affine: Affine) -> torch.Tensor:
    return dequantize(quantize(x, format, affine), format, affine)


def different(x: torch.Tensor, format: Format, affine: Affine) -> int:
    one, other = by_codes(x, format, affine), fake_quantize(x, format, affine)
    return int((one.view(torch.int32) != other.view(torch.int32)).sum())


def different_on_patterns(format: Format) -> int:
    """The same over a million float32 bit patterns, of all exponents and both signs, at scales from tiny to huge."""
    patterns = torch.randint(-(2**31), 2**31, (1 << 20,), generator=torch.Generator().manual_seed(1))
    x = patterns.to(torch.int32).view(torch.float32)
    x = x[~x.isnan()]
    scales = (2.0**-126, 1e-20, 0.0137, 1.0, 1e20)
    return sum(different(x, format, Affine(torch.tensor(scale), None)) for scale in scales)


def measure(format: Format, granularity: Granularity, size: str, turns: int) -> Row:
    x = torch.randn(HEIGHTS[size], 1024, generator=torch.Generator().manual_seed(0))
    affine = fit(x, Rounding(format, granularity), (1,))
    buffer = torch.empty_like(x)
    cases = {
        "codes": lambda: by_codes(x, format, affine),
        "twin": lambda: fake_quantize(x, format, affine),
        "copy": lambda: buffer.copy_(x),
    }
    seconds = interleaved(cases, turns, time.process_time)
    times = {name: spread([1e3 * value for value in values]) for name, values in seconds.items()}
    return Row(
        format.name,
        granularity.value,
        size,
        **times,
        ratio=ratio(seconds["codes"], seconds["twin"]),
        different=different(x, format, affine),
    )


def claims_of(rows: list[Row]) -> list[Claim]:
    """What the documentation says of the twin, on the device that this ran on."""
    headline = next(row for row in rows if (row.format, row.granularity, row.size) == ("e4m3", "per-tensor", "1M"))
    apart = sum(row.different for row in rows) + sum(different_on_patterns(format) for format in FORMATS)
    return [
        at_least(
            "e4m3, 1M values, one scale: CPU time of encode and decode over that of the twin",
            headline.ratio.median,
            2.5,
        ),
        at_most("values whose bits differ between the twin and encode and decode", apart, 0),
    ]


def main() -> int:
    arguments = command_line(__doc__, "fewer turns: under a minute").parse_args()
    torch.set_num_threads(1)
    turns = {"1M": 15, "16M": 2} if arguments.quick else {"1M": 60, "16M": 15}

    print_machine()
    print("milliseconds, and how many times longer encode and decode takes: median [quartiles]")
    print(
        f"{'format':7}{'scale':12}{'size':5}{'encode and decode':>24}{'twin':>24}{'copy':>24}{'ratio':>20}{'differ':>8}"
    )
    rows = []
    for size in HEIGHTS:
        for format in FORMATS:
            for granularity in (Granularity.PER_TENSOR, Granularity.PER_CHANNEL):
                row = measure(format, granularity, size, turns[size])
                rows.append(row)
                figures = "".join(f"{each:.2f}".rjust(24) for each in (row.codes, row.twin, row.copy))
                print(f"{row.format:7}{row.granularity:12}{size:5}{figures}{f'{row.ratio:.1f}':>20}{row.different:8}")
    claims = claims_of(rows)
    return finished(arguments.json, rows, claims)


if __name__ == "__main__":
    sys.exit(main())
