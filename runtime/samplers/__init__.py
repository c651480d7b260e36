"""Samplers: noise schedules, one step of each solver, and noise that belongs to a sample's seed.

Steps are pure functions, state in, state out: they read nothing back from the device, so that a whole generation can
be one captured graph.
"""

from .euler import euler_step
from .flow import flow_mix, flow_noise, flow_velocity, flow_x0
from .flow_map import flow_map_step
from .lcm import lcm_denoise, lcm_scalings, lcm_step, lcm_timesteps
from .noise import draw_noise
from .perflow import perflow_times, perflow_velocity, perflow_window
from .renoise import renoise_flow_step, renoise_vp_step
from .schedule import check_sigmas, flow_sigmas
from .shift import exponential_shift, linear_shift, static_shift, terminal_shift, token_mu
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
    "alpha_bars",
    "check_sigmas",
    "draw_noise",
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
    "perflow_times",
    "perflow_velocity",
    "perflow_window",
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
]
