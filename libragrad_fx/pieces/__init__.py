"""Models that are no single graph: several by Dynamo, or else the ops that one call ran.

Comes in: a model that ``capture`` refused. Goes out: a ``CutModule`` over captured pieces.
May import: every stage. Begin with ``dynamo``; ``tape`` is for what Dynamo does not take.
"""
