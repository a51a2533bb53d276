"""Texts -> features: list[str] -> (B, L, D)."""
