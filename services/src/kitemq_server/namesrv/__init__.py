"""The route registry: which brokers there are, and which topics they serve."""
