"""Namesrv and broker of KiteMQ."""
