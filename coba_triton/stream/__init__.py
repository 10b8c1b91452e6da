"""Long runs: sources, simulation, sinks and results."""
