"""The official Hugging Face checkpoint format, in and out."""
