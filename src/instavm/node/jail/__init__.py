"""What stands around a VMM process: the VMM is assumed to be broken into one day, and must find nothing to go on with."""
