"""Measures netstack beside its peers, in one run and as ratios: `python -m benchmarks`. See benchmarks/README.md."""
