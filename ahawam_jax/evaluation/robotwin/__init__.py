"""RoboTwin's table: its tasks over devices, what was run on what, and the numbers that others published."""
