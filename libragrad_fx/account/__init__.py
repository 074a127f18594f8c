"""Checks a balanced module: ledger, static proof, certificate, and the check at birth.

Comes in: a balanced module, and inputs. Goes out: a ``Ledger``, ``Proof``, ``Certificate`` or error.
May import: everything before it. Begin with ``ledger``; ``birth`` checks a module before anyone gets it.
"""
