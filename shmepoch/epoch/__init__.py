"""One epoch: its cursors, feed, operations, registry, bindings and build mode."""
