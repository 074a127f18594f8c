"""From an ``nn.Module`` and example inputs to a ``Trace``: a functional graph to call like the model.

Comes in: any model, as its user calls it. Goes out: its ops, its module calls, our assumptions.
May import: ``graph``, ``ops``, ``module``. Begin with ``export``, then ``normal``.
"""
