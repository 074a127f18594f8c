"""Models that are no single graph: several graphs by Dynamo, or else the recorded ops of one call.

Comes in: a model that ``capture`` refused. Goes out: a ``CutModule`` over captured pieces.
May import: every stage. Begin with ``dynamo``; ``tape`` is for what Dynamo does not take.
"""
