"""The stack itself: protocol state without IO. Time comes in as `now`, sockets come in through `core.ports`."""
