"""Care of a data folder: whose it is, whether it is sound, collection, backup."""
