"""The training loop, its states, and what they need."""
