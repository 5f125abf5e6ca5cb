"""Which prompt tokens are worth reading in cross-attention."""
