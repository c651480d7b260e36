"""Calibration: it sees what hooks see, names weights as later compilations do, and its file is read strictly."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ditc
from ditc import Calibration, CalibrationError, calibrate
from ditc.kernels.formats import FORMATS, sqnr
from ditc.passes.quantize.calibration import EXACT_DB, HEADER, LinearRecord, fingerprint_of, weight_name
from ditc.passes.rewrite import aten, calls
from ditc.runtime.generate import Guidance, generate
from ditc.runtime.samplers import flow_sigmas

TIMES = (900.0, 500.0, 100.0)
Make = Callable[..., Any]


def trajectory(latent: Tensor, times: tuple[float, ...] = TIMES) -> Callable[[nn.Module], None]:
    """A run of one generation, whose input moves."""

    def run(model: nn.Module) -> None:
        for step, time in enumerate(times):
            model(latent / (1 + step), torch.full((len(latent),), time))

    return run


@contextmanager
def hooked(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The inputs of every linear, call by call, by the weight's name."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(args[0].clone())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def observe_eagerly(model: nn.Module, run: Callable[[nn.Module], None]) -> dict[str, list[Tensor]]:
    with hooked(model) as seen, torch.no_grad():
        run(model)
    return seen


@pytest.fixture
def made(make_dit: Make, dit_inputs: Make) -> tuple[nn.Module, Calibration]:
    model = make_dit()
    return model, calibrate(model, trajectory(dit_inputs()[0]))


def test_ranges_are_those_that_hooks_see(make_dit: Make, dit_inputs: Make) -> None:
    model, run = make_dit(), trajectory(dit_inputs()[0])
    calibration, seen = calibrate(model, run), observe_eagerly(model, run)
    assert calibration.timesteps == TIMES
    assert set(calibration.records) == set(seen)
    for name, inputs in seen.items():
        channels = torch.stack([x.flatten(0, -2).abs().amax(0) for x in inputs])
        record = calibration.records[name]
        torch.testing.assert_close(calibration.channel_amax(name), channels.amax(0))
        torch.testing.assert_close(torch.tensor(record.step_amax), channels.amax(1))
        assert calibration.amax(name) == record.amax == max(record.step_amax)
        assert record.rows == sum(x.flatten(0, -2).shape[0] for x in inputs)
        assert record.calls == len(TIMES)
        assert calibration.drift(name) == pytest.approx(max(record.step_amax) / min(record.step_amax))


def test_errors_are_those_of_the_formats_at_the_worst_step(dit_inputs: Make, make_dit: Make) -> None:
    model, run = make_dit(width=64), trajectory(dit_inputs()[0])
    calibration, seen = calibrate(model, run), observe_eagerly(model, run)
    for name in ("blocks.0.to_q.weight", "blocks.1.down.weight", "time_in.weight"):
        weight = model.get_parameter(name).detach()
        for format in FORMATS.values():
            granularity = "tensor" if format.name == "nvfp4" else "row"
            rounded = format.dequantize(format.quantize(weight, granularity=granularity))
            both, alone = [], []
            for x in seen[name]:
                y = x @ weight.t()
                both.append(sqnr(y, format.dequantize(format.quantize(x)) @ rounded.t()))
                alone.append(sqnr(y, x @ rounded.t()))
            assert calibration.sqnr(name, format.name) == pytest.approx(min(both), abs=0.05)
            assert calibration.sqnr(name, format.name, "none") == pytest.approx(min(alone), abs=0.05)
            assert len(calibration.records[name].sqnr[format.name]) == len(TIMES)


def test_half_precision_is_calibrated_in_its_own_numbers(make_dit: Make, dit_inputs: Make) -> None:
    full = calibrate(make_dit(), trajectory(dit_inputs()[0]))
    model = make_dit().bfloat16()
    half = calibrate(model, trajectory(dit_inputs(dtype=torch.bfloat16)[0]))
    full.check(model)
    for name in full.records:
        assert half.channel_amax(name).dtype == torch.float32
        assert half.amax(name) == pytest.approx(full.amax(name), rel=0.05)
        assert half.sqnr(name, "int8") == pytest.approx(full.sqnr(name, "int8"), abs=2)


def test_samples_of_large_linears_stand_for_all_of_them(make_dit: Make, dit_inputs: Make) -> None:
    model, run = make_dit(width=96, depth=1), trajectory(dit_inputs(batch=3, size=24)[0], (500.0,))
    calibration, seen = calibrate(model, run), observe_eagerly(model, run)
    format = FORMATS["int8"]
    for name in ("blocks.0.modulation.weight", "blocks.0.to_q.weight"):
        x, weight = seen[name][0], model.get_parameter(name).detach()
        y = format.dequantize(format.quantize(x)) @ format.dequantize(format.quantize(weight)).t()
        assert calibration.sqnr(name, "int8") == pytest.approx(sqnr(x @ weight.t(), y), abs=1.0)


def test_formats_that_do_not_fit_have_no_error(made: tuple[nn.Module, Calibration]) -> None:
    _, calibration = made  # 24 features are no multiple of 16 or 32, 48 are one of 16
    assert calibration.sqnr("blocks.0.to_q.weight", "mxfp8") is None
    assert calibration.sqnr("blocks.0.to_q.weight", "nvfp4") is None
    assert calibration.sqnr("blocks.0.down.weight", "nvfp4") is not None
    assert calibration.sqnr("blocks.0.to_q.weight", "int8") is not None


def test_formats_may_be_chosen(make_dit: Make, dit_inputs: Make) -> None:
    calibration = calibrate(make_dit(), trajectory(dit_inputs()[0]), formats=["fp8"])
    assert all(set(record.sqnr) == {"fp8"} for record in calibration.records.values())
    with pytest.raises(ValueError, match="fp9"):
        calibrate(make_dit(), trajectory(dit_inputs()[0]), formats=["fp9"])


def test_a_weight_of_zeros_is_exact(make_dit: Make, dit_inputs: Make) -> None:
    model = make_dit()
    nn.init.zeros_(model.head.weight)
    calibration = calibrate(model, trajectory(dit_inputs()[0]))
    assert calibration.sqnr("head.weight", "int8") == EXACT_DB


def test_generations_meet_step_by_step(make_dit: Make, dit_inputs: Make) -> None:
    model, latent = make_dit(), dit_inputs()[0]

    def twice(compiled: nn.Module) -> None:
        trajectory(latent)(compiled)
        trajectory(3 * latent)(compiled)

    once, both = calibrate(model, trajectory(3 * latent)), calibrate(model, twice)
    assert both.timesteps == TIMES
    name = "blocks.0.to_q.weight"
    assert both.records[name].calls == 2 * len(TIMES)
    assert all(a >= b for a, b in zip(both.records[name].step_amax, once.records[name].step_amax, strict=True))


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_does_not_add_steps(make_dit: Make, batched: bool) -> None:
    model = make_dit()

    def run(compiled: nn.Module) -> None:
        condition = torch.zeros(2, 1)
        generate(
            lambda x, timestep, c: compiled(x + c[:, :, None, None], timestep),
            condition,
            seeds=[1, 2],
            shape=(4, 8, 8),
            sigmas=flow_sigmas(4),
            guidance=Guidance(2.0, condition + 5, batched=batched),
        )

    calibration = calibrate(model, run)
    assert len(calibration.timesteps) == 4
    record = calibration.records["blocks.0.to_q.weight"]
    assert len(record.step_amax) == 4
    assert record.calls == (4 if batched else 8)


def test_branches_that_diffusers_names_do_not_add_steps(zoo: Mapping[str, Callable[[], Any]]) -> None:
    pytest.importorskip("diffusers")
    model, args, kwargs = zoo["flux"]()

    def run(compiled: nn.Module) -> None:
        for time in (0.9, 0.5, 0.1):
            for branch in ("cond", "uncond"):
                with compiled.cache_context(branch):  # type: ignore[operator]
                    compiled(*args, **kwargs | {"timestep": torch.full_like(kwargs["timestep"], time)})

    calibration = calibrate(model, run, formats=["int8"])
    assert [round(time or 0, 3) for time in calibration.timesteps] == [0.9, 0.5, 0.1]
    assert {record.calls for record in calibration.records.values()} == {6}


class BrokenDiT(nn.Module):
    """A transformer whose blocks break the graph, so that Dynamo compiles each block's frame alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        for block in inner.blocks:  # type: ignore[union-attr]
            forward = block.forward

            def broken(x: Tensor, conditioning: Tensor, forward: Any = forward) -> Tensor:
                torch._dynamo.graph_break()
                out: Tensor = forward(x, conditioning)
                return out

            block.forward = broken

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.inner(hidden_states, timestep)
        return out


def test_pieces_between_graph_breaks_know_their_place_in_the_model(make_dit: Make, dit_inputs: Make) -> None:
    model = BrokenDiT(make_dit(depth=3))
    run = trajectory(dit_inputs()[0])
    calibration, seen = calibrate(model, run), observe_eagerly(model, run)
    assert {f"inner.blocks.{i}.to_q.weight" for i in range(3)} <= set(calibration.records)
    assert set(calibration.records) <= set(seen)
    for name in calibration.records:
        wanted = max(float(x.abs().max()) for x in seen[name])
        assert calibration.amax(name) == pytest.approx(wanted, rel=1e-5)


class TwiceDiT(nn.Module):
    """Runs one transformer twice: every linear is called two times a step."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.inner(100 * self.inner(hidden_states, timestep), timestep)
        return out


def test_a_module_called_twice_is_one_linear(make_dit: Make, dit_inputs: Make) -> None:
    model, run = TwiceDiT(make_dit()), trajectory(dit_inputs()[0])
    calibration, seen = calibrate(model, run), observe_eagerly(model, run)
    for name, inputs in seen.items():
        assert calibration.records[name].calls == len(inputs) == 2 * len(TIMES)
        assert calibration.amax(name) == pytest.approx(max(float(x.abs().max()) for x in inputs), rel=1e-4)


def test_a_second_shape_joins_the_same_linears(make_dit: Make, dit_inputs: Make) -> None:
    model = make_dit()

    def run(compiled: nn.Module) -> None:
        for size in (8, 12, 8):
            trajectory(dit_inputs(size=size)[0])(compiled)

    calibration = calibrate(model, run, formats=["int8"])
    assert len(calibration.timesteps) == len(TIMES)
    assert calibration.records["blocks.0.up.weight"].calls == 3 * len(TIMES)


@pytest.mark.parametrize("route", ["dynamo", "export"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_later_captures_find_their_linears(
    name: str, route: str, zoo: Mapping[str, Callable[[], Any]], captured: Callable[..., list[Any]]
) -> None:
    model, args, kwargs = zoo[name]()
    if name not in _CALIBRATED:
        with torch.no_grad():
            model(*args, **kwargs)
        _CALIBRATED[name] = calibrate(model, lambda compiled: compiled(*args, **kwargs))
    calibration = _CALIBRATED[name]
    assert set(calibration.records) <= {n for n, _ in model.named_parameters(remove_duplicate=False)}
    found = [
        weight_name(node.args[1])  # type: ignore[arg-type]
        for capture in captured(name, route)
        for node in calls(capture.graph, aten.linear.default)
    ]
    known = [name for name in found if name is not None and name in calibration]
    assert len(known) >= 0.9 * len(found) > 0
    assert "│" in str(calibration)


_CALIBRATED: dict[str, Calibration] = {}


def test_the_trained_demo_drifts() -> None:
    pytest.importorskip("diffusers")
    from ditc.examples.digits.evaluate import denoiser_of, draw_clips
    from ditc.examples.digits.model import load_transformer

    model = load_transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibration = calibrate(model, lambda m: draw_clips(denoiser_of(m), torch.tensor([3]), [7], steps=4))
    assert len(calibration.timesteps) == 4
    times = [time for time in calibration.timesteps if time is not None]
    assert times == sorted(times, reverse=True) and times[0] == 1000
    calibration.check(model)
    drifts = {name: calibration.drift(name) for name in calibration.records}
    assert all(drift >= 1 for drift in drifts.values()) and max(drifts.values()) > 1.2
    inside = [record for record in calibration.records.values() if record.role.startswith(("attention", "mlp"))]
    assert len(inside) == 4 * 10
    for record in inside:
        int8, fp8, nvfp4 = (calibration.sqnr(record.name, format) for format in ("int8", "fp8", "nvfp4"))
        assert int8 is not None and fp8 is not None and nvfp4 is not None
        assert int8 > 20 and fp8 > 20 and 8 < nvfp4 < min(int8, fp8)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- what it leaves behind -------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(make_dit: Make, dit_inputs: Make) -> None:
    model, (latent, _) = make_dit(), dit_inputs()
    model.train()
    model.blocks[1].eval()
    keys = [set(vars(module)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    kept: list[nn.Module] = []

    def run(compiled: nn.Module) -> None:
        kept.append(compiled)
        assert not model.training
        trajectory(latent)(compiled)

    calibration = calibrate(model, run)
    assert [module.training for module in model.modules()] == modes
    # torch.compile marks every module that it was given so
    assert [set(vars(module)) - {"_is_torch_compile"} for module in model.modules()] == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    # a module that the run kept goes on working, unobserved
    text, timestep = str(calibration), torch.full((2,), 500.0)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(kept[0](latent, timestep), model(latent, timestep))
    assert str(calibration) == text


def test_nothing_keeps_the_model_alive(make_dit: Make, dit_inputs: Make) -> None:
    model = make_dit()
    calibration = calibrate(model, trajectory(dit_inputs()[0]))
    gone = weakref.ref(model.blocks[0].to_q.weight)
    del model
    gc.collect()
    assert gone() is None
    assert "blocks.0.to_q.weight" in calibration


def test_a_compiled_module_stands_for_the_one_behind_it(make_dit: Make, dit_inputs: Make) -> None:
    model, run = make_dit(), trajectory(dit_inputs()[0])
    calibration = calibrate(ditc.compile(model, {"lower": "eager"}), run)
    calibration.check(model)
    assert "blocks.0.to_q.weight" in calibration


def test_a_run_that_fails_restores_the_model(make_dit: Make) -> None:
    model = make_dit().train()

    def run(_: nn.Module) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        calibrate(model, run)
    assert model.training


def test_compiling_afterwards_is_not_disturbed(make_dit: Make, dit_inputs: Make) -> None:
    model, (latent, timestep) = make_dit(), dit_inputs()
    calibrate(model, trajectory(latent))
    compiled = ditc.compile(model, {"lower": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(latent, timestep), model(latent, timestep))
    assert ditc.stats(compiled).calls == 1


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_run_that_does_not_use_its_argument_is_refused(make_dit: Make, dit_inputs: Make) -> None:
    model = make_dit()
    with pytest.raises(CalibrationError, match="never called"):
        calibrate(model, lambda _: trajectory(dit_inputs()[0])(model))


def test_what_diverges_is_refused(make_dit: Make, dit_inputs: Make) -> None:
    model = make_dit()
    with torch.no_grad():
        model.blocks[0].up.weight[3, 4] = math.inf
    with pytest.raises(CalibrationError, match=r"blocks\.0\.down\.weight held NaN or infinity at step 0"):
        calibrate(model, trajectory(dit_inputs()[0]))


def test_nothing_observed_says_why(make_dit: Make, dit_inputs: Make) -> None:
    def run(compiled: nn.Module) -> None:
        with torch.enable_grad():
            trajectory(dit_inputs()[0])(compiled)

    with pytest.raises(CalibrationError, match="gradients are recorded"):
        calibrate(make_dit(), run)


def test_a_model_without_linears_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    with pytest.raises(CalibrationError, match="no linear"):
        calibrate(model, lambda compiled: compiled(torch.ones(1, 1, 8, 8)))


def test_only_modules_are_calibrated() -> None:
    with pytest.raises(TypeError, match="function"):
        calibrate(lambda x: x, lambda compiled: None)  # type: ignore[arg-type]


# --- looking things up -----------------------------------------------------------------------------------------------


def test_static_scales(made: tuple[nn.Module, Calibration]) -> None:
    _, calibration = made
    name = "blocks.0.up.weight"
    amax = calibration.amax(name)
    for format, largest in (("int8", 127), ("fp8", 448), ("nvfp4", 2688)):
        assert calibration.static_scale(name, format) == pytest.approx(amax / largest)
    for format in ("mxfp8", "mxfp4", "none"):
        with pytest.raises(CalibrationError, match="no static scale"):
            calibration.static_scale(name, format)


def test_fused_weights_are_found_by_their_parts(made: tuple[nn.Module, Calibration]) -> None:
    _, calibration = made
    parts = [f"blocks.0.to_{x}.weight" for x in "qkv"]
    joined = " + ".join(parts)
    assert joined in calibration and "blocks.9.to_q.weight" not in calibration
    assert f"{parts[0]} + nothing" not in calibration
    errors = [calibration.sqnr(part, "int8") for part in parts]
    assert calibration.sqnr(joined, "int8") == min(error for error in errors if error is not None)
    assert calibration.amax(joined) == max(calibration.amax(part) for part in parts)
    assert torch.equal(calibration.channel_amax(joined), calibration.channel_amax(parts[0]))
    with pytest.raises(CalibrationError, match="different widths"):
        calibration.channel_amax("blocks.0.to_q.weight + blocks.0.down.weight")


@pytest.mark.parametrize("ask", ["amax", "channel_amax", "drift"])
def test_unknown_linears_are_refused(ask: str, made: tuple[nn.Module, Calibration]) -> None:
    with pytest.raises(CalibrationError, match=r"no linear 'blocks\.9'"):
        getattr(made[1], ask)("blocks.9")


def test_a_range_that_comes_from_zero_drifts_without_bound(made: tuple[nn.Module, Calibration]) -> None:
    _, calibration = made
    record = calibration.records["head.weight"]
    for steps, drift in (((0.0, 1.0), math.inf), ((0.0, 0.0), 1.0), ((2.0, 1.0, 4.0), 4.0)):
        changed = record.model_copy(update={"step_amax": steps})
        other = Calibration("", "", {}, (), (), {"head.weight": changed}, {})
        assert other.drift("head.weight") == drift
        assert other.static_scale("head.weight", "int8") > 0


def test_the_fingerprint_is_of_names_and_shapes(make_dit: Make) -> None:
    model = make_dit()
    mine = fingerprint_of(model)
    assert fingerprint_of(make_dit(seed=5)) == mine
    assert fingerprint_of(make_dit().bfloat16()) == mine
    assert fingerprint_of(make_dit(depth=3)) != mine
    assert fingerprint_of(make_dit(width=32)) != mine


def test_the_text_is_a_table(made: tuple[nn.Module, Calibration]) -> None:
    text = str(made[1])
    assert "calibration of TinyDiT, 19 linears, 3 steps" in text
    assert "blocks.0.to_q" in text and "attention.query" in text and "int8 dB" in text
    assert max(map(len, text.splitlines())) <= 140


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_it_comes_back_as_it_was(made: tuple[nn.Module, Calibration], tmp_path: Path) -> None:
    model, calibration = made
    path = tmp_path / "a.safetensors"
    calibration.save(path)
    again = Calibration.load(path, model)
    for field in ("model", "fingerprint", "versions", "timesteps", "notes", "records"):
        assert getattr(again, field) == getattr(calibration, field)
    assert again.channels.keys() == calibration.channels.keys()
    assert all(torch.equal(again.channels[name], calibration.channels[name]) for name in again.channels)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_another_model_is_refused(made: tuple[nn.Module, Calibration], make_dit: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made[1].save(path)
    with pytest.raises(CalibrationError, match=r"is of a TinyDiT .* calibrate it"):
        Calibration.load(path, make_dit(depth=3))


def test_a_damaged_file_is_refused_wherever_it_ends(made: tuple[nn.Module, Calibration], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made[1].save(path)
    data = path.read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CalibrationError, match="damaged"):
            Calibration.load(path)
    with pytest.raises(CalibrationError, match="there is no calibration"):
        Calibration.load(tmp_path / "none")
    with pytest.raises(CalibrationError, match="damaged"):
        Calibration.load(tmp_path)


def _edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
    edit(header)
    save_file(load_file(path), path, {HEADER: json.dumps(header)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h.update(schema_number=99), "layout 99"),
        (lambda h: h.pop("schema_number"), "layout None"),
        (lambda h: h.update(surprise=1), "surprise"),
        (lambda h: h.pop("fingerprint"), "fingerprint"),
        (lambda h: h["linears"][0].update(K="24"), "K"),
        (lambda h: h["linears"][0].update(N=None), "N"),
        (lambda h: h["linears"][0].update(step_amax=[math.nan]), "step_amax"),
        (lambda h: h["linears"][0].update(step_amax=[]), "step_amax"),
        (lambda h: h["linears"].pop(), "not those of its linears"),
        (lambda h: h["linears"][0].update(K=25), "not those of its linears"),
    ],
)
def test_a_header_that_is_not_ours_is_refused(
    edit: Callable[[dict[str, Any]], object], message: str, made: tuple[nn.Module, Calibration], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    made[1].save(path)
    _edited(path, edit)
    with pytest.raises(CalibrationError, match=message):
        Calibration.load(path)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CalibrationError, match="without a calibration"):
        Calibration.load(path)
    for text in ("[]", "{", "null"):
        save_file({"a": torch.ones(2)}, path, {HEADER: text})
        with pytest.raises(CalibrationError):
            Calibration.load(path)


def test_a_failing_save_leaves_the_old_file(
    made: tuple[nn.Module, Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        made[1].save(path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_records_are_strict() -> None:
    with pytest.raises(ValueError, match="extra"):
        LinearRecord(name="a", role="b", N=1, K=1, calls=1, rows=1, step_amax=(1.0,), sqnr={}, weight_sqnr={}, x=1)  # type: ignore[call-arg]
