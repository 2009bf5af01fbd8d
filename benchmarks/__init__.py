"""Benchmarks: what the library's speed and memory claims rest on."""
