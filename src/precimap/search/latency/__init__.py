"""What layers take on the target: timed here or read from a profile, and what a scheme saves of it."""
