"""What the ranks of a process group tell each other, through the key-value store of the group."""
