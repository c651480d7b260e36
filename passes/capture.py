"""Capture: a Dynamo graph or an exported program becomes one normal form.

Normal form is pre-dispatch functional ATen: ``aten.linear``, ``aten.scaled_dot_product_attention``,
``aten.layer_norm`` and ``aten.rms_norm`` stay single nodes, nothing mutates its inputs, every tensor enters through
a placeholder, and every placeholder carries a :class:`GraphInput` in ``node.meta[INPUT]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from .errors import CaptureError

aten = torch.ops.aten

INPUT = "ditc_input"
"""Key in a placeholder's ``meta`` of its :class:`GraphInput`."""

InputKind = Literal["parameter", "buffer", "data", "size", "packed", "state", "control"]


@dataclass(frozen=True)
class GraphInput:
    """What one placeholder of a captured graph stands for.

    ``name`` is a dotted path for weights (``blocks.0.attn.to_q.weight``) and the argument's name for data
    (``hidden_states``, or ``args_0`` where the caller's wrapper hides it). ``kind`` is ``parameter`` or ``buffer``
    for tensors that the module owns, ``data`` for what comes with each call, ``size`` for a symbolic integer,
    ``packed`` for a tensor derived from weights alone, ``state`` for what a session carries between steps, and
    ``control`` for numbers that the caller may change from step to step, such as thresholds.
    """

    name: str
    kind: InputKind

    @property
    def is_weight(self) -> bool:
        """Whether the tensor stays the same from call to call unless somebody edits the module."""
        return self.kind in ("parameter", "buffer", "packed")


@dataclass(frozen=True)
class Capture:
    """A graph in normal form.

    ``examples`` holds one example (real or fake) per placeholder of ``graph``, in order. ``unsupported`` says why
    the graph must run as it is, or is ``None``.
    """

    graph: fx.GraphModule
    examples: tuple[Any, ...]
    source: Literal["dynamo", "export"]
    unsupported: str | None = None


def graph_inputs(graph: fx.GraphModule) -> list[GraphInput]:
    """The :class:`GraphInput` of every placeholder, in order."""
    return [node.meta[INPUT] for node in graph.graph.find_nodes(op="placeholder")]


_SUBSCRIPT = re.compile(r"\[\s*['\"]?([^'\"\]]+)['\"]?\s*\]")
_NOISE = {"L", "self", "__dict__", "_modules", "_parameters", "_buffers", "_orig_mod", ""}


def dotted_path(source: str) -> str:
    """Turns Dynamo's name of a value into a dotted path.

    ``L['self'].__dict__['_modules']['blocks'].0.attn1`` and ``L['self']._modules['blocks']._modules['0'].attn1``
    both become ``blocks.0.attn1``; ``L['kwargs']['timestep']`` becomes ``timestep``; ``L['args'][0]`` ``args_0``.
    """
    argument = re.fullmatch(r"L\['(?:args)'\]\[(\d+)\]", source)
    if argument:
        return f"args_{argument.group(1)}"
    keyword = re.fullmatch(r"L\['kwargs'\]\['(\w+)'\]", source)
    if keyword:
        return keyword.group(1)
    flat = _SUBSCRIPT.sub(r".\1", source)
    return ".".join(part for part in flat.split(".") if part not in _NOISE)


def capture_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Capture:
    """Brings the graph that Dynamo hands to a backend into normal form.

    Dynamo's own graph is left alone: it is copied before anything is traced, because Dynamo still reads it.

    Args:
        gm: Dynamo's graph; parameters and buffers are placeholders of it.
        example_inputs: one tensor (real or fake) or integer per placeholder.

    Raises:
        CaptureError: the graph cannot be traced to ATen.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = [_dynamo_input(node, example) for node, example in zip(placeholders, example_inputs, strict=True)]
    copy = fx.Graph()
    copy.output(copy.graph_copy(gm.graph, {}))
    module = fx.GraphModule(gm, copy)
    module.meta = {}
    with torch.no_grad():
        graph, mutates = _to_aten(module, example_inputs)
    new_placeholders = graph.graph.find_nodes(op="placeholder")
    if len(new_placeholders) != len(placeholders):
        raise CaptureError(f"tracing changed the number of inputs from {len(placeholders)} to {len(new_placeholders)}")
    for old, new, fact in zip(placeholders, new_placeholders, inputs, strict=True):
        new.meta[INPUT] = fact
        if "tensor_dict" in old.meta:
            new.meta["tensor_dict"] = old.meta["tensor_dict"]
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return _finish(graph, tuple(example_inputs), "dynamo", mutates)


def capture_export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    check: bool = True,
) -> Capture:
    """Captures ``model`` with ``torch.export`` and brings it into the same normal form as Dynamo's graphs.

    Args:
        model: a module in evaluation mode.
        args, kwargs: example inputs of its ``forward``.
        dynamic_shapes: as for :func:`torch.export.export`.
        check: run the exported program on the example inputs and compare it with the module, because an export can
            succeed and still be wrong.

    Raises:
        CaptureError: the model cannot be exported, or the exported program disagrees with the module.
    """
    kwargs = dict(kwargs or {})
    with torch.no_grad():
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            program = program.run_decompositions({})
        except Exception as error:
            raise CaptureError(f"torch.export could not capture {type(model).__name__}: {error}") from error
        if check:
            _compare(program, model, args, kwargs)
    return capture_program(program, (args, kwargs))


def capture_program(program: torch.export.ExportedProgram, example: tuple[tuple[Any, ...], dict[str, Any]]) -> Capture:
    """The normal form of a program that somebody exported (lifted weights become placeholders with their names)."""
    signature = program.graph_signature
    graph = fx.GraphModule(program.graph_module, _copy_graph(program.graph_module.graph))
    parameters, buffers = signature.inputs_to_parameters, signature.inputs_to_buffers
    constants = signature.inputs_to_lifted_tensor_constants
    data = iter(pytree.arg_tree_leaves(*example[0], **example[1]))
    examples: list[Any] = []
    for node in graph.graph.find_nodes(op="placeholder"):
        if node.name in parameters:
            node.meta[INPUT] = GraphInput(parameters[node.name], "parameter")
            examples.append(program.state_dict[parameters[node.name]])
        elif node.name in buffers or node.name in constants:
            name = buffers.get(node.name) or constants[node.name]
            node.meta[INPUT] = GraphInput(name, "buffer")
            examples.append(program.state_dict[name] if name in program.state_dict else program.constants[name])
        else:
            node.meta[INPUT] = GraphInput(_export_data_name(node), "data")
            examples.append(next(data))
    mutates = bool(signature.buffers_to_mutate or signature.user_inputs_to_mutate)
    return _finish(graph, tuple(examples), "export", mutates)


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def _dynamo_input(node: fx.Node, example: Any) -> GraphInput:
    source = getattr(node, "_dynamo_source", None)
    text = source.name if source is not None else node.name
    name = dotted_path(text() if callable(text) else text) or node.name
    if not isinstance(example, torch.Tensor):
        return GraphInput(name, "size")
    if isinstance(example, torch.nn.Parameter) or "_parameters" in str(text):
        return GraphInput(name, "parameter")
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    if static or isinstance(example, torch.nn.Buffer) or "_buffers" in str(text):
        return GraphInput(name, "buffer")
    return GraphInput(name, "data")


def _export_data_name(node: fx.Node) -> str:
    # torch.export calls a placeholder by its argument, prefixed where it comes from a container
    return re.sub(r"^(args|kwargs)_", "", node.name) if node.name.startswith("kwargs_") else node.name


def _to_aten(module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, bool]:
    try:
        traced, signature = aot_export_module(
            module, tuple(example_inputs), trace_joint=False, pre_dispatch=True, decompositions={}
        )
    except Exception as error:
        raise CaptureError(f"the graph could not be traced to ATen: {error}") from error
    assert isinstance(traced, fx.GraphModule)
    mutates = bool(signature.buffers_to_mutate or signature.user_inputs_to_mutate)
    return traced, mutates


def _compare(
    program: torch.export.ExportedProgram, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    run: Callable[..., Any] = program.module()
    expected = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    actual = [t for t in pytree.tree_leaves(run(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    if len(expected) != len(actual):
        raise CaptureError(f"the exported program returns {len(actual)} tensors, the model {len(expected)}")
    for index, (want, got) in enumerate(zip(expected, actual, strict=True)):
        if want.is_floating_point() and not torch.allclose(want, got, rtol=1e-2, atol=1e-3, equal_nan=True):
            worst = (want - got).abs().max().item()
            raise CaptureError(
                f"the exported program disagrees with the model: output {index} differs by {worst:.3g}. "
                "Capture it through torch.compile instead."
            )


def _finish(graph: fx.GraphModule, examples: tuple[Any, ...], source: Any, mutates: bool) -> Capture:
    unsupported = "the graph writes to one of its inputs" if mutates else None
    if any(map(_draws_random_numbers, graph.graph.nodes)):
        unsupported = "the graph draws random numbers: call model.eval() first if this is dropout"
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Capture(graph, examples, source, unsupported)


def _draws_random_numbers(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default):
        return bool(node.args[2] and node.args[1] != 0.0)
    # attention is tagged for its dropout, which is its fifth argument
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    return torch.Tag.nondeterministic_seeded in node.target.tags


def fake_mode_of(graph: fx.GraphModule) -> FakeTensorMode:
    """The fake tensor mode in which the graph was traced.

    Raises:
        CaptureError: no node carries a fake tensor.
    """
    for node in graph.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch._subclasses.FakeTensor):
                return leaf.fake_mode
    raise CaptureError("the graph carries no fake tensors: it was not captured by ditc")
