"""How a run is spread over devices: one plan per distinct rank."""
