"""What adapters cost on the wire and on disk, and what rounding loses."""
