"""Chunks: only the tokens that still change go through the blocks; they look at keys and values of all tokens."""
