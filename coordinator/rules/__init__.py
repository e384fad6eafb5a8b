"""How updates become the next global adapter: one rule a file, each a screen of pure code."""
