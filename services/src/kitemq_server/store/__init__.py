"""The commit log and everything derived from it. Knows no gRPC and no service of the wire."""
