"""``python -m libragrad_fx`` is ``libragrad``."""

from __future__ import annotations

from libragrad_fx.cli import main

if __name__ == "__main__":
    main()
