"""Mixtures of experts: what their blocks are made of, and how their experts become records on flash."""
