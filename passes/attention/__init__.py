"""How attention is computed.

Read in this order: ``written`` and ``product`` (attention spelled out, and the proof that it is one), ``recognise``
(the pass that makes it one call), ``sink`` (the pass that lets norms and rotations come before the turn to heads),
``cost`` and ``decide`` (what becomes of each), ``chain``, ``norms``, ``rotation`` and ``tokens`` (what of a graph goes
into the kernels that make NVFP4 queries and keys, and the proofs), ``emit`` and ``use`` (the pass that does it),
``observe`` (errors on a model's own operands, for calibrations).
"""
