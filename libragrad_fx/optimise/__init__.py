"""A graph with the same forward and the same gradients that does less: the one that runs.

Comes in: a balanced graph without probes. Goes out: a leaner one, and the code that it runs as.
May import: ``graph``, ``ops``, ``decide.flow``. Begin with ``passes``, the list of them.
"""
