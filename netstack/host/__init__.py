"""The rim toward the host: its poller, its sockets, its settings."""
