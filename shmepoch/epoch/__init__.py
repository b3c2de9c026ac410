"""What one epoch is: cursors, feed, operations, registry, bindings and build mode."""
