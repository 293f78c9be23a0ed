"""What a run stands on: processes, devices, memory, optimizer steps, logs."""
