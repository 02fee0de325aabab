"""Layouts: from a snapshot to the bytes of a file, and back. No I/O."""
