"""What is pruned: which parameter is whose, a model changed and brought back, and what processes share."""
