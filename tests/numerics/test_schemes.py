"""Schemes as values: rows that come back equal, names that are refused with the choices, range rules as text."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precimap.errors import SchemeError
from precimap.numerics.formats import BF16, FORMATS, IntegerFormat
from precimap.numerics.schemes import (
    BF16_FLOOR,
    SCHEMES,
    Amax,
    Granularity,
    MinimumError,
    Percentile,
    RangeRule,
    Rounding,
    Scheme,
    range_rule_from_row,
    rounding_from_row,
    scheme,
    scheme_from_row,
)

rules = st.one_of(
    st.just(Amax()),
    st.floats(50, 100, exclude_min=True, exclude_max=True).map(Percentile),
    st.integers(2, 1000).map(MinimumError),
)


@st.composite
def roundings(draw: st.DrawFn) -> Rounding:
    format = draw(st.sampled_from(list(FORMATS.values())))
    symmetric = draw(st.booleans()) if isinstance(format, IntegerFormat) else True
    return Rounding(
        format, draw(st.sampled_from(Granularity)), draw(st.booleans()), symmetric=symmetric, range=draw(rules)
    )


@pytest.mark.parametrize("one", [*SCHEMES.values(), BF16_FLOOR], ids=lambda one: one.name)
def test_a_row_comes_back_equal_through_json(one: Scheme) -> None:
    assert scheme_from_row(one.name, json.loads(json.dumps(one.row()))) == one


@given(weight=roundings(), given_input=st.none() | roundings(), name=st.text(max_size=5))
def test_any_scheme_comes_back_equal_through_json(weight: Rounding, given_input: Rounding | None, name: str) -> None:
    made = Scheme(name, weight, given_input)
    assert scheme_from_row(name, json.loads(json.dumps(made.row()))) == made


@given(one=roundings(), other=roundings())
def test_rows_are_equal_when_the_values_are(one: Rounding, other: Rounding) -> None:
    assert (one.row() == other.row()) == (one == other)


def test_every_scheme_is_found_by_its_name_and_no_two_are_the_same() -> None:
    assert [scheme(name) for name in SCHEMES] == list(SCHEMES.values())
    assert [one.name for one in SCHEMES.values()] == list(SCHEMES)
    assert len({(one.weight, one.input) for one in SCHEMES.values()}) == len(SCHEMES)


@pytest.mark.parametrize("name", ["fp4", "FP8", "", "bfloat16"])
def test_an_unknown_name_is_told_the_choices(name: str) -> None:
    with pytest.raises(SchemeError) as refusal:
        scheme(name)
    assert repr(name) in str(refusal.value)
    assert all(choice in str(refusal.value) for choice in SCHEMES)


def test_what_a_scheme_says_of_itself() -> None:
    facts = {one.name: (one.weight_bits, one.computes_low, one.needs_calibration) for one in SCHEMES.values()}
    assert facts == {
        "fp8": (8, True, False),
        "fp8-tensor": (8, True, False),
        "fp8-static": (8, True, True),
        "fp8-fnuz": (8, True, False),
        "fp8-fnuz-tensor": (8, True, False),
        "fp8-fnuz-static": (8, True, True),
        "fp8-e5m2": (8, True, False),
        "fp8-weight": (8, False, False),
        "int8": (8, True, False),
        "int8-static": (8, True, True),
        "int8-static-u7": (8, True, True),
        "int8-weight": (8, False, False),
        "int8-row": (8, False, False),
        "int8-row-half": (8, False, False),
        "int4-row": (4, False, False),
        "bf16": (16, True, False),
        "fp16": (16, True, False),
    }


def test_a_range_rule_is_for_static_inputs() -> None:
    static = scheme("int8-static").with_range(Percentile(99.9))
    assert static.input == replace(SCHEMES["int8-static"].input, range=Percentile(99.9))
    assert static.weight == SCHEMES["int8-static"].weight
    for name in ("fp8", "fp8-weight"):
        with pytest.raises(SchemeError, match=f"scheme {name} has no static input range"):
            scheme(name).with_range(Amax())


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("amax", Amax()),
        ("percentile:99.9", Percentile(99.9)),
        ("percentile:51", Percentile(51.0)),
        ("mse", MinimumError(40)),
        ("mse:7", MinimumError(7)),
    ],
)
def test_range_rules_as_text(text: str, rule: RangeRule) -> None:
    assert range_rule_from_row(text) == rule


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "max",
            "Amax",
            "amax:3",
            "percentile",
            "percentile:50",
            "percentile:100",
            "percentile:nan",
            "percentile:x",
        ),
        *("mse:1", "mse:1001", "mse:2.5", "mse:x", "99.9"),
    ],
)
def test_other_range_rules_are_refused(text: str) -> None:
    with pytest.raises(SchemeError, match="expected a range rule amax, percentile:P") as refusal:
        range_rule_from_row(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [{"format": "fp8"}, {"granularity": "per-row"}, {"range": "max"}, {"symmetric": False}],
    ids=lambda change: next(iter(change)),
)
def test_a_row_of_no_rounding_is_refused(change: dict[str, object]) -> None:
    row = Rounding(BF16, Granularity.PER_TENSOR).row()
    with pytest.raises(SchemeError):
        rounding_from_row({**row, **change})


@pytest.mark.parametrize("field", ["format", "granularity", "dynamic", "symmetric", "range"])
def test_a_row_without_a_field_is_refused(field: str) -> None:
    row = Rounding(BF16, Granularity.PER_TENSOR).row()
    del row[field]
    with pytest.raises(SchemeError, match=field):
        rounding_from_row(row)


@pytest.mark.parametrize("row", [{}, {"weight": None, "input": None}, {"weight": {}, "input": 3}])
def test_a_row_of_no_scheme_is_refused(row: dict[str, object]) -> None:
    with pytest.raises(SchemeError, match=r"scheme mine: expected weight and input"):
        scheme_from_row("mine", row)
