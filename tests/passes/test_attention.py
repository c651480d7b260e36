"""Attention on few bits: what each site becomes and why, and the numbers of models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditc
from ditc.kernels.attention import attention_reason
from ditc.passes.attention.recognise import RecogniseAttention
from ditc.passes.attention.use import KEPT, UseAttention
from ditc.passes.backend import unquantized
from ditc.passes.base import PassReport
from ditc.passes.capture import INPUT, capture_export
from ditc.passes.errors import PassError
from ditc.passes.pipeline import Rewritten, rewrite
from ditc.passes.plan import Plan
from ditc.passes.quantize.tables import DeviceKind
from ditc.passes.structure import analyse
from ditc.passes.verify import graph_text

ops = torch.ops.ditc
TOLERANCE = {"int8": 0.03, "fp8": 0.09, "nvfp4": 0.35}
"""Relative error of a model's output; a wrong scale, mask or layout is off by more than half."""
A100, L40, H100, B200 = (
    DeviceKind("cuda", name, capability)
    for name, capability in (
        ("NVIDIA A100-SXM4-80GB", (8, 0)),
        ("NVIDIA L40", (8, 9)),
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA B200", (10, 0)),
    )
)


class Attention(nn.Module):
    """Attention of ``x`` over ``context``, with heads where ``heads`` is not 0; keys have ``kv_heads``."""

    def __init__(self, heads: int = 4, kv_heads: int | None = None, width: int = 72, **options: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.options = heads, kv_heads or heads, options
        inner = width // max(heads, 1) * max(self.kv_heads, 1)
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, inner), nn.Linear(width, inner)
        if self.kv_heads != heads:
            self.options["enable_gqa"] = True

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2) if heads else x

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self._split(self.q(x), self.heads)
        k, v = (self._split(layer(context), self.kv_heads) for layer in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, mask, **self.options)
        joined: Tensor = self.out(y.transpose(1, 2).flatten(2) if self.heads else y)
        return joined


def example(
    queries: int = 40, keys: int = 50, dtype: torch.dtype = torch.float32, mask: Tensor | None = None, **options: Any
) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    model = Attention(**options).eval().to(dtype)
    data = (torch.randn(2, queries, 72).to(dtype), torch.randn(2, keys, 72).to(dtype))
    return model, data if mask is None else (*data, mask)


def padding(length: int = 50) -> Tensor:
    """A key padding mask ``[2, 1, 1, length]``."""
    return (torch.arange(length) < torch.tensor([[length], [length // 3]]))[:, None, None]


def rewritten(model: nn.Module, inputs: tuple[Any, ...], kind: DeviceKind | None = None, **options: Any) -> Rewritten:
    """By the passes of attention alone; for this machine, or as for a device that is not here."""
    plan = Plan(**{"attention": "int8", **options})
    return rewrite(capture_export(model, inputs), plan, (RecogniseAttention(), UseAttention(kind=kind)))


def report(done: Rewritten) -> PassReport:
    return next(item for item in done.reports if item.name == UseAttention.name)


def count(done: Rewritten, target: Any) -> int:
    return len(done.graph.graph.find_nodes(op="call_function", target=target))


def run(done: Rewritten, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        weights = dict(model.named_parameters())
        names = [node.meta[INPUT].name for node in done.graph.graph.find_nodes(op="placeholder")]
        data = iter(inputs)
        output: Tensor = done.graph(*(weights[n] if n in weights else next(data) for n in names))[0]
    return output


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def has_kernel() -> None:
    if attention_reason() is not None:
        pytest.skip(str(attention_reason()))


# --- operands --------------------------------------------------------------------------------------------------------

OPERANDS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "plain": example,
    "scale": lambda: example(scale=0.3),
    "few": lambda: example(queries=3, keys=2),
    "odd heads": lambda: example(heads=9),
    "no heads": lambda: example(heads=0),
    "no heads, mask": lambda: example(heads=0, mask=padding()[:, 0].expand(2, 40, 50)),
    "grouped": lambda: example(kv_heads=2),
    "one shared head": lambda: example(kv_heads=1, mask=padding()),
    "causal": lambda: example(keys=40, is_causal=True),
    "padding": lambda: example(mask=padding()),
    "bias": lambda: example(mask=torch.randn(4, 40, 50, generator=torch.Generator().manual_seed(1))),
    "square mask": lambda: example(keys=40, mask=torch.eye(40).bool().logical_not()),
    "bfloat16": lambda: example(dtype=torch.bfloat16),
    "float16": lambda: example(dtype=torch.float16, mask=padding()),
}


@pytest.mark.parametrize("choice", ["int8", "fp8", "nvfp4"])
@pytest.mark.parametrize("operands", OPERANDS)
def test_meaning_is_kept(choice: str, operands: str, request: pytest.FixtureRequest) -> None:
    if choice == "int8":
        request.getfixturevalue("has_kernel")
    model, inputs = OPERANDS[operands]()
    done = rewritten(model, inputs, attention=choice)
    assert report(done).rewrites == 1 and not report(done).skipped
    assert count(done, ops.attention_int8.default) == (choice == "int8")
    assert count(done, ops.attention_quantized.default) == (choice != "int8")
    assert 1e-5 < error(run(done, model, inputs), model(*inputs).detach()) < TOLERANCE[choice]


def test_quantisation_stands_in_the_graph() -> None:
    done = rewritten(*example(), attention="fp8")
    quantised = done.graph.graph.find_nodes(op="call_function", target=ops.quantize.default)
    assert [node.args[1] for node in quantised] == ["fp8"] * 3
    (call,) = done.graph.graph.find_nodes(op="call_function", target=ops.attention_quantized.default)
    parts = [node for operand in call.args[:3] for node in operand]  # type: ignore[union-attr]
    assert {node.args[0] for node in parts} == set(quantised)


@pytest.mark.usefixtures("has_kernel")
@pytest.mark.parametrize("choice", ["int8", "nvfp4"])
def test_a_second_time_nothing_happens(choice: str) -> None:
    done = rewritten(*example(), attention=choice)
    before = graph_text(done.graph)
    again = rewrite_again(done, choice)
    assert again.rewrites == 0 and not again.skipped
    assert graph_text(done.graph) == before


def rewrite_again(done: Rewritten, choice: str) -> PassReport:
    from ditc.passes.base import PassContext

    plan = Plan(attention=choice)
    context = PassContext(plan, torch.device("cpu"), analyse(done.graph))
    return UseAttention()(done.graph, context)


def test_nothing_to_do_where_there_is_no_attention() -> None:
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval(), (torch.randn(2, 8),)
    found = report(rewritten(model, inputs))
    assert found.rewrites == 0 and not found.decisions


def test_a_plan_that_does_not_ask_gets_none() -> None:
    names = {item.name for item in rewrite(capture_export(*example()), Plan()).reports}
    assert not {name for name in names if "attention" in name}


# --- skips and reasons -----------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Whatever a function does with three projections."""

    def __init__(self, run: Callable[[Tensor, Tensor, Tensor], Tensor], width: int = 24) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(*(layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)))


def odd(run: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(0)
    return Odd(run).eval().to(dtype), (torch.randn(2, 16, 24).to(dtype),)


def _attend(*operands: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(*operands, **options)


SKIPPED = {
    "operands are float64": odd(_attend, torch.float64),
    "keys and values differ in shape": odd(lambda q, k, v: _attend(q, k, v[..., :6])),
    "queries and keys differ in batch or heads": odd(lambda q, k, v: _attend(q, k[:, :1], v[:, :1])),
    "linear attention has no softmax": odd(lambda q, k, v: q.relu() @ (k.relu().transpose(-1, -2) @ v)),
    "operands have 5 dimensions, and a mask of 5": odd(
        lambda q, k, v: _attend(q[None], k[None], v[None], attn_mask=torch.eye(16).bool().expand(1, 2, 2, 16, 16))
    ),
    "not proven to be one attention: its softmax weights are changed by aten.mul.Tensor": odd(
        lambda q, k, v: ((q @ k.transpose(-1, -2)).softmax(-1) * q[..., :1]) @ v
    ),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_says_why_a_site_stays(reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        rewritten(*SKIPPED[reason], attention="fp8")
    done = rewritten(*SKIPPED[reason], attention="auto")
    (row,) = report(done).decisions
    assert reason in row["reason"] and row["recipe"] == "native" and row["gain"] == 1.0


def test_five_dimensions_are_a_larger_batch() -> None:
    model, inputs = odd(lambda q, k, v: _attend(q[None], k[None], v[None])[0])
    done = rewritten(model, inputs, attention="fp8")
    assert error(run(done, model, inputs), model(*inputs).detach()) < TOLERANCE["fp8"]


def test_says_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditc.passes.attention.decide.attention_reason", lambda: "the CPU lacks fma")
    with pytest.raises(PassError, match="the CPU lacks fma"):
        rewritten(*example())
    assert "the CPU lacks fma" in report(rewritten(*example(), attention="auto")).decisions[0]["reason"]


@pytest.mark.usefixtures("has_kernel")
def test_heads_too_wide_for_the_kernel_stay() -> None:
    torch.manual_seed(0)
    model, inputs = Attention(heads=1, width=264).eval(), (torch.randn(1, 4, 264), torch.randn(1, 4, 264))
    with pytest.raises(PassError, match="heads of 264 features, the kernel takes 256"):
        rewritten(model, inputs)


def test_a_table_by_kind(zoo: Any) -> None:
    stats, _ = compiled(zoo["pixart"], attention={"cross": "fp8"})
    rows = attention_rows(stats)
    assert {(row["kind"], row["recipe"]) for row in rows} == {("self", "native"), ("cross", "fp8")}
    assert {row["reason"] for row in rows if row["kind"] == "self"} == {"the plan leaves its kind alone"}


# --- devices and cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "choice", "recipe"),
    [
        (A100, "int8", "int8_fp16"),
        (L40, "int8", "int8_fp8"),
        (H100, "int8", "int8_fp8"),
        (B200, "int8", "int8_fp8"),
        (A100, "fp8", "fp8"),
        (H100, "fp8", "fp8"),
        (H100, "nvfp4", "nvfp4"),
    ],
)
def test_recipe_by_device(kind: DeviceKind, choice: str, recipe: str) -> None:
    done = rewritten(*example(), kind, attention=choice)
    assert report(done).decisions[0]["recipe"] == recipe
    (call,) = done.graph.graph.find_nodes(op="call_function", target=ops.attention_quantized.default)
    assert call.args[3] == recipe


def long_example(length: int, heads: int = 8, features: int = 128) -> tuple[nn.Module, tuple[Any, ...]]:
    model = Attention(heads=heads, width=heads * features).eval().to(torch.bfloat16)
    x = torch.empty(1, length, heads * features, dtype=torch.bfloat16)
    return model, (x, x)


def decided(kind: DeviceKind, length: int, **options: Any) -> Any:
    model, (x, _) = long_example(length)
    capture = capture_export(model.to("meta"), (x.to("meta"), x.to("meta")), check=False)
    done = rewrite(capture, Plan(**{"attention": "auto", **options}), (UseAttention(kind=kind),))
    return report(done).decisions[0]


def test_auto_takes_what_pays_and_is_good_enough() -> None:
    few, many = decided(H100, 256), decided(H100, 16384)
    assert few["recipe"] == "native" and "x as fast" in few["reason"]
    assert many["recipe"] in ("int8_fp8", "fp8") and many["gain"] > 1.3 and many["sqnr"] >= 20
    strict = decided(H100, 16384, error_budget=60.0)
    assert strict["recipe"] == "native" and "less than 60" in strict["reason"]
    assert decided(B200, 16384, error_budget=5.0)["recipe"] == "nvfp4"


def test_auto_without_a_cost_table_stays_native() -> None:
    row = decided(A100, 16384)
    assert row["recipe"] == "native" and "no cost table for 'NVIDIA A100" in row["reason"]


def test_explicit_choices_are_obeyed_with_a_remark() -> None:
    row = decided(H100, 256, attention="fp8")
    assert row["recipe"] == "fp8" and row["gain"] < 1 and "no gain in time is expected" in row["reason"]
    emulated = report(rewritten(*example(), attention="nvfp4")).decisions[0]
    assert "computed by its reference here" in emulated["reason"] and emulated["gain"] is None
    assert decided(A100, 256, attention="fp8")["gain"] is None, "there is no table of this device"


# --- models ----------------------------------------------------------------------------------------------------------


def attention_rows(stats: Any) -> list[Any]:
    passes = [item for program in stats.programs for item in program.passes]
    return [row for item in passes if item.name == UseAttention.name for row in item.decisions]


def compiled(built: Any, lower: str = "eager", fullgraph: bool = True, **plan: Any) -> tuple[Any, float]:
    """Statistics of a model of the zoo, compiled and called twice, and its error."""
    model, args, kwargs = built()
    module = ditc.compile(model, {"lower": lower, **plan}, fullgraph=fullgraph)
    with torch.no_grad():
        want = model(*args, **kwargs)
        module(*args, **kwargs)
        got = module(*args, **kwargs)
    want, got = (y[0] if isinstance(y, tuple) else getattr(y, "sample", y) for y in (want, got))
    return ditc.stats(module), error(got, want)


MODELS = {
    "mmdit": {"joint"},
    "flux": {"joint"},
    "qwenimage": {"joint"},
    "pixart": {"self", "cross"},
    "lumina_next": {"self", "cross"},
    "allegro": {"self", "cross"},
    "latte": {"self", "cross"},
    "explicit_dit": {"self"},
    "einsum_dit": {"self"},
    "mha_weights_dit": {"self"},
}
"""Joint attention, masks, padded keys, shared heads, factorised video, and attention by hand; and its kinds."""


@pytest.mark.usefixtures("has_kernel")
@pytest.mark.parametrize("name", MODELS)
def test_models(zoo: Any, name: str) -> None:
    stats, found = compiled(zoo[name], attention="int8")
    rows = attention_rows(stats)
    assert {row["recipe"] for row in rows} == {"int8"} and {row["kind"] for row in rows} == MODELS[name]
    assert 0 < found < TOLERANCE["int8"]


@pytest.mark.parametrize("choice", ["fp8", "nvfp4"])
@pytest.mark.parametrize("name", ["mmdit", "explicit_dit", "lumina_next"])
def test_models_by_the_reference(zoo: Any, name: str, choice: str) -> None:
    stats, found = compiled(zoo[name], attention=choice)
    assert {row["recipe"] for row in attention_rows(stats)} == {choice}
    assert 0 < found < TOLERANCE[choice]


@pytest.mark.usefixtures("has_kernel")
def test_linear_attention_stays_beside_others(zoo: Any) -> None:
    stats, found = compiled(zoo["sana"], attention="int8")
    recipes = {(row["kind"], row["recipe"]) for row in attention_rows(stats)}
    assert recipes == {("self", "native"), ("cross", "int8")} and found < TOLERANCE["int8"]


@pytest.mark.usefixtures("has_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [{"quantize": "int8"}, {"attention_sparse": 0.2}])
def test_through_inductor(make_dit: Any, dit_inputs: Any, dtype: torch.dtype, plan: dict[str, Any]) -> None:
    model, inputs = make_dit(width=32).to(dtype), dit_inputs(dtype=dtype)
    module = ditc.compile(model, {"attention": "int8", **plan}, fullgraph=True)
    with torch.inference_mode():
        assert 0 < error(module(*inputs), model(*inputs)) < 2 * TOLERANCE["int8"]
    (program,) = ditc.stats(module).programs
    assert program.untouched is None and {row["recipe"] for row in attention_rows(ditc.stats(module))} == {"int8"}


@pytest.mark.parametrize("choice", ["fp8", "nvfp4"])
def test_references_through_inductor(make_dit: Any, dit_inputs: Any, choice: str) -> None:
    model, inputs = make_dit(width=32), dit_inputs()
    with torch.inference_mode():
        found = error(ditc.compile(model, {"attention": choice}, fullgraph=True)(*inputs), model(*inputs))
    assert 0 < found < TOLERANCE[choice]


@pytest.mark.parametrize("choice", ["int8", "nvfp4"])
@pytest.mark.parametrize("sparse", [0.0, 0.3])
def test_one_graph_serves_other_lengths(choice: str, sparse: float, request: pytest.FixtureRequest) -> None:
    if choice == "int8":
        request.getfixturevalue("has_kernel")
    model, inputs = example(keys=150)
    plan = {"attention": choice, "lower": "eager", "attention_sparse": sparse}
    module = ditc.compile(model, plan, dynamic=True)
    with torch.no_grad():
        # a single block of queries would be a graph of its own
        for length in (136, 200, 271):
            x = torch.randn(2, length, 72)
            assert error(module(x, inputs[1]), model(x, inputs[1])) < TOLERANCE[choice]
    assert len(ditc.stats(module).programs) == 1


def test_a_graph_without_attention_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval()
    module = ditc.compile(model, {"attention": "fp8"})
    with torch.no_grad(), pytest.warns(UserWarning, match="attention was asked for, but there is no attention"):
        module(torch.randn(2, 8))


# --- keys that are skipped -------------------------------------------------------------------------------------------


def clustered(tokens: int = 256, clusters: int = 4) -> tuple[nn.Module, tuple[Any, ...]]:
    """Tokens in runs that resemble each other and attend to their own run: what block maps are for."""
    torch.manual_seed(0)
    model = Attention(heads=2, width=32)
    with torch.no_grad():
        for layer in (model.q, model.k):
            layer.weight.copy_(4 * torch.eye(32))
            layer.bias.zero_()
    means = torch.randn(clusters, 32).repeat_interleave(tokens // clusters, 0)
    x = means + 0.05 * torch.randn(2, tokens, 32)
    return model.eval(), (x, x)


def test_sparse_attention_skips_blocks_and_says_how_many() -> None:
    model, inputs = clustered()
    module = ditc.compile(model, {"attention": "fp8", "attention_sparse": 0.2, "lower": "eager"})
    with torch.no_grad():
        assert error(module(*inputs), model(*inputs)) < TOLERANCE["fp8"]
        (program,) = ditc.stats(module).programs
        (kept,) = program.measured[KEPT].values()
        assert 0.2 < kept < 0.5, "each of four clusters has a block of its own"
        # what has no structure is looked at whole; the measure is the mean over both calls
        noise = torch.randn(2, 256, 32)
        module(noise, noise)
    (program,) = ditc.stats(module).programs
    (mean,) = program.measured[KEPT].values()
    assert math.isclose(mean, (kept + 1) / 2, rel_tol=1e-5)
    assert "attention kept" in program.remarks


def test_sparse_attention_keeps_no_state(make_dit: Any, dit_inputs: Any) -> None:
    """Modules that share a graph, and sessions, have measures and nothing else between them."""
    first, second, inputs = make_dit(seed=0, width=32), make_dit(seed=1, width=32), dit_inputs(size=24)
    plan = {"attention": "fp8", "attention_sparse": 1.0, "lower": "eager"}
    modules = [ditc.compile(model, plan) for model in (first, second)]
    with torch.no_grad(), ditc.session() as session:
        outputs = [module(*inputs) for module in modules]
        assert session.bytes() == 0
    with torch.no_grad(), ditc.session():
        assert torch.equal(modules[0](*inputs), outputs[0])
    one, two = (ditc.stats(module).programs[0] for module in modules)
    assert one.calls == 2 and two.calls == 1 and one.state_bytes_per_branch == 0
    assert set(one.measured[KEPT]) == set(two.measured[KEPT]) == {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("lowering", ["cond", "split"])
def test_sparse_attention_in_a_guarded_region(make_dit: Any, dit_inputs: Any, lowering: str) -> None:
    """A step that is reused looks at no block: what was kept is what the last computed step said."""
    model, inputs = make_dit(width=32), dit_inputs(size=24)
    plan = {"attention": "fp8", "attention_sparse": 1.0, "lower": "eager"}
    cache = {"policy": "teacache", "polynomial": [1.0, 0.0], "lowering": lowering, "threshold": 1e9}
    plain, guarded = ditc.compile(model, plan), ditc.compile(model, {**plan, "cache": cache})
    with torch.no_grad(), ditc.session():
        want = plain(*inputs)
        assert torch.equal(guarded(*inputs), want)
        moved = inputs[0] * 1.1, inputs[1]
        assert not torch.equal(guarded(*moved), plain(*moved))
    (program,) = [program for program in ditc.stats(model).programs if program.guard is not None]
    assert program.guard is not None and [step.hits for step in program.guard.steps] == [(False, False), (True, True)]
    first = next(p for p in ditc.stats(model).programs if p.guard is None)
    assert program.measured[KEPT].keys() == first.measured[KEPT].keys() == {"blocks.0", "blocks.1"}
    assert all(0 < kept <= 1 for kept in program.measured[KEPT].values())


def test_precise_steps_serve_attention(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(width=32), dit_inputs()
    plan = Plan(attention="fp8", attention_sparse=0.5, precise_first=1, lower="eager")
    assert not unquantized(plan).changes_attention and not unquantized(plan).attention_sparse
    module = ditc.compile(model, plan)
    with torch.no_grad(), ditc.session(steps=3):
        want = model(*inputs)
        assert error(module(*inputs), want) < 1e-6
        assert error(module(*inputs), want) > 1e-4
    (program,) = ditc.stats(module).programs
    assert program.calls == 2 and program.precise_calls == 1 and program.measured[KEPT]


@pytest.mark.usefixtures("has_kernel")
def test_a_window_along_frames(zoo: Any) -> None:
    plan = {"attention": "int8", "attention_window": {"self": 1}}
    stats, _ = compiled(zoo["spatial_temporal"], **plan)
    rows = attention_rows(stats)
    assert {row["axis"]: row["window"] for row in rows} == {"height × width": 0, "frames": 1}
    spatial = next(row for row in rows if row["axis"] != "frames")
    assert "no window: it runs over height × width tokens, not along one axis of a grid" in spatial["reason"]
    skips = [skip.reason for program in stats.programs for item in program.passes for skip in item.skipped]
    assert any("no window" in reason for reason in skips)


def test_a_window_is_a_band_of_keys(zoo: Any) -> None:
    """Against the same model whose temporal attention is masked by hand."""
    built = zoo["spatial_temporal"]
    model, args, kwargs = built()
    module = ditc.compile(model, {"attention": "fp8", "attention_window": 1, "lower": "eager"})
    original = F.scaled_dot_product_attention

    def banded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames = q.shape[-2]
        near = (torch.arange(frames)[:, None] - torch.arange(frames)).abs() <= 1
        return original(q, k, v, near if frames == 3 else None)

    with torch.no_grad():
        got, full = module(*args, **kwargs), model(*args, **kwargs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", banded)
            want = model(*args, **kwargs)
    assert error(got, want) < 0.5 * error(full, want) and error(got, want) < TOLERANCE["fp8"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mmdit", "queries and keys of joint attention are not positions along one axis"),
        ("einops_dit", "it runs over full tokens, not along one axis of a grid"),
    ],
)
def test_no_window_elsewhere(zoo: Any, name: str, reason: str) -> None:
    stats, _ = compiled(zoo[name], attention="fp8", attention_window=2)
    rows = attention_rows(stats)
    assert all(row["window"] == 0 and reason in row["reason"] for row in rows)


# --- the report ------------------------------------------------------------------------------------------------------


def test_explain_has_a_row_for_each_fate(zoo: Any) -> None:
    model, args, kwargs = zoo["pixart"]()
    told = ditc.explain(model, args, kwargs, {"attention": {"self": "nvfp4"}, "quantize": "int8"})
    text = str(told)
    assert "attentions" in text and "linears" in text and "nvfp4" in text and "native" in text
    rows = told.to_data()["passes"]
    decisions = next(item["decisions"] for item in rows if item["name"] == UseAttention.name)
    assert {"site", "kind", "axis", "q_len", "head_dim", "recipe", "reason", "sqnr", "gain"} <= set(decisions[0])
    assert len(decisions) == len(told.structure.attentions)


@pytest.mark.parametrize("plan", [{"attention": "fp8"}, {"attention": "nvfp4", "attention_sparse": 0.5}])
def test_graph_is_golden(golden: Any, make_dit: Any, dit_inputs: Any, plan: dict[str, Any]) -> None:
    done = rewrite(capture_export(make_dit(depth=1), dit_inputs()), Plan(**plan))
    golden(f"passes/{'-'.join(f'{k}={v}' for k, v in plan.items())}.txt", graph_text(done.graph))
