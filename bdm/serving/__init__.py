"""Requests of many clients -> one engine -> pictures, and what became of the rest."""
