"""Does what the plan says, and undoes it to prove that the forward is the original's.

Comes in: a ``Trace`` and a ``Plan``. Goes out: the balanced module.
May import: ``graph``, ``ops``, ``optimise``, ``module``. Begin with ``edits``; ``erase`` is the proof.
"""
