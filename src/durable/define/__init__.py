"""What a workflow is: frozen values, and the builder that checks and makes them. Pure: no I/O, no clock, no chance."""
