"""What a stranger, a member or all of them together may cost."""
