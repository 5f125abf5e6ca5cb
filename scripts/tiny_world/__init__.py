"""A small procedural world, and the text-to-video model trained on it."""
