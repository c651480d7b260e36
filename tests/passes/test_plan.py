"""Plan: strict at every door, one stable text."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.passes.errors import PlanError
from ditc.passes.plan import KINDS, Plan
from ditc.passes.structure import Role

plans = st.builds(
    Plan,
    quantize=st.one_of(
        st.sampled_from(["int8", "auto", "nvfp4"]),
        st.dictionaries(st.sampled_from(["*", "attention", "mlp.down"]), st.sampled_from(["fp8", "auto"]), min_size=1),
    ),
    activations=st.sampled_from(["dynamic", "none"]),
    calibration=st.one_of(st.none(), st.just('a "quoted" path')),
    error_budget=st.floats(0, 200),
    lowrank=st.integers(0, 64),
    precise_first=st.integers(0, 3),
    fuse=st.booleans(),
    fp32_matmul=st.sampled_from(["default", "onednn"]),
    attention=st.one_of(
        st.sampled_from(["auto", "int8", "nvfp4"]),
        st.dictionaries(st.sampled_from(["*", "self", "joint"]), st.sampled_from(["fp8", "auto"]), min_size=1),
    ),
    attention_sparse=st.floats(0, 1),
    attention_window=st.integers(0, 9),
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
        ({"quantize": "int7"}, "'none', 'auto', 'int8'"),
        ({"quantize": {}}, "empty table"),
        ({"quantize": {"mlp.dwon": "int8"}}, "did you mean 'mlp.down'"),
        ({"quantize": {"zzz": "int8"}}, "known roles: attention"),
        ({"quantize": {"mlp": "int7"}}, "'none', 'auto', 'int8'"),
        ({"lowrank": 8}, "quantize='none'"),
        ({"quantize": {"*": "none"}, "free_originals": True}, "quantize='none'"),
        ({"quantize": "int8", "lowrank": -1}, "greater than or equal to 0"),
        ({"quantize": "int8", "activations": "static"}, "ditc.calibrate"),
        ({"quantize": "mxfp8", "activations": "static", "calibration": "c"}, "impossible for mxfp8"),
        ({"quantize": "int8", "precise_first": 1, "free_originals": True}, "drop one of them"),
        ({"quantize": "auto", "error_budget": -1.0}, "greater than or equal to 0"),
        ({"attention": "int4"}, "'auto', 'native', 'int8'"),
        ({"attention": {}}, "empty table"),
        ({"attention": {"joined": "int8"}}, "did you mean 'joint'"),
        ({"attention": {"zzz": "int8"}}, "known kinds: self, cross, joint"),
        ({"attention": {"self": "int4"}}, "'auto', 'native', 'int8'"),
        ({"attention": "int8", "attention_sparse": 1.5}, "less than or equal to 1"),
        ({"attention": "int8", "attention_sparse": float("nan")}, "finite number"),
        ({"attention": "int8", "attention_sparse": {"self": -0.1}}, "greater than or equal to 0"),
        ({"attention": "int8", "attention_sparse": {}}, "empty table"),
        ({"attention": "int8", "attention_window": -1}, "greater than or equal to 0"),
        ({"attention": "int8", "attention_window": 1.5}, "valid integer"),
        ({"attention": "int8", "attention_window": {"slef": 2}}, "did you mean 'self'"),
        ({"attention_sparse": 0.1}, "self attention stays native: choose 'auto', 'int8'"),
        ({"attention": {"self": "int8"}, "attention_sparse": {"cross": 0.1}}, "cross attention stays native"),
        ({"attention": {"cross": "int8"}, "attention_window": {"self": 4}}, "self attention stays native"),
        ({"attention": "int8", "attention_window": {"cross": 4}}, "no meaning for cross attention.*name 'self'"),
        ({"precise_first": 1}, "quantize='none' and attention='native'"),
        ({"attention": {"self": "native"}, "precise_last": 1}, "quantize='none' and attention='native'"),
        ({"attention": "int8", "lowrank": 8}, "quantize='none'"),
        ({"fuse": 1}, "valid boolean"),
        ({"fuse": "yes"}, "valid boolean"),
        ({"mode": "fast"}, "reduce-overhead"),
        ({"lower": "eager", "mode": "max-autotune"}, "only mode='default' is possible"),
    ],
)
def test_refuses_with_what_would_be_right(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_options(options)


def test_the_longest_role_name_wins() -> None:
    plan = Plan(quantize={"*": "int8", "mlp": "fp8", "mlp.down": "none"})
    assert plan.format_for(Role.MLP_DOWN) == "none" and plan.format_for(Role.MLP_UP) == "fp8"
    assert plan.format_for(Role.OUT) == "int8"
    assert plan.names(Role.MLP_UP) and not plan.names(Role.OUT)
    assert Plan(quantize={"mlp": "fp8"}).format_for(Role.OUT) is None


def test_attention_by_kind() -> None:
    plan = Plan(attention={"self": "int8", "*": "fp8"}, attention_sparse={"joint": 0.25}, attention_window=8)
    assert [plan.attention_for(kind) for kind in KINDS] == ["int8", "fp8", "fp8"]
    assert [plan.sparse_for(kind) for kind in KINDS] == [0.0, 0.0, 0.25]
    assert [plan.window_for(kind) for kind in KINDS] == [8, 8, 8]
    assert plan.changes_attention and not Plan(attention={"self": "native"}).changes_attention
    # one value for all is for the kinds that change, so that a table of kinds needs no second one
    assert Plan(attention={"self": "int8"}, attention_sparse=0.1).attention_for("cross") == "native"


def test_precise_steps_need_attention_or_linears_on_few_bits() -> None:
    assert Plan(attention="int8", precise_first=2).precise_first == 2


def test_tables_mean_the_same_in_any_order() -> None:
    a = Plan(attention={"self": "int8", "cross": "fp8"}, quantize={"mlp": "fp8", "attention": "int8"})
    b = Plan(attention={"cross": "fp8", "self": "int8"}, quantize={"attention": "int8", "mlp": "fp8"})
    assert a == b and a.to_toml() == b.to_toml() and a.key() == b.key()


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
        'quantize = "int8"\nactivations = "dynamic"\nerror_budget = 20.0\nlowrank = 0\nprecise_first = 0\n'
        'precise_last = 0\nfree_originals = false\nfuse = true\nfp32_matmul = "default"\nattention = "native"\n'
        "attention_sparse = 0.0\nattention_window = 0\n"
        'weights = "watch"\nmode = "default"\nlower = "inductor"\n'
    )
