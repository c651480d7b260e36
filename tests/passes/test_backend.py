"""torch.compile(model, backend="ditc"): the right answer whatever the caller does, a reason where nothing is done."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditc
from ditc.passes.backend import UntouchedWarning

EAGER = {"lower": "eager"}
INT8 = {"quantize": "int8", "lower": "eager"}


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def compiled(model: nn.Module, options: dict[str, Any], **settings: Any) -> Any:
    return torch.compile(model, backend="ditc", options=options, **settings)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_inference_mode(make_dit: Any, dit_inputs: Any, dtype: torch.dtype, grad_mode: Any) -> None:
    model, inputs = make_dit().to(dtype), dit_inputs(dtype=dtype)
    with grad_mode():
        expected = model(*inputs)
        for options, bound in ((EAGER, 1e-5 if dtype is torch.float32 else 2e-2), (INT8, 2e-2)):
            got = compiled(model, options, fullgraph=True)(*inputs)
            assert got.dtype is dtype
            assert error(got, expected) < bound


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_inductor_and_modes(make_dit: Any, dit_inputs: Any, mode: str | None) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    with torch.no_grad():
        expected = model(*inputs)
        if mode is None:
            assert error(compiled(model, {"quantize": "int8"})(*inputs), expected) < 2e-2
        else:
            assert error(torch.compile(model, backend="ditc", mode=mode)(*inputs), expected) < 1e-5


def test_a_new_timestep_compiles_nothing_and_a_new_resolution_works(make_dit: Any, dit_inputs: Any) -> None:
    model = make_dit()
    run = compiled(model, INT8)
    with torch.no_grad():
        run(*dit_inputs(time=1000.0))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for time in (999.5, 3.0, 0.0):
                assert error(run(*dit_inputs(time=time)), model(*dit_inputs(time=time))) < 2e-2
        for size in (12, 6, 10, 8):
            for batch in (2, 3):
                inputs = dit_inputs(batch=batch, size=size)
                got = run(*inputs)
                assert got.shape == inputs[0].shape
                assert error(got, model(*inputs)) < 2e-2


def test_instances_of_one_class_keep_their_own_weights(make_dit: Any, dit_inputs: Any) -> None:
    models = [make_dit(seed) for seed in range(3)]
    inputs = dit_inputs()
    runs = [compiled(model, INT8) for model in models]
    with torch.no_grad():
        for _ in range(2):
            for model, run in zip(models, runs, strict=True):
                assert error(run(*inputs), model(*inputs)) < 2e-2
    counts = [ditc.stats(run).calls for run in runs]
    assert counts == [2, 2, 2]


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("blocks.0.down.weight").mul_(-3.0)


def _load_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def _fuse_lora(model: nn.Module) -> None:
    weight = model.get_parameter("blocks.1.up.weight")
    weight.data += torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])


def _new_parameter(model: nn.Module) -> None:
    linear = model.get_submodule("blocks.0.down")
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))  # type: ignore[arg-type]


@pytest.mark.parametrize("edit", [_in_place, _load_state_dict, _fuse_lora, _new_parameter])
def test_a_changed_weight_is_noticed(make_dit: Any, dit_inputs: Any, edit: Callable[[nn.Module], None]) -> None:
    model, inputs = make_dit(), dit_inputs()
    run = compiled(model, INT8)
    with torch.no_grad():
        before = model(*inputs)
        assert error(run(*inputs), before) < 2e-2
        edit(model)
        expected = model(*inputs)
        assert error(before, expected) > 5e-2, "the edit must matter for this test to mean something"
        assert error(run(*inputs), expected) < 2e-2


def test_a_copy_and_a_moved_module_run_right(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(), dit_inputs()
    run = compiled(model, INT8)
    with torch.no_grad():
        run(*inputs)
        twin = copy.deepcopy(model)
        twin.get_parameter("head.weight").zero_()
        twin.get_parameter("head.bias").fill_(2.0)
        assert torch.equal(compiled(twin, INT8)(*inputs), twin(*inputs))
        assert error(run(*inputs), model(*inputs)) < 2e-2
        model.to(torch.bfloat16)
        inputs = (inputs[0].bfloat16(), inputs[1])
        assert error(run(*inputs), model(*inputs)) < 3e-2


def test_gradients_pass_through_untouched(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    run = compiled(model, {"quantize": "int8"})
    with pytest.warns(UntouchedWarning, match="gradients are recorded"):
        loss = run(*inputs).square().mean()
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(*inputs).square().mean().backward()
    assert len(got) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert error(run(*inputs), model(*inputs)) < 2e-2, "the same module still compiles for inference"
    reasons = {program.untouched for program in ditc.stats(run).programs}
    assert len(reasons) == 2 and None in reasons


def test_training_mode_keeps_its_dropout(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(dropout=0.5), dit_inputs()
    model.train()
    run = compiled(model, INT8)
    with torch.no_grad(), pytest.warns(UntouchedWarning, match="random"):
        a, b = run(*inputs), run(*inputs)
    assert not torch.equal(a, b), "dropout drops"
    model.eval()
    with torch.no_grad():
        assert error(run(*inputs), model(*inputs)) < 2e-2


def test_unknown_options_are_refused_by_name(make_dit: Any, dit_inputs: Any) -> None:
    with torch.no_grad(), pytest.raises(Exception, match="did you mean 'quantize'"):
        compiled(make_dit(), {"quantise": "int8"})(*dit_inputs())
    with pytest.raises(ditc.PlanError, match="did you mean 'quantize'"):
        ditc.compile(make_dit(), {"quantise": "int8"})
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ditc.compile(lambda x: x)  # type: ignore[arg-type]


def test_fp64_is_refused_with_the_reason(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit().double(), dit_inputs(dtype=torch.float64)
    with torch.no_grad():
        with pytest.raises(Exception, match="float64; float32, bfloat16 or float16 is wanted"):
            compiled(model, INT8)(*inputs)
        torch._dynamo.reset()
        assert error(compiled(model, EAGER)(*inputs), model(*inputs)) < 1e-12


def test_a_model_without_tokens_is_left_alone_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)).eval()
    x = torch.randn(1, 3, 9, 9)
    run = compiled(model, INT8)
    with torch.no_grad(), pytest.warns(UntouchedWarning, match="no linear on a token path"):
        assert error(run(x), model(x)) < 1e-6


def test_integer_and_tensorless_graphs_run() -> None:
    class Integers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 + 1

    with torch.no_grad():
        assert torch.equal(compiled(Integers(), EAGER)(torch.arange(5)), torch.arange(5) * 2 + 1)


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 4, 0, 0)])
def test_empty_inputs_do_what_the_model_does(make_dit: Any, shape: tuple[int, ...]) -> None:
    model = make_dit()
    inputs = torch.randn(shape), torch.full((shape[0],), 5.0)
    with torch.no_grad():
        try:
            expected = model(*inputs)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                compiled(model, INT8)(*inputs)
            return
        with pytest.warns(UntouchedWarning, match="empty"):
            got = compiled(model, INT8)(*inputs)
        assert got.shape == expected.shape


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_weights_and_inputs_never_look_healthy(make_dit: Any, dit_inputs: Any, poison: float) -> None:
    model, inputs = make_dit(), dit_inputs()
    with torch.no_grad():
        model.get_parameter("blocks.0.up.weight")[3, 2] = poison
        run = compiled(model, INT8)
        with pytest.raises(ditc.DitcError, match=r"blocks\.0\.up\.weight.*NaN or infinity"):
            run(*inputs)
        model.get_parameter("blocks.0.up.weight")[3, 2] = 0.0
        assert error(run(*inputs), model(*inputs)) < 2e-2, "a mended weight runs"
        inputs[0][1, 0, 0, 0] = poison
        healthy, broken = run(*inputs)
        assert torch.isfinite(healthy).all()
        assert torch.equal(torch.isfinite(broken), torch.isfinite(model(*inputs)[1]))


def test_graph_breaks_run_right(make_dit: Any, dit_inputs: Any) -> None:
    class Broken(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            y: Tensor = self.inner(x, t)
            torch._dynamo.graph_break()
            return y + self.inner(x * 0.5, t)

    model, inputs = Broken(make_dit()).eval(), dit_inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UntouchedWarning)
        assert error(compiled(model, INT8)(*inputs), model(*inputs)) < 2e-2


def test_a_graph_that_writes_its_input_is_left_alone() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            x.add_(1)
            return F.relu(self.linear(x))

    model = Writes().eval()
    twin = copy.deepcopy(model)
    x, y = torch.ones(2, 4), torch.ones(2, 4)
    with torch.no_grad(), pytest.warns(UntouchedWarning, match="writes to one of its inputs"):
        got = compiled(model, EAGER)(x)
        assert torch.equal(got, twin(y))
    assert torch.equal(x, y)
    assert int(model.seen) == int(twin.seen) == 1  # type: ignore[arg-type]


def test_autocast_is_left_alone(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs)
        with pytest.warns(UntouchedWarning, match="autocast"):
            got = compiled(model, INT8)(*inputs)
    assert got.dtype is expected.dtype
    assert error(got, expected) < 1e-2


def test_threads_share_a_program(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(), dit_inputs()
    run = compiled(model, INT8)
    results: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(run(*inputs) for _ in range(3))

    with torch.no_grad():
        expected = run(*inputs)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert all(torch.equal(result, expected) for result in results)


def test_stats_say_what_ran(make_dit: Any, dit_inputs: Any, portable: None) -> None:
    model, inputs = make_dit(), dit_inputs()
    run = ditc.compile(model, ditc.Plan(quantize="int8", lower="eager"))
    assert ditc.stats(run).programs == ()
    with torch.no_grad():
        run(*inputs)
        run(*inputs)
    (program,) = ditc.stats(run).programs
    assert program.calls == 2
    assert program.untouched is None
    assert program.packs == 1
    linears = [
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "blocks" in name and "modulation" not in name
    ]
    weights = sum(m.weight.numel() + 4 * m.out_features for m in linears)
    biases = sum(4 * m.out_features for name, m in model.named_modules() if name.endswith(("to_q", "to_k", "to_v")))
    assert program.packed_bytes == weights + biases
    rewrites = {report.name: report.rewrites for report in program.passes}
    assert rewrites["fuse"] == 2 * 5
    assert rewrites["quantize"] == 2 * 4
    assert "quantize" in str(ditc.stats(run))
