"""Answering: the decoding engine, the published weights and trials of new ones, keys and limits."""
