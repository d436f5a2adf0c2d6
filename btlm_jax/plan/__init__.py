"""Compile a config's train steps for TPUs or GPUs on a machine without them; predict memory, step time and cost."""
