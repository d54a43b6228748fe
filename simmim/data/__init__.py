"""Where images come from, in which order, and what happens to them."""
