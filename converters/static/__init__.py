"""Prefill in fixed chunks on another processor: what it needs is added to a language model's bundle."""
