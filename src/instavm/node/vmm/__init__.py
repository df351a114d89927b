"""Drivers of virtual machine monitors, all behind `base.Driver` and `base.Machine`."""
