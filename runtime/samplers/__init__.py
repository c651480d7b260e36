"""Samplers: noise schedules, one step of each solver, and noise that belongs to a sample's seed.

Steps are pure functions, state in, state out: they read nothing back from the device, so that a whole generation can
be one captured graph.
"""

from .errors import SamplerError
from .euler import euler_step
from .flow import flow_mix, flow_noise, flow_velocity, flow_x0
from .flow_map import flow_map_step
from .lcm import lcm_denoise, lcm_scalings, lcm_step, lcm_timesteps
from .manifest import Betas, GuidanceRule, Sampler, Shift, TokenLine
from .noise import draw_noise
from .perflow import perflow_times, perflow_velocity, perflow_window
from .published import published, published_names
from .renoise import renoise_flow_step, renoise_vp_step
from .schedule import check_sigmas, flow_sigmas
from .shift import exponential_shift, linear_shift, static_shift, terminal_shift, token_mu
from .solver import Solver, euler_solver, make_solver, walk
from .tcd import tcd_landing, tcd_step
from .trigflow import (
    trigflow_mix,
    trigflow_ode_step,
    trigflow_output,
    trigflow_sample_to_flow,
    trigflow_step,
    trigflow_to_flow,
    trigflow_x0,
)
from .vp import alpha_bars, vp_mix, vp_parts

__all__ = [
    "Betas",
    "GuidanceRule",
    "Sampler",
    "SamplerError",
    "Shift",
    "Solver",
    "TokenLine",
    "alpha_bars",
    "check_sigmas",
    "draw_noise",
    "euler_solver",
    "euler_step",
    "exponential_shift",
    "flow_map_step",
    "flow_mix",
    "flow_noise",
    "flow_sigmas",
    "flow_velocity",
    "flow_x0",
    "lcm_denoise",
    "lcm_scalings",
    "lcm_step",
    "lcm_timesteps",
    "linear_shift",
    "make_solver",
    "perflow_times",
    "perflow_velocity",
    "perflow_window",
    "published",
    "published_names",
    "renoise_flow_step",
    "renoise_vp_step",
    "static_shift",
    "tcd_landing",
    "tcd_step",
    "terminal_shift",
    "token_mu",
    "trigflow_mix",
    "trigflow_ode_step",
    "trigflow_output",
    "trigflow_sample_to_flow",
    "trigflow_step",
    "trigflow_to_flow",
    "trigflow_x0",
    "vp_mix",
    "vp_parts",
    "walk",
]
