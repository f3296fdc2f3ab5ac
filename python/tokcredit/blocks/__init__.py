"""Arithmetic on spans of tokens: the functions that stages are made of."""
