"""The demo page: photographs, digits and sentences, and what balancing changes of their explanations.

Comes in: nothing. Goes out: one HTML page.
May import: everything. Begin with ``build``.
"""

from libragrad_fx.demo.data import mixer, vit

__all__ = ["mixer", "vit"]
