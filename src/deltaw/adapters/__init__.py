"""What an adapter is on disk and in algebra."""
