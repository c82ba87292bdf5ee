"""Attention written by hand that torch's fused kernel can compute."""
