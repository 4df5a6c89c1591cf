"""Split models: an encoder for the device, latents on the link, a tail for the edge."""
