"""What happens to a graph: match, share, place, rewrite, recompute; then what a device makes of it."""
