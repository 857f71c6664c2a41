"""Kernel and collective tables -> the few constants of an accelerator's file that no datasheet gives."""
