"""Pictures and captions -> batches: sources by index, and a stream in an order that the seed decides."""
