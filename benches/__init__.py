"""Side-by-side benchmarks: ``python -m benches --list``."""
