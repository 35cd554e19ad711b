"""A mixed load over HTTP on a real server, with faults, for every cache in turn: does it keep serving? `make soak`."""
