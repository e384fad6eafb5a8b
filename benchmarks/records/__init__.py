"""How fast records become JSON and come back."""
