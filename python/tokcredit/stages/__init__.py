"""The stages of an objective, one module per kind."""
