"""What bytes mean: pure values and functions; no I/O, no clock, no randomness. Source: docs/format.md."""
