"""See the credit: which tokens of a run were paid, and why."""
