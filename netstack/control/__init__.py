"""What people and programs see of a running network: logs, and the HTTP API."""
