"""Causal language models: examples of text and of answers, packed into rows, and their loss."""
