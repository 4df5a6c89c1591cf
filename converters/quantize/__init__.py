"""Rounding methods, one a file: rows of a matrix in, codes with scales and zero points out."""
