"""Models as data: the published layout, readers of every form, and the network in NumPy."""
