"""The runner: what it verifies, dumps, bisects and reports."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from ditc.passes.base import PassContext, PassReport, Skip
from ditc.passes.canonicalize import Canonicalize
from ditc.passes.capture import INPUT, Capture, GraphInput, capture_export
from ditc.passes.errors import PassError
from ditc.passes.pipeline import passes_for, rewrite
from ditc.passes.plan import Plan
from ditc.passes.rewrite import aten, calls
from ditc.passes.verify import graph_text
from ditc.runtime.artifact import Gauge, StateEntry


@pytest.fixture
def capture(make_dit: Any, dit_inputs: Any) -> Capture:
    return capture_export(make_dit(), dit_inputs())


@dataclass(frozen=True)
class Harmful:
    """A pass that does what the function says, and reports what it is told to."""

    name: ClassVar[str] = "harmful"
    act: Callable[[fx.GraphModule, PassContext], None] = lambda graph, ctx: None
    rewrites: int = 1
    skipped: tuple[Skip, ...] = ()
    requested: bool = False

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        self.act(graph, ctx)
        return PassReport(self.name, self.rewrites, self.skipped, self.requested)


def _silu_to_inplace(graph: fx.GraphModule, ctx: PassContext) -> None:
    for node in calls(graph, aten.silu.default):
        node.target = aten.silu_.default


def _other_output(graph: fx.GraphModule, ctx: PassContext) -> None:
    output = graph.graph.output_node()
    (value,) = output.all_input_nodes
    with graph.graph.inserting_before(output):
        output.args = ((graph.graph.call_function(aten.to.dtype, (value, torch.float16)),),)


def _drop_input(graph: fx.GraphModule, ctx: PassContext) -> None:
    timestep = graph.graph.find_nodes(op="placeholder")[-1]
    timestep.meta[INPUT] = GraphInput("other", "data")
    _touch(graph, ctx)


def _touch(graph: fx.GraphModule, ctx: PassContext) -> None:
    (node, *_) = calls(graph, aten.silu.default)
    node.target = aten.relu.default


def _undeclared_state(graph: fx.GraphModule, ctx: PassContext) -> None:
    output = graph.graph.output_node()
    output.args = ((*output.args[0], output.args[0][0]),)  # type: ignore[misc, index]


def _wrong_shape(graph: fx.GraphModule, ctx: PassContext) -> None:
    (node, *_) = calls(graph, aten.linear.default)
    node.args = (node.args[0], node.args[2])


def _declare_only(graph: fx.GraphModule, ctx: PassContext) -> None:
    _touch(graph, ctx)
    ctx.declare_state(StateEntry("x", (1,), torch.bool))


def _raise(graph: fx.GraphModule, ctx: PassContext) -> None:
    raise KeyError("a programming error")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Harmful(_silu_to_inplace), "writes to its input"),
        (Harmful(_other_output), "outputs were"),
        (Harmful(_drop_input), "inputs are not what they were"),
        (Harmful(_undeclared_state), "0 state entries are declared, 1 are returned"),
        (Harmful(_wrong_shape), "shapes do not propagate"),
        (Harmful(), "1 rewrites, but the graph did not"),
        (Harmful(_touch, rewrites=0), "0 rewrites, but the graph changed"),
        (Harmful(_raise), "a programming error"),
        (Harmful(_declare_only), "declared is"),
        (
            Harmful(rewrites=0, requested=True, skipped=(Skip("linear", "too odd"),)),
            "could rewrite none of 1 candidates: too odd",
        ),
    ],
)
def test_a_pass_that_breaks_its_contract_is_caught(
    capture: Capture, bad: Harmful, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITC_REPRO", str(tmp_path))
    with pytest.raises(PassError, match=message):
        rewrite(capture, Plan(), (bad,))
    assert Plan.from_toml((tmp_path / "plan.toml").read_text()) == Plan()
    assert "aten.linear" in (tmp_path / "graph.before.txt").read_text()
    assert "harmful" in (tmp_path / "error.txt").read_text() or "Harmful" in (tmp_path / "error.txt").read_text()


def test_requested_passes_need_no_work_where_there_is_none(capture: Capture) -> None:
    reports = rewrite(capture, Plan(), (Harmful(rewrites=0, requested=True),)).reports
    assert [report.rewrites for report in reports[1:]] == [0]


@pytest.mark.usefixtures("portable")
def test_dump_writes_what_changed(capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITC_DUMP", str(tmp_path))
    rewrite(capture, Plan(quantize="int8"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "00.canonicalize.after.py",
        "00.canonicalize.after.txt",
        "00.capture.txt",
        "02.fuse.after.py",
        "02.fuse.after.txt",
        "03.quantize.after.py",
        "03.quantize.after.txt",
        "04.fuse-neighbours.after.py",
        "04.fuse-neighbours.after.txt",
        "06.hoist.after.py",
        "06.hoist.after.txt",
    ]
    assert "quantized_linear" not in (tmp_path / "02.fuse.after.txt").read_text()
    assert "quantized_linear" in (tmp_path / "03.quantize.after.txt").read_text()


def test_pass_limit_bisects(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITC_PASS_LIMIT", "2")
    done = {report.name: report for report in rewrite(capture, Plan(quantize="int8")).reports}
    assert done["fuse"].rewrites
    assert not done["quantize"].rewrites
    assert done["quantize"].skipped[0].reason == "DITC_PASS_LIMIT=2"
    assert done["hoist"].rewrites, "what was marked must still be hoisted"


def test_pass_limit_must_be_a_number(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITC_PASS_LIMIT", "two")
    with pytest.raises(PassError, match="whole number"):
        rewrite(capture, Plan())


@pytest.mark.parametrize("plan", [Plan(), Plan(fuse=False), Plan(quantize="int8"), Plan(quantize="int8", fuse=False)])
def test_every_pass_is_idempotent(make_dit: Any, dit_inputs: Any, plan: Plan) -> None:
    for item in (Canonicalize(), *passes_for(plan)):
        capture = capture_export(make_dit(), dit_inputs())
        once = rewrite(capture, plan, (item,))
        text = graph_text(once.graph)
        again = rewrite(Capture(once.graph, capture.examples, "export"), plan, (item,))
        assert graph_text(again.graph) == text
        assert all(report.rewrites == 0 for report in again.reports if report.name != "hoist")


def test_reports_count_operators(capture: Capture) -> None:
    for report in rewrite(capture, Plan(quantize="int8")).reports:
        assert report.operators_before > 0
        assert report.milliseconds > 0
        if report.name == "canonicalize":
            assert report.operators_after < report.operators_before


def test_state_is_declared_and_carried(capture: Capture) -> None:
    """A pass may add state: one placeholder and one output, both declared."""

    def remember(graph: fx.GraphModule, ctx: PassContext) -> None:
        output = graph.graph.output_node()
        (value,) = output.args[0]  # type: ignore[misc]
        last = graph.graph.find_nodes(op="placeholder")[-1]
        shape = tuple(value.meta["val"].shape)
        with graph.graph.inserting_after(last):
            state = graph.graph.placeholder("previous")
        state.meta = {"val": value.meta["val"], INPUT: GraphInput("previous", "state")}
        ctx.declare_state(StateEntry("previous", shape, torch.float32))
        with graph.graph.inserting_before(output):
            total = graph.graph.call_function(operator.add, (value, state))
            total.target = aten.add.Tensor
        output.args = ((total, value),)

    done = rewrite(capture, Plan(), (Harmful(remember),))
    assert [entry.name for entry in done.state.entries] == ["previous"]
    inputs = capture.examples
    zero = done.state.initial(torch.device("cpu"))
    with torch.no_grad():
        first, state = done.graph(*inputs, *zero)
        second, _ = done.graph(*inputs, state)
    assert torch.equal(first, state)
    assert torch.equal(second, 2 * first)


def _gauge(graph: fx.GraphModule, ctx: PassContext) -> None:
    output = graph.graph.output_node()
    with graph.graph.inserting_before(output):
        mean = graph.graph.call_function(aten.mean.default, (output.args[0][0],))  # type: ignore[index]
        values = graph.graph.call_function(aten.reshape.default, (mean, [1]))
    ctx.declare_gauge(graph, Gauge("mean", ("output",)), values)


def test_gauges_stand_between_outputs_and_state(capture: Capture) -> None:
    def state_then_gauge(graph: fx.GraphModule, ctx: PassContext) -> None:
        (value,) = graph.graph.output_node().args[0]  # type: ignore[misc]
        first = next(iter(graph.graph.nodes))
        with graph.graph.inserting_before(first):
            state = graph.graph.placeholder("before")
        state.meta = {"val": value.meta["val"], INPUT: GraphInput("before", "state")}
        # a state's placeholder stands behind the caller's
        graph.graph.find_nodes(op="placeholder")[-1].append(state)
        ctx.declare_state(StateEntry("before", tuple(value.meta["val"].shape), torch.float32))
        graph.graph.output_node().args = ((value, state),)
        _gauge(graph, ctx)

    done = rewrite(capture, Plan(), (Harmful(state_then_gauge),))
    assert done.gauges == (Gauge("mean", ("output",)),)
    inputs = list(capture.examples)
    (zero,) = done.state.initial(torch.device("cpu"))
    with torch.no_grad():
        output, gauge, state = done.graph(*inputs, zero)
    assert torch.equal(gauge, output.mean().reshape(1)) and torch.equal(state, zero)


def test_an_undeclared_gauge_is_caught(capture: Capture) -> None:
    def act(graph: fx.GraphModule, ctx: PassContext) -> None:
        _gauge(graph, ctx)
        _undeclared_state(graph, ctx)

    with pytest.raises(PassError, match="0 state entries and 1 gauges are declared, 2 are returned"):
        rewrite(capture, Plan(), (Harmful(act),))
