"""Plan: strict at every door, one stable text."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.passes.errors import PlanError
from ditc.passes.plan import Plan

plans = st.builds(
    Plan,
    quantize=st.sampled_from(["none", "int8"]),
    fuse=st.booleans(),
    fp32_matmul=st.sampled_from(["default", "onednn"]),
    weights=st.sampled_from(["watch", "frozen"]),
    mode=st.sampled_from(["default", "reduce-overhead", "max-autotune"]),
)


@given(plans)
def test_toml_and_options_round_trip(plan: Plan) -> None:
    assert Plan.from_toml(plan.to_toml()) == plan
    assert Plan.from_options(plan.to_options()) == plan
    assert tomllib.loads(plan.to_toml()) == plan.to_options()


@given(plans, plans)
def test_key_tells_plans_apart(a: Plan, b: Plan) -> None:
    assert (a.key() == b.key()) == (a == b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "int8"}, "did you mean 'quantize'"),
        ({"zzz": 1}, "known options: quantize"),
        ({"quantize": "int7"}, "'none' or 'int8'"),
        ({"fuse": 1}, "valid boolean"),
        ({"fuse": "yes"}, "valid boolean"),
        ({"mode": "fast"}, "reduce-overhead"),
        ({"lower": "eager", "mode": "max-autotune"}, "only mode='default' is possible"),
    ],
)
def test_refuses_with_what_would_be_right(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_options(options)


def test_refuses_text_that_is_no_plan() -> None:
    with pytest.raises(PlanError, match="not TOML"):
        Plan.from_toml("quantize = ")
    with pytest.raises(PlanError, match="unknown option"):
        Plan.from_toml("[quantise]\nx = 1")


def test_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Plan().quantize = "int8"  # type: ignore[misc]


def test_mode_comes_from_either_door() -> None:
    assert Plan.from_options(None, "max-autotune") == Plan(mode="max-autotune")
    with pytest.raises(PlanError):
        Plan.from_options({}, "fast")


def test_text_is_stable() -> None:
    assert Plan(quantize="int8").to_toml() == (
        'quantize = "int8"\nfuse = true\nfp32_matmul = "default"\nweights = "watch"\nmode = "default"\n'
        'lower = "inductor"\n'
    )
