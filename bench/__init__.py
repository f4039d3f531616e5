"""The benchmarks: each module with a main() is one part, started as `python -m bench.<part>`."""
