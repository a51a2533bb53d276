"""The same work done by us and by a peer, side by side: time, memory, operations."""
