"""The default world, small and real, and the judge of what is drawn in it."""
