"""Hand-written attention that is scaled dot-product attention, computed by torch's fused kernel."""
