"""Memory levels: on-chip SRAM shared by all cores, and stacked DRAM."""
