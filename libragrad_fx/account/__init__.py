"""Whether what came out is what was promised: numbers, proofs, certificates.

Comes in: a balanced module, and inputs. Goes out: a ``Ledger``, ``Proof``, ``Certificate`` or error.
May import: everything before it. Begin with ``ledger``; ``birth`` checks a module before anyone gets it.
"""
