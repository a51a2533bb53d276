"""Trials, their scores and the reports of them."""
