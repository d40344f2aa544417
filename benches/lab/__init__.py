"""The parts of the comparison: processes, subjects, loads, measures, report. `compare.py` beside this folder puts them together."""
