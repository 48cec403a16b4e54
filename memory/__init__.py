"""The state of a learner, on the host and on the device: bases, replay, adapters, journal, snapshots."""
