"""What any stage may ask of a node: nothing here knows what is done with the answer.

Comes in: nodes of ``torch.fx`` graphs. Goes out: facts about them.
May import: ``errors``, ``types``. Begin with ``notes``.
"""
