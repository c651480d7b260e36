"""Few-step distillation: a student with the teacher's parameters that needs fewer steps.

A :class:`Subject` says what is distilled, a :class:`Method` what is minimised; one loop trains every pair of both.
Everything is a rectified flow, x = (1 - sigma) x0 + sigma eps, whose networks predict the velocity v = eps - x0.
"""
