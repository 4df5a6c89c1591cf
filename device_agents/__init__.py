"""Device and edge daemons: pairing, links, negotiation. Nothing here yet runs; see docs/architecture.md."""
