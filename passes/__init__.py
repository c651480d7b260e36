"""The compiler: graph in, graph out.

Read in this order: ``capture`` (one normal form), ``structure`` (facts about it), ``base`` (what a pass is),
``pipeline`` (who runs the passes), ``quantize`` and ``fuse`` (two of them), ``lower`` and ``backend``.
"""
