"""What happens to a graph: match, share, place, rewrite."""
