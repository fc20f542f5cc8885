"""Speed, measured beside the alternatives in one run: `python -m benchmarks op|model|train`."""
