"""What the analysis finds on each model of the zoo: stacks, streams, axes, timestep, attentions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import fx

from ditc.passes.capture import INPUT, Capture, GraphInput
from ditc.passes.structure import FACTS, Role, Structure, analyse

Captured = Callable[..., list[Capture]]


@dataclass(frozen=True)
class Expected:
    """``stacks``: name, depth, streams. ``sites``: kind, axis, way of writing, count."""

    axis: str
    stacks: list[tuple[str, int, int]]
    sites: dict[tuple[str, str, str], int]
    timestep: str = "timestep"
    conditioning: set[str] = field(default_factory=set)
    witness: str = "names and structure"
    others: set[str] = field(default_factory=set)


def _sites(**counts: int) -> dict[tuple[str, str, str], int]:
    return {(kind, "full", "sdpa"): count for kind, count in counts.items()}


TEXT = {"encoder_hidden_states"}
SQUARE, VIDEO = "hidden_states 16 = height 4 × width 4", "hidden_states 48 = frames 3 × height 4 × width 4"

ISSUE = {
    "dit": Expected(SQUARE, [("transformer_blocks", 3, 1)], _sites(self=3), conditioning={"class_labels"}),
    "pixart": Expected(SQUARE, [("transformer_blocks", 3, 1)], _sites(self=3, cross=3), others=TEXT),
    "sd3": Expected(
        SQUARE, [("transformer_blocks", 3, 2)], _sites(joint=3), conditioning={"pooled_projections"}, others=TEXT
    ),
    "flux": Expected(
        "hidden_states 16",
        [("transformer_blocks", 2, 2), ("single_transformer_blocks", 3, 1)],
        _sites(joint=5),
        conditioning={"guidance", "pooled_projections"},
        others=TEXT,
    ),
    "flux2": Expected(
        "hidden_states 16",
        [("transformer_blocks", 2, 2), ("single_transformer_blocks", 3, 1)],
        _sites(joint=5),
        conditioning={"guidance"},
        others=TEXT,
    ),
    "qwenimage": Expected("hidden_states 16", [("transformer_blocks", 3, 2)], _sites(joint=3), others=TEXT),
    "wan": Expected(VIDEO, [("blocks", 3, 1)], _sites(self=3, cross=3), others=TEXT),
    "ltx": Expected("hidden_states 24", [("transformer_blocks", 3, 1)], _sites(self=3, cross=3), others=TEXT),
    "hunyuan_video": Expected(
        VIDEO,
        [
            ("context_embedder.token_refiner.refiner_blocks", 2, 1),
            ("transformer_blocks", 2, 2),
            ("single_transformer_blocks", 3, 1),
        ],
        _sites(self=2, joint=5),
        conditioning={"guidance", "pooled_projections"},
        others=TEXT,
    ),
    "cosmos": Expected(
        "hidden_states 32 = frames 2 × height 4 × width 4",
        [("transformer_blocks", 3, 1)],
        _sites(self=3, cross=3),
        others=TEXT,
    ),
}

GRID = "x 12 = height 3 × width 4"
CLIP = "x 36 = frames 3 × height 3 × width 4"
PLAIN = Expected(GRID, [("blocks", 3, 1)], _sites(self=3), "t", {"y"})
WRITTEN_OUT = Expected(GRID, [("blocks", 3, 1)], {("self", "full", "explicit"): 3}, "t", {"y"})

BY_HAND = {
    **dict.fromkeys(("einops_dit", "mha_dit", "swiglu_dit", "geglu_dit", "parallel_dit", "lora_dit"), PLAIN),
    **dict.fromkeys(("raw_time", "table_time"), PLAIN),
    **dict.fromkeys(("mha_weights_dit", "explicit_dit", "einsum_dit"), WRITTEN_OUT),
    "window_dit": Expected(GRID, [("blocks", 3, 1)], {("self", "width", "sdpa"): 3}, "t", {"y"}),
    "recurrent_dit": Expected(GRID, [("block", 4, 1)], _sites(self=4), "t", {"y"}, witness="structure"),
    "functional_dit": Expected(GRID, [("blocks", 3, 1)], _sites(self=3), "t", witness="structure"),
    "no_numbers": Expected(
        GRID, [("blocks", 3, 1)], _sites(self=3), "t", {"y"}, witness="structure", others={"registers"}
    ),
    "uvit": Expected(GRID, [("down", 2, 1), ("up", 2, 1)], _sites(self=5), "t"),
    "spatial_temporal": Expected(
        CLIP, [("blocks", 2, 1)], {("self", "height × width", "sdpa"): 2, ("self", "frames", "sdpa"): 2}, "t"
    ),
    "interleaved": Expected(
        CLIP,
        [("spatial", 3, 1), ("temporal", 3, 1)],
        {("self", "height × width", "sdpa"): 3, ("self", "frames", "sdpa"): 3},
        "t",
    ),
    "mmdit": Expected("latent 12", [("layers", 3, 2)], _sites(joint=3), "t", others={"others.0"}),
    "three_streams": Expected("latent 12", [("layers", 3, 3)], _sites(joint=3), "t", others={"others.0", "others.1"}),
    "per_token": Expected("x 12", [("blocks", 3, 1)], _sites(self=3)),
    "mixer": Expected(GRID, [("blocks", 3, 1)], {}, "t", {"y"}),
}

MORE = {
    "sana": Expected(
        "hidden_states 64 = height 8 × width 8",
        [("transformer_blocks", 3, 1)],
        {("self", "full", "linear"): 3, ("cross", "full", "sdpa"): 3},
        conditioning={"guidance"},
        others=TEXT,
    ),
    "latte": Expected(
        VIDEO,
        [("transformer_blocks", 3, 1), ("temporal_transformer_blocks", 3, 1)],
        {
            ("self", "height × width", "sdpa"): 3,
            ("cross", "height × width", "sdpa"): 3,
            ("self", "frames", "sdpa"): 3,
        },
        others=TEXT,
    ),
    "sd35": Expected(
        SQUARE,
        [("transformer_blocks", 4, 2)],
        _sites(joint=4, self=2),
        conditioning={"pooled_projections"},
        others=TEXT,
    ),
}
SLOW = {
    "auraflow": Expected(
        SQUARE,
        [("joint_transformer_blocks", 2, 2), ("single_transformer_blocks", 3, 1)],
        _sites(joint=5),
        others={*TEXT, "register_tokens"},
    ),
    "cogvideox": Expected(VIDEO, [("transformer_blocks", 3, 2)], _sites(joint=3), others=TEXT),
    "chroma": Expected(
        "hidden_states 16",
        [("transformer_blocks", 2, 2), ("single_transformer_blocks", 3, 1)],
        _sites(joint=5),
        others=TEXT,
    ),
    "bria": Expected(
        "hidden_states 16",
        [("transformer_blocks", 2, 2), ("single_transformer_blocks", 3, 1)],
        _sites(joint=5),
        others=TEXT,
    ),
    "allegro": Expected(VIDEO, [("transformer_blocks", 3, 1)], _sites(self=3, cross=3), others=TEXT),
    "hunyuan_dit": Expected(
        SQUARE,
        [("blocks", 4, 1)],
        _sites(self=4, cross=5),
        conditioning={"image_meta_size", "style"},
        others={*TEXT, "encoder_hidden_states_t5"},
    ),
    "kandinsky5": Expected(
        "hidden_states 32 = frames 2 × height 4 × width 4",
        [("text_transformer_blocks", 2, 1), ("visual_transformer_blocks", 3, 1)],
        _sites(self=5, cross=3),
        conditioning={"pooled_projections"},
        others=TEXT,
    ),
    "stable_audio": Expected(
        "hidden_states 16",
        [("transformer_blocks", 3, 1)],
        _sites(joint=3, cross=3),
        others={*TEXT, "global_hidden_states"},
    ),
    "skyreels_v2": Expected(VIDEO, [("blocks", 3, 1)], _sites(self=3, cross=3), others=TEXT),
    "ltx2": Expected(
        "hidden_states 24",
        [("transformer_blocks", 2, 2)],
        _sites(self=4, cross=8),
        others={*TEXT, "audio_hidden_states", "audio_encoder_hidden_states"},
    ),
    "cogview4": Expected(
        SQUARE,
        [("transformer_blocks", 3, 2)],
        _sites(joint=3),
        conditioning={"original_size", "target_size", "crop_coords"},
        others=TEXT,
    ),
    "easyanimate": Expected(VIDEO, [("transformer_blocks", 3, 2)], _sites(joint=3), others=TEXT),
    "lumina_next": Expected(SQUARE, [("layers", 3, 1)], _sites(self=3, cross=3), others=TEXT),
    "hunyuan_image": Expected(
        SQUARE,
        [
            ("context_embedder.token_refiner.refiner_blocks", 2, 1),
            ("transformer_blocks", 2, 2),
            ("single_transformer_blocks", 2, 1),
        ],
        _sites(self=2, joint=4),
        others=TEXT,
    ),
    "prx": Expected(SQUARE, [("blocks", 3, 1)], _sites(joint=3), others=TEXT),
}


def _main(captures: list[Capture]) -> Structure:
    """The structure of the capture with the most linears."""
    return max((analyse(capture.graph) for capture in captures), key=lambda structure: len(structure.linears))


def _check(structure: Structure, expected: Expected) -> None:
    assert str(structure.token_axis) == expected.axis
    assert {axis.name for axis in structure.tokens} - {structure.token_axis.name} == expected.others
    assert [(stack.name, stack.depth, len(stack.streams)) for stack in structure.stacks] == expected.stacks
    assert {stack.witness for stack in structure.stacks} == {expected.witness}
    sites = Counter((site.kind, site.axis, site.written) for site in structure.attentions)
    assert sites == expected.sites
    assert structure.timestep is not None and structure.timestep.name == expected.timestep
    assert set(structure.conditioning_inputs) == expected.conditioning


ALL = {**ISSUE, **BY_HAND, **MORE}
PARAMETERS = [*ALL, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", PARAMETERS)
def test_finds_the_structure(name: str, captured: Captured) -> None:
    _check(_main(captured(name)), {**ALL, **SLOW}[name])


@pytest.mark.parametrize("name", PARAMETERS)
def test_blocks_chain(name: str, captured: Captured) -> None:
    """Every stream enters each block, blocks do not overlap, and each block's input comes from the one before."""
    capture = max(captured(name), key=lambda c: len(c.graph.graph.nodes))
    structure = analyse(capture.graph)
    nodes = {node.name: node for node in capture.graph.graph.nodes}
    for stack in structure.stacks:
        seen: set[str] = set()
        for block in stack.blocks:
            assert not seen & set(block.nodes)
            seen |= set(block.nodes)
            assert all(block.inputs), (stack.name, block.index)
            assert not set(block.inputs) & set(block.nodes)
            assert {output for output in block.outputs if output} <= set(block.nodes)
        for before, after in zip(stack.blocks, stack.blocks[1:], strict=False):
            for left, entered in zip(before.outputs, after.inputs, strict=True):
                assert left is not None and entered is not None
                assert _depends(nodes[entered], nodes[left]), (stack.name, after.index)
        assert not set(stack.shared) & seen


def _depends(node: fx.Node, on: fx.Node) -> bool:
    pending, seen = [node], set()
    while pending:
        here = pending.pop()
        if here is on:
            return True
        if here not in seen:
            seen.add(here)
            pending.extend(here.all_input_nodes)
    return False


@pytest.mark.parametrize("name", ["dit", "flux", "wan", "einops_dit", "explicit_dit", "uvit", "mmdit", "recurrent_dit"])
def test_both_routes_agree(name: str, captured: Captured) -> None:
    dynamo, export = (analyse(captured(name, route)[0].graph) for route in ("dynamo", "export"))
    assert _facts(dynamo) == _facts(export)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ISSUE if n not in ("dit", "flux", "wan")])
def test_both_routes_agree_on_the_other_models(name: str, captured: Captured) -> None:
    dynamo, export = (analyse(captured(name, route)[0].graph) for route in ("dynamo", "export"))
    assert _facts(dynamo) == _facts(export)


def _facts(structure: Structure) -> dict[str, Any]:
    """What must not depend on how a graph was captured: all but node names (and how containers are spelt)."""

    def spelt(text: object) -> str:
        return str(text).replace("others_0", "others.0")

    return {
        "tokens": [spelt(axis) for axis in structure.tokens],
        "stacks": [
            (s.name, s.depth, spelt(s.streams), s.witness, [tuple(o is None for o in b.outputs) for b in s.blocks])
            for s in structure.stacks
        ],
        "linears": Counter((w.name, w.role, w.M, w.N, w.K, w.bias, w.stack, w.block) for w in structure.linears),
        "attentions": [
            (a.name, a.kind, a.axis, a.heads, a.kv_heads, a.q_len, a.kv_len, a.mask, a.q_norm, a.rope, a.block)
            for a in structure.attentions
        ],
        "timestep": structure.timestep.name if structure.timestep else None,
        "conditioning": set(structure.conditioning_inputs),
    }


@pytest.mark.parametrize("name", ["einops_dit", "mmdit", "sd3", "spatial_temporal"])
def test_symbolic_sizes_change_nothing(name: str, captured: Captured) -> None:
    fixed, dynamic = (_main(captured(name, dynamic=dynamic)) for dynamic in (False, True))
    assert _facts(fixed) == _facts(dynamic)


@pytest.mark.parametrize("name", ["flux", "hunyuan_video", "einops_dit", "explicit_dit", "recurrent_dit"])
def test_canonical_graphs_say_the_same(name: str, captured: Captured) -> None:
    from ditc.passes.pipeline import rewrite
    from ditc.passes.plan import Plan

    capture = captured(name)[0]
    copy = Capture(_copy(capture.graph), capture.examples, capture.source)
    assert _facts(rewrite(copy, Plan(), passes=()).structure) == _facts(analyse(capture.graph))


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copy = fx.GraphModule(module, graph)
    for node in copy.graph.nodes:
        node.meta = dict(node.meta)
    return copy


def _nameless(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which no module, weight or argument has a name that says anything."""
    copy = _copy(module)
    for number, node in enumerate(copy.graph.nodes):
        node.meta.pop("nn_module_stack", None)
        fact = node.meta.get(INPUT)
        if fact is not None:
            node.meta[INPUT] = GraphInput(f"in_{number}", fact.kind)
    return copy


UNALIKE = {
    "sd35": "its last blocks differ",
    "uvit": "it counts the middle block in",
    "interleaved": "they are one stack",
}


@pytest.mark.parametrize("name", [*ISSUE, *(n for n in BY_HAND if n not in ("spatial_temporal", *UNALIKE)), "sana"])
def test_structure_alone_finds_the_same(name: str, captured: Captured) -> None:
    """Without any name: the same roles, the same timestep, and stacks of the same depth and streams."""
    graph = captured(name)[0].graph
    named, nameless = analyse(graph), analyse(_nameless(graph))
    assert [w.role for w in nameless.linears] == [w.role for w in named.linears]
    assert [(s.depth, len(s.streams)) for s in nameless.stacks] == [(s.depth, len(s.streams)) for s in named.stacks]
    assert {s.witness for s in nameless.stacks} == {"structure"}
    assert named.timestep is not None and nameless.timestep is not None
    assert nameless.timestep.node == named.timestep.node


def test_a_broken_graph_is_reported_not_raised(captured: Captured) -> None:
    captures = captured("broken")
    assert len(captures) > 1
    structures = [analyse(capture.graph) for capture in captures]
    attending = [s for s in structures if s.attentions]
    assert attending
    for structure in attending:
        assert any("No timestep" in note for note in structure.notes)
        assert {w.role for w in structure.linears} >= {Role.QKV, Role.OUT, Role.MLP_UP, Role.MLP_DOWN}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lumina2", "omnigen", "mochi", "hidream", "z_image", "wan_vace", "wan_i2v"])
def test_models_that_break_or_differ_are_analysed_all_the_same(name: str, captured: Captured) -> None:
    """Most of these come in several graphs: nothing fails, and no linear behind an input is left without a role."""
    for capture in captured(name):
        structure = analyse(capture.graph)
        assert all(linear.role is not Role.UNKNOWN for linear in structure.linears)
        assert structure.timestep is not None or any("No timestep" in note for note in structure.notes)


def test_a_network_without_tokens_says_so(captured: Captured) -> None:
    structure = _main(captured("convnet"))
    assert structure.token_axis is None and not structure.stacks and structure.timestep is None
    assert {note.split(":")[0] for note in structure.notes} == {"No token axis", "No stack", "No timestep"}


def test_a_guidance_that_looks_like_the_timestep_is_told_apart_by_name(captured: Captured) -> None:
    timestep = analyse(captured("flux")[0].graph).timestep
    assert timestep is not None
    assert timestep.evidence.endswith("`guidance` looks the same, the argument's name decides")


def test_properties_of_attentions(captured: Captured) -> None:
    flux = analyse(captured("flux")[0].graph).attentions[0]
    assert (flux.heads, flux.head_dim, flux.q_len, flux.q_norm, flux.k_norm, flux.rope) == (
        2,
        16,
        23,
        "rms",
        "rms",
        True,
    )
    assert flux.query_tokens == ("encoder_hidden_states", "hidden_states") and flux.mask is None
    pixart = {site.kind: site for site in analyse(captured("pixart")[0].graph).attentions}
    assert pixart["cross"].mask == "additive" and pixart["self"].mask is None and not pixart["self"].rope
    explicit = analyse(captured("explicit_dit")[0].graph).attentions[0]
    assert (explicit.kv_heads, explicit.heads, explicit.mask, explicit.q_norm, explicit.rope) == (
        1,
        2,
        "additive",
        "rms",
        True,
    )
    einsum = analyse(captured("einsum_dit")[0].graph).attentions[0]
    assert (einsum.layout, einsum.heads, einsum.mask) == ("BLHD", 2, "bool")
    packed = analyse(captured("mha_weights_dit")[0].graph).attentions[0]
    assert (packed.layout, packed.heads, packed.batch) == ("(BH)LD", 2, 2)


def test_a_last_block_without_its_second_stream(captured: Captured) -> None:
    blocks = analyse(captured("sd3")[0].graph).stacks[0].blocks
    assert [output is None for output in blocks[-1].outputs] == [False, True]
    assert all(output is not None for block in blocks[:-1] for output in block.outputs)


@pytest.mark.slow
def test_a_long_skip_within_a_stack(captured: Captured) -> None:
    stack = analyse(captured("hunyuan_dit")[0].graph).stacks[0]
    assert [(skip.source, skip.target) for skip in stack.long_skips] == [(0, 3)]


def test_nodes_carry_the_facts(captured: Captured) -> None:
    graph = captured("sd3")[0].graph
    structure = analyse(graph)
    facts = {node.name: node.meta[FACTS] for node in graph.graph.nodes}
    for linear in structure.linears:
        assert (facts[linear.node].role, facts[linear.node].stack, facts[linear.node].block) == (
            linear.role,
            linear.stack,
            linear.block,
        )
        no_tokens = linear.role in (Role.MODULATION, Role.TIMESTEP, Role.CONDITIONING)
        assert facts[linear.node].conditioning == no_tokens
        assert ("tokens" in facts[linear.node].axes) != no_tokens
    for site in structure.attentions:
        assert facts[site.node].attention == "joint"
        assert facts[site.node].axes == ("batch", "features", "tokens", "features")
