"""Explanations as compiled programs. Begin with ``call``, then ``flat``; ``zeros`` is the algebra."""

from libragrad_fx.programs.call import Program, program

__all__ = ["Program", "program"]
