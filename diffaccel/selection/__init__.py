"""What is worth reading, by content."""
