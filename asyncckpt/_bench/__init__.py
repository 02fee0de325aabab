"""Measure what saving costs a training on the disk at hand; the benchmarks of the repository build on it."""
