"""The demo page: small trained models, pictures of digits and clothes, and what balancing changes.

Comes in: nothing. Goes out: one HTML page.
May import: everything. Begin with ``build``.
"""
