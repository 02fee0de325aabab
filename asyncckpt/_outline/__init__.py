"""Outlines: what a pickle holds, told without unpickling it. No I/O, no torch."""
