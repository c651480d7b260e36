"""free_originals: weights are released once packed, and whatever still needs them works or says so."""

from __future__ import annotations

import gc
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditc
from ditc.kernels.errors import WeightError
from ditc.runtime import packing, release
from ditc.runtime.artifact import Piece
from ditc.runtime.weights import WeightCache

INT8 = {"quantize": "int8", "lower": "eager"}
FREE = {**INT8, "free_originals": True}
PACKED = ("to_q", "to_k", "to_v", "to_out", "gate", "up", "down")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, options: dict[str, Any]) -> Any:
    return torch.compile(model, backend="ditc", options=options)


def is_empty(weight: Tensor) -> bool:
    return weight.untyped_storage().nbytes() == 0


def memory(run: nn.Module) -> Any:
    return ditc.stats(run).programs[0].memory


@torch.no_grad()
def reference(model: nn.Module, inputs: Any) -> Tensor:
    """What the same plan gives without releasing anything."""
    result: Tensor = compiled(model, INT8)(*inputs)
    torch._dynamo.reset()
    gc.collect()
    return result


def piece(*inputs: int, output: int = 0, key: str = "", run: Callable[..., Tensor] | None = None) -> Piece:
    def default(*weights: Tensor) -> list[Tensor]:
        return [torch.cat([w.reshape(-1) for w in weights]).to(torch.int8)]

    return Piece(default if run is None else lambda *w: [run(*w)], inputs, (output,), key or f"pack {inputs} {run}")


@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_released_weights_give_the_same_picture_at_every_resolution(make_dit: Any, dit_inputs: Any, lower: str) -> None:
    model = make_dit(depth=1)
    sizes = (8, 6, 10) if lower == "inductor" else (8, 6)
    expected = [reference(model, dit_inputs(size=size)) for size in sizes]
    run = compiled(model, {**FREE, "lower": lower})
    with torch.no_grad():
        for _ in range(2):
            for size, want in zip(sizes, expected, strict=True):
                torch.testing.assert_close(run(*dit_inputs(size=size)), want, rtol=1e-3, atol=1e-4)
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(*dit_inputs(size=8))
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            assert is_empty(parameter) == (name.split(".")[-2] in PACKED), name
    programs = ditc.stats(run).programs
    assert [program.packs for program in programs] == [1] + [0] * (len(programs) - 1), "packed once, shared"
    assert not any(program.unreleased for program in programs)


def test_a_weight_that_the_graph_still_reads_stays(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    with torch.no_grad():
        compiled(model, FREE)(*inputs)
    kept = [n for n, p in model.named_parameters() if not is_empty(p)]
    assert {n.split(".")[0] for n in kept} >= {"patch", "time_in", "time_out", "head"}
    assert "blocks.0.modulation.weight" in kept


def test_numbers_add_up_and_are_shown(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(width=64), dit_inputs()
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    plain = compiled(model, INT8)
    with torch.no_grad():
        plain(*inputs)
        before = memory(plain)
        torch._dynamo.reset()
        del plain
        run = compiled(model, FREE)
        run(*inputs)
    after = memory(run)
    gone = sum(size for name, size in sizes.items() if is_empty(model.get_parameter(name)))
    assert before.released == 0
    assert before.resident == before.packed + before.originals
    assert (after.packed, after.originals) == (before.packed, before.originals)
    assert after.released == gone > 0.9 * after.originals
    assert after.resident == after.packed + after.originals - gone
    assert after.resident < 0.35 * before.originals
    assert after.peak < before.peak
    text = str(ditc.stats(run))
    for word in ("released", "resident", "peak"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 110


def live_bytes() -> int:
    """Bytes of all CPU storages that Python can see."""
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor) and type(item) in (Tensor, nn.Parameter):
            storage = item.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("free", [False, True])
def test_packing_needs_no_more_than_one_layer_beside_what_is_kept(free: bool) -> None:
    layers, N, K = 8, 128, 256
    original, packed = N * K * 4, N * K
    weights = [nn.Parameter(torch.randn(N, K), requires_grad=False) for _ in range(layers)]
    gc.collect()
    base = live_bytes() - layers * original
    seen: list[int] = []

    def pack(w: Tensor) -> Tensor:
        copied = w.clone()
        q = copied.mul_(10).to(torch.int8)
        seen.append(live_bytes() - base)
        return q

    pieces = [piece(i, output=i, key=f"layer {i} {free}", run=pack) for i in range(layers)]
    cache = WeightCache(pieces, True, range(layers) if free else ())
    cache.get(weights, True)
    slack = 64 * 8 * layers * 2  # samples and checksums
    for done, total in enumerate(seen):
        held = (layers - done) * original if free else layers * original
        assert total <= held + done * packed + (original + packed) + slack, done
    found = cache.memory()
    assert found.peak <= max(seen) + slack
    assert found.peak >= max(seen) - slack
    if free:
        assert found.peak <= (layers + 1) * original + packed
        assert live_bytes() - base <= layers * packed + slack
    else:
        assert found.peak >= layers * (original + packed)


def test_a_shared_storage_is_not_released_and_reported(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    down = model.get_submodule("blocks.0.down")
    view = down.weight.detach()[:1]
    expected = reference(model, inputs)
    run = compiled(model, FREE)
    with torch.no_grad():
        assert torch.equal(run(*inputs), expected)
    assert not is_empty(down.weight)
    assert torch.isfinite(view).all()
    (program,) = ditc.stats(run).programs
    assert program.unreleased == {"blocks.0.down.weight": "another tensor shares its storage"}
    assert "1 weights not released: another tensor shares its storage" in program.remarks
    with torch.no_grad():
        down.weight.mul_(-2.0)
        assert not torch.equal(run(*inputs), expected), "what is kept is still watched"


def test_storage_of_a_file_is_not_released(tmp_path: Any) -> None:
    torch.save({"w": torch.ones(4, 4)}, tmp_path / "w.pt")
    weight = torch.load(tmp_path / "w.pt", mmap=True)["w"]
    cache = WeightCache([piece(0, key="file")], True, [0], ["w"])
    cache.get([weight], True)
    assert cache.unreleased() == {"w": "its storage belongs to a file or to another library"}
    assert torch.equal(weight, torch.ones(4, 4))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_new_weights_packs_anew(make_dit: Any, dit_inputs: Any, assign: bool) -> None:
    model, other, inputs = make_dit(depth=1), make_dit(seed=1, depth=1), dit_inputs()
    state = {name: value.clone() for name, value in other.state_dict().items()}
    expected = reference(other, inputs)
    run = compiled(model, FREE)
    with torch.no_grad():
        run(*inputs)
        model.load_state_dict(state, assign=assign)
        del state
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(run(*inputs), expected)
    assert is_empty(model.get_parameter("blocks.0.down.weight")), "the new ones are released too"


def test_loading_what_does_not_fit_leaves_weights_released(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    run = compiled(model, FREE)
    state = {name: torch.ones(3, 3) for name, _ in model.named_parameters()}
    with torch.no_grad():
        expected = run(*inputs)
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(state)
        assert is_empty(model.get_parameter("blocks.0.down.weight"))
        assert torch.equal(run(*inputs), expected)


def test_values_given_through_data_pack_anew(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    values = {name: -p.detach().clone() for name, p in model.named_parameters()}
    run = compiled(model, FREE)
    with torch.no_grad():
        run(*inputs)
        for name, parameter in model.named_parameters():
            parameter.data = values.pop(name)
        got = run(*inputs)
    assert is_empty(model.get_parameter("blocks.0.down.weight"))
    twin = make_dit(depth=1)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.neg_()
    assert torch.equal(got, reference(twin, inputs))


def test_a_part_of_a_fused_layer_alone_is_refused_by_name(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    run = compiled(model, FREE)
    with torch.no_grad():
        run(*inputs)
        block = model.get_submodule("blocks.0")
        block.to_q.weight = nn.Parameter(torch.randn(24, 24))
        with pytest.raises(WeightError, match=r"blocks\.0\.to_k\.weight.*free_originals.*load_state_dict"):
            run(*inputs)
        for linear in (block.to_q, block.to_k, block.to_v):
            linear.load_state_dict({"weight": torch.randn(24, 24), "bias": torch.zeros(24)}, assign=True)
        assert torch.isfinite(run(*inputs)).all()


def test_another_plan_on_released_weights_is_refused(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    before = compiled(model, {"lower": "eager", "fuse": False})
    with torch.no_grad():
        before(*inputs)
        compiled(model, FREE)(*inputs)
        for run in (before, compiled(model, {"lower": "eager"}), compiled(model, {**FREE, "fuse": False})):
            with pytest.raises(WeightError, match="released by free_originals"):
                run(*inputs)


def test_compiling_again_finds_what_was_packed(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    with torch.no_grad():
        expected = compiled(model, FREE)(*inputs)
        torch._dynamo.reset()
        gc.collect()
        assert torch.equal(compiled(model, FREE)(*inputs), expected)


@pytest.mark.parametrize("way", ["call", "save", "pickle", "fill", "to"])
def test_eager_use_of_a_released_module_fails(make_dit: Any, dit_inputs: Any, way: str) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    with torch.no_grad():
        expected = compiled(model, FREE)(*inputs)
        ways: dict[str, Callable[[], object]] = {
            "call": lambda: model(*inputs),
            "save": lambda: torch.save(model.state_dict(), io.BytesIO()),
            "pickle": lambda: torch.save(model, io.BytesIO()),
            "fill": lambda: model.get_parameter("blocks.0.up.weight").fill_(1.0),
            "to": lambda: model.to(torch.bfloat16),
        }
        kind, message = (
            (WeightError, "weight.*: released") if way == "save" else (RuntimeError, "data|storage|released")
        )
        with pytest.raises(kind, match=message):
            ways[way]()
        if way != "to":
            assert torch.equal(compiled(model, FREE)(*inputs), expected), "what is packed is unharmed"


def test_resizing_the_storage_does_not_make_garbage_a_weight() -> None:
    weight = nn.Parameter(torch.arange(12.0), requires_grad=False)
    cache = WeightCache([piece(0, key="resized")], True, [0], ["w"])
    expected = cache.get([weight], True)[0].clone()
    weight.untyped_storage().resize_(48)
    assert torch.equal(cache.get([weight], True)[0], expected)
    other = WeightCache([piece(0, key="something else")], True, [0], ["w"])
    with pytest.raises(WeightError, match="w: released"):
        other.get([weight], True)


def test_an_unhealthy_weight_is_not_lost() -> None:
    good, bad = (nn.Parameter(torch.ones(3, 3), requires_grad=False) for _ in range(2))
    bad[1, 1] = float("nan")
    pieces = [Piece(lambda w: [w.amax()], (i,), (i,), f"amax {i}", ((0, f"layer{i}.weight"),)) for i in range(2)]
    cache = WeightCache(pieces, True, [0, 1], ["a", "b"])
    with pytest.raises(WeightError, match=r"layer1\.weight holds NaN"):
        cache.get([good, bad], True)
    assert is_empty(good)
    assert not is_empty(bad)
    bad[1, 1] = 5.0
    assert [float(x) for x in cache.get([good, bad], True)] == [1.0, 5.0]
    assert is_empty(bad)


def test_an_edit_repacks_its_own_piece_only() -> None:
    weights = [nn.Parameter(torch.ones(3, 3), requires_grad=False) for _ in range(3)]
    ran: list[str] = []

    def run(name: str) -> Callable[[Tensor], Tensor]:
        return lambda w: ran.append(name) or w.sum()  # type: ignore[func-returns-value]

    cache = WeightCache([piece(i, output=i, key=f"sum {i}", run=run(str(i))) for i in range(3)], True)
    cache.get(weights, True)
    weights[1].data.mul_(2)
    assert [float(x) for x in cache.get(weights, True)] == [9, 18, 9]
    assert ran == ["0", "1", "2", "1"]


def test_programs_share_what_is_equal_and_nothing_that_was_edited_between() -> None:
    weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    first, second, third = (WeightCache([piece(0, key="shared")], True) for _ in range(3))
    (packed,) = first.get([weight], True)
    assert second.get([weight], True)[0] is packed
    weight.data[0, 0] = 9.0
    got = third.get([weight], True)[0]
    assert int(got[0]) == 9
    assert (first.packs, second.packs, third.packs) == (1, 0, 1)
    assert first.get([weight], True)[0] is got, "what the third made serves the first"


def test_weights_that_are_gone_leave_nothing_behind() -> None:
    weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    cache = WeightCache([piece(0, key="gone")], True, [0])
    cache.get([weight], True)
    held, gone = len(packing._held), len(release._released)
    del weight, cache
    gc.collect()
    assert len(packing._held) == held - 1
    assert len(release._released) == gone - 1


def test_a_released_weight_that_two_pieces_read_waits_for_both() -> None:
    weight = nn.Parameter(torch.full((2, 2), 3.0), requires_grad=False)
    pieces = [piece(0, output=0, key="first"), piece(0, output=1, key="second", run=lambda w: w * 2)]
    cache = WeightCache(pieces, True, [0])
    a, b = cache.get([weight], True)
    assert a.tolist() == [3] * 4
    assert b.tolist() == [[6.0, 6.0], [6.0, 6.0]]
    assert is_empty(weight)
    assert cache.get([weight], True)[1] is b


def test_what_aliases_a_weight_keeps_it() -> None:
    weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    cache = WeightCache([piece(0, key="alias", run=lambda w: w.t())], True, [0], ["w"])
    assert torch.equal(cache.get([weight], True)[0], torch.ones(2, 2))
    assert cache.unreleased() == {"w": "another tensor shares its storage"}


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "fp8"},
        {"quantize": "nvfp4", "lowrank": 4},
        {"quantize": {"attention": "mxfp8", "mlp": "mxfp4", "*": "none"}, "activations": "none"},
        {"quantize": "int8", "weights": "frozen", "fuse": False},
    ],
    ids=str,
)
def test_every_way_to_quantise_can_release(make_dit: Any, dit_inputs: Any, options: dict[str, Any]) -> None:
    model = make_dit(depth=1, width=64)
    options = {**options, "lower": "eager"}
    inputs = [dit_inputs(size=size) for size in (8, 6)]
    with torch.no_grad():
        expected = [compiled(model, options)(*x) for x in inputs]
        torch._dynamo.reset()
        gc.collect()
        run = compiled(model, {**options, "free_originals": True})
        for _ in range(2):
            for x, want in zip(inputs, expected, strict=True):
                torch.testing.assert_close(run(*x), want, rtol=1e-4, atol=1e-5)
    for name in ("to_q", "to_out", "gate", "down"):
        assert is_empty(model.get_parameter(f"blocks.0.{name}.weight")), name


def test_threads_may_make_the_first_call_together(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    expected = reference(model, inputs)
    run = compiled(model, FREE)
    results: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(run(*inputs) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert all(torch.equal(result, expected) for result in results)
    assert is_empty(model.get_parameter("blocks.0.down.weight"))
