"""Skills and how they are found."""
