"""Prompts -> picture files that say how they were made."""
