"""Compile a config's train steps for a TPU slice that is not there, and say what they would need and take."""
