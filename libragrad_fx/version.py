"""The version, for a checkout that is not installed as well."""

__version__ = "0.1.0"
