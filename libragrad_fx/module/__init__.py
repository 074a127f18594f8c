"""The ``nn.Module`` that a user gets: it copies, pickles, moves, trains, and fires forward hooks.

Comes in: a graph and the model's module tree. Goes out: a ``CapturedModule``.
May import: ``graph``, ``ops``, ``optimise.execute``. Begin with ``captured``.
"""
