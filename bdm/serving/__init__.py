"""Requests that enter and leave a running batch."""
