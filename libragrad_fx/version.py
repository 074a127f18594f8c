"""The version: a constant, so that a checkout that is not installed knows it."""

__version__ = "0.1.0"
