"""What users see while a command runs: progress bars, plots, text for a terminal."""
