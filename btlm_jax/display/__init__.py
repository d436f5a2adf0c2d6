"""What people look at: progress bars, plots, text for a terminal."""
