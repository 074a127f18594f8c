"""Same forward to the bit, LibraGrad-balanced backward: a compiler pass for any PyTorch model.

The public names are listed in ``__init__.pyi``. Each is imported when it is first used, so that a command
that needs none of them starts at once.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
