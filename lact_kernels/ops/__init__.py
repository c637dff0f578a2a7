"""The public operations: documentation, checks, choice of backend."""
