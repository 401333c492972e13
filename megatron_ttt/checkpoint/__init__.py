"""Saving, loading, publishing, finding checkpoints."""
