"""What transformers and diffusers say and call: the only folder that names them."""
