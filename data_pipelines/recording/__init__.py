"""Writing datasets, and recording them in simulation. Imports simulation; no reader and no batch imports it."""
