"""Compile a config's train steps for a TPU slice on a machine without one; predict memory, step time and cost."""
