"""Trainers that people already use, each in a file of its own: its loggers make versions of what it writes."""
