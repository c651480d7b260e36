"""Which formats are taken apart for a compiler, and what inductor makes of them, on CUDA without a CUDA device too."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ditc.kernels import quantize as room
from ditc.kernels.attention import RECIPES, quantize_operands
from ditc.kernels.quantize.lowering import _decompositions, traced
from ditc.passes.attention.use import UseAttention
from ditc.passes.capture import capture_export
from ditc.passes.pipeline import rewrite
from ditc.passes.plan import Plan
from ditc.passes.quantize.tables import DeviceKind

OPS = torch.ops.ditc
BOTH = frozenset({"int8", "fp8"})
Codegen = Callable[..., str]


@pytest.mark.parametrize(
    ("capability", "formats"), [((8, 0), {"int8"}), ((8, 9), BOTH), ((9, 0), BOTH), ((10, 0), BOTH), ((12, 0), BOTH)]
)
def test_fp8_is_taken_apart_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], formats: set[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert traced("cuda") == formats and traced("cpu") == {"int8"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert traced("cuda") == {"int8"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_taken_apart_is_fp8(normal: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, m, s = (normal(2, n, 48, seed=n, dtype=dtype) for n in (7, 1, 1))
    x[0, 3, 5] = torch.nan
    parts = OPS.quantize(x, "fp8")
    calls = {
        "quantize": [(x, "fp8"), (x, "fp8", torch.tensor(0.01))],
        "quantize_weight": [(x[0], "fp8")],
        "norm_quantize": [(x, "layer", 1e-6, None, None, m, s, "fp8")],
        "activation_quantize": [(x, "gelu_tanh", x, "fp8")],
        "dequantize": [(parts, "fp8", dtype)],
    }
    lowered = _decompositions(BOTH)
    for name, arguments in calls.items():
        op = getattr(OPS, name).default
        for each in arguments:
            torch.testing.assert_close(lowered[op](*each), op(*each), rtol=0, atol=0, equal_nan=True)


class _Hopper:
    """What inductor asks a device for."""

    name, major, minor = "", 9, 0
    gcnArchName = ""  # noqa: N815
    multi_processor_count, warp_size, total_memory = 132, 32, 80 << 30
    regs_per_multiprocessor, max_threads_per_multi_processor = 65536, 2048


@contextlib.contextmanager
def _pretend() -> Iterator[None]:
    """Inductor believes to have a Hopper: private, as of torch 2.13."""
    from torch._dynamo.device_interface import caching_worker_device_properties as properties
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils._triton import has_triton, has_triton_package

    known = DeviceProperties(
        type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, warp_size=32,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for target, value in (
            ("torch.cuda.is_available", lambda: True),
            ("torch.cuda.current_device", lambda: 0),
            ("torch.cuda.get_device_properties", lambda *_: _Hopper),
            ("torch.cuda.get_device_capability", lambda *_: (9, 0)),
            ("torch.utils._triton.triton_hash_with_backend", lambda: "none"),
        ):
            stack.enter_context(mock.patch(target, value))
        # what was found out about this machine before, or is now about the other, is remembered
        for remembers in (has_triton, has_triton_package):
            remembers.cache_clear()
            stack.callback(remembers.cache_clear)
        stack.enter_context(mock.patch.object(DeviceProperties, "create", lambda _: known))
        stack.enter_context(mock.patch.dict(properties, {"cuda": [_Hopper]}))
        yield


@pytest.fixture
def codegen() -> Codegen:
    """``codegen(function, *inputs)``: the program that inductor writes for CUDA, with both formats taken apart."""
    if not torch.__version__.startswith("2.13."):
        pytest.skip("written for the inductor of torch 2.13")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton: pip install 'ditc[triton]'")

    def written(function: Callable[..., Any], *inputs: Tensor) -> str:
        from torch._inductor.debug import DebugContext
        from torch._inductor.graph import GraphLowering
        from torch._inductor.virtualized import V

        table = {**select_decomp_table(), **_decompositions(BOTH)}
        graph = make_fx(function, decomposition_table=table, tracing_mode="fake")(*inputs)
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        with FakeTensorMode() as fake:
            there = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") for x in inputs]
        FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*there)
        lowering = GraphLowering(graph, example_inputs=there)
        with _pretend(), V.set_graph_handler(lowering), V.set_fake_mode(fake), DebugContext():
            lowering.run(*there)
            return str(lowering.codegen()[0].value)

    return written


def launches(program: str) -> list[str]:
    """Kernels and ops that a program calls, in order."""
    body = program[program.index("def call(") :]
    found = re.findall(r"(triton_\w+)\.run\(|= (torch\.ops\.\w+\.\w+)\.default\(|(extern_kernels\.\w+)\(", body)
    return ["".join(names) for names in found]


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_norm_modulation_and_quantising_are_one_cuda_kernel(
    codegen: Codegen, normal: Callable[..., Tensor], format: str
) -> None:
    def chain(x: Tensor, m: Tensor, s: Tensor, gate: Tensor, y: Tensor) -> list[Tensor]:
        parts: list[Tensor] = OPS.norm_quantize(x + gate * y, "layer", 1e-6, None, None, m, s, format)
        return parts

    row = [normal(2, 1, 512, seed=i, dtype=torch.bfloat16) for i in range(3)]
    x, y = (normal(2, 100, 512, seed=i, dtype=torch.bfloat16) for i in (4, 5))
    program = codegen(chain, x, row[0], row[1], row[2], y)
    assert len(launches(program)) == 1
    assert ("tl.float8e4nv" in program) == (format == "fp8")


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("rope", [rotated, halves])
def test_norm_rope_and_quantising_are_one_cuda_kernel(
    codegen: Codegen, site_inputs: list[Tensor], rope: Callable[..., Tensor], format: str
) -> None:
    """Where norm and RoPE come before the turn to heads, as models write it or as the pass leaves it."""

    def queries(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        tables = cos.unsqueeze(1), sin.unsqueeze(1)
        q = rope(F.rms_norm(x.unflatten(-1, (4, 64)), (64,), w, 1e-6), *tables)
        parts: list[Tensor] = OPS.quantize(q.transpose(1, 2).float(), format)
        return parts

    q, _, _, *rest = site_inputs
    assert len(launches(codegen(queries, q, *rest))) == 1


def site(recipe: str, heads_first: bool = True) -> Callable[..., Tensor]:
    """Queries, keys and values as projections leave them; norms, RoPE, attention."""

    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (4, 64)) for x in (q, k, v))
        if heads_first:
            q, k = (x.transpose(1, 2) for x in (q, k))
        else:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = (rotated(F.rms_norm(x, (64,), w, 1e-6), cos, sin) for x in (q, k))
        if not heads_first:
            q, k = (x.transpose(1, 2) for x in (q, k))
        v = v.transpose(1, 2)
        parts = quantize_operands(q, k, v, RECIPES[recipe])
        y: Tensor = OPS.attention_quantized(parts.q, parts.k, parts.v, recipe, 0.125, q.dtype, parts.bias)
        return y

    return function


@pytest.fixture
def site_inputs(normal: Callable[..., Tensor]) -> list[Tensor]:
    q, k, v = (normal(2, 256, 256, seed=i, dtype=torch.bfloat16) for i in range(3))
    return [q, k, v, torch.ones(64, dtype=torch.bfloat16), normal(256, 64, seed=3), normal(256, 64, seed=4)]


@pytest.mark.parametrize("recipe", ["int8_fp16", "int8_fp8", "fp8"])
def test_attention_reads_what_seven_cuda_kernels_wrote(
    codegen: Codegen, site_inputs: list[Tensor], recipe: str
) -> None:
    """Q up to its codes: 1. K up to RoPE, its mean over tokens and its codes: 3, for the mean needs all of it. V: 3.

    With heads first, as the pass ``sink transposes`` does not leave it, inductor walks norms by tokens and quantises
    by heads, and needs one more.
    """
    for heads_first in (False, True):
        called = launches(codegen(site(recipe, heads_first), *site_inputs))
        assert called[-1] == "torch.ops.ditc.attention_quantized" and len(called) <= 8 + heads_first
        assert all(name.startswith("triton_") for name in called[:-1])


class Model(torch.nn.Module):
    """Projections in one product, norms, RoPE, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(256, 768, dtype=torch.bfloat16)

    def forward(self, x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 64)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k = (rotated(F.rms_norm(part, (64,), w, 1e-6), cos, sin) for part in (q, k))
        return F.scaled_dot_product_attention(q, k, v)


def test_nvfp4_reads_projections_in_its_own_kernels(codegen: Codegen, site_inputs: list[Tensor]) -> None:
    """Norm, RoPE, smoothing and codes of Q: one kernel; of K: two, and the product with Q's means is in the second.

    Beside that the tables take one, once for all attentions, and values one. Without these ops Q, K and the product
    took nine.
    """
    x, _, _, *rest = site_inputs
    capture = capture_export(Model(), (x, *rest))
    done = rewrite(capture, Plan(attention="nvfp4"), (UseAttention(kind=DeviceKind("cuda", "B200", (10, 0))),))
    (product,) = done.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    with done.graph.graph.inserting_before(next(iter(done.graph.graph.nodes))):
        product.replace_all_uses_with(done.graph.graph.placeholder("projected"))
    done.graph.graph.erase_node(product)
    done.graph.recompile()
    projected = torch.zeros(2, 256, 768, dtype=torch.bfloat16)
    called = launches(codegen(lambda *inputs: done.graph(*inputs)[0], projected, *capture.examples))
    ops = [f"torch.ops.ditc.{name}" for name in ("smooth_queries", "smooth_keys", "quantize_kernel")]
    assert sorted(called[:-1]) == sorted(["triton_poi_fused_0", *ops])
    assert called[-1] == "torch.ops.ditc.attention_quantized"
    before = launches(codegen(site("nvfp4", False), *site_inputs))
    assert before.count(ops[2]) == 3 and before.count("extern_kernels.bmm") == 1 and len(before) == 11, before


def test_norm_rope_and_int8_are_one_cpu_kernel(site_inputs: list[Tensor]) -> None:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(graph, inputs, decompositions={**select_decomp_table(), **room.lowerings("cpu")})

    with torch.no_grad():
        _, (program, *others) = run_and_get_code(torch.compile(site("int8_fp16"), backend=backend), *site_inputs)
    assert not others
    body = program[program.index("def call(") :]
    assert len(re.findall(r"^\s*cpp_fused\w*\(", body, re.M)) == 1
    assert set(re.findall(r"= torch\.ops\.(\S+?)\.default\(", body)) == {"ditc.attention_quantized"}
