"""Snapshots: from a live state to host memory, as it was at one instant."""
