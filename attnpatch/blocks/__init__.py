"""What a block is: how tokens are grouped, and which block each token of a call lies in."""
