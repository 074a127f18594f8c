"""Decides what each value means for the gradient, and plans the edits; nothing is changed here.

Comes in: a ``Trace``, and the rules. Goes out: an ``Analysis`` (roles, facts), then a ``Plan``.
May import: ``graph``, ``ops``. Begin with ``roles``, then ``plan``; ``flow`` says where gradients go.
"""
