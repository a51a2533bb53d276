"""What a run trains, on what, and with which loss."""
