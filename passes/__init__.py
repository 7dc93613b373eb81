"""What happens to a graph: match, place, share, rewrite."""
