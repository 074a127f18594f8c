"""Makes the lean graph: same forward and gradients as the balanced one, less work. It is what runs.

Comes in: a balanced graph without probes. Goes out: a leaner one, and the code that it runs as.
May import: ``graph``, ``ops``, ``decide.flow``. Begin with ``passes``, the list of them.
"""
