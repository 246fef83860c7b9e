"""Files that somebody damaged or wrote against us: 5,000 of each kind, and only precimap's own errors come out.

A fixed seed, so that a failure comes again. What loads is checked to be a whole value: a map that loads is the very map
that was written, whatever its bytes (a certified one has no second form of other content).
"""

import contextlib
import json
import random
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from helpers.small_maps import a_map, certified, decision
from helpers.small_tasks import planted_task
from precimap import Effort, HardwareProfile, PrecisionMap, load_deployed, search
from precimap.cli_options import margin_text
from precimap.cli_values import allowed_of, sizes_of
from precimap.errors import InputError, JournalError, MapError, PrecimapError, ProfileError
from precimap.journal import open_journal
from precimap.numerics.schemes import SCHEMES, range_rule_from_row
from precimap.report.run_record import read_run
from precimap.runtime.checkpoint import DIGEST_KEY, METADATA_KEY, _digest
from precimap.runtime.deploy import deployed_layers, deployment_of
from precimap.searching.certificate.ledger import AskedSplit, Ledger
from precimap.task_file import load_task

CASES = 5000
WHOLE = certified(a_map(**{"a.weight": decision("fp8"), "b.weight": decision(), "c.weight": decision("int8-static")}))
SEED = 20_261_127

# What no writer of these files writes, and a reader meets all the same.
LITERALS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1e-999", b"9" * 400, b"9" * 5000, b"0x10", b"1_000", b"-0",
    b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b'"\\u0000"', b"[" * 2000, b'{"a":' * 2000, b"// no", b"\xff\xfe",
    b"\xed\xa0\x80", b"\x00", b"18446744073709551616", b"1.0", b'"fp8"', b"3",
)  # fmt: skip


def damaged(text: bytes, chance: random.Random) -> bytes:
    """One or a few of: a flipped bit, another byte, a cut, a part doubled or moved, a literal put in or in place of one."""
    out = bytearray(text)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(out)) if out else 0
        match chance.randrange(7):
            case 0 if out:
                out[at] ^= 1 << chance.randrange(8)
            case 1 if out:
                out[at] = chance.randrange(256)
            case 2:
                del out[at:]
            case 3:
                out[at:at] = out[at : at + chance.randrange(1, 80)]
            case 4:
                del out[at : at + chance.randrange(1, 80)]
            case 5:
                out[at:at] = chance.choice(LITERALS)
            case _:
                stop = next((i for i in range(at, len(out)) if out[i : i + 1] in (b",", b"}", b"]", b":")), len(out))
                out[at:stop] = chance.choice(LITERALS)
    return bytes(out)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        inner = (*path, key)
        if isinstance(item, dict | list):
            found += places(item, inner)
        else:
            found.append(inner)
    return found


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**70, 10**400, 0.5, -0.5, 1e308, 5e-324, "", "fp8", "x" * 999, "\x00",
    [], [1], [None], {}, {"a": 1}, [[[[]]]], "NaN", "1", "__import__('os')",
)  # fmt: skip


def rewritten(row: Any, chance: random.Random) -> Any:
    """Well-formed JSON with one or two values of another type or size, keys taken out, put in or renamed."""
    made = json.loads(json.dumps(row))
    for _ in range(chance.choice((1, 1, 2))):
        *_, path = chance.sample(places(made), 1)
        inner, value = made, chance.choice(VALUES)
        if not path:
            return value
        for key in path[:-1]:
            inner = inner[key]
        match chance.randrange(4) if isinstance(inner, dict) else 0:
            case 0:
                inner[path[-1]] = value
            case 1:
                del inner[path[-1]]
            case 2:
                inner[chance.choice(("surprise", "digest", "version", ""))] = value
            case _:
                inner[str(path[-1]) + "x"] = inner.pop(path[-1])
    return made


def hostile(row: Any, number: int, chance: random.Random) -> bytes:
    """Half are damaged bytes, half are rewritten values."""
    if number % 2:
        return damaged(json.dumps(row).encode(), chance)
    return json.dumps(rewritten(row, chance)).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: opening a file anew takes longer than reading it."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


def refused(load: Callable[[], Any], number: int) -> Any:
    """What loads, or None for what precimap refuses. Every other error is a failure of this test."""
    try:
        return load()
    except PrecimapError:
        return None
    except BaseException as error:
        raise AssertionError(f"case {number} of seed {SEED} ended with {type(error).__name__}: {error}") from error


def test_maps(folder: Path) -> None:
    chance, path, whole = random.Random(SEED), folder / "map.json", WHOLE
    row, loaded = json.loads(whole.text()), 0
    for number in range(CASES):
        path.write_bytes(hostile(row, number, chance))
        found = refused(lambda: PrecisionMap.load(path), number)
        loaded += found is not None
        assert found is None or found == whole, f"case {number} is another map, and is taken"
    assert loaded < CASES / 10, "the damage does none"


def test_maps_whose_digest_was_made_again(folder: Path) -> None:
    """Past the digest: what loads is a map that can be asked everything."""
    chance, row = random.Random(SEED + 1), json.loads(WHOLE.text())
    for number in range(CASES):
        made = rewritten(row, chance)
        if isinstance(made, dict):
            made.pop("digest", None)
            made.update(certificate=None, rounding=None)
        found = refused(lambda made=made: PrecisionMap.parse(json.dumps(made)), number)
        if found is not None:
            refused(lambda found=found: (found.fingerprint, found.bytes_after, found.flops_share, found.text()), number)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(16, 32)


def checkpoint() -> tuple[dict[str, torch.Tensor], str]:
    """A small file of the map's layers: a in FP8, b as it is, c in INT8."""
    torch.manual_seed(3)
    model = Net()
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for name, dtype in (("a", torch.float8_e4m3fn), ("c", torch.int8)):
        weight = tensors.pop(f"{name}.weight")
        tensors[f"{name}.weight.codes"] = (weight * 100).to(dtype)
        tensors[f"{name}.weight.scale"] = torch.full((32, 1), 0.01)
    return tensors, WHOLE.text()


@pytest.mark.filterwarnings("ignore:this map is not certified")
def test_checkpoints(folder: Path) -> None:
    chance, path, model = random.Random(SEED), folder / "model.safetensors", Net().eval()
    tensors, text = checkpoint()
    whole = save(tensors, {METADATA_KEY: text, DIGEST_KEY: _digest(tensors, text)})
    path.write_bytes(whole)
    load_deployed(model, path)  # it is one
    header = 8 + int.from_bytes(whole[:8], "little")
    for number in range(CASES):
        part = chance.choice((slice(0, 8), slice(8, header), slice(0, header), slice(header, None), slice(None)))
        begin, stop, _ = part.indices(len(whole))
        made = whole[:begin] + damaged(whole[begin:stop], chance) + whole[stop:]
        if number % 3 == 0:  # a header of the right length again: what the format itself lets through
            inner = whole[8:header]
            inner = damaged(inner, chance)
            made = len(inner).to_bytes(8, "little") + inner + whole[header:]
        path.write_bytes(made)
        found = refused(lambda: load_deployed(model, path), number)
        if found is not None:  # a part of the header doubled, which says the same again
            layers, state = deployed_layers(found), found.state_dict()
            assert deployment_of(found).map == WHOLE, f"case {number} is another map"
            for name in ("a", "c"):
                layer = layers[f"{name}.weight"]
                assert torch.equal(layer.codes.float(), tensors[f"{name}.weight.codes"].float())
                assert torch.equal(layer.weight_affine.scale, tensors[f"{name}.weight.scale"])
            for name in ("a.bias", "b.weight", "b.bias", "c.bias"):
                assert torch.equal(state[name], tensors[name])


def profile() -> dict[str, Any]:
    times = {"median": 1e-5, "lower": 9e-6, "upper": 2e-5, "n": 15}
    low = {"fp8": {"seconds": times, "ratio": times, "shared": None}}
    device = {
        "name": "a", "capability": "b", "threads": 1, "allocator": "default", "clock": "wall time", "torch": "2",
        "precimap": "0", "driver": None,
    }  # fmt: skip
    rows = [
        {"module": "Linear(2, 2)", "dtype": "float32", "each": 1, "rows": n, "base": times, "low": low} for n in (8, 64)
    ]
    schemes = {"fp8": SCHEMES["fp8"].row()}
    return {
        "version": 2, "target": "cpu-int8", "device": device, "batch_sizes": [8, 64], "schemes": schemes, "rows": rows
    }  # fmt: skip


def test_profiles(folder: Path) -> None:
    chance, path, row = random.Random(SEED), folder / "there.json", profile()
    path.write_text(json.dumps(row))
    assert HardwareProfile.load(path).rows
    for number in range(CASES):
        path.write_bytes(hostile(row, number, chance))
        found = refused(lambda: HardwareProfile.load(path), number)
        if found is not None:
            for rows in (8, 20, 64, 65):
                refused(lambda found=found, rows=rows: found.at("Linear(2, 2)", "float32", 1, rows, ["fp8"]), number)
    for content in (b"", b"[" * 100_000, b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ProfileError):
            HardwareProfile.load(path)


def test_ledgers(folder: Path) -> None:
    chance = random.Random(SEED)
    split = AskedSplit("split", (np.arange(100, dtype=np.uint64),), lambda: "")
    book = Ledger.open(folder, split, 0.9)
    for name in ("one", "two"):
        book.spend(name, 0.05, f"what {name} is")
    row = json.loads(book.path.read_text())
    for number in range(CASES):
        book.path.write_bytes(hostile(row, number, chance))
        refused(lambda: Ledger.open(folder, split, 0.9).judged(), number)
    for content in (b"[" * 100_000, b"\xff", b"", b"{}"):
        book.path.write_bytes(content)
        with pytest.raises(JournalError, match="Do not delete it"):
            Ledger.open(folder, split, 0.9)


CONCLUDED = "preflight inventory floor evidence chain certificates summary".split()


def finished_run(folder: Path) -> None:
    task = planted_task(units=120)
    search(task, schemes=["fp8"], margin=0.5, run=folder, ledger=folder / "ledger", effort=Effort(rounding_draws=0))


def test_journals_as_bytes(folder: Path) -> None:
    chance, path = random.Random(SEED), folder / "measurements.sqlite"
    finished_run(folder)
    with sqlite3.connect(path) as connection:
        connection.execute("pragma wal_checkpoint(truncate)")
    connection.close()
    whole = path.read_bytes()

    def read() -> Any:
        with open_journal(folder) as journal:
            journal.premise()
            journal.measurements("probe")
        return read_run(folder)

    read()
    for number in range(CASES):
        begin = chance.choice((0, 0, 4096 * chance.randrange(len(whole) // 4096)))
        made = whole[:begin] + damaged(whole[begin : begin + 4096], chance) + whole[begin + 4096 :]
        path.write_bytes(made)
        for beside in folder.glob("measurements.sqlite-*"):
            beside.unlink()
        refused(read, number)


def test_journals_as_values(folder: Path) -> None:
    """A file whose pages are whole and whose rows are not what a search writes."""
    chance, path = random.Random(SEED), folder / "measurements.sqlite"
    finished_run(folder)
    with open_journal(folder) as journal:
        kinds = {kind: journal.conclusions(kind)[-1].value for kind in CONCLUDED}
    assert read_run(folder).result is not None
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("pragma journal_mode = delete")
    connection.execute("pragma synchronous = off")
    for number in range(CASES // 5):
        kind = chance.choice(list(kinds))
        text = hostile(kinds[kind], number, chance).decode("utf-8", "replace").replace("\x00", "")
        connection.execute("update conclusion set value = ? where kind = ?", (text, kind))
        refused(lambda: read_run(folder), number)
        connection.execute("update conclusion set value = ? where kind = ?", (json.dumps(kinds[kind]), kind))
    connection.close()


def test_what_is_typed_on_the_command_line(folder: Path) -> None:
    """Rules, sizes, ranges, margins and where a task is; no text of a task file, which is code and is run."""
    import typer

    chance = random.Random(SEED)
    typed = (
        b"percentile:99.9",
        b"mse:40",
        b"rows:float32",
        b"64,1024",
        b"0.05%",
        b"tower.*=fp8,int8",
        b"mine.py:task",
        b"a.b:c",
    )
    for number in range(CASES):
        text = damaged(chance.choice(typed), chance).decode("utf-8", "surrogateescape").replace("\x00", "")
        for parse in (range_rule_from_row, sizes_of, lambda given: allowed_of([given])):
            refused(lambda parse=parse, text=text: parse(text), number)
        with contextlib.suppress(typer.BadParameter):
            margin_text(text)
        if number % 10 == 0 and not text.partition(":")[0].replace(".", "").isidentifier():
            refused(lambda text=text: load_task(str(folder / text) if text.endswith(".py") else text), number)
    with pytest.raises(InputError):
        sizes_of("9" * 5000)
    with pytest.raises(MapError):
        PrecisionMap.load(folder)
