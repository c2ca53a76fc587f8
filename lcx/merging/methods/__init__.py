"""Ways to merge: each finds out what it needs of a whole tensor, and gives a function from a block to its merged numbers."""
