"""What a device sends an edge of a latent: quantised, entropy-coded, and refused where the two sides' tables differ.

`codec.Codec` is the door; docs/split.md says how to use it and lays the bytes down.
"""
