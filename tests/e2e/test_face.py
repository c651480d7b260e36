"""What a user touches first: the import, the backend's name, explain, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ditc
from ditc.cli import app

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 64, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_cheap_and_lazy() -> None:
    heavy = ["torch", "triton", "diffusers", "onnx", "onnxruntime", "modelopt", "matplotlib", "sklearn"]
    loaded = python(f"import sys, ditc; ditc.__version__; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"
    loaded = python(f"import sys, ditc; ditc.compile, ditc.stats; print([m for m in {heavy[2:]} if m in sys.modules])")
    assert loaded == "[]"


def test_every_public_name_is_there() -> None:
    for name in ditc.__all__:
        assert getattr(ditc, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        ditc.optimise  # noqa: B018


def test_the_backend_needs_no_import() -> None:
    code = (
        "import torch; m = torch.nn.Linear(4, 4).eval(); torch.set_grad_enabled(False);"
        "c = torch.compile(m, backend='ditc', options={'lower': 'eager'}); x = torch.randn(2, 4);"
        "print(torch.allclose(c(x), m(x)), 'ditc' in torch.compiler.list_backends())"
    )
    assert python(code) == "True True"


def test_explain_is_data_and_a_table(zoo: Mapping[str, Callable[[], Any]]) -> None:
    model, args, kwargs = zoo["mmdit"]()
    model.train()
    report = ditc.explain(model, args, kwargs, plan={"quantize": "int8"})
    assert model.training, "the model is left as it was"
    (stack,) = report.structure.stacks
    assert (stack.depth, len(stack.streams)) == (len(stack.blocks), 2)
    assert report.structure.timestep is not None
    assert report.structure.token_axis is not None
    for linear in report.structure.linears:
        assert linear.name and linear.role and min(linear.M, linear.N, linear.K) > 0
    done = {report.name: report.rewrites for report in report.passes}
    assert done["quantize"] > 0
    text = str(report)
    for expected in (stack.name, "attention.out", "quantize", "joint"):
        assert expected in text
    assert json.loads(json.dumps(report.to_data()))["plan"]["quantize"] == "int8"


class Twice(torch.nn.Module):
    """A model whose graph breaks between two calls of another one."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        first = self.inner(*args)
        torch._dynamo.graph_break()
        return first, self.inner(*args)


def test_explain_names_graph_breaks(zoo: Mapping[str, Callable[[], Any]]) -> None:
    model, args, _ = zoo["mmdit"]()
    report = ditc.explain(Twice(model).eval(), args)
    assert len(report.graphs) == 2
    assert any("graph break" in note and "test_face.py" in note for note in report.notes)
    assert report.structure.stacks
    model, args, kwargs = zoo["broken"]()
    report = ditc.explain(model, args, kwargs)
    assert any("breaks into 3 graphs" in note for note in report.notes)
    assert any("TORCH_LOGS=graph_breaks" in note for note in report.notes)


def test_explain_says_why_a_plan_cannot_be_carried_out(
    zoo: Mapping[str, Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditc.passes.quantize.decide.supported", lambda *_: "no integer GEMM today")
    model, args, kwargs = zoo["mmdit"]()
    report = ditc.explain(model, args, kwargs, plan={"quantize": "int8"})
    assert any("no integer GEMM today" in note for note in report.notes)
    assert report.structure.stacks, "what was found is shown all the same"


def test_explain_without_inputs_needs_a_configuration() -> None:
    with pytest.raises(ditc.CaptureError, match="pass args or kwargs"):
        ditc.explain(torch.nn.Linear(4, 4))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    pytest.importorskip("diffusers")
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    values = {"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.36.0", **WAN}
    (folder / "config.json").write_text(json.dumps(values))
    (tmp_path / "wan.json").write_text(json.dumps(WAN))
    return folder


def test_command_explains_a_class_and_a_folder(checkpoint: Path) -> None:
    by_class = run("explain", "WanTransformer3DModel", "--config", str(checkpoint.parents[1] / "wan.json"), "--json")
    assert by_class.exit_code == 0, by_class.output
    data = json.loads(by_class.stdout)
    assert [(stack["name"], stack["depth"]) for stack in data["structure"]["stacks"]] == [("blocks", 3)]
    assert [axis["name"] for axis in data["structure"]["token_axis"]["sub_axes"]] == ["frames", "height", "width"]
    for folder in (checkpoint, checkpoint.parent):
        table = run("explain", str(folder), "--set", "quantize=int8")
        assert table.exit_code == 0, table.output
        assert "attention.query" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "WanTransfomer3DModel"), "WanTransformer3DModel"),
        (("explain", "WanTransformer3DModel", "--set", "quantise=int8"), "did you mean 'quantize'"),
        (("explain", "WanTransformer3DModel", "--input", "hidden_states=2xfour"), "wanted is NAME=2x16x64"),
        (("plan", "--set", "quantize=int3"), "'none', 'auto', 'int8'"),
    ],
)
def test_command_refuses_with_what_would_be_right(arguments: tuple[str, ...], message: str) -> None:
    pytest.importorskip("diffusers")
    done = run(*arguments)
    assert done.exit_code != 0
    assert message in str(done.exception) + done.output


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("quantize=int8", {"quantize": "int8"}),
        ("fuse=false", {"fuse": False}),
        ("error_budget=30", {"error_budget": 30.0}),
        ('attention={self = "int8", cross = "fp8"}', {"attention": {"self": "int8", "cross": "fp8"}}),
        ("cost_table=2026-11-21", {"cost_table": "2026-11-21"}),
    ],
)
def test_command_reads_values_of_plans(text: str, plan: dict[str, object]) -> None:
    done = run("plan", "--set", text)
    assert done.exit_code == 0, done.output
    assert ditc.Plan.from_toml(done.stdout) == ditc.Plan(**plan)


def test_command_prints_plans(tmp_path: Path) -> None:
    text = run("plan", "--set", "quantize=int8", "--set", "fuse=false").stdout
    assert ditc.Plan.from_toml(text) == ditc.Plan(quantize="int8", fuse=False)
