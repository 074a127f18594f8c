"""Facts about a node that any stage may ask for: schema, aliasing, source line, note.

Comes in: nodes of ``torch.fx`` graphs. Goes out: facts about them.
May import: ``errors``, ``types``. Begin with ``notes``.
"""
