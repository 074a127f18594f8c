"""The demo page: small trained models that read digits on photographs, and what balancing changes.

Comes in: nothing. Goes out: one HTML page.
May import: everything. Begin with ``build``.
"""

from libragrad_fx.demo.data import mixer, vit

__all__ = ["mixer", "vit"]
