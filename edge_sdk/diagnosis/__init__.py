"""What a machine is told before it takes part: what is missing, and which model and rank would fit."""
