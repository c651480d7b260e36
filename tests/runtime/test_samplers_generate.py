"""Generation by manifests: what is drawn, what is refused, what is left behind."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditc.runtime.generate import Cancelled, Guidance, generate
from ditc.runtime.samplers import (
    Sampler,
    SamplerError,
    draw_noise,
    flow_mix,
    flow_sigmas,
    lcm_timesteps,
    make_solver,
    perflow_times,
    published,
    vp_mix,
    walk,
)
from ditc.runtime.session import current_branch, current_session

SHAPE = (2, 4, 4)
VP: dict[str, Any] = {"process": "vp", "timesteps": lcm_timesteps(4), "betas": {}, "timestep_scale": 1.0}
FLOW: dict[str, Any] = {
    "process": "flow",
    "sigmas": (1.0, 0.9, 0.6, 0.3, 0.0),
    "warped": True,
    "timestep_scale": 1000.0,
}
TRIG: dict[str, Any] = {"process": "trigflow", "angles": (1.5708, 1.3, 0.8, 0.4, 0.0), "timestep_scale": 1.0}
KINDS: dict[str, dict[str, Any]] = {
    "euler": {**FLOW, "kind": "euler", "solver": "ode", "prediction": "velocity"},
    "euler-x0": {**FLOW, "kind": "euler", "solver": "ode", "prediction": "x0"},
    "renoise": {**FLOW, "kind": "renoise", "solver": "sde", "prediction": "velocity"},
    "renoise-x0": {**FLOW, "kind": "renoise", "solver": "sde", "prediction": "x0"},
    "renoise-vp": {**VP, "kind": "renoise", "solver": "sde", "prediction": "eps"},
    "renoise-vp-x0": {**VP, "kind": "renoise", "solver": "sde", "prediction": "x0"},
    "lcm": {**VP, "kind": "lcm", "solver": "sde", "prediction": "eps"},
    "lcm-v": {**VP, "kind": "lcm", "solver": "sde", "prediction": "v"},
    "tcd": {**VP, "kind": "tcd", "solver": "sde", "prediction": "eps", "eta": 0.3},
    "tcd-ode": {**VP, "kind": "tcd", "solver": "ode", "prediction": "x0", "eta": 0.0},
    "trigflow": {**TRIG, "kind": "trigflow", "solver": "sde", "prediction": "trigflow", "sigma_data": 0.5},
    "trigflow-ode": {**TRIG, "kind": "trigflow", "solver": "ode", "prediction": "x0", "sigma_data": 0.5},
    "trigflow-flow": {**TRIG, "kind": "trigflow", "solver": "sde", "prediction": "velocity", "sigma_data": 0.5},
    "flow_map": {**FLOW, "kind": "flow_map", "solver": "ode", "prediction": "average_velocity"},
    "perflow": {
        **{**FLOW, "sigmas": perflow_times(4)},
        **{"kind": "perflow", "solver": "ode", "prediction": "velocity", "windows": 4},
    },
    "perflow-vp": {
        **{**VP, "timesteps": (1000, 750, 500, 250, 0)},
        **{"kind": "perflow", "solver": "ode", "prediction": "eps", "windows": 4},
    },
    "perflow-vp-diffusion": {
        **{**VP, "timesteps": (1000, 750, 500, 250, 0)},
        **{"kind": "perflow", "solver": "ode", "prediction": "diff_eps", "windows": 4},
    },
}


def manifest(name: str, **changes: Any) -> Sampler:
    return Sampler(**{"role": "student", "steps": 4, "name": name, **KINDS[name], **changes})


def field(x: Tensor, timestep: Tensor, condition: Tensor, **more: Tensor) -> Tensor:
    """A smooth model that depends on its own sample, the time, the condition and whatever else it is given."""
    extra = sum(more.values(), torch.zeros_like(timestep))
    level = (timestep + 0.5 * extra).view(-1, 1, 1, 1) / 1000
    return torch.tanh(x + 0.3 * x.flip(-1)) * (1 + level) + condition.view(-1, 1, 1, 1)


def draw(sampler: Sampler | None, seeds: list[int], denoiser: Any = field, **more: Any) -> Tensor:
    condition = torch.tensor([float(seed % 97) for seed in seeds]) / 100
    return generate(denoiser, condition, seeds=seeds, shape=SHAPE, sampler=sampler, **more)


@pytest.mark.parametrize("name", KINDS)
def test_generation_is_the_walk_of_the_solver(name: str) -> None:
    sampler = manifest(name)
    solver = make_solver(sampler)
    noise = draw_noise([5, 6], SHAPE)
    fresh = [draw_noise([5, 6], SHAPE, step=step) for step in range(3)] if sampler.solver == "sde" else []
    condition = torch.tensor([0.05, 0.06])
    wanted = walk(solver, lambda x, t, **more: field(x, t, condition, **more), noise, fresh)
    assert torch.equal(draw(sampler, [5, 6]), wanted)


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_two_is_two_batches_of_one(name: str) -> None:
    sampler = manifest(name)
    together = draw(sampler, [5, 2**62])
    assert torch.equal(together, draw(sampler, [5, 2**62]))
    assert torch.equal(together[:1], draw(sampler, [5]))
    assert torch.equal(together[1:], draw(sampler, [2**62]))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4), st.sampled_from(sorted(KINDS)), st.data())
def test_a_sample_does_not_depend_on_its_place(seeds: list[int], name: str, data: Any) -> None:
    order = data.draw(st.permutations(range(len(seeds))))
    forth, shuffled = draw(manifest(name), seeds), draw(manifest(name), [seeds[i] for i in order])
    torch.testing.assert_close(shuffled, forth[list(order)], rtol=1e-5, atol=1e-5)


def true_model(sampler: Sampler, data: Tensor) -> Any:
    """The model that knows the data: its output is the true one wherever the sample lies."""

    def model(x: Tensor, timestep: Tensor, condition: Tensor, target: Tensor | None = None) -> Tensor:
        level = float(timestep[0]) / sampler.timestep_scale
        if sampler.prediction == "x0":
            return data
        if sampler.process == "flow" or sampler.prediction == "velocity":
            return (x - data) / level
        if sampler.process == "trigflow":
            # the model sees x / sigma_data, of data / sigma_data
            clean = data / sampler.sigma_data if sampler.sigma_data else data
            return (math.cos(level) * x - clean) / math.sin(level)
        assert sampler.betas is not None
        bar = sampler.betas.table()[round(level)]
        eps = (x - bar**0.5 * data) / (1 - bar) ** 0.5
        return bar**0.5 * eps - (1 - bar) ** 0.5 * data if sampler.prediction == "v" else eps

    return model


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("perflow-")])
def test_a_model_that_knows_the_data_arrives_there(name: str) -> None:
    sampler = manifest(name)
    data = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    result = draw(sampler, [1, 2], true_model(sampler, data), preview=lambda i, n, x0: seen.append(x0))
    # LCM's scalings and TCD's last level leave their own trace
    tolerance = {"lcm": 1e-3, "lcm-v": 1e-3, "tcd": 0.2, "tcd-ode": 0.2}.get(name, 1e-4)
    torch.testing.assert_close(result, data, rtol=0, atol=tolerance)
    assert len(seen) == 4
    for estimate in seen:
        torch.testing.assert_close(estimate, data, rtol=0, atol=2e-3)


def test_flow_euler_by_manifest_is_flow_euler_by_sigmas() -> None:
    rule = {"warped": False, "shift": 3.0, "sigmas": tuple(flow_sigmas(4).tolist())}
    sampler = manifest("euler", **rule)
    assert torch.equal(draw(sampler, [1, 2]), draw(None, [1, 2], sigmas=flow_sigmas(4, 3.0)))
    assert torch.equal(draw(sampler, [1, 2], sigmas=flow_sigmas(4, 3.0), steps=4), draw(sampler, [1, 2]))
    teacher = manifest("euler", **rule, role="teacher")
    assert torch.equal(draw(teacher, [1], steps=9), draw(None, [1], sigmas=flow_sigmas(9, 3.0)))


def test_the_model_is_given_what_the_manifest_says() -> None:
    seen: list[tuple[float, dict[str, float]]] = []

    def watched(x: Tensor, timestep: Tensor, condition: Tensor, **more: Tensor) -> Tensor:
        assert timestep.dtype == torch.float32
        assert all(value.shape == timestep.shape == (1,) for value in more.values())
        seen.append((float(timestep[0]), {name: float(value[0]) for name, value in more.items()}))
        return torch.zeros_like(x)

    draw(manifest("flow_map"), [1], watched)
    wanted = [(1000, 900), (900, 600), (600, 300), (300, 0)]
    assert seen == [(pytest.approx(t), {"target": pytest.approx(r, abs=1e-3)}) for t, r in wanted]
    seen.clear()
    draw(manifest("lcm"), [1], watched)
    assert [t for t, _ in seen] == list(lcm_timesteps(4)[:-1])
    seen.clear()
    embedded = {"guidance": {"convention": "embedded", "scale": 3.5}}
    draw(manifest("euler", **embedded), [1], watched)
    draw(manifest("euler", **embedded), [1], watched, guidance=Guidance(2.0))
    assert [more for _, more in seen] == [{"guidance": 3.5}] * 4 + [{"guidance": 2.0}] * 4


def test_sana_on_flow_times_is_the_model_on_its_own_units() -> None:
    # the state of TrigFlow is half the latents; what comes out are the latents
    sampler = published("sana-sprint-2step")
    scale = {**sampler.to_dict(), "sigma_data": 1.0}
    torch.testing.assert_close(draw(sampler, [1, 2]), draw(Sampler(**scale), [1, 2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("convention", ["from_unconditional", "from_conditional"])
def test_both_conventions_of_guidance(convention: Any, batched: bool) -> None:
    nothing = torch.tensor([-0.2, -0.3])
    sampler = manifest("euler", guidance={"convention": convention, "scale": 2.0})
    guided = draw(sampler, [1, 2], guidance=Guidance(None, nothing, batched))
    # the same strength in the other convention: w from cond is 1 + w from uncond
    other = {"from_unconditional": "from_conditional", "from_conditional": "from_unconditional"}[convention]
    same = Guidance(1.0 if other == "from_conditional" else 3.0, nothing, batched, other)  # type: ignore[arg-type]
    torch.testing.assert_close(
        guided, draw(None, [1, 2], sigmas=sampler.resolve(), guidance=same), rtol=1e-5, atol=1e-5
    )
    explicit = draw(sampler, [1, 2], guidance=Guidance(2.0, nothing, batched, convention))
    assert torch.equal(guided, explicit)
    off = Guidance({"from_unconditional": 1.0, "from_conditional": 0.0}[convention])
    assert torch.equal(draw(sampler, [1, 2], guidance=off), draw(None, [1, 2], sigmas=sampler.resolve()))


def test_the_guided_output_is_what_the_sampler_sees() -> None:
    # the model gives the condition alone, so x0 = noise - guided
    sampler = manifest("euler", guidance={"convention": "from_conditional", "scale": 3.0})
    constant = lambda x, t, c: c.view(-1, 1, 1, 1).expand_as(x)  # noqa: E731
    result = draw(sampler, [10], constant, guidance=Guidance(None, torch.tensor([0.5])))
    torch.testing.assert_close(result, draw_noise([10], SHAPE) - (0.1 + 3 * (0.1 - 0.5)), rtol=0, atol=1e-5)


def test_guidance_that_contradicts_the_manifest_is_refused() -> None:
    nothing = torch.zeros(1)
    distilled = published("flux-1-schnell")
    with pytest.raises(SamplerError, match=r"FLUX.1-schnell \(student\) has its guidance distilled.*guidance=None"):
        draw(distilled, [1], guidance=Guidance(3.5, nothing))
    # in diffusers' convention, 0 is the unconditional branch and not "off"
    with pytest.raises(SamplerError, match="guidance=None"):
        draw(distilled, [1], guidance=Guidance(0.0, nothing))
    assert torch.equal(draw(distilled, [1]), draw(distilled, [1], guidance=Guidance(1.0, nothing)))
    rule = {"convention": "from_unconditional", "scale": 4.0}
    guided = manifest("euler", guidance=rule)
    with pytest.raises(SamplerError, match=r"pass guidance=Guidance\(4, unconditional\), or scale 1 for none"):
        draw(guided, [1])
    with pytest.raises(SamplerError, match="another strength"):
        draw(guided, [1], guidance=Guidance(4.0, nothing, convention="from_conditional"))
    with pytest.raises(ValueError, match="needs unconditional"):
        draw(guided, [1], guidance=Guidance(4.0))
    embedded = manifest("euler", guidance={"convention": "embedded", "scale": 3.5})
    with pytest.raises(SamplerError, match="another strength"):
        draw(embedded, [1], guidance=Guidance(2.0, nothing, convention="from_unconditional"))
    with pytest.raises(ValueError, match="one branch"):
        draw(embedded, [1], guidance=Guidance(2.0, nothing))
    with pytest.raises(ValueError, match="needs a scale"):
        draw(None, [1], sigmas=flow_sigmas(2), guidance=Guidance(None, nothing))


def test_requests_that_contradict_the_manifest_are_refused() -> None:
    student = manifest("renoise", shape=(2, 4, -1))
    for request, reason in (
        ({"steps": 50}, "in 4 steps, not 50.*sample the teacher"),
        ({"sigmas": flow_sigmas(50)}, "not 50"),
        ({"sigmas": flow_sigmas(4)}, "leave sigmas away"),
        ({"timesteps": 1}, "leave timesteps away"),
        ({"scheduler": object()}, "leave scheduler away"),
    ):
        with pytest.raises(SamplerError, match=reason):
            draw(student, [1], **request)
    with pytest.raises(SamplerError, match="made for samples of shape"):
        generate(field, torch.zeros(1), seeds=[1], shape=(3, 4, 4), sampler=student)
    with pytest.raises(ValueError, match="contradicts the 4 steps"):
        draw(None, [1], sigmas=flow_sigmas(4), steps=5)
    with pytest.raises(ValueError, match="needs sigmas"):
        draw(None, [1])
    with pytest.raises(ValueError, match="of a scheduler"):
        draw(None, [1], sigmas=flow_sigmas(4), scheduler_options={"mu": 1.0})


def test_a_student_that_carries_its_manifest_is_obeyed() -> None:
    class Student:
        sampler = manifest("renoise")

        def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
            return field(x, timestep, condition)

    assert torch.equal(draw(None, [1], Student()), draw(manifest("renoise"), [1]))
    with pytest.raises(SamplerError, match="distilled at the levels"):
        draw(None, [1], Student(), sigmas=flow_sigmas(50, 3.0))
    # a compiled module hands on the attributes of its own
    module = torch.nn.Identity()
    module.sampler = manifest("renoise")  # type: ignore[assignment]
    module.forward = field  # type: ignore[assignment]
    compiled = torch.compile(module, backend="eager")
    assert torch.equal(draw(None, [1], compiled), draw(manifest("renoise"), [1]))
    # an attribute of that name that is something else means nothing
    other = Student()
    other.sampler = "euler"  # type: ignore[assignment]
    assert torch.equal(draw(None, [1], other, sigmas=flow_sigmas(3)), draw(None, [1], sigmas=flow_sigmas(3)))


@pytest.mark.parametrize("way", ["progress", "preview", "raise", "denoiser"])
@pytest.mark.parametrize("name", ["renoise", "tcd", "trigflow"])
def test_a_generation_that_stops_leaves_nothing_behind(name: str, way: str) -> None:
    sampler, told = manifest(name), []

    def progress(done: int, total: int) -> bool:
        told.append((done, total))
        if way == "raise" and done == 2:
            raise Cancelled("by the caller")
        return not (way == "progress" and done == 2)

    def failing(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        if way == "denoiser" and len(told) == 2:
            raise RuntimeError("out of memory")
        return field(x, timestep, condition)

    before, state = draw(sampler, [1, 2]), torch.get_rng_state()
    with pytest.raises(RuntimeError if way == "denoiser" else Cancelled):
        preview = (lambda done, total, x0: done < 2) if way == "preview" else None
        draw(sampler, [1, 2], failing, progress=progress, preview=preview)
    assert told == [(1, 4), (2, 4)]
    assert current_session() is None
    assert current_branch() is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.equal(draw(sampler, [1, 2]), before)


@pytest.mark.parametrize("name", KINDS)
def test_a_preview_that_is_written_to_changes_nothing(name: str) -> None:
    def scribble(done: int, total: int, x0: Tensor) -> None:
        x0.fill_(7)

    sampler = manifest(name)
    assert torch.equal(draw(sampler, [1], preview=scribble), draw(sampler, [1]))


@pytest.mark.parametrize("name", KINDS)
def test_results_are_not_the_buffers_of_the_model(name: str) -> None:
    # a captured graph writes into the same output at every call
    buffer = torch.empty(1, *SHAPE)

    def model(x: Tensor, timestep: Tensor, condition: Tensor, **more: Tensor) -> Tensor:
        return buffer.copy_(field(x, timestep, condition, **more))

    sampler = manifest(name)
    first = draw(sampler, [1], model)
    kept = first.clone()
    draw(sampler, [2], model)
    assert torch.equal(first, kept)
    assert torch.equal(first, draw(sampler, [1]))


@pytest.mark.parametrize("name", ["renoise", "lcm", "trigflow", "flow_map"])
def test_what_diverges_is_reported(name: str) -> None:
    with pytest.raises(FloatingPointError, match="diverged"):
        draw(manifest(name), [1], lambda x, t, c, **more: x / 0)


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_models_are_widened_and_wrong_shapes_refused(name: str) -> None:
    assert draw(manifest(name), [1], lambda x, t, c, **more: x.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="sample's shape"):
        draw(manifest(name), [1], lambda x, t, c, **more: x[..., :1])


def test_the_steps_of_a_solver_want_noise_exactly_where_they_take_some() -> None:
    solver, x = make_solver(manifest("renoise")), torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="step 0 of 4 needs fresh noise"):
        solver.advance(0, x, x)
    with pytest.raises(ValueError, match="step 3 of 4 takes no fresh noise"):
        solver.advance(3, x, x, x)


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_generation_is_one_graph(name: str) -> None:
    sampler = manifest(name)
    solver = make_solver(sampler)
    takes = [step for step in range(4) if solver.takes_noise(step)]

    def program(noise: Tensor, fresh: Tensor, condition: Tensor) -> Tensor:
        return walk(solver, lambda x, t, **more: field(x, t, condition, **more), noise, fresh)

    noise = draw_noise([5, 6], SHAPE)
    fresh = torch.stack([draw_noise([5, 6], SHAPE, step=step) for step in takes] or [noise])
    condition = torch.tensor([0.05, 0.06])
    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")(noise, fresh, condition)
    torch.testing.assert_close(compiled, draw(sampler, [5, 6]), rtol=1e-5, atol=1e-5)


def test_a_solver_elsewhere_than_the_noise_is_refused() -> None:
    solver = make_solver(manifest("euler")).to("meta")
    with pytest.raises(ValueError, match=r"on meta and the noise on cpu: use solver.to\(device\)"):
        walk(solver, lambda x, t: x, draw_noise([1], SHAPE))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", KINDS)
def test_a_whole_generation_is_one_cuda_graph(name: str) -> None:
    sampler = manifest(name)
    solver = make_solver(sampler).to("cuda")
    noise = draw_noise([5, 6], SHAPE, device="cuda")
    fresh = [draw_noise([5, 6], SHAPE, device="cuda", step=step) for step in range(3)] if solver.noisy else []
    condition = torch.tensor([0.05, 0.06], device="cuda")

    def program() -> Tensor:
        return walk(solver, lambda x, t, **more: field(x, t, condition, **more), noise, fresh)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        program()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = program()
    graph.replay()
    wanted = generate(field, condition, seeds=[5, 6], shape=SHAPE, sampler=sampler)
    torch.testing.assert_close(captured, wanted, rtol=1e-6, atol=1e-6)
    # the noise is the same on every device
    torch.testing.assert_close(captured.cpu(), draw(sampler, [5, 6]), rtol=1e-3, atol=1e-3)


def test_perflow_on_vp_follows_the_line_of_each_window() -> None:
    # a model that gives the noise which DDIM needs from the start of each window to its end
    sampler = manifest("perflow-vp")
    assert sampler.betas is not None
    table = sampler.betas.table()
    data, eps = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(4))
    ends = [vp_mix(data, eps, table[max(t - 1, 0)]) for t in (1000, 750, 500, 250, 0)]
    solver = make_solver(sampler)
    for step, (start, end) in enumerate(pairwise(ends)):
        torch.testing.assert_close(solver.advance(step, start, eps), end, rtol=1e-4, atol=1e-4)


def test_solvers_hold_for_data_that_lies_on_a_line() -> None:
    # x at a level is known, so the estimate at every step is too
    data, noise = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(3))
    solver = make_solver(manifest("euler"))
    for step, level in enumerate(solver.levels[:-1]):
        x = flow_mix(data, noise, level)
        torch.testing.assert_close(solver.x0(step, x, noise - data), data, rtol=0, atol=1e-5)
