"""The quantise pass: formats by plan, role and cost; static ranges, low-rank branches, stored weights; neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditc
from ditc.kernels.formats import FORMATS
from ditc.passes.base import PassReport
from ditc.passes.capture import capture_export, graph_inputs
from ditc.passes.errors import PassError, PlanError
from ditc.passes.pipeline import Rewritten, rewrite
from ditc.passes.plan import Plan
from ditc.passes.quantize.calibration import Calibration, LinearRecord, fingerprint_of

aten, ops = torch.ops.aten, torch.ops.ditc
pytestmark = pytest.mark.usefixtures("portable")
TOLERANCE = {"int8": 0.02, "fp8": 0.08, "mxfp8": 0.08, "nvfp4": 0.25, "mxfp4": 0.35}
"""Relative error of two blocks of random weights; a wrong scale or layout is off by more than half."""


def rewritten(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> Rewritten:
    return rewrite(capture_export(model, inputs), Plan(**options))


def run(done: Rewritten, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    facts = [fact for fact in graph_inputs(done.graph) if fact.kind != "packed"]
    data = iter(inputs)
    values = [weights[fact.name] if fact.name in weights else next(data) for fact in facts]
    with torch.no_grad():
        packed = done.prologue.graph(*(values[i] for i in done.prologue.inputs)) if done.prologue else ()
        output: Tensor = done.graph(*values, *packed)[0]
    return output


def count(done: Rewritten, target: Any) -> int:
    return len(done.graph.graph.find_nodes(op="call_function", target=target))


def report(done: Rewritten) -> PassReport:
    return next(item for item in done.reports if item.name == "quantize")


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def block_output(model: nn.Module) -> Any:
    """Makes a model whose output shows what its blocks do: the head of an untrained one hardly does."""
    for block in model.blocks:
        nn.init.normal_(block.modulation.bias, std=1.0)
    return model


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("activations", ["dynamic", "none"])
def test_every_format_runs_and_is_as_near_as_its_bits(
    make_dit: Any, dit_inputs: Any, format: str, activations: str
) -> None:
    model, inputs = block_output(make_dit(width=32)), dit_inputs()
    done = rewritten(model, inputs, quantize=format, activations=activations)
    found = error(run(done, model, inputs), model(*inputs).detach())
    assert 1e-6 < found < TOLERANCE[format]
    linears = count(done, ops.quantized_linear.default), count(done, ops.weight_linear.default)
    assert linears == ((8, 0) if activations == "dynamic" else (0, 8))
    for row in report(done).decisions:
        assert row["reason"] and row["role"]
        if row["format"] != "none":
            assert row["sqnr"] > 10 and row["gain"] > 0


def test_a_table_by_role(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = block_output(make_dit(width=32)), dit_inputs()
    table = {"mlp": "nvfp4", "mlp.down": "fp8", "head": "int8", "attention.out": "none"}
    done = rewritten(model, inputs, quantize=table, fuse=False)
    chosen = {row["role"]: row["format"] for row in report(done).decisions}
    assert chosen["mlp.up"] == chosen["mlp.gate"] == "nvfp4"
    assert chosen["mlp.down"] == "fp8" and chosen["head"] == "int8"
    assert chosen["attention.out"] == chosen["attention.query"] == chosen["modulation"] == "none"
    assert error(run(done, model, inputs), model(*inputs).detach()) < 0.1


def test_auto_takes_the_fastest_within_the_error_budget(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(width=96), dit_inputs()
    chosen = {row["format"] for row in report(rewritten(model, inputs, quantize="auto")).decisions}
    assert chosen == {"int8", "none"}, "on a CPU only INT8 is faster"
    done = rewritten(model, inputs, quantize="auto", error_budget=60.0)
    assert {row["format"] for row in report(done).decisions} == {"none"}
    assert any("less than 60" in row["reason"] for row in report(done).decisions)


class Conditioned(nn.Module):
    """Blocks whose modulation has a weight that does not fit a cache."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(8, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(ConditionedBlock(width) for _ in range(2))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] * torch.exp(-torch.arange(128) / 16.0)
        c = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1)))
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        y: Tensor = self.head(x)
        return y


class ConditionedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, g, d, e, h = self.modulation(c).unsqueeze(1).chunk(6, -1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + a) + b
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + g * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = F.layer_norm(x, x.shape[-1:]) * (1 + d) + e
        return x + h * self.down(F.gelu(self.up(y), approximate="tanh"))


@pytest.mark.parametrize("batch", [1, 8])
def test_a_modulation_of_few_rows_is_read_in_eight_bits(batch: int) -> None:
    torch.manual_seed(0)
    model, inputs = Conditioned().eval(), (torch.randn(batch, 6, 8), torch.full((batch,), 300.0))
    done = rewritten(model, inputs, quantize="int8")
    rows = [row for row in report(done).decisions if row["role"] == "modulation"]
    assert len(rows) == 2
    if batch == 1:
        assert all(row["format"] == "int8" and row["activations"] == "none" and row["gain"] > 1.1 for row in rows)
        assert count(done, ops.weight_linear.default) == 2
    else:
        assert all(row["format"] == "none" and "8 rows" in row["reason"] for row in rows)
    assert error(run(done, model, inputs), model(*inputs).detach()) < 0.02


@pytest.mark.parametrize("quantize", ["auto", "int8"])
def test_what_is_packed_for_good_serves_every_number_of_rows(quantize: str) -> None:
    torch.manual_seed(0)
    model, chosen = Conditioned().eval(), []
    for batch in (1, 8):
        inputs = (torch.randn(batch, 6, 8), torch.full((batch,), 300.0))
        done = rewritten(model, inputs, quantize=quantize, free_originals=True)
        chosen.append([(row["weight"], row["format"], row["activations"]) for row in report(done).decisions])
    assert chosen[0] == chosen[1] and any(format == "int8" for _, format, _ in chosen[0])


def test_neighbours_are_fused_where_nobody_else_reads_between() -> None:
    torch.manual_seed(0)
    model, inputs = Conditioned().eval(), (torch.randn(1, 6, 8), torch.full((1,), 300.0))
    done = rewritten(model, inputs, quantize="int8")
    assert count(done, ops.norm_quantize.default) == 4 and count(done, ops.activation_quantize.default) == 2
    assert count(done, aten.layer_norm.default) == count(done, aten.gelu.default) == 0
    linears = done.graph.graph.find_nodes(op="call_function", target=ops.quantized_linear.default)
    assert sum(node.args[3] is not None and node.args[4] is not None for node in linears) == 4
    norms = done.graph.graph.find_nodes(op="call_function", target=ops.norm_quantize.default)
    assert {node.args[1] for node in norms} == {"layer"}


class Normed(nn.Module):
    """A block whose first norm is called with as few arguments as can be, in one of several ways."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.embed = nn.Linear(4, 32)
        self.weight, self.bias = nn.Parameter(torch.rand(32)), nn.Parameter(torch.randn(32))
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = {
            "layer": lambda: F.layer_norm(x, (32,)),
            "layer, weight": lambda: F.layer_norm(x, (32,), self.weight),
            "layer, weight and bias": lambda: F.layer_norm(x, (32,), self.weight, self.bias),
            "layer, large eps": lambda: F.layer_norm(x, (32,), self.weight, self.bias, 0.5),
            "rms": lambda: F.rms_norm(x, (32,)),
            "rms, weight": lambda: F.rms_norm(x, (32,), self.weight),
            "rms, large eps": lambda: F.rms_norm(x, (32,), self.weight, 0.5),
        }[self.norm]()
        q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        z: Tensor = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return z


@pytest.mark.parametrize(
    "norm",
    ["layer", "layer, weight", "layer, weight and bias", "layer, large eps", "rms", "rms, weight", "rms, large eps"],
)
def test_a_norm_keeps_its_arguments(norm: str) -> None:
    torch.manual_seed(0)
    model, x = Normed(norm).eval(), torch.randn(2, 5, 4)
    done = rewritten(model, (x,), quantize={"attention": "int8", "token": "int8"})
    assert count(done, ops.norm_quantize.default) == 1
    assert error(run(done, model, (x,)), model(x).detach()) < 0.01


class Reads(nn.Module):
    """One block in whose middle somebody else reads what a quantised linear reads or makes."""

    def __init__(self, leak: str) -> None:
        super().__init__()
        self.leak = leak
        self.embed = nn.Linear(4, 32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        y = F.rms_norm(x, (32,))
        q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        o = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + o
        h = F.silu(self.up(F.rms_norm(x, (32,))))
        z = x + self.down(h)
        return z, {"norm": y, "out": o, "activation": h, "nothing": z}[self.leak] * 2


@pytest.mark.parametrize(
    ("leak", "norms", "activations", "epilogues"),
    [("nothing", 2, 1, 2), ("norm", 1, 1, 2), ("out", 2, 1, 1), ("activation", 2, 0, 2)],
)
def test_what_others_read_stays(leak: str, norms: int, activations: int, epilogues: int) -> None:
    torch.manual_seed(0)
    model, x = Reads(leak).eval(), torch.randn(2, 5, 4)
    done = rewritten(model, (x,), quantize={"*": "int8", "attention": "int8", "mlp": "int8"})
    fused = next(item for item in done.reports if item.name == "fuse-neighbours")
    assert fused.rewrites == norms + activations + epilogues
    assert count(done, ops.norm_quantize.default) == norms
    assert count(done, ops.activation_quantize.default) == activations
    expected = model(x)
    weights = dict(model.named_parameters())
    values = [weights.get(fact.name, x) for fact in graph_inputs(done.graph) if fact.kind != "packed"]
    with torch.no_grad():
        assert done.prologue is not None
        outputs = done.graph(*values, *done.prologue.graph(*(values[i] for i in done.prologue.inputs)))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert error(actual, wanted.detach()) < 0.02


def calibration_of(model: nn.Module, amax: float) -> Calibration:
    """What a calibration would say if every input of every linear had channels up to ``amax``, one of them more."""
    records, channels = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            key, K = f"{name}.weight", module.in_features
            records[key] = LinearRecord(
                name=key, role="token", N=module.out_features, K=K, calls=1, rows=8, step_amax=(amax / 2, amax),
                sqnr=dict.fromkeys(FORMATS, (33.0, 31.0)), weight_sqnr=dict.fromkeys(FORMATS, (35.0,)),
            )  # fmt: skip
            channels[key] = torch.full((K,), amax / 4).index_fill(0, torch.tensor([1]), amax)
    return Calibration(type(model).__name__, fingerprint_of(model), {}, (500.0, 0.0), (), records, channels)


@pytest.fixture
def calibrated(make_dit: Any, tmp_path: Path) -> Callable[[float], tuple[nn.Module, str]]:
    def make(amax: float) -> tuple[nn.Module, str]:
        model = block_output(make_dit(width=32))
        path = tmp_path / "ranges.safetensors"
        calibration_of(model, amax).save(path)
        return model, str(path)

    return make


@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4"])
def test_static_ranges_come_from_the_calibration(calibrated: Any, dit_inputs: Any, format: str) -> None:
    (model, path), inputs = calibrated(8.0), dit_inputs()
    done = rewritten(model, inputs, quantize=format, activations="static", calibration=path)
    scales = {node.args[1] for node in done.graph.graph.find_nodes(op="call_function", target=aten.full.default)}
    assert list(scales) == [pytest.approx(8.0 / {"int8": 127, "fp8": 448, "nvfp4": 2688}[format])]
    assert {r["sqnr"] for r in report(done).decisions if r["format"] == format} == {31.0}, "the worst step's"
    expected = model(*inputs).detach()
    fits = error(run(done, model, inputs), expected)
    assert fits < {"int8": 0.15, "fp8": 0.12, "nvfp4": 0.3}[format]
    (model, path) = calibrated(0.05)
    too_small = rewritten(model, inputs, quantize=format, activations="static", calibration=path)
    assert error(run(too_small, model, inputs), expected) > 2 * fits, "values beyond the range saturate"


def test_a_static_range_that_was_never_measured_is_an_error(calibrated: Any, make_dit: Any, dit_inputs: Any) -> None:
    _, path = calibrated(8.0)
    torch.manual_seed(0)
    model, inputs = Conditioned().eval(), (torch.randn(1, 6, 8), torch.full((1,), 300.0))
    with pytest.raises(PassError, match="no linear"):
        rewritten(model, inputs, quantize="int8", activations="static", calibration=path)


def test_a_missing_calibration_is_an_error(make_dit: Any, dit_inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(ditc.DitcError, match="there is no calibration"):
        rewritten(make_dit(), dit_inputs(), quantize="int8", calibration=str(tmp_path / "none"))
    with pytest.raises(PlanError, match="cannot be read"):
        rewritten(make_dit(), dit_inputs(), quantize="int8", cost_table=str(tmp_path / "none"))


def outliers(model: nn.Module) -> nn.Module:
    """Gives every weight a strong part of rank 2, as trained ones have."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and min(module.weight.shape) > 8:
            N, K = module.weight.shape
            with torch.no_grad():
                module.weight += torch.randn(N, 2) @ torch.randn(2, K) * 0.3
    return model


@pytest.mark.parametrize("activations", ["dynamic", "none"])
def test_a_low_rank_branch_takes_what_four_bits_would_lose(make_dit: Any, dit_inputs: Any, activations: str) -> None:
    model, inputs = outliers(block_output(make_dit(width=32))), dit_inputs()
    expected = model(*inputs).detach()
    plain, branch = (
        rewritten(model, inputs, quantize="nvfp4", activations=activations, lowrank=rank) for rank in (0, 8)
    )
    assert count(branch, aten.linear.default) == count(plain, aten.linear.default) + 2 * 8
    assert error(run(branch, model, inputs), expected) < 0.75 * error(run(plain, model, inputs), expected)
    assert "lowrank without a calibration: outlier channels are not smoothed" in report(branch).details


def test_smoothing_with_a_calibration_keeps_the_meaning(calibrated: Any, dit_inputs: Any) -> None:
    (model, path), inputs = calibrated(8.0), dit_inputs()
    done = rewritten(model, inputs, quantize="int8", lowrank=4, calibration=path)
    assert done.prologue is not None
    assert done.prologue.graph.graph.find_nodes(op="call_function", target=ops.smoothing_scale.default)
    assert error(run(done, model, inputs), model(*inputs).detach()) < 0.01
    assert not any("not smoothed" in text for text in report(done).details)


class Stored(nn.Linear):
    """A linear whose weight is stored quantised, as checkpoints bring it."""

    def __init__(self, linear: nn.Linear, format: str) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.format = format
        self.bias = linear.bias
        del self.weight
        for index, part in enumerate(ops.quantize_weight(linear.weight.detach(), format)):
            self.register_buffer(f"part{index}", part)

    def forward(self, x: Tensor) -> Tensor:
        parts = [getattr(self, f"part{index}") for index in range(len(FORMATS[self.format].part_types((1, 32))))]
        return F.linear(x, ops.dequantize(parts, self.format, x.dtype), self.bias)


def store(model: nn.Module, format: str) -> nn.Module:
    for block in model.blocks:
        for name, module in list(block.named_children()):
            if isinstance(module, nn.Linear) and name != "modulation":
                setattr(block, name, Stored(module, format))
    return model


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_stored_weight_is_used_as_it_is(make_dit: Any, dit_inputs: Any, format: str) -> None:
    original, inputs = block_output(make_dit(width=32)), dit_inputs()
    expected = run(rewritten(original, inputs, quantize=format, fuse=False), original, inputs)
    model = store(original, format)
    done = rewritten(model, inputs, quantize=format, fuse=False)
    assert count(done, ops.dequantize.default) == count(done, ops.quantize_weight.default) == 0
    assert done.prologue is None or not done.prologue.graph.graph.find_nodes(
        op="call_function", target=ops.quantize_weight.default
    )
    torch.testing.assert_close(run(done, model, inputs), expected, rtol=0, atol=0)


def test_a_stored_weight_keeps_its_format_or_is_encoded_anew(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = store(block_output(make_dit(width=32)), "nvfp4"), dit_inputs()
    expected = model(*inputs).detach()
    kept = rewritten(model, inputs, quantize="int8")
    assert {row["format"] for row in report(kept).decisions} == {"nvfp4", "none"}
    again = rewritten(model, inputs, quantize="fp8")
    assert {row["format"] for row in report(again).decisions} == {"fp8", "none"}
    assert error(run(again, model, inputs), expected) < 0.05
    plain = rewritten(model, inputs)
    torch.testing.assert_close(run(plain, model, inputs), expected, rtol=1e-5, atol=1e-5)


def test_the_tables_of_a_report_are_readable(make_dit: Any, dit_inputs: Any) -> None:
    text = str(ditc.explain(make_dit(), dit_inputs(), plan={"quantize": "int8"}))
    assert "SQNR dB" in text and "the plan asks for it" in text and "its errors reach every token" in text
