"""Everything specific to transformers and diffusers: no other folder names them."""
