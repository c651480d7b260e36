"""Samplers of rectified flow: noise schedules, one step of each solver, and noise that belongs to a sample's seed."""

from .euler import euler_step
from .noise import draw_noise
from .schedule import check_sigmas, flow_sigmas, static_shift

__all__ = ["check_sigmas", "draw_noise", "euler_step", "flow_sigmas", "static_shift"]
