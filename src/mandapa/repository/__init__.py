"""Versions: artifacts, their logs, transactions, and the repository that holds them."""
