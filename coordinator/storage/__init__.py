"""What survives a crash: rows in SQLite, blobs in a folder, and the disk below both."""
