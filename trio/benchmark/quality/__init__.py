"""What pruning keeps of the answers."""
