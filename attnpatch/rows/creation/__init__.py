"""What a graph begins with though nobody multiplied it: masks, positions, constants, noise."""
