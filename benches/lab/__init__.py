"""The parts of the benchmark: processes, subjects, loads, measures, report. `compare.py` in the parent folder combines them."""
