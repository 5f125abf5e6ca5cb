"""Where a query may look, by position."""
