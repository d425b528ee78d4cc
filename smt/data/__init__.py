"""Text to batches: documents stay whole and in order from the file to the chunk that a model reads."""
