"""What drives an epoch: session adapter, agent factory and boundary, runtime loop, persistence."""
