"""How fast and how large: one command each, results recorded as JSON lines in results/."""
