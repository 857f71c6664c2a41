"""A step as MLCommons Chakra execution traces, one file per rank, for network simulators such as ASTRA-sim."""
