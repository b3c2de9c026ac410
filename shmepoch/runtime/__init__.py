"""The drivers of an epoch: session adapter, agent factory and boundary, loop, persistence."""
