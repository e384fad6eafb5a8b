"""The link to the coordinator: requests, downloads that resume, refusals, measured speed."""
