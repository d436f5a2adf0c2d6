"""Atomic files and locks, locations that may be URLs, protocol buffer messages."""
