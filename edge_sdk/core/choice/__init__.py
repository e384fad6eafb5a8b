"""The choice of rank: what a setting takes in memory and time, and which one is best."""
