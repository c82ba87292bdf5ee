"""Pipelines, denoisers, prompts and latents of diffusers."""
