"""What both ends of the wire agree on: record bytes, names, limits. Imports nothing of the SDK or the services."""
