"""What the host's proxy settings say, and the proxy that the gateway offers to guests."""
