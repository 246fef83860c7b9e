"""The map: total, bound to its premise, and unimpressed by hostile files."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precimap.errors import MapError, PremiseMismatch, SaveError
from precimap.numerics.schemes import SCHEMES
from precimap.precision_map import Decision, Evidence, PrecisionMap, Premise, Verdict

SCHEMA = Path(__file__).parent.parent / "docs" / "precision_map.schema.json"


def decision(scheme: str | None = None, **changes: object) -> Decision:
    static = scheme is not None and SCHEMES[scheme].needs_calibration
    fields: dict[str, object] = {
        "scheme": scheme,
        "verdict": Verdict.TOLERANT if scheme else Verdict.SENSITIVE,
        "reason": "measured",
        "shape": (32, 16),
        "ops": ("linear",),
        "contracted": (1,),
        "input_scale": 0.0625 if static else None,
        "input_zero": 3 if static else None,
        "evidence": {
            "fp8": Evidence(drop=1e-4, error=2e-5, lower=6e-5, upper=1.4e-4, n=900, clusters=900, changed=812)
        },
        "flops_share": 0.5,
        "bytes": 2048,
    }
    return Decision(**{**fields, **changes})


def a_map(**layers: Decision) -> PrecisionMap:
    premise = Premise(
        weights="w" * 16, task="t", metric="loss", calibration="c", search="s", certify="v", base_precision="float32",
        device="cpu", precimap="0", torch="2",
    )  # fmt: skip
    return PrecisionMap(
        target="emulated", schemes={n: s.row() for n, s in SCHEMES.items()}, layers=layers, premise=premise
    )


EXAMPLE = a_map(a=decision("fp8"), b=decision(), c=decision("int8-static"))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "map.json")
    loaded = PrecisionMap.load(tmp_path / "map.json")
    assert loaded == EXAMPLE
    assert loaded.fingerprint == EXAMPLE.fingerprint
    assert loaded.diff(EXAMPLE) == ()
    assert loaded.low == ("a", "c")


@given(scale=st.floats(1e-30, 1e30), zero=st.integers(-128, 255))
def test_scales_survive_json_to_the_bit(scale: float, zero: int) -> None:
    made = a_map(c=decision("int8-static", input_scale=scale, input_zero=zero))
    again = PrecisionMap.parse(made.model_dump_json())
    assert (again.layers["c"].input_scale, again.layers["c"].input_zero) == (scale, zero)


@given(st.integers(0, len(EXAMPLE.model_dump_json()) - 1))
def test_a_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(MapError):
        PrecisionMap.parse(EXAMPLE.model_dump_json()[:length])


def _changed(**changes: object) -> str:
    return json.dumps({**json.loads(EXAMPLE.model_dump_json()), **changes})


def _layer_changed(**changes: object) -> str:
    row = json.loads(EXAMPLE.model_dump_json())
    row["layers"]["a"].update(changes)
    return json.dumps(row)


HOSTILE = {
    "not json": "hello",
    "a list": "[]",
    "null": "null",
    "deep nesting": "[" * 100_000,
    "another version": _changed(version=99),
    "extra field": _changed(surprise=1),
    "schemes missing": _changed(schemes={}),
    "layers a list": _changed(layers=[]),
    "unknown scheme": _layer_changed(scheme="fp3"),
    "unknown verdict": _layer_changed(verdict="fine"),
    "scheme a number": _layer_changed(scheme=8),
    "nan share": _layer_changed(flops_share=float("nan")),
    "share above one": _layer_changed(flops_share=1.5),
    "negative scale": _layer_changed(input_scale=-1.0),
    "infinite scale": _layer_changed(input_scale=float("inf")),
    "huge integer": _layer_changed(bytes=10**400),
    "longer integer than Python reads": _changed(version=1)[:-1] + ', "x": ' + "9" * 5000 + "}",
    "static without scale": _layer_changed(scheme="int8-static"),
    "a layer twice": '{"layers": {"a": 1, "a": 2}}',
    "scheme with an unknown format": _changed(schemes={"fp8": {"weight": {"format": "e9m9"}, "input": None}}),
    "range rule that is code": _changed(
        schemes={
            "fp8": {**SCHEMES["fp8"].row(), "weight": {**SCHEMES["fp8"].weight.row(), "range": "__import__('os')"}}
        }
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json_is_refused_with_one_message(case: str) -> None:
    with pytest.raises(MapError, match=r"map|twice"):
        PrecisionMap.parse(HOSTILE[case])


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MapError, match="cannot be read"):
        PrecisionMap.load(tmp_path / "nowhere.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MapError, match="UTF-8"):
        PrecisionMap.load(tmp_path / "bytes.json")


def test_another_premise_is_named() -> None:
    EXAMPLE.check(weights="w" * 16, metric="loss")
    with pytest.raises(PremiseMismatch, match=r"weights: the map was made for w+, this is other"):
        EXAMPLE.check(weights="other", metric="loss")


def test_a_diff_names_what_differs() -> None:
    other = a_map(a=decision(), b=decision(), c=decision("int8-static", input_scale=0.125), d=decision("fp8"))
    assert EXAMPLE.diff(other) == (
        "a: fp8 -> base precision",
        "c: int8-static (input scale 0.0625) -> int8-static (input scale 0.125)",
        "d: not in the map -> fp8",
    )


def test_the_fingerprint_is_of_what_runs() -> None:
    assert a_map(a=decision("fp8", reason="other")).fingerprint == a_map(a=decision("fp8")).fingerprint
    assert a_map(a=decision("fp8-e5m2")).fingerprint != a_map(a=decision("fp8")).fingerprint
    moved = a_map(c=decision("int8-static", input_scale=0.0626))
    assert moved.fingerprint != a_map(c=decision("int8-static")).fingerprint


def test_a_full_disk_leaves_the_old_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    EXAMPLE.save(tmp_path / "map.json")
    before = (tmp_path / "map.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left"):
        a_map(a=decision()).save(tmp_path / "map.json")
    assert (tmp_path / "map.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


def test_the_documented_schema_is_the_code_s() -> None:
    assert json.loads(SCHEMA.read_text()) == PrecisionMap.model_json_schema()
