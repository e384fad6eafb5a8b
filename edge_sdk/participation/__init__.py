"""Taking part: the loop that asks for work, trains it and hands it in, and what it decides on the way."""
