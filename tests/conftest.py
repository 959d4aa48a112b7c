"""What pytest must not import while it looks for tests."""

collect_ignore = ["second_device.py", "second_device_runs.py"]
"""The first changes its process for good: tests start it in one of its own."""
