"""shmepoch: one runtime epoch, shared by the processes of an agent deployment."""

from shmepoch.epoch.bindings import (
    RuntimeBuildMode,
    SessionOwned,
    SessionRuntimeBindings,
    StandaloneEphemeral,
)
