"""Closed loop in simulation, with intervals. Imports inference and the simulation; only commands import it."""
