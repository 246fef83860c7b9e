"""The map: total, bound to its premise, and unimpressed by hostile files."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.small_maps import a_map, certified, decision
from precimap.errors import MapError, PremiseMismatch, SaveError
from precimap.numerics.schemes import SCHEMES
from precimap.precision_map import PrecisionMap

SCHEMA = Path(__file__).parent.parent / "docs" / "precision_map.schema.json"


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
    "more weights than there is": _changed(of_model={"weights_share": 1.1, "bytes": 10**6}),
    "layers larger than the model": _changed(of_model={"weights_share": 1.0, "bytes": 1}),
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


# --- maps that cannot lie -----------------------------------------------------------------------------------------


CERTIFIED = certified(EXAMPLE, realigned_at="c")
CERTIFIED_ROW = json.loads(CERTIFIED.model_dump_json())


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in nested JSON at which a value stands."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))
    else:
        yield path


def edited(path: tuple[str | int, ...], change: Callable[[Any], Any]) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(json.dumps(CERTIFIED_ROW))
    inner: Any = row
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = change(inner[path[-1]])
    return row


def otherwise(value: Any) -> Any:
    """Another value of the same type, as near as can be: what a hand that knows the format would write."""
    if value is None:
        return 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return math.nextafter(value, math.inf) if isinstance(value, float) else value + "x"


def with_digest(row: dict[str, Any]) -> str:
    """As somebody writes it who knows how a digest is made."""
    rest = {key: value for key, value in row.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**rest, "digest": hashlib.sha256(text.encode()).hexdigest()})


def test_a_certified_map_survives_its_file_in_any_form(tmp_path: Path) -> None:
    CERTIFIED.save(tmp_path / "map.json")
    assert PrecisionMap.load(tmp_path / "map.json") == CERTIFIED
    assert PrecisionMap.parse(json.dumps(CERTIFIED_ROW, sort_keys=True, indent=7)) == CERTIFIED
    assert PrecisionMap.parse(with_digest(CERTIFIED_ROW)) == CERTIFIED, "the digest is SHA-256 of the sorted rest"


def test_no_value_of_a_certified_map_can_be_edited() -> None:
    """Each value of the file by itself, by the smallest step there is."""
    found = list(places(CERTIFIED_ROW))
    assert len(found) > 150
    for path in found:
        with pytest.raises(MapError):
            PrecisionMap.parse(json.dumps(edited(path, otherwise)))


def test_no_value_of_a_certified_map_can_be_left_out() -> None:
    for path in places(CERTIFIED_ROW):
        row = edited(path, lambda value: value)
        inner: Any = row
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        try:
            said = PrecisionMap.parse(json.dumps(row))
        except MapError:
            continue
        assert said == CERTIFIED, f"{path} is the default, or it is missed"


def _certificate(**changes: Any) -> dict[str, Any]:
    return edited(("certificate",), lambda row: {**row, **changes})


def _guard(**changes: Any) -> dict[str, Any]:
    return edited(("certificate", "guards", "calibration"), lambda row: {**row, **changes})


def _rounding(**changes: Any) -> dict[str, Any]:
    return edited(("rounding",), lambda row: {**row, **changes})


LIES = {
    "a bound above the margin": (_certificate(upper=0.5, drop=0.4, margin=0.01), "certified, with a drop of 0.4"),
    "a margin below the bound": (_certificate(margin=0.0017), "the margin 0.0017"),
    "no bound": (_certificate(upper=None), "no upper bound"),
    "a drop above its bound": (_certificate(drop=0.0019), "certified, with a drop of 0.0019"),
    "a guard that is not held": (_guard(held=False), "its guard calibration is not held"),
    "a guard above its margin": (_guard(upper=0.006), "it is held, with"),
    "a guard without a bound": (_guard(upper=None), "it is held, with"),
    "a guard below its margin by much": (_guard(drop=0.0051), "it is held, with"),
    "a guard of more clusters than units": (_guard(clusters=901), "901 clusters of 900 units"),
    "certified by its verdict alone": (_certificate(certified=False), "certified is false"),
    "certified against its verdict": (_certificate(verdict="no: the drop is above the margin"), "certified is true"),
    "more changed than there are": (_certificate(changed=1001), "1001 of 1000 units changed"),
    "more clusters than units": (_certificate(clusters=1001), "1001 clusters of 1000 units"),
    "less spent than it cost": (_certificate(spent_alpha=0.01), "alpha 0.05 was spent, and 0.01 in all"),
    "all of alpha": (_certificate(spent_alpha=1.0), "certificate"),
    "an alpha of a coin": (_certificate(alpha=0.6, spent_alpha=0.7), "certificate"),
    "a negative error": (_certificate(error=-1e-4), "certificate"),
    "the certificate of another map": (_certificate(map="0" * 16), "its certificate is of another map"),
    "the certificate of another metric": (_certificate(metric="AUC"), "its certificate is in AUC"),
    "one layer more": (edited(("layers", "b", "scheme"), lambda _: "fp8"), "its certificate is of another map"),
    "one layer less": (edited(("layers", "a", "scheme"), lambda _: None), "its certificate is of another map"),
    "another input range": (edited(("layers", "c", "input_scale"), lambda x: 2 * x), "its certificate is of another map"),
    "another zero": (edited(("layers", "c", "input_zero"), lambda x: x + 1), "its certificate is of another map"),
    "another realignment": (edited(("realignment", "scale"), lambda _: [1.5]), "its certificate is of another map"),
    "no realignment": (edited(("realignment",), lambda _: None), "its certificate is of another map"),
    "another target": (edited(("target",), lambda _: "cpu-int8"), "its certificate is of another map"),
    "other weights": (edited(("premise", "weights"), lambda _: "x" * 16), "its certificate is of another map"),
    "another meaning of its scheme": (
        edited(("schemes", "fp8"), lambda _: SCHEMES["fp8-e5m2"].row()), "its certificate is of another map"
    ),
    "a sensitive layer that is low": (edited(("layers", "a", "verdict"), lambda _: "sensitive"), "is sensitive, and in"),
    "a pinned layer that is low": (edited(("layers", "a", "verdict"), lambda _: "pinned"), "is pinned, and in"),
    "evidence of more than all": (edited(("layers", "a", "evidence", "fp8", "changed"), lambda _: 901), "901 units changed"),
    "evidence upside down": (edited(("layers", "a", "evidence", "fp8", "lower"), lambda _: 1.0), "above the upper bound"),
    "a better mean of the draws": (_rounding(mean=-0.1), "the mean of the rounding draws"),
    "a smaller spread of the draws": (_rounding(sd=1e-4), "the sd of the rounding draws"),
    "more in common than there is": (_rounding(common=1.0), "cannot be common"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_what_contradicts_itself_is_refused_whatever_its_digest(case: str) -> None:
    row, said = LIES[case]
    with pytest.raises(MapError, match=re.escape(said)):
        PrecisionMap.parse(with_digest(row))


def test_a_file_that_was_edited_is_told_what_to_do() -> None:
    with pytest.raises(MapError, match=r"digest is of another content: the file was edited.*precimap certify"):
        PrecisionMap.parse(json.dumps(edited(("layers", "b", "reason"), lambda _: "friendlier")))


@pytest.mark.parametrize("claim", ["certificate", "rounding"])
def test_a_claim_without_a_digest_is_refused(claim: str) -> None:
    row = {**CERTIFIED_ROW, **{key: None for key in ("certificate", "rounding") if key != claim}}
    for without in ({**row, "digest": None}, {key: value for key, value in row.items() if key != "digest"}):
        with pytest.raises(MapError, match=f"it has {claim} and no digest"):
            PrecisionMap.parse(json.dumps(without))


def test_a_map_of_one_s_own_needs_neither_certificate_nor_digest() -> None:
    row = {**edited(("layers", "b", "scheme"), lambda _: "fp8"), "certificate": None, "rounding": None}
    del row["digest"]
    made = PrecisionMap.parse(json.dumps(row))
    assert made.low == ("a", "b", "c")
    assert made.not_certified == "it has no certificate"


def test_what_is_changed_in_memory_is_written_as_it_is_or_not_at_all(tmp_path: Path) -> None:
    loaded = PrecisionMap.parse(CERTIFIED.model_dump_json())
    assert loaded.not_certified is None
    plain = loaded.model_copy(update={"certificate": None})
    plain.save(tmp_path / "map.json")
    assert PrecisionMap.load(tmp_path / "map.json") == plain
    other = loaded.model_copy(update={"target": "cpu-int8"})
    assert other.not_certified == "its certificate is of another map"
    with pytest.raises(MapError, match=r"cannot write the map: its certificate is of another map"):
        other.save(tmp_path / "map.json")
    assert PrecisionMap.load(tmp_path / "map.json") == plain
    no = CERTIFIED.certificate.model_copy(update={"certified": False, "verdict": "no: the drop is above the margin"})
    assert loaded.model_copy(update={"certificate": no}).not_certified == (
        "its certificate says 'no: the drop is above the margin'"
    )
