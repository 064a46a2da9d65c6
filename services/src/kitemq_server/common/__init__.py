"""What every service needs: configuration, serving, errors on the wire, logs, metrics.

Imports no service and no store.
"""
