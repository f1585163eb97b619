"""What hotlora knows of transformers: the only reader of its names and of the flags of its experts modules."""
