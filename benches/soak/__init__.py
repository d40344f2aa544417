"""Parts of `benches/soak_peers.py`: servers and their restarts, callers, hopguard, the verdict."""
