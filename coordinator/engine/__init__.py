"""The pure machine that decides who trains what and when a version is due: two tables of transitions."""
