"""Evaluation: models by methods by policies by metrics by data."""
