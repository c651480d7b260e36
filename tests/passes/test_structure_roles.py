"""Every linear's role, against what the models' authors called it. Names are read here, and nowhere in the compiler."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from torch import fx

from ditc.passes.capture import Capture
from ditc.passes.structure import Role, analyse

Captured = Callable[..., list[Capture]]

Q, K, V, QKV, OUT = Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.OUT
TIME, CONDITIONING, MODULATION = Role.TIMESTEP, Role.CONDITIONING, Role.MODULATION

COMMON = [
    (r"attn\d?\.(to_q|add_q_proj)", Q),
    (r"attn\d?\.(to_k|add_k_proj)", K),
    (r"attn\d?\.(to_v|add_v_proj)", V),
    (r"attn\d?\.(to_out\.0|to_add_out)", OUT),
    (r"(ff|ff_context|ffn|img_mlp|txt_mlp)\.net\.0\.proj", Role.MLP_UP),
    (r"(ff|ff_context|ffn|img_mlp|txt_mlp)\.net\.2", Role.MLP_DOWN),
    (r"(timestep_embedder|time_embedder)\.linear_[12]", TIME),
    (r"(text_embedder|guidance_embedder)\.linear_[12]", CONDITIONING),
    (r"norm\d?(_context)?\.linear(_[12])?", MODULATION),
    (r"norm_out\.linear(_[12])?", MODULATION),
    (r"(context_embedder|x_embedder|img_in|txt_in|caption_projection\.linear_[12])", Role.EMBEDDER),
    (r"proj_out", Role.HEAD),
]
"""Fragment of a name and role; the first that matches at the end of a name counts. A model's own come first."""

OWN = {
    "dit": [(r"proj_out_1", MODULATION), (r"proj_out_2", Role.HEAD)],
    "pixart": [(r"adaln_single\.linear", MODULATION)],
    "flux": [
        (r"single_transformer_blocks\.\d+\.proj_mlp", Role.MLP_UP),
        (r"single_transformer_blocks\.\d+\.proj_out", Role.OUT_MLP),
    ],
    "flux2": [
        (r"to_qkv_mlp_proj", Role.QKV_MLP),
        (r"single_transformer_blocks\.\d+\.attn\.to_out", Role.OUT_MLP),
        (r"linear_in", Role.MLP_GATE_UP),
        (r"linear_out", Role.MLP_DOWN),
        (r"(double|single)_stream_modulation(_img|_txt)?\.linear", MODULATION),
    ],
    "qwenimage": [(r"(img|txt)_mod\.1", MODULATION)],
    "wan": [(r"time_proj", MODULATION), (r"condition_embedder\.text_embedder\.linear_[12]", Role.EMBEDDER)],
    "ltx": [(r"time_embed\.linear", MODULATION), (r"proj_in", Role.EMBEDDER)],
    "hunyuan_video": [
        (r"single_transformer_blocks\.\d+\.proj_mlp", Role.MLP_UP),
        (r"single_transformer_blocks\.\d+\.proj_out", Role.OUT_MLP),
        (r"context_embedder\.proj_in", Role.EMBEDDER),
    ],
    # the second linear of this embedder makes shift, scale and gate itself: data flow says so, the name does not
    "cosmos": [
        (r"t_embedder\.linear_1", TIME),
        (r"t_embedder\.linear_2", MODULATION),
        (r"patch_embed\.proj", Role.EMBEDDER),
    ],
    "sd35": [],
    "sd3": [],
    "sana": [(r"time_embed\.linear", MODULATION)],
    "latte": [(r"adaln_single\.linear", MODULATION)],
    "cogvideox": [(r"time_embedding\.linear_[12]", TIME), (r"text_proj", Role.EMBEDDER)],
    "auraflow": [
        (r"time_step_proj\.linear_[12]", TIME),
        (r"(ff|ff_context)\.linear_1", Role.MLP_GATE),
        (r"(ff|ff_context)\.linear_2", Role.MLP_UP),
        (r"out_projection", Role.MLP_DOWN),
        (r"pos_embed\.proj", Role.EMBEDDER),
    ],
    "chroma": [
        (r"single_transformer_blocks\.\d+\.proj_mlp", Role.MLP_UP),
        (r"single_transformer_blocks\.\d+\.proj_out", Role.OUT_MLP),
        (r"distilled_guidance_layer\.(in_proj|layers\.\d+\.linear_[12])", TIME),
        (r"distilled_guidance_layer\.out_proj", MODULATION),
    ],
    "stable_audio": [
        (r"(cross_attention_proj|global_proj)\.[02]", Role.EMBEDDER),
        (r"time_proj|timestep_proj\.[02]", TIME),
        (r"proj_in", Role.EMBEDDER),
        (r"ff\.net\.0\.proj", Role.MLP_GATE_UP),
    ],
}

HAND = [
    (r"time(\.net)?\.[02]", TIME),
    (r"blocks\.\d+\.(spatial|temporal)?.*ada(\.\d)?|(spatial|temporal|layers)\.\d+\.ada(\.\d)?|block\.ada", MODULATION),
    (r"(first|second|third)\.ada", MODULATION),
    (r"qkv(\.(base|a|b|\d))?", QKV),
    (r"attn\.inner\.in_proj", QKV),
    (r"(attn\.proj|attn\.inner\.out_proj|layers\.\d+\.out)(\.(base|a|b|\d))?", OUT),
    (r"(fc1|channels\.fc1)(\.(base|a|b))?", Role.MLP_UP),
    (r"(fc2|channels\.fc2)(\.(base|a|b))?", Role.MLP_DOWN),
    (r"patch|into(\.\d)?", Role.EMBEDDER),
    (r"ada", MODULATION),
    (r"head", Role.HEAD),
]
OWN_HAND = {
    **{name: [] for name in ("einops_dit", "mha_dit", "mha_weights_dit", "recurrent_dit", "no_numbers", "lora_dit")},
    **{name: [] for name in ("spatial_temporal", "interleaved", "mmdit", "three_streams", "per_token", "raw_time")},
    **{name: [] for name in ("table_time", "window_dit")},
    "explicit_dit": [(r"attn\.q", Q), (r"attn\.kv", QKV), (r"attn\.o", OUT)],
    "einsum_dit": [(r"attn\.q", Q), (r"attn\.k", K), (r"attn\.v", V), (r"attn\.o", OUT)],
    "swiglu_dit": [
        (r"attn\.gate", Role.GATE),
        (r"mlp\.w1", Role.MLP_GATE),
        (r"mlp\.w3", Role.MLP_UP),
        (r"mlp\.w2", Role.MLP_DOWN),
    ],
    "geglu_dit": [(r"mlp\.wi", Role.MLP_GATE_UP), (r"mlp\.wo", Role.MLP_DOWN)],
    "parallel_dit": [(r"blocks\.\d\.into", Role.QKV_MLP), (r"blocks\.\d\.out", Role.OUT_MLP)],
    "functional_dit": [
        (r"t[12]", TIME),
        (r"qkv\.\d", QKV),
        (r"proj\.\d", OUT),
        (r"ada\.\d", MODULATION),
        (r"up\.\d", Role.MLP_UP),
        (r"down\.\d", Role.MLP_DOWN),
        (r"out", Role.HEAD),
    ],
    "uvit": [(r"skips\.\d", Role.TOKEN)],
    "mixer": [(r"tokens\.0", Role.MLP_UP), (r"tokens\.2", Role.MLP_DOWN)],
}
SLOW = {"cogvideox", "auraflow", "chroma", "stable_audio"}


def _expected(name: str, rules: list[tuple[str, Role]]) -> Role | None:
    for pattern, role in rules:
        if re.search(rf"(^|\.)({pattern})$", name):
            return role
    return None


def _wrong(capture: Capture, rules: list[tuple[str, Role]]) -> list[tuple[str, Role, Role | None]]:
    structure = analyse(capture.graph)
    said = [(linear.name, linear.role, _expected(linear.name, rules)) for linear in structure.linears]
    assert said
    return [entry for entry in said if entry[1] is not entry[2]]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in OWN])
def test_roles_in_models_of_diffusers(name: str, captured: Captured) -> None:
    assert not _wrong(captured(name)[0], [*OWN[name], *COMMON])


@pytest.mark.parametrize("name", OWN_HAND)
def test_roles_in_models_by_hand(name: str, captured: Captured) -> None:
    assert not _wrong(captured(name)[0], [*OWN_HAND[name], *HAND])


@pytest.mark.parametrize("name", [*OWN, *OWN_HAND])
def test_every_product_with_a_weight_is_counted_once(name: str, captured: Captured) -> None:
    if name in SLOW:
        pytest.skip("counted in the slow tests")
    graph = captured(name)[0].graph
    linears = analyse(graph).linears
    assert len({linear.node for linear in linears}) == len(linears)
    written = {node.name for node in graph.graph.nodes if str(node.target) == "aten.linear.default"}
    assert written <= {linear.node for linear in linears}
    nodes = {node.name: node for node in graph.graph.nodes}
    for linear in linears:
        assert nodes[linear.weight].op == "placeholder"
        assert _numel(nodes[linear.weight]) == linear.N * linear.K
        assert _numel(nodes[linear.node]) == linear.M * linear.N


def _numel(node: fx.Node) -> int:
    return int(node.meta["val"].numel())
